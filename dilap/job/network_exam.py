"""Scores of a job's networks on examples that no search saw: in torch, and artifacts through their runtime."""

from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import nn

from dilap.backends import Network, host
from dilap.backends.readers import open_network
from dilap.core.artifact import Artifact
from dilap.core.codec import digest
from dilap.evaluation.subject import require_unchanged
from dilap.job.examples import Shown
from dilap.job.network_stages import NetworkStages
from dilap.job.quality import AnyQuality, kept_quality
from dilap.job.result import versions
from dilap.models.network import Examples, TorchNetwork


class Answers(Protocol):
    """A network in torch, or an artifact in its runtime."""

    def outputs(self, images: Examples) -> NDArray[np.float32]:
        """Return logits or embeddings (examples x numbers)."""


@dataclass(frozen=True, kw_only=True)
class NetworkExam(Generic[AnyQuality]):
    """The examples on which all models of a job are scored, with the answers of the dense torch model.

    `reference` has its answers (logits or embeddings) on the examples for evaluation, `validation` those on the
    validation split.
    """

    shown: Shown[Any, AnyQuality]
    reference: NDArray[np.float32]
    validation: NDArray[np.float32]

    @staticmethod
    def of(stages: NetworkStages) -> "NetworkExam[Any]":
        """Ask the dense model: the model in `stages.source` must not be pruned yet."""
        network = TorchNetwork(stages.source.model)
        return NetworkExam(
            shown=stages.shown,
            reference=stages.answers("unseen", lambda: _answers(stages, network, "dense model")),
            validation=stages.answers("validation", lambda: network.outputs(stages.shown.validated)),
        )

    @property
    def dense(self) -> AnyQuality:
        """Quality of the dense torch model, which all others are compared with."""
        return self._quality(self.reference)

    def of_torch(self, stages: NetworkStages, model: nn.Module) -> AnyQuality:
        return self._quality(_answers(stages, TorchNetwork(model), "torch model"))

    def validation_distance(self, model: nn.Module) -> float:
        """Return how far a torch model is from the dense one on the validation split."""
        return self.shown.distance(TorchNetwork(model).outputs(self.shown.validated), self.validation)

    def validation_distance_of_artifact(self, folder: Path, artifact: Artifact) -> float:
        """Return how far an exported file, through its runtime on this machine, is from the dense torch model there.

        Raises Crashed, Unavailable or Unsupported where it cannot run here.
        """
        with closing(_opened(folder, artifact)) as network:
            return self.shown.distance(network.outputs(self.shown.validated), self.validation)

    def of_artifact(
        self, stages: NetworkStages, folder: Path, artifact: Artifact, *, in_torch: AnyQuality
    ) -> AnyQuality:
        """Score an exported file, shown the examples through its runtime on this machine; the score of a file is kept.

        Where that is not possible here, the quality `in_torch` is returned with the reason. Raises InvalidInput or
        Mismatch where a file of the artifact is missing or was changed.
        """
        require_unchanged(folder, artifact)

        def read() -> AnyQuality:
            with closing(_opened(folder, artifact)) as network:
                answers = _answers(stages, network, folder.name)
            return self._quality(answers, through=artifact.backend, artifact_sha256=artifact.sha256)

        path = stages.workspace.common / f"quality-{self._key(artifact)}.json"
        return kept_quality(path, read, in_torch=in_torch, sha256=artifact.sha256)

    def _key(self, artifact: Artifact) -> str:
        """Return a digest of everything that the score of an artifact depends on."""
        shown, reference = self.shown.evaluation, digest(self.reference.tolist())
        made_of = [artifact.sha256, artifact.companions, shown.sha256, asdict(self.shown.input), reference, versions()]
        return digest(made_of)[:16]

    def _quality(
        self, answers: NDArray[np.float32], *, through: str = "torch", artifact_sha256: str = ""
    ) -> AnyQuality:
        return self.shown.quality(answers, self.reference, through=through, artifact_sha256=artifact_sha256)


def _opened(folder: Path, artifact: Artifact) -> Network:
    return open_network(artifact.backend, folder / artifact.path, threads=host.num_physical_cores())


def _answers(stages: NetworkStages, network: Answers, name: str) -> NDArray[np.float32]:
    """Return what a network gives for all examples for evaluation (examples x numbers), a few of them at a time."""
    shown, found = stages.shown, list[NDArray[np.float32]]()
    with stages.workspace.log.bar(f"show {name}", total=len(shown.evaluation), unit=shown.UNIT) as bar:
        for batch in shown.batches(shown.evaluation):
            found.append(network.outputs(batch))
            bar.update(len(batch))
    return np.concatenate(found)
