"""Build what a search may choose from: widths that the runtime loads, the layout allows, and that cost less."""

import math
from collections.abc import Sequence
from typing import Literal

from dilap.core.costs import Costs, PairCost
from dilap.core.errors import Unsupported
from dilap.core.rules import PORTABLE_FFN_MULTIPLE, Capabilities, WidthRules, portable_levels
from dilap.core.shape import Architecture
from dilap.core.space import Choice, Coupling, Level, Space

Layout = Literal["free", "portable", "uniform"]
LAYOUTS: tuple[Layout, ...] = ("free", "portable", "uniform")


def default_layout(capabilities: Capabilities) -> Layout:
    """Return the least restrictive layout that the runtime loads."""
    return "free" if capabilities.per_layer_widths else "uniform"


def require_layout(layout: Layout, capabilities: Capabilities) -> None:
    """Raise Unsupported where the runtime cannot load plans of that layout."""
    if layout != "uniform" and not capabilities.per_layer_widths:
        raise Unsupported(
            f"this runtime needs equal widths in every layer for this family: use --layout uniform, not {layout}"
        )


def width_rules(layout: Layout, capabilities: Capabilities) -> WidthRules:
    """Return the rules for methods that choose widths of their own instead of measured levels."""
    portable, uniform = layout == "portable", layout == "uniform"
    return WidthRules(
        ffn_multiple=math.lcm(capabilities.ffn_multiple, PORTABLE_FFN_MULTIPLE if portable else 1),
        head_pruning=not portable,
        attention_removal=capabilities.attention_removal and not uniform,
        ffn_removal=capabilities.ffn_removal and not (portable or uniform),
        layer_removal=capabilities.layer_removal,
        equal_widths=uniform,
        output_biases=capabilities.output_biases and not portable,
    )


def build_space(costs: Costs, architecture: Architecture, capabilities: Capabilities, *, layout: Layout) -> Space:
    """Return every sublayer with the widths that the runtime loads and that cost less than the next larger one.

    The layout `portable` removes no single heads and has FFN widths that are positive multiples of 256, which more
    runtimes load. `uniform` is for equal widths in every layer, with whole layers removed if the runtime loads that.
    The block that the network cannot do without keeps at least its narrowest width.
    """
    choices = []
    for block in architecture.blocks:
        offered = capabilities.levels(block)
        if layout == "portable":
            offered = portable_levels(block, offered)
        levels = [Level(counts=one, cost=costs.block(block, one)) for one in costs.cheaper(block, offered)]
        if layout == "uniform":  # a layer is removed as a whole, and costs nothing then
            removed = Level(counts=(0,) * len(block.groups), cost=0.0)
            levels = [*(level for level in levels if not level.is_removed), *[removed] * capabilities.layer_removal]
        kept = tuple(level for level in levels if block.name != architecture.required_block or not level.is_removed)
        choices.append(Choice(block=block, levels=kept))
    couplings = tuple(_coupling(choices, names, cost) for names, cost in costs.pairs.items())
    return Space(architecture=architecture, choices=tuple(choices), fixed_cost=costs.constant, couplings=couplings)


def _coupling(choices: Sequence[Choice], names: tuple[str, str], cost: PairCost) -> Coupling:
    """Return the costs of all pairs of levels of the two choices with these names."""
    first, second = (next(index for index, choice in enumerate(choices) if choice.name == name) for name in names)
    rows = (tuple(cost(one.counts, two.counts) for two in choices[second].levels) for one in choices[first].levels)
    return Coupling(first=first, second=second, costs=tuple(rows))


def describe(architecture: Architecture) -> str:
    """Return one line about a dense model's shape."""
    layer = architecture.layers[0]
    return (
        f"{architecture.family}, {len(architecture.layers)} layers, hidden {architecture.hidden_size}, "
        f"{layer.num_heads} heads, {layer.num_kv_heads} KV heads, {architecture.ffn_words(layer)}, "
        f"{architecture.num_parameters / 1e6:.1f} M parameters"
    )
