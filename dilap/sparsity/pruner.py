"""A rule of your own for zeros inside matrices, with its own statistics of their inputs: subclass `Pruner`.

    from dataclasses import dataclass, field

    import torch

    from dilap.sparsity.pattern import keep_best
    from dilap.sparsity.pruner import Pruner


    @dataclass
    class TypicalInputs(Pruner):
        '''Weights go first whose size times the mean size of their input is small. `--set power=2` changes it.'''

        power: float = 1.0
        sums: dict[str, torch.Tensor] = field(default_factory=dict)

        def add_inputs(self, name: str, inputs: torch.Tensor) -> None:
            self.sums[name] = self.sums.get(name, 0) + inputs.float().abs().sum((0, 1))

        def scores(self, name: str, weight: torch.Tensor) -> torch.Tensor:
            return weight.abs() ** self.power * self.sums.pop(name)

        def unstructured(self, name: str, weight: torch.Tensor, num_zeros: int) -> torch.Tensor:
            kept = keep_best(self.scores(name, weight).flatten(), num_zeros)
            return weight * kept.reshape(weight.shape)

        def n_of_m(self, name: str, weight: torch.Tensor, *, kept: int, group: int) -> torch.Tensor:
            groups = self.scores(name, weight).reshape(len(weight), -1, group)
            return weight * keep_best(groups, group - kept).reshape(weight.shape)

`dilap-prune --pattern 2:4 --method my_module:TypicalInputs` runs it. The job owns all the rest: it takes the model
through the calibration text layer by layer, shows every matrix's inputs once and as they are, asks for the matrix when
all of them were shown, and checks that it has its zeros. Only one layer has to be on a device at a time.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from dilap.core.errors import Unsupported, VerificationFailed
from dilap.sparsity.pattern import Pattern


class Pruner:
    """A rule for zeros inside matrices that keeps its own statistics; a subclass has at least one of the last two.

    Matrices are named as in the model (`model.layers.0.mlp.down_proj`) and come as (outputs x inputs) in f32, on the
    device that the layer is on.
    """

    def add_inputs(self, name: str, inputs: torch.Tensor) -> None:
        """Take some of a matrix's inputs (sequences x tokens x inputs); by default none are looked at."""

    def unstructured(self, name: str, weight: torch.Tensor, num_zeros: int) -> torch.Tensor:  # noqa: ARG002
        """Return the matrix with at least so many zeros."""
        raise Unsupported(f"{type(self).__name__} has no method `unstructured`: give a pattern like 2:4")

    def n_of_m(self, name: str, weight: torch.Tensor, *, kept: int, group: int) -> torch.Tensor:  # noqa: ARG002
        """Return the matrix with at most `kept` non-zeros in every `group` consecutive inputs of a row."""
        raise Unsupported(f"{type(self).__name__} has no method `n_of_m`: give a share of zeros, like 0.5")

    def pruned(self, name: str, weight: torch.Tensor, pattern: Pattern) -> torch.Tensor:
        """Return the matrix with the zeros of a pattern. Raises VerificationFailed where it lacks some."""
        if pattern.group:
            assert pattern.kept is not None
            found = self.n_of_m(name, weight, kept=pattern.kept, group=pattern.group)
        else:
            found = self.unstructured(name, weight, pattern.num_zeros(weight.numel()))
        if found.shape != weight.shape:
            raise VerificationFailed(f"{name}: the shape {tuple(found.shape)} where {tuple(weight.shape)} was asked")
        pattern.require(found, name=name)
        return found


@contextmanager
def inputs_shown(pruner: Pruner, matrices: Mapping[str, nn.Linear], *, num_tokens: int) -> Iterator[set[str]]:
    """Show a pruner the inputs of matrices, by name, in sequences of `num_tokens`, until the context is left.

    A name that is taken out of the set that the context gives is shown no more.
    """
    shown = set(matrices)

    def hook(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def show(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            if name in shown:
                pruner.add_inputs(name, inputs[0].detach().reshape(-1, num_tokens, inputs[0].shape[-1]))

        return show

    handles = [matrix.register_forward_pre_hook(hook(name)) for name, matrix in matrices.items()]
    try:
        yield shown
    finally:
        for handle in handles:
            handle.remove()
