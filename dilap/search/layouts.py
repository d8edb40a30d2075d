"""From measured costs to what a search may choose: cut by the runtime, by the layout and by what pays."""

import math
from collections.abc import Sequence
from typing import Literal

from dilap.backends import Capabilities
from dilap.core.errors import Unsupported
from dilap.core.shape import Architecture
from dilap.core.space import Choice, Level, Space, WidthRules
from dilap.profilers.tables.fit import LatencyModel
from dilap.profilers.tables.probes import AttentionLevel
from dilap.search.parameters import ParameterCosts

Costs = LatencyModel | ParameterCosts
Layout = Literal["free", "portable", "uniform"]
LAYOUTS: tuple[Layout, ...] = ("free", "portable", "uniform")
_PORTABLE_FFN_MULTIPLE = 256


def default_layout(capabilities: Capabilities) -> Layout:
    """The widest layout that the runtime loads."""
    return "free" if capabilities.per_layer_widths else "uniform"


def require_layout(layout: Layout, capabilities: Capabilities) -> None:
    """Raises Unsupported where the runtime cannot load plans of that layout."""
    if layout != "uniform" and not capabilities.per_layer_widths:
        raise Unsupported(
            f"this runtime needs equal widths in every layer for this family: use --layout uniform, not {layout}"
        )


def width_rules(layout: Layout, capabilities: Capabilities) -> WidthRules:
    """What methods that choose widths of their own have to keep to."""
    portable, uniform = layout == "portable", layout == "uniform"
    return WidthRules(
        ffn_multiple=math.lcm(capabilities.ffn_multiple, _PORTABLE_FFN_MULTIPLE if portable else 1),
        head_pruning=not portable,
        attention_removal=capabilities.attention_removal and not uniform,
        ffn_removal=capabilities.ffn_removal and not (portable or uniform),
        equal_widths=uniform,
        output_biases=capabilities.output_biases and not portable,
    )


def build_space(
    model: Costs,
    *,
    attention_levels: Sequence[AttentionLevel],
    ffn_levels: Sequence[int],
    layout: Layout,
) -> Space:
    """Every sublayer with its measurably faster levels.

    `portable` keeps heads whole and FFN widths at positive multiples of 256, which more runtimes load; `uniform` is for
    equal widths in every layer and whole layers removed. The first layer always keeps attention: a model without any
    is none, and several runtimes need it just there.
    """
    architecture = model.architecture
    dense = architecture.layers[0]
    full = (dense.num_heads, dense.num_kv_heads)
    if layout == "portable":
        attention_levels = [level for level in attention_levels if level in (full, (0, 0))]
        multiples = range(_PORTABLE_FFN_MULTIPLE, dense.num_channels, _PORTABLE_FFN_MULTIPLE)
        ffn_levels = [*multiples, dense.num_channels]
    attention = [_attention_level(model, *level) for level in model.measurable_attention_levels(attention_levels)]
    ffn = [
        Level(num_channels=width, seconds=model.ffn_seconds(width)) for width in model.measurable_ffn_levels(ffn_levels)
    ]
    if layout == "uniform":  # a layer goes as a whole, and then costs nothing
        attention = [*(level for level in attention if not level.is_removed), Level(seconds=0.0)]
        ffn = [*(level for level in ffn if not level.is_removed), Level(seconds=0.0)]
    choices = []
    for layer in range(len(architecture.layers)):
        kept = [level for level in attention if layer or not level.is_removed]
        choices.append(Choice(layer=layer, kind="attention", levels=tuple(kept)))
        choices.append(Choice(layer=layer, kind="ffn", levels=tuple(ffn)))
    return Space(architecture=architecture, choices=tuple(choices), fixed_seconds=model.fixed_seconds)


def _attention_level(model: Costs, num_heads: int, num_kv_heads: int) -> Level:
    return Level(
        num_kv_groups=num_kv_heads,
        num_query_slots=num_heads // num_kv_heads if num_kv_heads else 0,
        seconds=model.attention_seconds(num_heads, num_kv_heads),
    )


def describe(architecture: Architecture) -> str:
    """One line about a dense model's shape."""
    layer = architecture.layers[0]
    return (
        f"{architecture.family}, {len(architecture.layers)} layers, hidden {architecture.hidden_size}, "
        f"{layer.num_heads} heads, {layer.num_kv_heads} KV heads, {layer.num_channels} channels, "
        f"{architecture.num_parameters / 1e6:.1f} M parameters"
    )
