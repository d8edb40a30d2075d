"""An image network as ONNX: traced by torch, in f32, in f16, or with 8-bit weights and activations (Q/DQ).

Constants, batch norms among them, are folded into the convolutions by torch's exporter, before anything is quantised.
"""

import collections
import importlib
import importlib.util
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import nn

from dilap.backends.child import called
from dilap.backends.inputs import whole_batches
from dilap.core.errors import Unavailable, Unsupported, reason_of
from dilap.core.images import ImageInput
from dilap.export.onnx.emitter import OPSET
from dilap.export.traced import quietly, traced

_IMAGES = "calibration.npy"


def write_network(path: Path, model: nn.Module, input_: ImageInput) -> None:
    """Write a network in f32, with the input `images` and the output `logits`. Raises Unsupported, Unavailable."""
    if importlib.util.find_spec("onnxscript") is None:
        raise Unavailable("exporting image networks to ONNX needs onnxscript; pip install 'dilap[onnxruntime]'")
    graph = traced(model, input_)
    with quietly():
        try:
            exported = torch.onnx.export(
                graph, dynamo=True, opset_version=OPSET, input_names=["images"], output_names=["logits"], verbose=False
            )
        except Exception as error:  # the exporter's own, of operators that ONNX lacks
            raise Unsupported(f"torch cannot write the model as ONNX: {reason_of(error)}") from error
    assert exported is not None
    for node in exported.model.graph:
        node.metadata_props.clear()  # stack traces with the paths of this machine
    exported.model.metadata_props.clear()
    exported.save(path)


@dataclass(frozen=True, kw_only=True)
class Quantisation:
    """How a runtime wants its 8 bits.

    `symmetric` activations have no zero point. `float_weights` keeps weights as floats before a pair of Q and DQ, and
    biases as floats.
    """

    symmetric: bool
    float_weights: bool


# x86 and Arm CPUs multiply unsigned by signed bytes; TensorRT takes signed ones without a zero point.
CPU = Quantisation(symmetric=False, float_weights=False)
TENSORRT = Quantisation(symmetric=True, float_weights=True)


def quantise_(path: Path, images: NDArray[np.float32], input_: ImageInput, how: Quantisation) -> None:
    """Quantise the file in f32, in place, with scales from what `images` make of it.

    Raises InvalidInput for images of another size.
    """
    floats, stored = path.with_name(f"f32-{path.name}"), path.with_name(_IMAGES)
    path.rename(floats)
    np.save(stored, np.stack(list(whole_batches(images, input_.shape))))
    try:
        called(
            quantised,
            floats,
            path,
            stored,
            runtime="onnxruntime",
            symmetric=how.symmetric,
            float_weights=how.float_weights,
        )
    finally:
        floats.unlink()
        stored.unlink()


def quantised(floats: Path, path: Path, images: Path, *, symmetric: bool, float_weights: bool) -> None:
    """Quantise the file `floats` into the file `path` with ONNX Runtime's own quantiser, in this process.

    `images` is an .npy file of batches. Channels have scales of their own, because the weights of depthwise
    convolutions differ a hundredfold between them.
    """
    logging.disable(logging.WARNING)  # advice to fold constants first, which is done
    library: Any = importlib.import_module("onnxruntime.quantization")
    batches = np.load(images, mmap_mode="r")

    class Reader(library.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._batches = iter(batches)

        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            batch = next(self._batches, None)
            return None if batch is None else {"images": np.ascontiguousarray(batch)}

    library.quantize_static(
        floats,
        path,
        Reader(),
        quant_format=library.QuantFormat.QDQ,
        per_channel=True,
        activation_type=library.QuantType.QInt8 if symmetric else library.QuantType.QUInt8,
        weight_type=library.QuantType.QInt8,
        extra_options={
            "ActivationSymmetric": symmetric,
            "WeightSymmetric": True,
            "AddQDQPairToWeight": float_weights,
            "QuantizeBias": not float_weights,
        },
    )


def round_to_f16_(path: Path) -> None:
    """Turn the file in f32, in place, into one that computes in f16 and has its input and output in f32."""
    float16: Any = importlib.import_module("onnxruntime.transformers.float16")
    onnx: Any = importlib.import_module("onnx")
    onnx.save(float16.convert_float_to_float16(onnx.load(path), keep_io_types=True), path)


def operators(path: Path) -> dict[str, int]:
    """Return how many nodes of every type a file has."""
    return dict(sorted(collections.Counter(node.op_type for node in ir.load(path).graph).items()))
