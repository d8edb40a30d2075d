"""Levels with precisions: what is scored is the cut and rounded model, and the quadratic model says what rounding does."""

import copy
from typing import Any

import pytest
import torch
from standins.models import NORMS_BEHIND, logits, mixed_net, random_tokens, tiny_model, tiny_task
from torch import nn
from torch.nn import functional
from torch.testing import assert_close
from transformers import PreTrainedModel

from dilap.core.space import Space
from dilap.models.anatomy import decoder_layers
from dilap.models.cut import shrink_
from dilap.models.families import family_of
from dilap.models.matrices import put_, replaced
from dilap.models.reference import Teacher
from dilap.models.rounding import rounded
from dilap.models.statistics import first_of
from dilap.search.curvature import linearise
from dilap.search.levels import plan_at
from dilap.search.supernet import Supernet
from dilap.search.tap import base_fit

TOKENS = random_tokens(8, 24)
OTHERS = random_tokens(3, 12, seed=1)
FAMILIES = ("llama", "opt", "phi3", "gemma2", "granite", "qwen3_moe")


def drawn_config(net: Supernet, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(int(torch.randint(size, (1,), generator=generator)) for size in net.sizes)


def mixed(family: str, **changes: Any) -> tuple[Space, Supernet, Teacher]:
    model = tiny_model(family, **changes)
    space, net = mixed_net(model, TOKENS)
    return space, net, Teacher.of(model, OTHERS, keep_states=True)


def kl_of(dense: torch.Tensor, model: PreTrainedModel) -> float:
    q, p = logits(model, OTHERS).log_softmax(-1), dense.log_softmax(-1)
    return float(functional.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_score_is_the_kl_of_the_cut_and_rounded_model(family: str, seed: int, tied: bool) -> None:
    space, net, teacher = mixed(family, tie_word_embeddings=tied)
    config = drawn_config(net, seed)
    dense, parameters = logits(net.model, OTHERS), net.parameters(config)
    found = net.kl(teacher, config)
    net.close()
    plan = plan_at(tiny_task(net.model, space=space), net, config)
    shrunk = shrink_(tiny_model(family, tie_word_embeddings=tied), plan, parameters=parameters)
    assert found == pytest.approx(kl_of(dense, shrunk), rel=1e-3, abs=1e-5)
    net.set(config)
    assert found == pytest.approx(kl_of(dense, net.model), rel=1e-3, abs=1e-5)
