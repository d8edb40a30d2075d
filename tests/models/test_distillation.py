"""Recovery lowers the KL, leaves a plain model in its best state, and goes on where it was killed."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from standins.models import FAMILIES, SPARSE, Kept, logits, plan_for, random_tokens, tiny_model, tiny_tokenizer
from standins.recovery import distil
from torch.nn import functional
from torch.testing import assert_close
from transformers import PreTrainedModel

from dilap.core.errors import InvalidInput, Unavailable
from dilap.models.cut import shrink_
from dilap.models.load import load, save_checkpoint
from dilap.models.recovery.options import Mode, RecoveryOptions
from dilap.models.recovery.train import Told, slope_of
from dilap.models.reference import Teacher, final_hidden, head_of

# peft reads an attribute that transformers 5.23 renames.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
TOKENS = random_tokens(16, 16)
KEPT: Kept = {"layers.0.channels": tuple(range(48)), "layers.1.kv_groups": (1,), "layers.2.channels": ()}
KEPT_EXPERTS: Kept = {"layers.0.experts": (0, 2, 3), "layers.1.kv_groups": (1,), "layers.2.experts": ()}
MODES: tuple[Mode, ...] = ("lora", "full")


def options(mode: Mode, *, seed: int = 0, steps: int = 30) -> RecoveryOptions:
    return RecoveryOptions(
        mode=mode, steps=steps, batch_tokens=128, lora_rank=4, full_rate=0.03, lora_rate=0.05, seed=seed
    )


def pruned(family: str) -> PreTrainedModel:
    model = tiny_model(family)
    return shrink_(model, plan_for(model, KEPT_EXPERTS if family in SPARSE else KEPT))


def shapes(model: PreTrainedModel) -> dict[str, tuple[type, tuple[int, ...], torch.dtype]]:
    return {name: (type(p), tuple(p.shape), p.dtype) for name, p in model.named_parameters()}


def modules(model: PreTrainedModel) -> list[tuple[str, type]]:
    return [(name, type(module)) for name, module in model.named_modules()]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", [*FAMILIES, *SPARSE])
def test_distillation_lowers_the_kl_on_its_text(family: str, mode: Mode) -> None:
    teacher, model = Teacher.of(tiny_model(family), TOKENS), pruned(family)
    before = teacher.kl(model)
    distil(model, teacher, options(mode))
    assert teacher.kl(model) < 0.95 * before


def test_a_step_does_not_depend_on_how_many_tokens_run_at_once() -> None:
    losses = []
    for piece_tokens in (1, 10_000):
        asked = replace(options("full", steps=4), piece_tokens=piece_tokens)
        losses.append(distil(pruned("llama"), Teacher.of(tiny_model("llama"), TOKENS), asked).kls)
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", [*FAMILIES, *SPARSE])
def test_distillation_leaves_a_plain_model(family: str, mode: Mode) -> None:
    model, plain = pruned(family), pruned(family)
    distil(model, Teacher.of(tiny_model(family), TOKENS), options(mode, steps=2))
    assert modules(model) == modules(plain)
    assert shapes(model) == shapes(plain)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("mode", MODES)
def test_distilled_model_saves_and_loads(mode: Mode, tmp_path: Path) -> None:
    model = pruned("llama")
    distil(model, Teacher.of(tiny_model("llama"), TOKENS), options(mode, steps=2))
    save_checkpoint(model, tiny_tokenizer(tmp_path / "tokenizer"), tmp_path / "out")
    assert_close(logits(load(str(tmp_path / "out")).model, TOKENS), logits(model, TOKENS))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", [*FAMILIES, *SPARSE])
def test_only_the_decoder_layers_are_trained(family: str, mode: Mode) -> None:
    model, before = pruned(family), dict(pruned(family).named_parameters())
    distil(model, Teacher.of(tiny_model(family), TOKENS), options(mode, steps=2))
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all(".layers." in name for name in changed), sorted(changed)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_distillation_is_deterministic_for_a_seed(family: str, mode: Mode) -> None:
    teacher = Teacher.of(tiny_model(family), TOKENS)
    first, second, other = (distil(pruned(family), teacher, options(mode, seed=s, steps=3)).kls for s in (0, 0, 1))
    assert first == second
    assert first != other


def test_progress_gets_the_kl_of_every_step() -> None:
    found: list[Told] = []
    teacher = Teacher.of(tiny_model("llama"), TOKENS)
    done = distil(pruned("llama"), teacher, options("full", steps=5), progress=found.append)
    assert [told.kl for told in found] == done.kls
    assert [told.step for told in found] == [1, 2, 3, 4, 5]


def test_first_loss_is_the_kl_of_its_batch() -> None:
    """Nothing random, as dropout, comes between the model and its loss."""
    teacher, model = Teacher.of(tiny_model("opt"), TOKENS), pruned("opt")
    before = teacher.kl(model)
    whole = RecoveryOptions(mode="full", steps=1, batch_tokens=TOKENS.numel())
    assert distil(model, teacher, whole).kls[0] == pytest.approx(before, rel=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_a_step_is_as_long_as_the_weights_are_large(mode: Mode) -> None:
    """A model whose value and output projections are scaled against each other computes the same, and learns alike."""
    teacher, plain, scaled = Teacher.of(tiny_model("llama"), TOKENS), pruned("llama"), pruned("llama")
    with torch.no_grad():
        for name, parameter in scaled.named_parameters():
            parameter.mul_({"v_proj.weight": 8, "o_proj.weight": 1 / 8}.get(".".join(name.split(".")[-2:]), 1))
    losses = [distil(one, teacher, options(mode, steps=6)).kls for one in (plain, scaled)]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)  # the gradient that is clipped differs


@pytest.mark.parametrize("mode", MODES)
def test_bf16_model_stays_bf16(mode: Mode) -> None:
    model = pruned("llama").to(torch.bfloat16)
    distil(model, Teacher.of(tiny_model("llama").to(torch.bfloat16), TOKENS), options(mode, steps=2))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


class Killed(Exception):
    """Stands for the end of a process."""


def killed_after(step: int) -> Callable[[Told], None]:
    def progress(told: Told) -> None:
        if told.step == step:
            raise Killed

    return progress


@pytest.mark.parametrize("mode", MODES)
def test_killed_recovery_goes_on_as_if_it_had_not_been(mode: Mode, tmp_path: Path) -> None:
    teacher = Teacher.of(tiny_model("llama"), TOKENS)
    asked = replace(options(mode, steps=7), evaluate_every=2, checkpoint_seconds=0.0)
    whole, resumed = pruned("llama"), pruned("llama")
    wanted = distil(whole, teacher, asked)
    with pytest.raises(Killed):
        distil(pruned("llama"), teacher, asked, folder=tmp_path, progress=killed_after(5))
    told: list[int] = []
    found = distil(resumed, teacher, asked, folder=tmp_path, progress=lambda one: told.append(one.step))
    assert told == [6, 7]
    assert found == wanted
    assert_close(dict(resumed.named_parameters()), dict(whole.named_parameters()), rtol=0, atol=0)


@pytest.mark.parametrize("file", ["step-2/position.json", "step-2/model.safetensors", "best.safetensors"])
@pytest.mark.parametrize("is_there", [True, False], ids=["damaged", "missing"])
def test_damaged_checkpoint_of_a_recovery_is_refused_in_one_line(file: str, is_there: bool, tmp_path: Path) -> None:
    teacher, asked = Teacher.of(tiny_model("llama"), TOKENS), replace(options("full", steps=3), checkpoint_seconds=0.0)
    with pytest.raises(Killed):
        distil(pruned("llama"), teacher, asked, folder=tmp_path, progress=killed_after(2))
    (tmp_path / file).write_text("{") if is_there else (tmp_path / file).unlink()
    (tmp_path / "step-last").mkdir()  # is none of its own
    with pytest.raises(InvalidInput, match=r"step-2: the recovery cannot go on from it .*; remove") as caught:
        distil(pruned("llama"), teacher, asked, folder=tmp_path)
    assert "\n" not in str(caught.value)


def test_the_best_state_is_kept() -> None:
    """Steps that are far too long do harm; the state before the first of them that does is what is left."""
    teacher, model = Teacher.of(tiny_model("llama"), TOKENS), pruned("llama")
    done = distil(model, teacher, replace(options("full", steps=6), full_rate=0.6, evaluate_every=1))
    assert teacher.kl(model) == pytest.approx(min(done.validation.values()), rel=1e-5)
    assert done.validation[done.best_step] == min(done.validation.values())


def test_recovery_that_never_helps_leaves_the_model_as_it_was() -> None:
    teacher, model = Teacher.of(tiny_model("llama"), TOKENS), pruned("llama")
    done = distil(model, teacher, replace(options("full", steps=2), full_rate=1e4))
    assert done.best_step == 0
    assert_close(dict(model.named_parameters()), dict(pruned("llama").named_parameters()), rtol=0, atol=0)


def test_activations_that_are_computed_again_change_nothing() -> None:
    teacher = Teacher.of(tiny_model("opt"), TOKENS)  # its layers have dropout, which must not come in
    asked = options("full", steps=3)
    plain, again = (
        distil(pruned("opt"), teacher, replace(asked, checkpoint_activations=flag)).kls for flag in (False, True)
    )
    assert again == pytest.approx(plain, rel=1e-5)


def test_states_of_8_bits_lead_nearly_where_those_of_32_do() -> None:
    pytest.importorskip("torchao")
    teacher = Teacher.of(tiny_model("llama"), TOKENS)
    kls = [
        distil(pruned("llama"), teacher, replace(options("full", steps=8), has_8bit_states=flag)).kls
        for flag in (False, True)
    ]
    assert kls[0] != kls[1]
    assert kls[1][-1] == pytest.approx(kls[0][-1], rel=0.1)


def test_killed_recovery_with_states_of_8_bits_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    teacher = Teacher.of(tiny_model("llama"), TOKENS)
    asked = replace(options("full", steps=6), has_8bit_states=True, checkpoint_seconds=0.0)
    whole = distil(pruned("llama"), teacher, asked).kls
    with pytest.raises(Killed):
        distil(pruned("llama"), teacher, asked, folder=tmp_path, progress=killed_after(3))
    assert distil(pruned("llama"), teacher, asked, folder=tmp_path).kls == whole


def test_vectors_are_trained_beside_adapters() -> None:
    model, before = pruned("llama"), dict(pruned("llama").named_parameters())
    asked = replace(options("lora", steps=2), lora_vectors=True)
    distil(model, Teacher.of(tiny_model("llama"), TOKENS), asked)
    changed = {name for name, one in model.named_parameters() if not torch.equal(one, before[name])}
    assert "model.layers.0.input_layernorm.weight" in changed
    assert "model.norm.weight" not in changed


def test_the_gradient_of_the_loss_is_that_of_its_parts() -> None:
    """KL, the loss of the next token and the relative distance of hidden states, by autograd from their definitions."""
    dense, model = tiny_model("llama"), pruned("llama")
    teacher, head = Teacher.of(dense, TOKENS, keep_states=True), head_of(model)
    asked = replace(options("full"), next_token=0.3, hidden=0.5)
    hidden = final_hidden(model, TOKENS).detach().requires_grad_(True)
    at_head = teacher.at_head(hidden.detach(), head, rows=slice(None), labels=TOKENS.roll(-1, 1).reshape(1, -1))
    found = slope_of(at_head, teacher, hidden.detach(), TOKENS, slice(None), options=asked)

    logits, states = hidden @ head.E.T, final_hidden(dense, TOKENS).detach()
    wanted = (states @ head.E.T).log_softmax(-1)
    kl = functional.kl_div(logits.log_softmax(-1), wanted, log_target=True, reduction="sum")
    length = TOKENS.shape[1]
    inner = logits.reshape(len(TOKENS), length, -1)[:, :-1].flatten(0, 1)
    loss = functional.cross_entropy(inner, TOKENS[:, 1:].flatten(), reduction="sum")
    distance = (hidden - states).square().sum() / states.square().sum(-1).mean()
    (0.7 * kl + 0.3 * loss + 0.5 * distance).backward()
    assert_close(found, hidden.grad, rtol=1e-3, atol=1e-5)


def test_hidden_states_come_nearer() -> None:
    dense, model = tiny_model("llama"), pruned("llama")
    teacher = Teacher.of(dense, TOKENS, keep_states=True)

    def distance() -> float:
        assert teacher.states is not None
        with torch.no_grad():
            return float((final_hidden(model, TOKENS) - teacher.states.reshape(-1, 64)).square().mean())

    before = distance()
    distil(model, teacher, replace(options("full"), hidden=10.0))
    assert distance() < 0.9 * before


def test_tokens_make_steps() -> None:
    assert RecoveryOptions(tokens=200_000_000, batch_tokens=65_536).num_steps == 3052
    assert RecoveryOptions(tokens=10_000, data=("a",), batch_tokens=1000, sequence_length=2000).num_steps == 5


def test_unknown_tracker_is_refused() -> None:
    with pytest.raises(Unavailable, match="tracker 'nonsense' is none of accelerate's"):
        distil(pruned("llama"), Teacher.of(tiny_model("llama"), TOKENS), replace(options("full"), tracker="nonsense"))
