"""Everything runs where the model is, and finds there what it finds on the CPU."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from standins.fake_gpu import TwoDevices, fake_gpu
from standins.models import (
    logits,
    mixed_net,
    plan_for,
    random_tokens,
    tiny_model,
    tiny_net,
    tiny_task,
    tiny_tokenizer,
)
from standins.quick_methods import NAMES
from standins.recovery import distil
from torch.testing import assert_close
from transformers import PreTrainedModel

from dilap import methods
from dilap.models.cut import shrink_
from dilap.models.recovery.options import Mode, RecoveryOptions
from dilap.models.reference import Teacher, perplexity
from dilap.models.rounded_model import round_model_
from dilap.models.text import self_generated
from dilap.search.curvature import linearise
from dilap.search.options import LevelOptions, LibraryOptions, Order, RelaxationOptions, SearchOptions
from dilap.search.refit import refit_sequentially
from dilap.sparsity.barber import PUBLISHED, Barber, decoder_matrices
from dilap.sparsity.pattern import Pattern
from dilap.sparsity.rules import RULES, sparsify_

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
TOKENS = random_tokens(6, 16)
SHORT = LevelOptions(search=SearchOptions(step=0.3, evaluations=2, restarts=2, relaxation=RelaxationOptions(steps=10)))
OWN_CODE = [*(name for name in NAMES if name not in ("prune_then_quantise", "uniform")), "equal_widths"]
QUICKEST = {
    "llm_streamline": {"steps": "2"},
    "loraprune": {"steps": "2", "batch_tokens": "96"},
    "compresso": {"steps": "2", "batch_tokens": "96"},
    "ziplm": {"starts": "2", "failures": "1"},
}


@pytest.fixture
def gpu() -> Iterator[torch.device]:
    with fake_gpu() as device:
        yield device


def both(gpu: torch.device, family: str = "llama", **changes: object) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model on the CPU, and the same on the accelerator."""
    there = tiny_model(family, **changes).to(gpu)
    there.tie_weights()  # which real accelerators need not be told
    return tiny_model(family, **changes), there


def require_near(found: torch.Tensor, wanted: torch.Tensor, name: str = "") -> None:
    """Equal but for the order of sums, which is another one in the attention of accelerators."""
    assert_close(found.to("cpu"), wanted, rtol=1e-3, atol=1e-4, msg=lambda text: f"{name}: {text}")


def require_equal(here: dict[str, torch.Tensor], there: dict[str, torch.Tensor]) -> None:
    assert here.keys() == there.keys()
    for name, value in here.items():
        require_near(there[name], value, name)


def test_an_operation_on_two_devices_raises(gpu: torch.device) -> None:
    """So these tests can fail."""
    with pytest.raises(TwoDevices):
        torch.ones(2, device=gpu) + torch.ones(2)


@pytest.mark.parametrize("name", OWN_CODE)
def test_method_finds_the_same_plan(name: str, gpu: torch.device) -> None:
    here, there = both(gpu, num_hidden_layers=3)
    made = methods.get(name, QUICKEST.get(name, {}))
    wanted, found = (made(tiny_task(model, share=0.7, levels=SHORT)) for model in (here, there))
    assert found.plan == wanted.plan
    require_equal(dict(wanted.parameters), dict(found.parameters))
    shrunk = [shrink_(model, one.plan, parameters=one.parameters) for model, one in ((here, wanted), (there, found))]
    assert {one.device.type for one in shrunk[1].parameters()} == {gpu.type}
    require_near(logits(shrunk[1], TOKENS.to(gpu)), logits(shrunk[0], TOKENS))


@pytest.mark.parametrize("family", ["opt", "gemma2", "qwen3_moe"])  # biases; norms behind and a soft cap; experts
def test_search_finds_the_same_plan_in_other_families(family: str, gpu: torch.device) -> None:
    here, there = both(gpu, family, num_hidden_layers=2)
    wanted, found = (methods.get("dilap")(tiny_task(model, share=0.8, levels=SHORT)) for model in (here, there))
    assert found.plan == wanted.plan
    require_equal(dict(wanted.parameters), dict(found.parameters))


@pytest.mark.parametrize("importance", ["wanda", "obs"])
def test_library_is_the_same_and_in_the_memory_of_the_host(importance: Order, gpu: torch.device) -> None:
    nets = [tiny_net(one, TOKENS, options=LibraryOptions(order=importance))[1] for one in both(gpu)]
    for wanted, found in zip(*(one.library for one in nets), strict=True):
        assert [one.units for one in found] == [one.units for one in wanted]
        assert {one.weight.device.type for one in found} == {"cpu"}
        require_equal(*({str(k): one.weight for k, one in enumerate(levels)} for levels in (wanted, found)))


def test_quadratic_model_of_widths_and_precisions_is_the_same(gpu: torch.device) -> None:
    found = []
    for model in both(gpu, num_hidden_layers=2, intermediate_size=96):
        _, net = mixed_net(model, TOKENS)
        net.set((1,) * len(net.sizes))
        teacher = Teacher.of(
            tiny_model("llama", num_hidden_layers=2, intermediate_size=96).to(model.device), TOKENS, keep_states=True
        )
        found.append(linearise(net, teacher, samples=1, seed=0))
    for there, here in ((found[1].b, found[0].b), (found[1].Q, found[0].Q)):
        # Behind rounding to 4 bits the order of sums may decide between two codes.
        assert float((there - here).abs().max()) < 1e-2 * float(here.abs().max())


def test_refit_with_precisions_is_the_same(gpu: torch.device) -> None:
    made = []
    for model in both(gpu, num_hidden_layers=2, intermediate_size=96):
        _, net = mixed_net(model, TOKENS)
        made.append(refit_sequentially(net, (1,) * len(net.sizes), TOKENS, correction=1.0))
    assert made[1].keys() == made[0].keys()
    for name, wanted in made[0].items():  # a weight between two codes may fall on either of them
        close = torch.isclose(made[1][name].to("cpu"), wanted, rtol=1e-3, atol=1e-4)
        assert close.float().mean() > 0.98, name


@pytest.mark.parametrize("precision", ["q8_0", "iq4_nl", "q4_0", "int4", "8da4w"])
def test_model_is_rounded_where_it_is(precision: str, gpu: torch.device) -> None:
    here, there = both(gpu, num_hidden_layers=1, hidden_size=64)
    parts = {"layers.0.attention": precision, "layers.0.ffn": precision}
    for model in (here, there):
        round_model_(model, parts, tokens=TOKENS)
    kl = float((logits(here, TOKENS) - logits(there, TOKENS.to(gpu)).to("cpu")).abs().mean())
    assert kl < 0.01 * float(logits(here, TOKENS).abs().mean())


@pytest.mark.parametrize("rule", RULES)
def test_zeros_inside_matrices_are_the_same(rule: str, gpu: torch.device) -> None:
    pattern, found = Pattern.parse("2:4"), []
    for model in both(gpu, num_hidden_layers=1):
        dense = decoder_matrices(model)
        sparsify_(model, TOKENS, methods.get(rule, table=RULES), pattern)
        Barber(threshold=PUBLISHED[rule][1]).rebuild_(model, dense, TOKENS, pattern)
        found.append(decoder_matrices(model))
    require_equal(*found)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_recovery_learns_the_same(mode: Mode, gpu: torch.device) -> None:
    options = RecoveryOptions(
        mode=mode, steps=2, batch_tokens=64, lora_rank=4, next_token=0.2, hidden=0.1, checkpoint_activations=True
    )
    found = []
    for model in both(gpu, num_hidden_layers=2):
        teacher = Teacher.of(model, TOKENS, keep_states=True)
        shrink_(model, plan_for(model, {"layers.0.channels": tuple(range(48))}))
        found.append(distil(model, teacher, options))
        assert {one.device for one in model.parameters()} == {model.device}
    assert found[1].kls == pytest.approx(found[0].kls, rel=1e-3)


def test_answers_of_the_dense_model_lie_in_the_memory_of_the_host(gpu: torch.device) -> None:
    here, there = both(gpu)
    wanted, found = (Teacher.of(model, TOKENS, keep_states=True) for model in (here, there))
    for one in (found.mean_embedding, found.constant, found.losses, found.states):
        assert one is not None
        assert one.device.type == "cpu"
    require_near(found.mean_embedding, wanted.mean_embedding)
    assert found.kl(there) == pytest.approx(0, abs=1e-5)
    assert perplexity(there, TOKENS) == pytest.approx(perplexity(here, TOKENS), rel=1e-4)


def test_model_samples_the_same_text(tmp_path: Path, gpu: torch.device) -> None:
    words = tiny_tokenizer(tmp_path)
    here, there = (self_generated(one, words, num_sequences=3, length=8, seed=0) for one in both(gpu))
    assert there.device.type == "cpu"
    assert torch.equal(here, there)
