"""Export image networks and encoders of texts to a runtime's format, checked against torch."""

from pathlib import Path
from typing import TYPE_CHECKING

from dilap import backends
from dilap.core.artifact import Artifact
from dilap.core.errors import InvalidInput
from dilap.core.network_input import NetworkInput, TokenInput
from dilap.core.progress import Progress
from dilap.job.networks import reads_texts

if TYPE_CHECKING:
    from dilap.models.convolutional.load import NetworkSource
    from dilap.models.network import Examples

_NUM_CALIBRATED = 128  # images or sentences, whose activations say the ranges of 8 bits


def export_network(
    name: str,
    *,
    backend: str,
    precision: str | None = None,
    input_: NetworkInput | None = None,
    processor: Path | None = None,
    weights: Path | None = None,
    calib: str | None = None,
    out: Path,
    progress: Progress,
) -> Artifact:
    """Write the folder `out`, whole or not at all, with the network's file, its sidecar `artifact.json` and a card.

    `name`, `input_`, `processor` and `weights` are those of `load_network`. `calib` names photographs (see
    `dilap.models.images.read_images`), from which 8 bits take the ranges of activations, or a text for an encoder of
    texts, which is compared with torch on its sentences. Raises InvalidInput,
    Unavailable, Unsupported where the runtime cannot hold the network, and VerificationFailed where it computes
    something else than torch.
    """
    chosen = network_precision(backend, precision)
    if chosen == "int8" and calib is None and not reads_texts(name):
        raise InvalidInput("int8 needs photographs, which say the ranges of the activations: give a folder as --calib")
    progress.say(f"exporting {name} to {backend}, {chosen}")
    # Importing torch takes seconds: bad input is refused first.
    from dilap import export as exporters  # noqa: PLC0415
    from dilap.job.card import write_export_card  # noqa: PLC0415
    from dilap.models.convolutional.load import load_network  # noqa: PLC0415

    exporter = exporters.get_network(backend)
    source = load_network(name, input_=input_, processor=processor, weights=weights)
    for note in source.notes:
        progress.say(note)
    artifact = exporter.export(
        source.model,
        input_=source.input,
        precision=chosen,
        images=None if calib is None else _calibration(calib, source, progress),
        plan_digest="",
        out=out,
        tokenizer=source.tokenizer,
    )
    options = {"--processor": processor, "--weights": weights, "--calib": calib}
    words = [word for option, value in options.items() if value is not None for word in (option, str(value))]
    words += [] if input_ is None else ["--input", _in_one_word(input_)]
    command = ["dilap-export", "--backend", backend, "--precision", chosen, *words, name]
    write_export_card(out, artifact, source.origin, command=command)
    return artifact


def _in_one_word(input_: NetworkInput) -> str:
    return str(input_.length if isinstance(input_, TokenInput) else input_)


def _calibration(name: str, source: "NetworkSource", progress: Progress) -> "Examples":
    """Return photographs, or sentences of a text, as the network takes them."""
    from dilap.models.images import read_images  # noqa: PLC0415
    from dilap.models.sentences import read_sentences  # noqa: PLC0415

    if isinstance(source.input, TokenInput):
        assert source.folder is not None
        sentences = read_sentences(name, tokenizer=source.folder)
        some, _ = sentences.split(train=min(len(sentences), _NUM_CALIBRATED), validation=0, seed=0)
        progress.say(f"calibrating on {len(some)} of the {len(sentences)} sentences of {sentences.name}")
        return some.all_tokens(source.input)
    images = read_images(name, labelled=False)
    few, _ = images.split(train=min(len(images), _NUM_CALIBRATED), validation=0, seed=0)
    progress.say(f"calibrating on {len(few)} of the {len(images)} photographs in {images.name}")
    return few.all_pixels(source.input)


def network_precision(backend: str, precision: str | None) -> str:
    """Return `precision`, or the first in which the runtime runs networks for None. Raises Unsupported."""
    runtime = backends.get(backend)
    backends.require_networks(runtime)
    chosen = precision or runtime.network_precisions()[0]
    backends.require_network_precision(runtime, chosen)
    return chosen
