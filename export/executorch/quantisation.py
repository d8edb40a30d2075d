"""8da4w: 4-bit weights in groups of 32, activations in 8 bits, scaled token by token at run time.

The head is in 8 bits a row, as is a matrix whose rows no group divides; the embedding too, because a token reads one
row of it, so that 4 bits would make the file smaller and nothing faster. Scales are the plain ones: torchao's
half-quadratic ones cost SmolLM2-135M 0.15 dB (6.70 for 6.85).
"""

import hashlib

import torch
from executorch.backends.xnnpack.operators.node_visitor import NodeVisitor
from torch import nn
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxUnpackedToInt8Tensor, quantize_
from torchao.quantization.granularity import PerAxis, PerGroup

from dilap.export.executorch.header import GROUP_SIZE

_INT4: torch.dtype = torch.int4  # type: ignore[attr-defined] # torch's stubs lack it


def quantise_linear_(linear: nn.Linear, *, is_head: bool) -> None:
    """Give a matrix its types; called in torch it computes what XNNPACK does, up to the order of summation."""
    grouped = not is_head and linear.in_features % GROUP_SIZE == 0
    config = Int8DynamicActivationIntxWeightConfig(
        weight_dtype=_INT4 if grouped else torch.int8,
        weight_granularity=PerGroup(GROUP_SIZE) if grouped else PerAxis(0),
    )
    quantize_(linear, config, filter_fn=None)
    if grouped and isinstance(linear.weight, IntxUnpackedToInt8Tensor):
        linear.weight.scale.copy_(linear.weight.scale.bfloat16())  # as XNNPACK keeps them


def quantised_rows(table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A table in 8 bits, and the scale of every row."""
    scales = table.abs().amax(1).clamp(min=1e-12) / 127
    return (table / scales[:, None]).round().to(torch.int8), scales


def constants(linear: nn.Linear) -> list[tuple[str, bytes]]:
    """What a delegate stores for a matrix, under the names that it finds it by: weights, scales, bias."""
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
