"""Zeros inside matrices: the golden checks of Wanda, SparseGPT and magnitude, side by side with their formulas."""

import pytest
import torch
from standins.models import FAMILIES, random_tokens, tiny_model
from torch.testing import assert_close

from dilap.core.errors import InvalidInput, Unsupported, VerificationFailed
from dilap.models.anatomy import decoder_layers
from dilap.models.families import family_of
from dilap.models.modeling_dilap import linear_at
from dilap.models.statistics import InputStatistics, paths_of
from dilap.sparsity.pattern import Pattern, keep_best
from dilap.sparsity.rules import ROLES, Magnitude, Rule, SparseGpt, Wanda, sparsify_

HALF, TWO_OF_FOUR = Pattern.parse("0.5"), Pattern.parse("2:4")
PATTERNS = ("0.5", "2:4", "4:8", "0.3")
RULES: dict[str, Rule] = {"magnitude": Magnitude(), "wanda": Wanda(), "sparsegpt": SparseGpt()}


def statistics_of(x: torch.Tensor) -> InputStatistics:
    found = InputStatistics()
    found.add(x[None], covariance=True)
    return found


def problem(outputs: int, inputs: int, *, seed: int = 0, tokens: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix and correlated inputs, in f64."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, inputs, generator=generator, dtype=torch.float64) @ mixing
    return torch.randn(outputs, inputs, generator=generator, dtype=torch.float64), x


def error(weight: torch.Tensor, sparse: torch.Tensor, x: torch.Tensor) -> float:
    return float(((weight - sparse).double() @ x.double().T).square().sum())


def zeros(weight: torch.Tensor) -> torch.Tensor:
    return weight == 0


# patterns


@pytest.mark.parametrize("text", ["4:4", "a:b", "0:4", "5:4", "1.5", "0", "1", "-0.5", "2:4:8", ""])
def test_nonsense_patterns_are_rejected(text: str) -> None:
    with pytest.raises(InvalidInput, match="is not understood"):
        Pattern.parse(text)


def test_n_of_m_counts_what_is_kept() -> None:
    assert (Pattern.parse("1:4").sparsity, Pattern.parse("3:4").sparsity) == (0.75, 0.25)
    assert Pattern.parse("1:4").keep(torch.tensor([[1.0, 4.0, 2.0, 3.0]])).tolist() == [[False, True, False, False]]


@pytest.mark.parametrize("pattern", [HALF, TWO_OF_FOUR])
def test_check_rejects_a_planted_violation(pattern: Pattern) -> None:
    weight = torch.tensor([[0.0, 1, 0, 2, 0, 3, 0, 4]]).repeat(2, 1)
    pattern.require(weight, name="x")
    weight[0, 0] = 1.0
    with pytest.raises(VerificationFailed, match="x: "):
        pattern.require(weight, name="x")


def test_experts_are_refused_before_anything_is_changed() -> None:
    with pytest.raises(Unsupported, match="zeros inside matrices of experts are not supported yet"):
        sparsify_(tiny_model("qwen3_moe"), random_tokens(2, 8), Wanda(), TWO_OF_FOUR)


def test_groups_that_do_not_divide_are_refused_before_anything_is_changed() -> None:
    model = tiny_model("llama", intermediate_size=90)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InvalidInput, match=r"layers.0.mlp.down_proj has 90 inputs, which groups of 4 do not divide"):
        sparsify_(model, random_tokens(2, 8), Wanda(), TWO_OF_FOUR)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# whole models


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_every_matrix_has_its_zeros_and_nothing_else_changes(family: str, name: str, text: str) -> None:
    model, pattern = tiny_model(family), Pattern.parse(text)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    sparsify_(model, random_tokens(6, 24), RULES[name], pattern)
    matrices = {
        f"{family_of(model.config).layers}.{index}.{path}.weight"
        for index, layer in enumerate(decoder_layers(model))
        for role in ROLES
        for path in paths_of(family_of(model.config), role)
        if linear_at(layer, path) is not None
    }
    assert len(matrices) == {"llama": 21, "opt": 18}[family]
    for key, value in model.state_dict().items():
        if key in matrices:
            assert float(zeros(value).float().mean()) == pytest.approx(pattern.sparsity, abs=0.02)
        else:
            assert torch.equal(value, before[key])


@pytest.mark.parametrize("name", ["wanda", "sparsegpt"])
def test_propagation_changes_later_layers_only(name: str) -> None:
    pruned, dense = tiny_model("llama"), tiny_model("llama")
    sparsify_(pruned, random_tokens(6, 24), RULES[name], HALF, propagate="pruned")
    sparsify_(dense, random_tokens(6, 24), RULES[name], HALF, propagate="dense")
    same = [
        torch.equal(a.get_parameter("mlp.up_proj.weight"), b.get_parameter("mlp.up_proj.weight"))
        for a, b in zip(decoder_layers(pruned), decoder_layers(dense), strict=True)
    ]
    assert same == [True, False, False]


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_weights_keep_their_type(family: str) -> None:
    model = tiny_model(family).to(torch.bfloat16)
    sparsify_(model, random_tokens(2, 8), Wanda(), TWO_OF_FOUR)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


# magnitude


def test_m1_exact_number_of_zeros() -> None:
    weight, x = problem(7, 9)
    assert int(zeros(Magnitude()(weight, statistics_of(x), HALF)).sum()) == 31


def test_m1_upstream_compatible_takes_one_more() -> None:
    """9 of 16 at a share of one half."""
    weight, x = problem(4, 4)
    found = Magnitude(upstream_compatible=True)(weight, statistics_of(x), HALF)
    assert int(zeros(found).sum()) == 9
    assert torch.equal(zeros(found), weight.abs() <= weight.abs().flatten().sort().values[8])


@pytest.mark.parametrize("text", PATTERNS)
def test_m2_m3_kept_weights_are_the_largest_of_their_group(text: str) -> None:
    pattern = Pattern.parse(text)
    weight, x = problem(6, 16)
    found = Magnitude()(weight, statistics_of(x), pattern)
    groups = (weight.reshape(-1, pattern.group or weight.numel()), found.reshape(-1, pattern.group or weight.numel()))
    for dense, sparse in zip(*groups, strict=True):
        assert dense[sparse == 0].abs().max() <= dense[sparse != 0].abs().min()


def test_m4_magnitude_does_not_depend_on_the_inputs() -> None:
    weight, x = problem(5, 8)
    assert torch.equal(
        Magnitude()(weight, statistics_of(x), HALF), Magnitude()(weight, statistics_of(torch.rand(9, 8)), HALF)
    )


# Wanda


def test_w1_every_row_loses_the_same_number() -> None:
    weight, x = problem(11, 15)
    assert zeros(Wanda()(weight, statistics_of(x), HALF)).sum(1).tolist() == [7] * 11


def test_w2_mask_does_not_depend_on_scales() -> None:
    weight, x = problem(6, 8)
    mask = zeros(Wanda()(weight, statistics_of(x), HALF))
    scaled = weight * torch.tensor([1.0, -2, 3, 0.1, 5, -7])[:, None]
    assert torch.equal(mask, zeros(Wanda()(scaled, statistics_of(3 * x), HALF)))


def test_w3_equal_norms_give_the_magnitude_mask_of_every_row() -> None:
    weight, x = problem(6, 8)
    x = x / x.norm(dim=0)
    assert torch.equal(zeros(Wanda()(weight, statistics_of(x), HALF)), ~keep_best(weight.abs(), 4))


def test_w4_hand_example() -> None:
    weight = torch.tensor([[2, -1, 0.5, 3], [-0.2, 4, 1, 0.1]])
    x = torch.tensor([[1.0, 0, 4, 1], [1, 2, 0, -1]])
    assert Wanda()(weight, statistics_of(x), HALF).tolist() == [[2, 0, 0, 3], [0, 4, 1, 0]]


@pytest.mark.parametrize("text", PATTERNS)
def test_wanda_side_by_side_with_its_formula(text: str) -> None:
    """S_ij = |W_ij| sqrt(sum over sequences of |X_j|^2 / B), the smallest of every row or group zeroed."""
    pattern, (weight, x) = Pattern.parse(text), problem(6, 16)
    scores = weight.abs() * (x.reshape(4, 64, 16).square().sum(1).mean(0)).sqrt()
    size, count = (pattern.group, pattern.group - (pattern.kept or 0)) if pattern.group else (16, int(16 * 0.5))
    if text == "0.3":
        count = int(16 * 0.3)
    expected = weight.clone().reshape(-1, size)
    for row, values in zip(expected, scores.reshape(-1, size), strict=True):
        row[values.topk(count, largest=False).indices] = 0
    found = InputStatistics()
    found.add(x.reshape(4, 64, 16))
    assert_close(Wanda()(weight, found, pattern), expected.reshape(weight.shape))


def test_w6_two_of_four_keeps_the_best_pair() -> None:
    weight, x = problem(5, 12)
    mask = ~zeros(Wanda()(weight, statistics_of(x), TWO_OF_FOUR)).reshape(5, 3, 4)
    scores = (weight.abs() * x.square().sum(0).sqrt()).reshape(5, 3, 4)
    assert (mask.sum(-1) == 2).all()
    assert torch.equal(mask, torch.zeros_like(mask).scatter_(-1, scores.topk(2).indices, value=True))


def test_silent_inputs_leave_magnitude_to_decide() -> None:
    weight, _ = problem(4, 8)
    found = Wanda()(weight, statistics_of(torch.zeros(5, 8)), HALF)
    assert torch.equal(zeros(found), ~keep_best(weight.abs(), 4))


def test_wanda_variant_has_the_sparsity_but_not_in_every_row() -> None:
    weight, x = problem(40, 60)
    found = zeros(Wanda(use_variant=True)(weight, statistics_of(x), HALF))
    assert float(found.float().mean()) == pytest.approx(0.5, abs=0.01)
    assert len(set(found.sum(1).tolist())) > 1


# SparseGPT


def test_sum_of_squared_errors_is_the_damped_error() -> None:
    weight, x = problem(5, 12)
    rule = SparseGpt(blocksize=4)
    covariance = x.T @ x / len(x)
    found = rule.solve(weight, rule.factor(covariance), HALF)
    damped = covariance + 0.01 * covariance.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    change, expected = weight - found, 0.0
    left, upper = weight.clone(), rule.factor(covariance)
    for j in range(12):
        e = (left[:, j] - found[:, j]) / upper[j, j]
        left -= torch.outer(e, upper[j])
        expected += float(e.square().sum())
    assert float(torch.trace(change @ damped @ change.T)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("blocksize", [4, 8, 32])
def test_blocks_do_not_change_a_given_mask(blocksize: int) -> None:
    weight, x = problem(6, 32)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) > 0.5
    upper = SparseGpt().factor(x.T @ x / len(x))
    whole = SparseGpt(blocksize=128).solve(weight, upper, HALF, mask=mask)
    assert_close(SparseGpt(blocksize=blocksize).solve(weight, upper, HALF, mask=mask), whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("blocksize", [4, 8, 32])
def test_blocks_do_not_change_two_of_four(blocksize: int) -> None:
    weight, x = problem(6, 32)
    upper = SparseGpt().factor(x.T @ x / len(x))
    whole = SparseGpt(blocksize=128).solve(weight, upper, TWO_OF_FOUR)
    assert_close(SparseGpt(blocksize=blocksize).solve(weight, upper, TWO_OF_FOUR), whole, rtol=1e-9, atol=1e-9)


def test_orthogonal_inputs_leave_plain_masking() -> None:
    weight, _ = problem(6, 8)
    upper = SparseGpt().factor(torch.diag(torch.arange(1.0, 9.0, dtype=torch.float64)))
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) > 0.5
    assert_close(SparseGpt().solve(weight, upper, HALF, mask=mask), weight * mask)


@pytest.mark.parametrize(("mask", "expected", "loss"), [([False, True], [0, 1.5], 1.5), ([True, False], [1, 0], 2.0)])
def test_hand_examples(mask: list[bool], expected: list[float], loss: float) -> None:
    """The first column's loss goes to the second; after the last column there is none left to take it."""
    G = torch.tensor([[2.0, 1], [1, 2]], dtype=torch.float64)
    rule, weight = SparseGpt(dampening=0.0), torch.ones(1, 2, dtype=torch.float64)
    found = rule.solve(weight, rule.factor(G), HALF, mask=torch.tensor([mask]))
    assert_close(found, torch.tensor([expected], dtype=torch.float64))
    change = weight - found
    assert float(change @ G @ change.T) == pytest.approx(loss)


def test_mean_error_is_well_below_wandas() -> None:
    """On inputs that are each correlated with their neighbours by 0.7."""
    ratios = []
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        x, weight = torch.randn(256, 32, generator=generator), torch.randn(8, 32, generator=generator)
        for column in range(1, 32):
            x[:, column] += 0.7 * x[:, column - 1]
        statistics = statistics_of(x)
        mine, theirs = (rule(weight.float(), statistics, HALF) for rule in (SparseGpt(), Wanda()))
        ratios.append(error(weight, mine, x) / error(weight, theirs, x))
    assert sum(ratios) / len(ratios) < 0.85


@pytest.mark.parametrize("seed", range(5))
def test_least_squares_on_the_kept_weights_bounds_it(seed: int) -> None:
    weight, x = problem(4, 16, seed=seed)
    found = SparseGpt()(weight.float(), statistics_of(x.float()), HALF)
    best = torch.zeros_like(weight)
    for row in range(4):
        kept = found[row] != 0
        best[row, kept] = torch.linalg.lstsq(x[:, kept], x @ weight[row]).solution
    assert error(weight, best, x) <= error(weight, found, x) * (1 + 1e-6)
    assert error(weight, best, x) <= error(weight, weight * (found != 0), x) * (1 + 1e-6)


def test_nothing_to_prune_changes_nothing() -> None:
    weight, x = problem(4, 8)
    none = Pattern(sparsity=0.0)
    assert torch.equal(SparseGpt()(weight.float(), statistics_of(x.float()), none), weight.float())


def test_everything_pruned_is_handled() -> None:
    weight, x = problem(4, 8)
    assert torch.isfinite(SparseGpt()(weight.float(), statistics_of(x.float()), Pattern(sparsity=1.0))).all()


def test_sparsegpt_side_by_side_with_its_formula() -> None:
    """One row and one block of three columns, by hand from G: saliency w^2 / U_jj^2, update e U_j / U_jj."""
    G = torch.tensor([[4.0, 1, 0.5], [1, 3, 1], [0.5, 1, 2]], dtype=torch.float64)
    damped = G + 0.01 * 3 * torch.eye(3, dtype=torch.float64)
    U = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    w = torch.tensor([0.3, 2.0, -1.0], dtype=torch.float64)
    saliency = [float(w[j] ** 2 / U[j, j] ** 2) for j in range(3)]
    first = min(range(3), key=lambda j: saliency[j])
    assert first == 0
    expected = w - w[0] / U[0, 0] * U[0]
    rule = SparseGpt()
    found = rule.solve(w[None], rule.factor(G), Pattern(sparsity=0.34))
    assert_close(found, expected[None])


def test_upstream_compatible_sparsegpt_takes_one_more_a_block() -> None:
    weight, x = problem(8, 16)
    statistics = statistics_of(x.float())
    counts = [
        int(zeros(SparseGpt(blocksize=8, upstream_compatible=quirk)(weight.float(), statistics, HALF)).sum())
        for quirk in (False, True)
    ]
    assert counts == [64, 66]


def test_dead_inputs_lose_their_weights() -> None:
    weight, x = problem(4, 8)
    x[:, 3] = 0
    found = SparseGpt()(weight.float(), statistics_of(x.float()), Pattern(sparsity=0.0))
    assert zeros(found).sum(0).tolist() == [0, 0, 0, 4, 0, 0, 0, 0]


def test_singular_covariance_degrades_instead_of_failing() -> None:
    weight, _ = problem(4, 8)
    x = torch.ones(3, 8) * 1e-3
    assert torch.isfinite(SparseGpt()(weight.float(), statistics_of(x), HALF)).all()


def test_duplicate_inputs_take_over() -> None:
    """Columns 0 and 1 of X are the same and column 0 is masked: w_1 becomes nearly w_0 + w_1."""
    weight, x = problem(3, 6)
    x[:, 1] = x[:, 0]
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[:, 0] = False
    found = SparseGpt().solve(weight, SparseGpt().factor(x.T @ x / len(x)), HALF, mask=mask)
    assert_close(found[:, 1], weight[:, 0] + weight[:, 1], rtol=0.06, atol=0.06)
    assert error(weight, found, x) < 1e-2 * error(weight, weight * mask, x)


def test_blocksize_that_groups_do_not_divide_is_refused() -> None:
    weight, x = problem(3, 16)
    with pytest.raises(InvalidInput, match="blocksize 6 is no multiple of 4"):
        SparseGpt(blocksize=6)(weight.float(), statistics_of(x.float()), TWO_OF_FOUR)
