"""The quantisations 8da4w, of 4-bit weights in groups of 32, and 8da8w, of 8-bit weights with one scale a row.

Activations have 8 bits and are scaled per token at run time. In 8da4w, a matrix whose rows are no multiple of a group
has 8 bits all the same. So have head and embedding, unless they are named: a token reads only one row of the embedding,
so that 4 bits would make the file smaller and nothing faster.
"""

import hashlib

import torch
from executorch.backends.xnnpack.operators.node_visitor import NodeVisitor
from torch import nn
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxUnpackedToInt8Tensor, quantize_
from torchao.quantization.granularity import PerAxis, PerGroup
from torchao.quantization.quant_primitives import MappingType

from dilap.export.executorch.header import GROUP_SIZE
from dilap.models.rounding import is_on_grid

_INT4: torch.dtype = torch.int4  # type: ignore[attr-defined] # torch's stubs lack it


def quantise_linear_(linear: nn.Linear, *, precision: str) -> None:
    """Quantise a matrix in place; in torch it then computes what XNNPACK does, up to the order of summation.

    By default the largest weight of a group lies halfway between two codes and is changed; the scale that leaves it as
    it is suits weights that were rounded before.
    """
    grouped = precision == "8da4w" and linear.in_features % GROUP_SIZE == 0
    is_kept = grouped and is_on_grid(linear.weight, "8da4w")
    config = Int8DynamicActivationIntxWeightConfig(
        weight_dtype=_INT4 if grouped else torch.int8,
        weight_granularity=PerGroup(GROUP_SIZE) if grouped else PerAxis(0),
        weight_mapping_type=MappingType.SYMMETRIC_NO_CLIPPING_ERR if is_kept else MappingType.SYMMETRIC,
    )
    # The scales are the plain ones: torchao's half-quadratic ones cost SmolLM2-135M 0.15 dB (6.70 for 6.85).
    quantize_(linear, config, filter_fn=None)
    if grouped and isinstance(linear.weight, IntxUnpackedToInt8Tensor):
        linear.weight.scale.copy_(linear.weight.scale.bfloat16())  # as XNNPACK keeps them


def quantised_rows(table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a table in 8 bits, and the scale of every row."""
    scales = table.abs().amax(1).clamp(min=1e-12) / 127
    return (table / scales[:, None]).round().to(torch.int8), scales


def quantised_groups(table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a table in 4 bits, two in a byte, and the scale of every group of every row, as a matrix would have them.

    The first of two has the upper half of the byte, and 8 stands for 0.
    """
    rows, columns = table.shape
    linear = nn.Linear(columns, rows, bias=False, device="meta")
    linear.weight = nn.Parameter(table, requires_grad=False)
    quantise_linear_(linear, precision="8da4w")
    assert isinstance(linear.weight, IntxUnpackedToInt8Tensor)
    pairs = (linear.weight.qdata + 8).to(torch.uint8).view(rows, -1, 2)
    return pairs[..., 0] << 4 | pairs[..., 1], linear.weight.scale.float()


def constants(linear: nn.Linear) -> list[tuple[str, bytes]]:
    """Return what a delegate stores for a matrix (weights, scales, bias), with the names that it finds them by."""
    weight, found = linear.weight, []
    if isinstance(weight, IntxUnpackedToInt8Tensor):
        grouped = weight.target_dtype == _INT4
        found.append(("", NodeVisitor.convert_to_qc4w(weight.qdata) if grouped else weight.qdata))
        found.append(("scale_", weight.scale.to(torch.bfloat16 if grouped else torch.float32)))
    else:
        found.append(("", weight))
    if linear.bias is not None:
        found.append(("", linear.bias))
    contents = ((prefix, _bytes(tensor)) for prefix, tensor in found)
    return [(prefix + hashlib.sha256(content).hexdigest(), content) for prefix, content in contents]


def _bytes(tensor: torch.Tensor) -> bytes:
    array: bytes = tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
    return array
