"""Export of image networks for TensorRT: an ONNX file and the recipe by which a device builds its engine."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from dilap.backends.child import called
from dilap.backends.tensorrt.builder import CHECKED_TARGETS
from dilap.backends.tensorrt.recipe import RECIPE_FILE, NetworkRecipe
from dilap.core.artifact import Artifact
from dilap.core.codec import decode, encode, file_sha256, write_json, written_aside
from dilap.core.errors import Crashed, Unavailable, Unsupported
from dilap.core.network_input import NetworkInput
from dilap.export.network import SQNR_BOUNDS_DB, described, require_exportable, verified_examples
from dilap.export.onnx.network import MODEL, operators, quantise_, round_to_f16_, verify_network, write_network
from dilap.export.onnx.tensorrt import REFERENCE, REMAINING, REPORT, TESTED
from dilap.export.onnx.tensorrt_report import CompileReport, compiled_network
from dilap.models.network import Examples, TorchNetwork, in_f32


class TensorRTNetworkExporter:
    """Writes `model.onnx`, the recipe, and what was checked."""

    backend = "tensorrt"

    def export(
        self,
        model: nn.Module,
        *,
        input_: NetworkInput,
        precision: str,
        images: Examples | None,
        plan_digest: str,
        out: Path,
        tokenizer: Path | None = None,  # noqa: ARG002  (texts are refused)
    ) -> Artifact:
        """Write `model` into the folder `out`, verified as far as this machine can, or leave nothing behind.

        What is not in 8 bits is in f16; input and output are in f32.
        """
        require_exportable(self.backend, precision, input_, images)
        shown = verified_examples(model, input_, images)
        expected = TorchNetwork(in_f32(model)).outputs(shown)
        with written_aside(out) as folder:
            folder.mkdir()
            path = folder / MODEL
            write_network(path, model, input_)
            if precision == "int8" and images is not None:
                quantise_(path, images, input_, for_tensorrt=True)
            round_to_f16_(path)
            sqnr_db, verified = _verified(path, expected, shown, precision=precision)
            np.savez(folder / REFERENCE, images=shown, logits=expected)
            recipe = NetworkRecipe(
                precision=precision,
                shape=input_.shape,
                num_classes=expected.shape[1],
                files={MODEL: file_sha256(path)},
                reference=REFERENCE,
                bound_db=SQNR_BOUNDS_DB[precision],
                tested=TESTED,
            )
            write_json(folder / RECIPE_FILE, encode(recipe))
            artifact = described(
                path,
                model,
                input_,
                backend=self.backend,
                precision=precision,
                plan_digest=plan_digest,
                sqnr_db=sqnr_db,
                details={"operators": operators(path), "notes": [verified, _compiled(path, recipe), REMAINING]},
            )
            companions = {name: file_sha256(folder / name) for name in (RECIPE_FILE, REFERENCE)}
            artifact = replace(artifact, companions=companions)
            write_json(folder / "artifact.json", encode(artifact))
        return artifact


def _verified(
    path: Path, expected: NDArray[np.float32], images: Examples, *, precision: str
) -> tuple[float | None, str]:
    """Return the SQNR in dB of the file in ONNX Runtime, None without it, and a line that says so."""
    try:
        found = verify_network(path, expected, images, precision=precision)
    except Unavailable as error:
        return None, f"not verified against torch: {error}"
    return found, f"verified against torch in ONNX Runtime: {found:.1f} dB"


def _compiled(path: Path, recipe: NetworkRecipe) -> str:
    """Write the compile report; return a line that sums it up, or says why there is none."""
    try:
        document = called(compiled_network, path, runtime="tensorrt", targets=CHECKED_TARGETS)
    except (Crashed, Unavailable, Unsupported) as error:
        return f"not compiled: {error}"
    report = replace(decode(CompileReport, document, source=REPORT), files=recipe.files)
    write_json(path.with_name(REPORT), encode(report))
    return f"{report.describe()} ({REPORT})"
