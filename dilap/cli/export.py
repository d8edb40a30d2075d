"""dilap-export: write any checkpoint or image network, pruned or not, in a runtime's format, checked against torch."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from dilap import backends
from dilap.cli import arguments, console
from dilap.core.errors import InvalidInput
from dilap.core.network_input import parse_input
from dilap.job import meaning
from dilap.job.export import chosen_precision, export
from dilap.job.network_export import network_precision
from dilap.job.networks import is_network
from dilap.job.outputs import name_of, name_of_vocabulary

_EXAMPLES = """\
  dilap-export --backend llamacpp runs/smollm2-135m-host_cpu-70pct/checkpoint
  dilap-export --backend llamacpp --precision q4_0 --out exported CHECKPOINT
  dilap-export --backend llamacpp --precision q4_0 --precision head=q8_0 --precision layers.3.ffn=f16 CHECKPOINT
  dilap-export --backend llamacpp --precision q4_0 --plan runs/mine/plan.json runs/mine/checkpoint
  dilap-export --backend llamacpp --tokenizer original.gguf CHECKPOINT
  dilap-export --backend llamacpp --vocabulary needs.txt CHECKPOINT
  dilap-export --backend tensorrt CHECKPOINT                    # for a Jetson, checked here as far as it goes
image networks (classifiers of transformers, efficientnet-lite0, your own modules):
  dilap-export --backend onnxruntime ./resnet-50
  dilap-export --backend executorch --precision int8 --calib photos/ efficientnet-lite0
  dilap-export --backend tensorrt --input 3x224x224 my_module:build
  dilap-export --backend onnxruntime --input 3x224x224 --weights runs/mine/checkpoint my_module:build
encoders of texts (BERT and its relatives in transformers, all-minilm-l6-v2):
  dilap-export --backend onnxruntime --precision int8 --input 128 all-minilm-l6-v2"""


def _parser() -> argparse.ArgumentParser:
    made = arguments.parser(
        "Write a checkpoint in a runtime's format and verify it against the torch model.", _EXAMPLES
    )
    source = made.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "checkpoint",
        nargs="?",
        default=argparse.SUPPRESS,
        metavar="CHECKPOINT",
        help="a run or a folder with config.json, a .gguf file, a hub id, a built-in name, or my_module:build",
    )
    source.add_argument("--model", dest="checkpoint", metavar="CHECKPOINT", help="the same, behind its name")
    made.add_argument(
        "--backend", required=True, metavar="RUNTIME", help=f"the runtime: {', '.join(backends.BACKENDS)}"
    )
    made.add_argument(
        "--precision",
        action="append",
        default=[],
        metavar="[PART=]FORMAT",
        help="of the model (the runtime's default otherwise), or of a part: head, embedding, attention, ffn, "
        "layers.N.attention, layers.N.ffn; may be given several times",
    )
    made.add_argument("--plan", metavar="FILE", help="a run's plan.json, whose precisions the parts get")
    made.add_argument("--tokenizer", metavar="PATH", help="a folder or GGUF file; the checkpoint's own by default")
    arguments.add_changes(made)
    arguments.add_compute(made)
    made.add_argument(
        "--input",
        metavar="SIZE",
        help="of an image network, 3x224x224: needed for my_module:build; tokens of an encoder of texts, 128",
    )
    made.add_argument(
        "--processor", metavar="DIR", help="has preprocessor_config.json, which says how photographs become inputs"
    )
    made.add_argument("--weights", metavar="DIR", help="a checkpoint of what my_module:build returns")
    made.add_argument(
        "--calib", metavar="DATA", help="photographs, which int8 takes its ranges from; an encoder's text"
    )
    made.add_argument("--out", metavar="DIR", help="the artifact's folder (CHECKPOINT-BACKEND-PRECISION)")
    made.add_argument("--json", action="store_true", help="print the sidecar as JSON")
    return made


def _command() -> int:
    given = _parser().parse_args()
    whole, parts = _precisions(given.precision)
    input_ = None if given.input is None else parse_input(given.input)
    is_image_network = input_ is not None or is_network(given.checkpoint)
    precision = (network_precision if is_image_network else chosen_precision)(given.backend, whole)
    mixed = "-mixed" if parts or given.plan else ""
    changes = f"{name_of(given.merge_adapter)}-" if given.merge_adapter else ""
    changes += f"{name_of_vocabulary(given.vocabulary)}-" if given.vocabulary else ""
    default = _beside(given.checkpoint, f"{changes}{given.backend}-{precision}{mixed}")
    out = arguments.new_path(given.out) if given.out else default
    artifact = export(
        given.checkpoint,
        backend=given.backend,
        precision=whole,
        precisions=parts,
        plan=Path(given.plan) if given.plan else None,
        tokenizer=Path(given.tokenizer) if given.tokenizer else None,
        merge_adapter=given.merge_adapter,
        vocabulary=given.vocabulary,
        compute=given.compute,
        input_=input_,
        processor=Path(given.processor) if given.processor else None,
        weights=Path(given.weights) if given.weights else None,
        calib=given.calib,
        out=out,
        progress=console.Console(),
    )
    if given.json:
        console.show_json(asdict(artifact))
    else:
        quality = (
            ""
            if artifact.sqnr_db is None
            else f", {artifact.sqnr_db:.1f} dB against torch: {meaning.of_sqnr(artifact.sqnr_db)}"
        )
        console.show(f"{out / artifact.path}: {artifact.num_bytes / 1e6:.1f} MB{quality}")
        for note in artifact.details.get("notes", ()):  # what was checked, and what only the device can check
            console.show(f"  {note}")
    return 0


def _quality(decibels: float) -> str:
    return f", {decibels:.1f} dB against torch: {meaning.of_sqnr(decibels)}"


def _precisions(given: Sequence[str]) -> tuple[str | None, dict[str, str]]:
    """Return the precision of the model, None where it is not given, and those of parts. Raises InvalidInput."""
    wholes = [one for one in given if "=" not in one]
    if len(wholes) > 1:
        raise InvalidInput(f"--precision {wholes[0]} and {wholes[1]} are both for the whole model: name one, and PART=")
    return next(iter(wholes), None), dict(one.split("=", 1) for one in given if "=" in one)


def _beside(checkpoint: str, ending: str) -> Path:
    """Return the default folder for the output: beside the checkpoint's, never inside it."""
    path = Path(checkpoint)
    if path.name in ("", ".."):
        path = path.resolve()
    return path.parent / f"{path.name.replace(':', '-')}-{ending}"


def main() -> None:
    console.run(_command)


if __name__ == "__main__":
    main()
