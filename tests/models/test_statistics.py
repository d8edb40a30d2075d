"""The statistics collector: what it sums, what it propagates, and that it agrees with the whole model."""

import pytest
import torch
from standins.models import FAMILIES, random_tokens, tiny_model
from torch import nn
from torch.testing import assert_close
from transformers import PreTrainedModel

from dilap.models.anatomy import decoder_layers
from dilap.models.compute import compute_precision
from dilap.models.compute_device import HOST
from dilap.models.families import family_of
from dilap.models.modeling_dilap import linear_at
from dilap.models.statistics import InputStatistics, Role, first_of, layer_statistics, paths_of

TOKENS = random_tokens(6, 20)
ROLES: tuple[Role, ...] = ("attention_in", "attention_out", "ffn_in", "ffn_out")


def inputs_of(model: PreTrainedModel, role: Role, layer: int) -> torch.Tensor:
    """What the model as a whole feeds to a projection (tokens x inputs)."""
    found: list[torch.Tensor] = []
    matrix = linear_at(decoder_layers(model)[layer], paths_of(family_of(model.config), role)[0])
    assert matrix is not None
    hook = matrix.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    with torch.no_grad(), compute_precision(HOST):
        model.model(TOKENS, use_cache=False)
    hook.remove()
    return found[0].reshape(-1, found[0].shape[-1]).float()


@pytest.mark.parametrize("family", FAMILIES)
def test_layerwise_forward_equals_the_model(family: str) -> None:
    model = tiny_model(family)
    *_, last = layer_statistics(model, TOKENS, batch_tokens=50)
    expected: list[torch.Tensor] = []
    hook = decoder_layers(model)[-1].register_forward_hook(lambda _m, _i, out: expected.append(first_of(out)))
    with torch.no_grad(), compute_precision(HOST):
        model.model(TOKENS, use_cache=False)
    hook.remove()
    # Batches of another size sum in another order.
    assert_close(torch.cat(list(last.outputs)), expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("role", ROLES)
def test_statistics_are_those_of_the_inputs(family: str, role: Role) -> None:
    model = tiny_model(family)
    x = inputs_of(model, role, 0)
    first = next(iter(layer_statistics(model, TOKENS, roles=[role], covariance=True, batch_tokens=10_000)))
    found = first.statistics[role]
    assert (found.num_tokens, len(found.mean)) == x.shape
    assert_close(found.mean.float(), x.mean(0), rtol=1e-4, atol=1e-5)
    assert_close(found.variance, x.var(0), rtol=1e-4, atol=1e-5)
    assert_close(found.norms, x.square().mean(0).sqrt(), rtol=1e-4, atol=1e-5)
    assert_close(found.covariance, x.T @ x / len(x), rtol=1e-4, atol=1e-4)


def test_every_token_is_counted_once() -> None:
    for step in layer_statistics(tiny_model("llama"), TOKENS, roles=ROLES, batch_tokens=40):
        assert {one.num_tokens for one in step.statistics.values()} == {TOKENS.numel()}
        assert {one.num_sequences for one in step.statistics.values()} == {len(TOKENS)}


@pytest.mark.parametrize("size", [1, 2, 5])
def test_w5_streamed_statistics_equal_those_of_one_batch(size: int) -> None:
    x = torch.randn(10, 7, 5, generator=torch.Generator().manual_seed(0)) + 100
    whole, parts = InputStatistics(), InputStatistics()
    whole.add(x, covariance=True)
    for part in x.split(size):
        parts.add(part, covariance=True)
    assert_close(parts.norms, whole.norms)
    assert_close(parts.variance, whole.variance)
    assert_close(parts.mean, whole.mean)
    assert_close(parts.covariance, whole.covariance)
    assert parts.num_sequences == 10


def test_variance_survives_a_large_mean() -> None:
    x = 1e4 + torch.randn(4, 500, 1, generator=torch.Generator().manual_seed(0))
    found = InputStatistics()
    for part in x:
        found.add(part[None])
    assert_close(found.variance, x.reshape(-1).double().var()[None].float(), rtol=1e-3, atol=0)


def test_diagonal_of_the_covariance_is_the_sum_of_squares() -> None:
    found = InputStatistics()
    found.add(torch.randn(3, 9, 6), covariance=True)
    assert_close(found.covariance.diagonal(), found.norms.square())


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_layers_feed_the_next_one_where_asked(family: str) -> None:
    def second_layer(propagate: str) -> torch.Tensor:
        model = tiny_model(family)
        out = family_of(model.config).ffn_out
        for step in layer_statistics(model, TOKENS, roles=["attention_in"], propagate=propagate):  # type: ignore[arg-type]
            if step.index == 1:
                return step.statistics["attention_in"].norms
            nn.init.zeros_(step.layer.get_parameter(f"{out}.weight"))
        raise AssertionError

    untouched = next(
        step for step in layer_statistics(tiny_model(family), TOKENS, roles=["attention_in"]) if step.index == 1
    ).statistics["attention_in"]
    assert torch.equal(second_layer("dense"), untouched.norms)
    assert not torch.equal(second_layer("pruned"), untouched.norms)


def test_a_layer_computed_elsewhere_gives_the_same() -> None:
    model = tiny_model("llama")
    here, there = (
        [step.statistics["ffn_out"].norms for step in layer_statistics(model, TOKENS, device=device)]
        for device in (None, torch.device("cpu"))
    )
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))
