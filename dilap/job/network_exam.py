"""Scores of a job's image networks on photographs that no search saw: in torch, and artifacts through their runtime."""

from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from dilap.backends import host
from dilap.backends.readers import open_network
from dilap.core.artifact import Artifact
from dilap.core.codec import digest
from dilap.core.sqnr import kl_divergence
from dilap.evaluation.document import ImageQuality
from dilap.evaluation.image_quality import ShowsImages, image_quality
from dilap.evaluation.subject import require_unchanged
from dilap.job.network_stages import NetworkStages
from dilap.job.photographs import Shown
from dilap.job.quality import PhotoQuality, kept_quality
from dilap.job.result import versions
from dilap.models.network import TorchNetwork


@dataclass(frozen=True, kw_only=True)
class NetworkExam:
    """The photographs on which all models of a job are scored, with the answers (logits) of the dense torch model.

    `reference` has its answers on the photographs for evaluation, `validation` those on the validation split.
    """

    shown: Shown
    reference: NDArray[np.float32]
    validation: NDArray[np.float32]

    @classmethod
    def of(cls, stages: NetworkStages) -> "NetworkExam":
        """Ask the dense model: the model in `stages.source` must not be pruned yet."""
        network = TorchNetwork(stages.source.model)
        return cls(
            shown=stages.shown,
            reference=stages.answers("unseen", lambda: _answers(stages, network, "dense model")),
            validation=stages.answers("validation", lambda: network.outputs(stages.shown.validation_pixels)),
        )

    @property
    def dense(self) -> PhotoQuality:
        """Quality of the dense torch model, which all others are compared with."""
        return self._quality(self.reference)

    def of_torch(self, stages: NetworkStages, model: nn.Module) -> PhotoQuality:
        return self._quality(_answers(stages, TorchNetwork(model), "torch model"))

    def validation_kl(self, model: nn.Module) -> float:
        """Return the mean KL of a torch model from the dense one on the validation split, in nats a photograph."""
        return kl_divergence(self.validation, TorchNetwork(model).outputs(self.shown.validation_pixels))

    def of_artifact(
        self, stages: NetworkStages, folder: Path, artifact: Artifact, *, in_torch: PhotoQuality
    ) -> PhotoQuality:
        """Score an exported file, shown photographs through its runtime on this machine; the score of a file is kept.

        Where that is not possible here, the quality `in_torch` is returned with the reason. Raises InvalidInput or
        Mismatch where a file of the artifact is missing or was changed.
        """
        require_unchanged(folder, artifact)

        def read() -> PhotoQuality:
            path, threads = folder / artifact.path, host.num_physical_cores()
            with closing(open_network(artifact.backend, path, threads=threads)) as network:
                logits = _answers(stages, network, folder.name)
            return self._quality(logits, through=artifact.backend, artifact_sha256=artifact.sha256)

        path = stages.workspace.common / f"quality-{self._key(artifact)}.json"
        return kept_quality(path, read, in_torch=in_torch, sha256=artifact.sha256)

    def _key(self, artifact: Artifact) -> str:
        """Return a digest of everything that the score of an artifact depends on."""
        images, reference = self.shown.evaluation, digest(self.reference.tolist())
        made_of = [artifact.sha256, artifact.companions, images.sha256, asdict(self.shown.input), reference, versions()]
        return digest(made_of)[:16]

    def _quality(
        self, logits: NDArray[np.float32], *, through: str = "torch", artifact_sha256: str = ""
    ) -> PhotoQuality:
        found: ImageQuality = image_quality(logits, self.reference, self.shown.evaluation)
        return PhotoQuality(**asdict(found), through=through, artifact_sha256=artifact_sha256)


def _answers(stages: NetworkStages, network: ShowsImages, name: str) -> NDArray[np.float32]:
    """Return what a network gives (images x classes) for all photographs for evaluation, a few of them at a time."""
    images, input_ = stages.shown.evaluation, stages.shown.input
    found = []
    with stages.workspace.log.bar(f"show {name}", total=len(images), unit="img") as bar:
        for batch in images.pixels(input_):
            found.append(network.outputs(batch))
            bar.update(len(batch))
    return np.concatenate(found)
