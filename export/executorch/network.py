"""Export of networks that are no decoders to ExecuTorch."""

from pathlib import Path

from torch import nn

from dilap.backends.child import opened
from dilap.backends.executorch.bindings import bindings
from dilap.backends.executorch.network import ExecuTorchNetwork
from dilap.core.artifact import Artifact
from dilap.core.codec import encode, write_json, written_aside
from dilap.core.errors import Unsupported, reason_of
from dilap.core.network_input import NetworkInput
from dilap.export.graph_of_network import exported_graph, quietly
from dilap.export.network import SQNR_BOUNDS_DB, add_tokenizer, described, require_exportable, verified_examples
from dilap.export.verify import verify_outputs
from dilap.models.network import Examples, TorchNetwork, in_f32

MODEL = "model.pte"


class ExecuTorchNetworkExporter:
    """Writes `model.pte` and `artifact.json`."""

    backend = "executorch"

    def export(
        self,
        model: nn.Module,
        *,
        input_: NetworkInput,
        precision: str,
        images: Examples | None,
        plan_digest: str,
        out: Path,
        tokenizer: Path | None = None,
    ) -> Artifact:
        """Write `model` into the folder `out`, verified, or leave nothing behind."""
        require_exportable(self.backend, precision, input_, images)
        shown = verified_examples(model, input_, images)
        expected = TorchNetwork(in_f32(model)).outputs(shown)
        with written_aside(out) as folder:
            folder.mkdir()
            path = folder / MODEL
            left = _write(path, model, input_, shown if images is None else images, precision=precision)
            with opened(ExecuTorchNetwork, path, runtime=self.backend, threads=1) as file:
                bound, name = SQNR_BOUNDS_DB[precision], f"{path.name} in {precision}"
                sqnr_db = verify_outputs(expected, file, shown, bound_db=bound, name=name)
            add_tokenizer(folder, tokenizer, model)
            artifact = described(
                path,
                model,
                input_,
                backend=self.backend,
                precision=precision,
                plan_digest=plan_digest,
                sqnr_db=sqnr_db,
                details={"operators_outside_xnnpack": left},
            )
            write_json(folder / "artifact.json", encode(artifact))
        return artifact


def _write(path: Path, model: nn.Module, input_: NetworkInput, images: Examples, *, precision: str) -> dict[str, int]:
    """Write a network's program, where it has 8 bits by `images`. Return the operators left to ExecuTorch.

    Raises Unsupported where the network cannot be traced or lowered.
    """
    bindings()  # raises a one-line reason where ExecuTorch is not installed
    with quietly():
        from dilap.export.executorch.lowering import lowered, quantised  # noqa: PLC0415 - needs ExecuTorch

        graph = exported_graph(model, input_) if precision == "f32" else quantised(model, input_, images)
        try:
            found = lowered(graph)
        except Exception as error:  # whatever ExecuTorch raises for an operator that it lacks
            raise Unsupported(f"ExecuTorch cannot hold the model: {reason_of(error)}") from error
    with path.open("wb") as file:
        found.program.write_to_file(file)
    return found.left
