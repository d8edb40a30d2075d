"""The level library: closed-form refits, importance orders and the file."""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import combinations, product
from pathlib import Path

import pytest
import torch
from standins.models import library_of, random_tokens, tiny_model, tiny_space
from torch.testing import assert_close
from transformers import PreTrainedModel

from dilap.core.costs import Counts
from dilap.core.errors import InvalidInput
from dilap.core.space import Choice
from dilap.models.statistics import layer_statistics
from dilap.search import library_file
from dilap.search.library import (
    LevelFit,
    Units,
    channel_order,
    fit_choices,
    greedy_heads,
    obs_order,
    output_error,
    refit,
    regularised,
    wanda_scores,
)
from dilap.search.library_file import Fits, kept_library, load_fits, save_fits
from dilap.search.options import LibraryOptions, Order
from dilap.search.supernet import Supernet

TOKENS = random_tokens(8, 32)


def problem(inputs: int, hidden: int = 6, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A projection and a damped covariance of correlated inputs, in f64."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    x = torch.randn(200, inputs, generator=generator, dtype=torch.float64) @ mixing
    covariance = x.T @ x / 200
    weight = torch.randn(hidden, inputs, generator=generator, dtype=torch.float64)
    return weight, covariance + 0.01 * covariance.diagonal().mean() * torch.eye(inputs, dtype=torch.float64)


def least_error(weight: torch.Tensor, H: torch.Tensor, columns: torch.Tensor) -> float:
    """The output error that is left when only these columns stay and are refitted."""
    change = weight.clone()
    change[:, columns] -= refit(weight @ H, H, columns)
    return float(torch.trace(change @ H @ change.T))


def test_output_error_is_that_of_the_changed_projection() -> None:
    weight, H = problem(12)
    K = torch.tensor([0, 3, 4, 10])
    products = weight @ H
    total = float((products * weight).sum())
    found = output_error(refit(products, H, K), K, H, products=products, total=total)
    assert found == pytest.approx(least_error(weight, H, K))


def test_refit_is_the_closed_form() -> None:
    weight, H = problem(12)
    K = torch.tensor([0, 3, 4, 10])
    assert_close(refit(weight @ H, H, K), weight @ H[:, K] @ torch.linalg.inv(H[K][:, K]))


def test_refit_is_least_squares_on_the_inputs() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(100, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    K = torch.tensor([1, 2, 6])
    expected = torch.linalg.lstsq(x[:, K], x @ weight.T).solution.T
    assert_close(refit(weight @ x.T @ x, x.T @ x, K), expected)


def test_refit_over_all_columns_changes_nothing() -> None:
    weight, H = problem(12)
    assert_close(refit(weight @ H, H, torch.arange(12)), weight)


def remove_one_by_one(weight: torch.Tensor, H: torch.Tensor, removed: list[int]) -> tuple[torch.Tensor, float]:
    """Optimal brain surgery, one column after the other; the weights left and the sum of half the scores."""
    weight, inverse, half_scores = weight.clone(), torch.linalg.inv(H), 0.0
    for column in removed:
        half_scores += float(weight[:, column].square().sum() / inverse[column, column]) / 2
        weight -= torch.outer(weight[:, column], inverse[column]) / inverse[column, column]
        inverse -= torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        inverse[column, column] = 1.0
    return weight, half_scores


def test_sequential_removals_equal_the_refit() -> None:
    weight, H = problem(12)
    left, _ = remove_one_by_one(weight, H, [7, 2, 11, 5])
    K = torch.tensor([0, 1, 3, 4, 6, 8, 9, 10])
    assert_close(left[:, K], refit(weight @ H, H, K))


def test_half_scores_of_sequential_removals_sum_to_half_the_error() -> None:
    weight, H = problem(12)
    left, half_scores = remove_one_by_one(weight, H, [7, 2, 11, 5])
    change = left.clone()
    change[:, [7, 2, 11, 5]] = 0  # removed columns are zero but for rounding
    assert half_scores == pytest.approx(0.5 * float(torch.trace((weight - change) @ H @ (weight - change).T)))


@pytest.mark.parametrize("seed", range(5))
def test_obs_order_one_at_a_time_is_the_greedy_one(seed: int) -> None:
    weight, H = problem(7, seed=seed)
    alive, removed = list(range(7)), []
    while alive:

        def error(column: int) -> float:
            kept = torch.tensor([c for c in alive if c != column], dtype=torch.long)
            return least_error(weight, H, kept)

        removed.append(min(alive, key=error))
        alive.remove(removed[-1])
    assert obs_order(weight, H, step=1).tolist() == removed[::-1]


def test_obs_order_in_chunks_is_a_permutation() -> None:
    weight, H = problem(50)
    assert sorted(obs_order(weight, H, step=16).tolist()) == list(range(50))


def test_obs_order_does_not_change_its_inputs() -> None:
    weight, H = problem(7)
    before = weight.clone(), H.clone()
    obs_order(weight, H, step=2)
    assert torch.equal(weight, before[0])
    assert torch.equal(H, before[1])


def inputs_of(model: PreTrainedModel, path: str) -> torch.Tensor:
    found: list[torch.Tensor] = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    with torch.no_grad():
        model(TOKENS)
    hook.remove()
    return found[0].reshape(-1, found[0].shape[-1])


def covariance_of(model: PreTrainedModel, layer: int, *, batch_tokens: int) -> torch.Tensor:
    """That of the inputs of a layer's second feed-forward matrix, as the library is fitted on it."""
    steps = layer_statistics(model, TOKENS, covariance=True, batch_tokens=batch_tokens)
    return next(step.statistics["ffn_out"].covariance for step in steps if step.index == layer)


@pytest.mark.parametrize("batch_tokens", [32, 100, 100_000])
def test_covariance_is_that_of_the_inputs(batch_tokens: int) -> None:
    model = tiny_model("llama")
    x = inputs_of(model, "model.layers.1.mlp.down_proj")
    found = covariance_of(model, 1, batch_tokens=batch_tokens)
    assert_close(found, x.T @ x / len(x), rtol=1e-4, atol=1e-5)  # f32 sums in another order


def test_wanda_scores_are_weight_norm_times_activation_norm() -> None:
    model = tiny_model("llama")
    x = inputs_of(model, "model.layers.1.mlp.down_proj")
    weight = model.model.layers[1].mlp.down_proj.weight.detach()
    covariance = covariance_of(model, 1, batch_tokens=256)
    expected = torch.stack([weight[:, c].norm() * (x[:, c].square().mean()).sqrt() for c in range(96)])
    assert_close(wanda_scores(weight, covariance), expected, rtol=1e-4, atol=1e-5)


def test_wanda_order_puts_the_largest_scores_first() -> None:
    weight, H = problem(12)
    scores = wanda_scores(weight, H)[channel_order(weight, H, order="wanda")]
    assert (scores.diff() <= 0).all()


def test_inactive_inputs_leave_the_covariance_invertible() -> None:
    covariance = torch.diag(torch.tensor([4.0, 0.0, 2.0]))
    assert_close(regularised(covariance, ridge=0.0).diagonal(), torch.tensor([4.0, 1.0, 2.0]))


@pytest.fixture(scope="module", params=["wanda", "obs"])
def library(request: pytest.FixtureRequest) -> list[list[LevelFit]]:
    order: Order = request.param
    model = tiny_model("llama")
    return library_of(model, tiny_space(model), TOKENS, options=LibraryOptions(order=order))


def test_full_level_is_the_dense_projection(library: list[list[LevelFit]]) -> None:
    fit = library[1][0]
    assert torch.equal(fit.weight, tiny_model("llama").model.layers[0].mlp.down_proj.weight)
    assert (fit.columns.tolist(), fit.error) == (list(range(96)), 0)


def test_removed_level_has_no_columns_and_error_one(library: list[list[LevelFit]]) -> None:
    for levels in library:
        assert levels[-1].weight.shape == (64, 0)
        assert levels[-1].error == pytest.approx(1)


def test_error_does_not_fall_as_channels_do(library: list[list[LevelFit]]) -> None:
    for levels in library[1::2]:
        errors = [fit.error for fit in levels]
        assert errors == sorted(errors)
        assert 0 < errors[1] < errors[2] < 1


def test_columns_belong_to_the_units(library: list[list[LevelFit]]) -> None:
    for fit in library[0]:
        groups, slots = fit.units["layers.0.kv_groups"], fit.units["layers.0.query_slots"]
        heads = [2 * group + slot for group in groups for slot in slots]
        assert fit.columns.tolist() == [16 * head + channel for head in heads for channel in range(16)]
        assert fit.weight.shape == (64, len(fit.columns))


def test_narrower_channels_are_a_subset(library: list[list[LevelFit]]) -> None:
    for wide, narrow in combinations(library[3], 2):
        assert set(narrow.units["layers.1.channels"]) <= set(wide.units["layers.1.channels"])


def heads_error(weight: torch.Tensor, H: torch.Tensor, shape: tuple[int, int], units: Units) -> float:
    """The output error that is left when only these KV groups and slots stay and the projection is refitted."""
    heads = torch.arange(H.shape[0]).reshape(*shape, -1)
    columns = heads[list(units[0])][:, list(units[1])].reshape(-1)
    return least_error(weight, H, columns)


def combinations_of(shape: tuple[int, int], counts: Counts) -> Iterator[Units]:
    return product(combinations(range(shape[0]), counts[0]), combinations(range(shape[1]), counts[1]))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("shape", "counts"), [((3, 3), (2, 3)), ((3, 3), (3, 2)), ((4, 1), (3, 1)), ((1, 6), (1, 5))])
def test_one_head_is_removed_as_the_best_of_all(shape: tuple[int, int], counts: Counts, seed: int) -> None:
    weight, H = problem(4 * shape[0] * shape[1], seed=seed)
    units = greedy_heads(weight, H, [counts], num_units=shape)[counts]
    best = min(combinations_of(shape, counts), key=lambda units: heads_error(weight, H, shape, units))
    assert units == best


@pytest.mark.parametrize("seed", range(5))
def test_greedy_heads_are_near_the_best_combination(seed: int) -> None:
    shape, wanted = (3, 3), list(product(range(1, 4), range(1, 4)))
    weight, H = problem(36, seed=seed)
    for counts, units in greedy_heads(weight, H, wanted, num_units=shape).items():
        assert tuple(map(len, units)) == counts
        least = min(heads_error(weight, H, shape, one) for one in combinations_of(shape, counts))
        assert heads_error(weight, H, shape, units) <= 1.2 * least + 1e-9


@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 32), (32, 8), (64, 8), (14, 2)])
def test_heads_of_real_numbers_are_ordered_by_removals_not_by_combinations(heads: int, kv_heads: int) -> None:
    shape = kv_heads, heads // kv_heads
    weight, H = problem(2 * heads)
    wanted = [(groups, slots) for groups in (1, shape[0] // 2, shape[0]) for slots in {1, shape[1]}]
    found = greedy_heads(weight, H, wanted, num_units=shape)
    assert set(found) == set(wanted)


def test_library_survives_a_round_trip(library: list[list[LevelFit]], tmp_path: Path) -> None:
    for levels in library:
        save_fits(tmp_path / "fits.safetensors", levels)
        for fit, found in zip(levels, load_fits(tmp_path / "fits.safetensors"), strict=True):
            assert (found.units, found.error) == (fit.units, fit.error)
            assert torch.equal(found.columns, fit.columns)
            assert torch.equal(found.weight, fit.weight)


def test_a_library_in_bf16_keeps_the_full_width_exactly(library: list[list[LevelFit]], tmp_path: Path) -> None:
    save_fits(tmp_path / "fits.safetensors", library[1], dtype=torch.bfloat16)
    full, *narrower = load_fits(tmp_path / "fits.safetensors")
    assert torch.equal(full.weight, library[1][0].weight)
    for fit, found in zip(library[1][1:], narrower, strict=True):
        assert found.weight.dtype == torch.bfloat16
        assert_close(found.weight.float(), fit.weight, rtol=2**-8, atol=0)


def test_a_large_library_is_kept_in_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_file, "_MOST_F32_BYTES", 0)
    model = tiny_model("llama")
    library = kept_library(tmp_path, tiny_space(model).choices, partial(fit_choices, model, tokens=TOKENS))
    assert {fit.weight.dtype for levels in library for fit in levels[1:]} == {torch.bfloat16}
    assert Supernet(model, library).library is library  # which compares the full widths with the model's projections


def test_only_what_a_library_lacks_is_fitted(tmp_path: Path) -> None:
    model = tiny_model("llama")
    choices, asked = tiny_space(model).choices, []

    def fit(missing: Sequence[Choice]) -> Fits:
        asked.append([choice.name for choice in missing])
        yield from fit_choices(model, missing, TOKENS)

    whole = kept_library(tmp_path, choices, fit)
    (tmp_path / "layers.1.ffn.safetensors").unlink()
    again = kept_library(tmp_path, choices, fit)
    assert asked == [[choice.name for choice in choices], ["layers.1.ffn"]]
    for levels, others in zip(whole, again, strict=True):
        assert all(torch.equal(one.weight, other.weight) for one, other in zip(levels, others, strict=True))


@pytest.mark.parametrize("keep", [0, 100, 20_000])
def test_damaged_library_is_invalid_input_that_says_what_to_do(
    library: list[list[LevelFit]], tmp_path: Path, keep: int
) -> None:
    path = tmp_path / "fits.safetensors"
    save_fits(path, library[1])
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InvalidInput, match=r"damaged level library .*; remove the file and run again"):
        load_fits(path)
