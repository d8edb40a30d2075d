"""Distillation lowers the KL and leaves a plain model."""

from pathlib import Path

import pytest
import torch
from standins.models import FAMILIES, SPARSE, Kept, logits, plan_for, random_tokens, tiny_model, tiny_tokenizer
from torch.testing import assert_close
from transformers import PreTrainedModel

from dilap.models.cut import shrink_
from dilap.models.distil import distil
from dilap.models.load import load, save_checkpoint
from dilap.models.options import Mode, RecoveryOptions
from dilap.models.reference import Teacher

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


def test_a_step_does_not_depend_on_how_many_tokens_run_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = []
    for tokens_at_once in (1, 10_000):
        monkeypatch.setattr("dilap.models.distil._TOKENS_AT_ONCE", tokens_at_once)
        losses.append(distil(pruned("llama"), Teacher.of(tiny_model("llama"), TOKENS), options("full", steps=4)))
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
    first, second, other = (distil(pruned(family), teacher, options(mode, seed=s, steps=3)) for s in (0, 0, 1))
    assert first == second
    assert first != other


def test_progress_gets_the_kl_of_every_step() -> None:
    found: list[float] = []
    teacher = Teacher.of(tiny_model("llama"), TOKENS)
    losses = distil(pruned("llama"), teacher, options("full", steps=5), progress=found.append)
    assert found == losses
    assert len(losses) == 5


def test_first_loss_is_the_kl_of_its_batch() -> None:
    """Nothing random, as dropout, comes between the model and its loss."""
    teacher, model = Teacher.of(tiny_model("opt"), TOKENS), pruned("opt")
    before = teacher.kl(model)
    whole = RecoveryOptions(mode="full", steps=1, batch_tokens=TOKENS.numel())
    assert distil(model, teacher, whole)[0] == pytest.approx(before, rel=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_a_step_is_as_long_as_the_weights_are_large(mode: Mode) -> None:
    """A model whose value and output projections are scaled against each other computes the same, and learns alike."""
    teacher, plain, scaled = Teacher.of(tiny_model("llama"), TOKENS), pruned("llama"), pruned("llama")
    with torch.no_grad():
        for name, parameter in scaled.named_parameters():
            parameter.mul_({"v_proj.weight": 8, "o_proj.weight": 1 / 8}.get(".".join(name.split(".")[-2:]), 1))
    losses = [distil(one, teacher, options(mode, steps=6)) for one in (plain, scaled)]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)  # the gradient that is clipped differs


@pytest.mark.parametrize("mode", MODES)
def test_bf16_model_stays_bf16(mode: Mode) -> None:
    model = pruned("llama").to(torch.bfloat16)
    distil(model, Teacher.of(tiny_model("llama").to(torch.bfloat16), TOKENS), options(mode, steps=2))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
