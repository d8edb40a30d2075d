"""A network that is no decoder as ONNX: traced by torch, in f32, in f16, or with 8-bit weights and activations (Q/DQ).

Constants, batch norms among them, are folded into the convolutions by torch's exporter, before anything is quantised.
"""

import collections
import importlib
import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import nn

from dilap.backends.child import called, opened
from dilap.backends.inputs import arrays_of, whole_batches
from dilap.backends.onnxruntime.network import OnnxNetwork
from dilap.core.artifact import Artifact
from dilap.core.codec import encode, write_json, written_aside
from dilap.core.errors import Unavailable, Unsupported, reason_of
from dilap.core.network_input import NetworkInput, input_names
from dilap.export.graph_of_network import exported_graph, quietly
from dilap.export.network import (
    SQNR_BOUNDS_DB,
    add_tokenizer,
    described,
    is_scaled_at_run_time,
    output_name,
    require_exportable,
    verified_examples,
)
from dilap.export.onnx.emitter import OPSET
from dilap.export.onnx.valid import require_valid
from dilap.export.verify import verify_outputs
from dilap.models.network import Examples, TorchNetwork, in_f32

MODEL = "model.onnx"
_IMAGES = "calibration.npy"
_PRODUCTS = ["Conv", "ConvTranspose", "Gemm", "MatMul"]


class OnnxNetworkExporter:
    """Writes `model.onnx` and `artifact.json`."""

    backend = "onnxruntime"

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
            write_network(path, model, input_)
            sqnr_db = verify_network(path, expected, shown, precision="f32")
            if precision == "int8":
                if images is None or is_scaled_at_run_time(input_):
                    quantise_weights_(path)
                else:
                    quantise_(path, images, input_)
                sqnr_db = verify_network(path, expected, shown, precision=precision)
            add_tokenizer(folder, tokenizer, model)
            artifact = described(
                path,
                model,
                input_,
                backend=self.backend,
                precision=precision,
                plan_digest=plan_digest,
                sqnr_db=sqnr_db,
                details={"operators": operators(path)},
            )
            write_json(folder / "artifact.json", encode(artifact))
        return artifact


def verify_network(path: Path, expected: NDArray[np.float32], images: Examples, *, precision: str) -> float:
    """Return the SQNR in dB of a file's logits to the expected ones. Raises VerificationFailed below the bound."""
    with opened(OnnxNetwork, path, runtime="onnxruntime", threads=1) as file:
        bound, name = SQNR_BOUNDS_DB[precision], f"{path.name} in {precision}"
        return verify_outputs(expected, file, images, bound_db=bound, name=name)


def write_network(path: Path, model: nn.Module, input_: NetworkInput) -> None:
    """Write a network in f32, with the input `images` and the output `logits`. Raises Unsupported, Unavailable.

    An encoder of texts has the inputs TOKEN_INPUTS and, without a head, the output `sentence_embedding`.
    """
    if importlib.util.find_spec("onnxscript") is None:
        raise Unavailable("exporting networks to ONNX needs onnxscript; pip install 'dilap[onnxruntime]'")
    graph = exported_graph(model, input_)
    with quietly():
        try:
            exported = torch.onnx.export(
                graph,
                dynamo=True,
                opset_version=OPSET,
                input_names=list(input_names(input_)),
                output_names=[output_name(model)],
                verbose=False,
            )
        except Exception as error:  # the exporter's own, of operators that ONNX lacks
            raise Unsupported(f"torch cannot write the model as ONNX: {reason_of(error)}") from error
    assert exported is not None
    for node in exported.model.graph:
        node.metadata_props.clear()  # stack traces with the paths of this machine
        if node.op_type == "AveragePool":
            _average_everything_(node)
    exported.model.metadata_props.clear()
    exported.save(path)
    require_valid(path)


def _average_everything_(node: Any) -> None:
    """Let an average over more than there is be one over everything, which TensorRT can parse.

    EfficientNet's last pooling has windows of 2,560 x 2,560 pixels, whatever the size of its input.
    """
    sides, window = node.inputs[0].shape[2:], node.attributes["kernel_shape"].as_ints()
    pads = node.attributes["pads"].as_ints() if "pads" in node.attributes else ()
    if all(have <= wide for have, wide in zip(sides, window, strict=True)) and not any(pads):
        node.op_type = "GlobalAveragePool"
        node.attributes.clear()


def quantise_weights_(path: Path) -> None:
    """Quantise the weights of the file in f32, in place; its activations get their scales at run time."""
    floats = path.with_name(f"f32-{path.name}")
    path.rename(floats)
    try:
        called(weights_quantised, floats, path, runtime="onnxruntime")
    finally:
        floats.unlink()


def weights_quantised(floats: Path, path: Path) -> None:
    """Quantise the weights of the file `floats` into the file `path`, in this process."""
    logging.disable(logging.WARNING)  # advice to fold constants first, which is done
    library: Any = importlib.import_module("onnxruntime.quantization")
    library.quantize_dynamic(floats, path, per_channel=True, weight_type=library.QuantType.QInt8)


def quantise_(path: Path, images: Examples, input_: NetworkInput, *, for_tensorrt: bool = False) -> None:
    """Quantise the file in f32, in place, with scales from what `images` make of it.

    Raises InvalidInput for images of another size.
    """
    floats, stored = path.with_name(f"f32-{path.name}"), path.with_name(_IMAGES)
    path.rename(floats)
    np.save(stored, np.stack(list(whole_batches(images, input_.shape))))
    try:
        names = input_names(input_)
        called(quantised, floats, path, stored, runtime="onnxruntime", names=names, for_tensorrt=for_tensorrt)
    finally:
        floats.unlink()
        stored.unlink()
    require_valid(path)


def quantised(floats: Path, path: Path, images: Path, *, names: Sequence[str], for_tensorrt: bool) -> None:
    """Quantise the file `floats` into the file `path` with ONNX Runtime's own quantiser, in this process.

    `images` is an .npy file of batches, `names` are those of the inputs. Channels have scales of their own, because the
    weights of depthwise convolutions differ a hundredfold between them.
    """
    logging.disable(logging.WARNING)  # advice to fold constants first, which is done
    library: Any = importlib.import_module("onnxruntime.quantization")
    batches = np.load(images, mmap_mode="r")

    class Reader(library.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._batches = iter(batches)

        def get_next(self) -> dict[str, NDArray[Any]] | None:
            batch = next(self._batches, None)
            return None if batch is None else dict(zip(names, arrays_of(np.ascontiguousarray(batch)), strict=True))

    # CPUs multiply unsigned by signed bytes.
    settings = {"activation_type": library.QuantType.QUInt8}
    if for_tensorrt:
        # TensorRT takes signed bytes without a zero point, weights and biases as floats, and joins a convolution with
        # what follows it where nothing is quantised between them.
        settings = {
            "activation_type": library.QuantType.QInt8,
            "op_types_to_quantize": _PRODUCTS,
            "extra_options": {
                "ActivationSymmetric": True,
                "AddQDQPairToWeight": True,
                "QuantizeBias": False,
                "OpTypesToExcludeOutputQuantization": _PRODUCTS,
            },
        }
    library.quantize_static(
        floats,
        path,
        Reader(),
        quant_format=library.QuantFormat.QDQ,
        per_channel=True,
        weight_type=library.QuantType.QInt8,
        **settings,
    )


def round_to_f16_(path: Path) -> None:
    """Turn the file in f32, in place, into one that computes in f16 and has its input and output in f32."""
    float16: Any = importlib.import_module("onnxruntime.transformers.float16")
    onnx: Any = importlib.import_module("onnx")
    onnx.save(float16.convert_float_to_float16(onnx.load(path), keep_io_types=True), path)
    model = ir.load(path)
    model.graph.sort()  # it puts the casts of inputs behind what reads them
    ir.save(model, path)
    require_valid(path)


def operators(path: Path) -> dict[str, int]:
    """Return how many nodes of every type a file has."""
    return dict(sorted(collections.Counter(node.op_type for node in ir.load(path).graph).items()))
