"""Export image networks to a runtime's format, checked against torch."""

from pathlib import Path

from dilap import backends
from dilap.core.artifact import Artifact
from dilap.core.codec import read_json
from dilap.core.errors import InvalidInput
from dilap.core.images import ImageInput
from dilap.core.progress import Progress
from dilap.models.builtin import BUILTIN_NETWORKS

_NUM_CALIBRATED = 128  # images, whose activations say the ranges of 8 bits
_CLASSIFIER = "ForImageClassification"  # ends the names of transformers' classes


def is_network(name: str) -> bool:
    """Return whether a model is an image network: built in, the folder of a classifier or its run, or a user's own."""
    folder = Path(name).expanduser()
    if name in BUILTIN_NETWORKS or not folder.exists():
        return name in BUILTIN_NETWORKS or ":" in name
    if (folder / "result.json").is_file():
        folder = folder / "checkpoint"
    config = folder / "config.json"
    if not config.is_file():
        return (folder / "narrowed.json").is_file()
    classes = read_json(config).get("architectures")
    return isinstance(classes, list) and any(str(one).endswith(_CLASSIFIER) for one in classes)


def export_network(
    name: str,
    *,
    backend: str,
    precision: str | None = None,
    input_: ImageInput | None = None,
    processor: Path | None = None,
    weights: Path | None = None,
    calib: str | None = None,
    out: Path,
    progress: Progress,
) -> Artifact:
    """Write the folder `out`, whole or not at all, with the network's file and its sidecar `artifact.json`.

    `name`, `input_`, `processor` and `weights` are those of `load_network`. `calib` names photographs (see
    `dilap.models.images.read_images`), from which 8 bits take the ranges of activations. Raises InvalidInput,
    Unavailable, Unsupported where the runtime cannot hold the network, and VerificationFailed where it computes
    something else than torch.
    """
    chosen = network_precision(backend, precision)
    if chosen == "int8" and calib is None:
        raise InvalidInput("int8 needs photographs, which say the ranges of the activations: give a folder as --calib")
    progress.say(f"exporting {name} to {backend}, {chosen}")
    # Importing torch takes seconds: bad input is refused first.
    from dilap import export as exporters  # noqa: PLC0415
    from dilap.models.convolutional.load import load_network  # noqa: PLC0415
    from dilap.models.images import read_images  # noqa: PLC0415

    exporter = exporters.get_network(backend)
    images = None if calib is None else read_images(calib, labelled=False)
    source = load_network(name, input_=input_, processor=processor, weights=weights)
    for note in source.notes:
        progress.say(note)
    pixels = None
    if images is not None:
        few, _ = images.split(train=min(len(images), _NUM_CALIBRATED), validation=0, seed=0)
        progress.say(f"calibrating on {len(few)} of the {len(images)} photographs in {images.name}")
        pixels = few.all_pixels(source.input)
    return exporter.export(source.model, input_=source.input, precision=chosen, images=pixels, plan_digest="", out=out)


def network_precision(backend: str, precision: str | None) -> str:
    """Return `precision`, or the first in which the runtime runs networks for None. Raises Unsupported."""
    runtime = backends.get(backend)
    backends.require_networks(runtime)
    chosen = precision or runtime.network_precisions()[0]
    backends.require_network_precision(runtime, chosen)
    return chosen
