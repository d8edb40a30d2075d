"""Rules of a user's own with their own statistics: what they are shown, and what is checked."""

import textwrap
from typing import Any

import pytest
import torch
from standins.models import random_tokens, tiny_model

from dilap.core.errors import Unsupported, VerificationFailed
from dilap.models.anatomy import decoder_layers
from dilap.models.families import family_of
from dilap.sparsity import pruner
from dilap.sparsity.pattern import Pattern, keep_best
from dilap.sparsity.pruner import Pruner
from dilap.sparsity.rules import Wanda, sparsify_

HALF, TWO_OF_FOUR = Pattern.parse("0.5"), Pattern.parse("2:4")
TOKENS = random_tokens(6, 24)


def matrices(model: Any) -> dict[str, torch.Tensor]:
    return {name: one.weight for name, one in model.named_modules() if isinstance(one, torch.nn.Linear)}


def example() -> type[Pruner]:
    """The class in the module's own example."""
    lines = (pruner.__doc__ or "").splitlines()
    code = [line for line in lines[1:] if line.startswith("    ") or not line]
    space: dict[str, Any] = {"__name__": "my_module"}
    exec(compile(textwrap.dedent("\n".join(code)), "example", "exec", dont_inherit=True), space)
    found: type[Pruner] = space["TypicalInputs"]
    return found


def test_the_example_has_fewer_than_40_lines() -> None:
    lines = (pruner.__doc__ or "").splitlines()
    assert 10 < sum(line.startswith("    ") for line in lines) < 40


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("pattern", [HALF, TWO_OF_FOUR], ids=str)
def test_the_example_prunes_every_matrix(pattern: Pattern, family: str) -> None:
    model = tiny_model(family)
    sparsify_(model, TOKENS, example()(), pattern)
    found = [w for name, w in matrices(model).items() if "lm_head" not in name]
    assert found
    assert all(float((w == 0).float().mean()) == pytest.approx(0.5, abs=0.01) for w in found)


class OwnWanda(Pruner):
    """Wanda by the interface for users."""

    def __init__(self) -> None:
        self.squares: dict[str, torch.Tensor] = {}

    def add_inputs(self, name: str, inputs: torch.Tensor) -> None:
        self.squares[name] = self.squares.get(name, torch.zeros(())) + inputs.double().square().sum((0, 1))

    def unstructured(self, name: str, weight: torch.Tensor, num_zeros: int) -> torch.Tensor:
        return weight * keep_best(weight.abs() * self.squares[name].sqrt(), num_zeros // len(weight))

    def n_of_m(self, name: str, weight: torch.Tensor, *, kept: int, group: int) -> torch.Tensor:
        scores = (weight.abs() * self.squares[name].sqrt()).reshape(len(weight), -1, group)
        return weight * keep_best(scores, group - kept).reshape(weight.shape)


@pytest.mark.parametrize("propagate", ["pruned", "dense"])
@pytest.mark.parametrize("pattern", [HALF, TWO_OF_FOUR], ids=str)
def test_wanda_of_ones_own_is_the_built_in_one(pattern: Pattern, propagate: Any) -> None:
    own, built_in = tiny_model("llama"), tiny_model("llama")
    sparsify_(own, TOKENS, OwnWanda(), pattern, propagate=propagate)
    sparsify_(built_in, TOKENS, Wanda(), pattern, propagate=propagate)
    for name, weight in matrices(built_in).items():
        assert torch.equal(matrices(own)[name], weight), name


class Counting(OwnWanda):
    """Counts the inputs that every matrix is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: dict[str, list[tuple[int, ...]]] = {}

    def add_inputs(self, name: str, inputs: torch.Tensor) -> None:
        super().add_inputs(name, inputs)
        self.shapes.setdefault(name, []).append(tuple(inputs.shape))


@pytest.mark.parametrize("device", [None, torch.device("cpu")], ids=["in_place", "offloaded"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_every_matrix_is_shown_all_tokens_once(family: str, device: torch.device | None) -> None:
    model, rule = tiny_model(family), Counting()
    sparsify_(model, TOKENS, rule, HALF, propagate="pruned", device=device)
    start = family_of(model.config).layers
    inside = {name for name in matrices(model) if name.startswith(start)}
    assert set(rule.shapes) == inside
    assert len(inside) == len(decoder_layers(model)) * {"llama": 7, "opt": 6}[family]
    for name, shapes in rule.shapes.items():
        assert sum(sequences * tokens for sequences, tokens, _ in shapes) == TOKENS.numel()
        assert {(tokens, width) for _, tokens, width in shapes} == {(24, matrices(model)[name].shape[1])}


class Nothing(Pruner):
    def unstructured(self, name: str, weight: torch.Tensor, num_zeros: int) -> torch.Tensor:
        return weight


class Narrow(Pruner):
    def unstructured(self, name: str, weight: torch.Tensor, num_zeros: int) -> torch.Tensor:
        return weight[:, :1] * 0


@pytest.mark.parametrize(
    ("rule", "complaint"),
    [(Nothing(), r"q_proj: 0\.00% zeros, 50\.00% asked"), (Narrow(), r"the shape \(64, 1\) where")],
)
def test_matrices_without_their_zeros_are_named(rule: Pruner, complaint: str) -> None:
    with pytest.raises(VerificationFailed, match=complaint):
        sparsify_(tiny_model("llama"), TOKENS, rule, HALF)


def test_a_pattern_that_a_rule_lacks_is_named() -> None:
    with pytest.raises(Unsupported, match="Nothing has no method `n_of_m`: give a share of zeros"):
        sparsify_(tiny_model("llama"), TOKENS, Nothing(), TWO_OF_FOUR)
