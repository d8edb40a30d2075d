"""Rounded matrices, kept while they fit into a number of bytes, because rounding takes longer than a layer's run."""

from collections import OrderedDict
from collections.abc import Hashable

import torch

from dilap.models.rounding import rounded


class RoundedMatrices:
    """Matrices rounded to precisions, those asked for last while they take at most `most_bytes` together."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self._kept: OrderedDict[tuple[Hashable, str], torch.Tensor] = OrderedDict()
        self._num_bytes = 0

    def of(self, key: Hashable, weight: torch.Tensor, precision: str) -> torch.Tensor:
        """Return `weight`, for which `key` stands, rounded to a precision, in its own type.

        An empty precision is the reference, in which it stays as it is.
        """
        if not precision:
            return weight
        if (key, precision) not in self._kept:
            matrix = rounded(weight.flatten(0, -2), precision)  # experts are a stack of matrices
            self._keep((key, precision), matrix.reshape(weight.shape).to(weight.dtype))
        self._kept.move_to_end((key, precision))
        return self._kept[key, precision]

    def _keep(self, key: tuple[Hashable, str], value: torch.Tensor) -> None:
        self._num_bytes += value.nbytes
        while self._kept and self._num_bytes > self.most_bytes:
            self._num_bytes -= self._kept.popitem(last=False)[1].nbytes
        self._kept[key] = value
