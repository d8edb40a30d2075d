"""Every method works on checkpoints in f16 and bf16 as on those in f32."""

from pathlib import Path

import pytest
import torch
from standins.models import logits as logits_of
from standins.models import plan_for, random_tokens, tiny_model, tiny_net, tiny_task, tiny_tokenizer
from standins.quick_methods import NAMES, method
from standins.recovery import distil
from transformers import PreTrainedModel

from dilap import methods
from dilap.models.cut import shrink_
from dilap.models.recovery.options import Mode, RecoveryOptions
from dilap.models.reference import Teacher
from dilap.models.text import self_generated
from dilap.search.refit import refit_sequentially
from dilap.sparsity.barber import PUBLISHED, Barber, decoder_matrices
from dilap.sparsity.pattern import Pattern
from dilap.sparsity.rules import RULES, sparsify_

# peft asks transformers by the old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
TOKENS = random_tokens(4, 16)
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)  # other tests are in f32


def model_of(dtype: torch.dtype, family: str = "llama", *, layers: int = 2) -> PreTrainedModel:
    return tiny_model(family, num_hidden_layers=layers).to(dtype)


def require_sound(model: PreTrainedModel, dtype: torch.dtype) -> None:
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert torch.isfinite(logits_of(model, TOKENS)).all()


@DTYPES
@pytest.mark.parametrize("name", NAMES)
def test_method_gives_a_sound_model(name: str, dtype: torch.dtype) -> None:
    model = model_of(dtype, layers=6)  # some leave four layers alone
    found = method(name)(tiny_task(model, share=0.8))
    require_sound(shrink_(model, found.plan, parameters=found.parameters), dtype)


@DTYPES
@pytest.mark.parametrize("rebuild", [False, True], ids=["once", "rebuilt"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_zeros_inside_matrices_give_a_sound_model(family: str, rule: str, rebuild: bool, dtype: torch.dtype) -> None:
    model, pattern = model_of(dtype, family), Pattern.parse("0.5")
    dense = decoder_matrices(model)
    sparsify_(model, TOKENS, methods.get(rule, table=RULES), pattern)
    if rebuild:
        granularity, threshold = PUBLISHED[rule]
        Barber(granularity=granularity, threshold=threshold).rebuild_(model, dense, TOKENS, pattern)
    require_sound(model, dtype)
    zeros = sum(int((matrix == 0).sum()) for matrix in decoder_matrices(model).values())
    assert zeros >= sum(matrix.numel() for matrix in dense.values()) // 2


@DTYPES
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_recovery_gives_a_sound_model(mode: Mode, dtype: torch.dtype) -> None:
    model = model_of(dtype)
    teacher = Teacher.of(model, TOKENS)
    shrink_(model, plan_for(model, {"layers.0.channels": tuple(range(48))}))
    losses = distil(model, teacher, RecoveryOptions(mode=mode, steps=3, batch_tokens=32, lora_rank=4)).kls
    assert torch.tensor(losses).isfinite().all()
    require_sound(model, dtype)


@DTYPES
def test_refit_and_scores_are_finite(dtype: torch.dtype) -> None:
    model = model_of(dtype)
    _, net = tiny_net(model, TOKENS)
    weights = refit_sequentially(net, (1, 1, 1, 1), TOKENS, correction=1.0)
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    scores = Teacher.of(model, TOKENS, keep_states=True).scores(model)
    assert scores.kl == pytest.approx(0, abs=1e-3)
    assert 1 < scores.perplexity < float("inf")


@DTYPES
def test_model_samples_calibration_text(dtype: torch.dtype, tmp_path: Path) -> None:
    tokens = self_generated(model_of(dtype), tiny_tokenizer(tmp_path), num_sequences=4, length=12, seed=0)
    assert tokens.shape == (4, 12)
