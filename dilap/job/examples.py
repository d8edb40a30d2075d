"""What the network of a job is shown: what it is searched on, and what its models are scored on."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Generic, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from dilap.core.codec import digest
from dilap.core.errors import InvalidInput
from dilap.core.network_input import NetworkInput
from dilap.job.network_options import ExampleOptions
from dilap.job.quality import AnyQuality
from dilap.models.network import Examples

_LEAST = 8  # examples: batch norms are measured on several


class ExampleSet(Protocol):
    """Photographs or sentences."""

    @property
    def name(self) -> str:
        """What they are from."""

    @property
    def sha256(self) -> str:
        """The digest of their contents."""

    def __len__(self) -> int: ...

    def split(self, *, train: int, validation: int, seed: int) -> tuple[Self, Self]:
        """Return two parts at random that share none, the same ones at every call. Raises InvalidInput."""


AnySet = TypeVar("AnySet", bound=ExampleSet)


@dataclass(frozen=True, kw_only=True)
class Shown(ABC, Generic[AnySet, AnyQuality]):
    """The examples of a job in three parts that share none, as a network with `input` takes them.

    Methods and recovery see `train`, recovery is judged on `validation`, and models are scored on `evaluation`. `name`
    is what the first two are from.
    """

    KIND: ClassVar[str]  # of examples
    UNIT: ClassVar[str]  # of bars of progress

    name: str
    input: NetworkInput
    train: AnySet
    validation: AnySet
    evaluation: AnySet

    @abstractmethod
    def batches(self, examples: AnySet) -> Iterator[Examples]:
        """Yield some of the examples as the network takes them, a few at a time."""

    @abstractmethod
    def distance(self, outputs: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
        """Return how far a network is from the dense one, by what both give for the same examples."""

    @abstractmethod
    def quality(
        self, outputs: NDArray[np.float32], reference: NDArray[np.float32], *, through: str, artifact_sha256: str
    ) -> AnyQuality:
        """Judge a model by what it and the dense network give for the examples that are scored."""

    @property
    def labels(self) -> tuple[int, ...] | None:
        """The classes of `train`, None where they are not known."""
        return None

    @property
    def remark(self) -> str:
        """What else is to be said of the examples that are scored."""
        return ""

    @cached_property
    def trained(self) -> Examples:
        """All of `train`, as the network takes them."""
        return _joined(self.batches(self.train))

    @cached_property
    def validated(self) -> Examples:
        """All of `validation`, as the network takes them."""
        return _joined(self.batches(self.validation))

    @property
    def num_searched(self) -> int:
        """How many examples the search and the recovery see."""
        return len(self.train) + len(self.validation)

    @cached_property
    def searched_sha256(self) -> str:
        """The digest of what the search and the recovery see."""
        return digest([self.train.sha256, self.validation.sha256])

    def describe(self) -> str:
        return (
            f"{self.KIND}: {len(self.train)} to calibrate on and {len(self.validation)} to judge recovery by, of "
            f"{self.name}; {len(self.evaluation)} to score on, of {self.evaluation.name}{self.remark}"
        )


def _joined(batches: Iterator[Examples]) -> Examples:
    found: Examples = np.concatenate(list(batches))
    return found


def require_enough(examples: ExampleSet, *, kind: str) -> None:
    """Raise InvalidInput for too few examples of a kind."""
    if len(examples) < _LEAST:
        raise InvalidInput(f"{examples.name}: {len(examples)} {kind} are too few to prune with; give {_LEAST} or more")


def parts_of(examples: AnySet, asked: ExampleOptions) -> tuple[AnySet, AnySet]:
    """Return what methods see of the examples, and what recovery is judged on."""
    validation = max(1, min(asked.most_validation, len(examples) // 4))
    train = min(asked.most_train, len(examples) - validation)
    return examples.split(train=train, validation=validation, seed=asked.seed)
