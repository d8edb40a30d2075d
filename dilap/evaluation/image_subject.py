"""What is shown photographs: an artifact through its runtime, or a network in torch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dilap.backends.inputs import random_images
from dilap.backends.readers import open_network
from dilap.core.artifact import Artifact
from dilap.core.codec import decode, read_json
from dilap.core.errors import InvalidInput
from dilap.core.images import ImageInput
from dilap.core.network_input import of_images
from dilap.evaluation.image_quality import ShowsImages
from dilap.evaluation.subject import require_unchanged, why_no_artifact
from dilap.models.convolutional.load import load_network
from dilap.models.network import TorchNetwork, classes_of


@dataclass(frozen=True, kw_only=True)
class ImageSubject:
    """An open image network. `backend` is `torch` or a runtime; `classes` has the numbers of those that have names."""

    name: str
    backend: str
    precision: str
    digest: str
    plan_digest: str
    input: ImageInput
    network: ShowsImages
    classes: Mapping[str, int] = field(default_factory=dict)
    close: Callable[[], None] = lambda: None

    @property
    def num_classes(self) -> int:
        """How many logits it gives."""
        return int(self.network.outputs(random_images((1, *self.input.size))).shape[1])


def open_image_subject(name: str, *, input_: ImageInput | None = None, threads: int = 1) -> ImageSubject:
    """Open the folder of an artifact or of a run, or what `load_network` loads (in torch), for images as `input_` says.

    Raises InvalidInput, Unavailable, Unsupported, and Mismatch where a file is not the one that its sidecar describes.
    """
    folder = Path(name)
    if (folder / "result.json").is_file():
        folder = folder / "artifact"
        if not folder.is_dir():
            raise InvalidInput(f"{name} has no artifact, {why_no_artifact(Path(name))}")
    return _of_artifact(name, folder, threads) if (folder / "artifact.json").is_file() else _of_model(name, input_)


def _of_artifact(name: str, folder: Path, threads: int) -> ImageSubject:
    sidecar = folder / "artifact.json"
    artifact = decode(Artifact, read_json(sidecar), source=str(sidecar))
    if artifact.input is None:
        raise InvalidInput(f"{name} is a decoder, which is shown texts and no images: give --reference or --tasks")
    input_ = of_images(artifact.input, name=name)
    require_unchanged(folder, artifact)
    network = open_network(artifact.backend, folder / artifact.path, threads=threads)
    return ImageSubject(
        name=name,
        backend=artifact.backend,
        precision=artifact.precision,
        digest=artifact.sha256,
        plan_digest=artifact.plan_digest,
        input=input_,
        network=network,
        close=network.close,
    )


def _of_model(name: str, input_: ImageInput | None) -> ImageSubject:
    source = load_network(name, input_=input_)
    return ImageSubject(
        name=name,
        backend="torch",
        precision=str(next(source.model.parameters()).dtype).removeprefix("torch."),
        digest=source.digest,
        plan_digest="",
        input=source.image_input,
        network=TorchNetwork(source.model),
        classes=classes_of(source.model),
    )
