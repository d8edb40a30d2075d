"""Build what a search may choose from: widths that the runtime loads, the layout allows, and that cost less.

Where several precisions are on offer, every width comes in each of them, and the head has a choice of its own.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from dilap.core.costs import Costs, Counts, PairCost, Setting
from dilap.core.errors import Unsupported
from dilap.core.groups import HEAD, Block
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


def build_space(
    costs: Costs, architecture: Architecture, capabilities: Mapping[str, Capabilities], *, layout: Layout
) -> Space:
    """Return every sublayer with the widths that the runtime loads and that cost less than the next larger one.

    `capabilities` has what the runtime loads in every precision on offer: first the reference, which changes nothing of
    the quality, then those of ever lower quality. An empty name is the artifact's own precision, which is named where
    there are several: some runtimes give a head of which nothing is said more bits than the rest. Then the last choice
    is that of the head's precision.

    The layout `portable` removes no single heads and has FFN widths that are positive multiples of 256, which more
    runtimes load. `uniform` is for equal widths in every layer, with whole layers removed if the runtime loads that.
    The block that the network cannot do without keeps at least its narrowest width.
    """
    layer_removal = all(one.layer_removal for one in capabilities.values())
    choices = []
    for block in (*architecture.blocks, *[HEAD] * (len(capabilities) > 1)):
        offered = [
            (counts, precision) for precision, one in capabilities.items() for counts in _widths(block, one, layout)
        ]
        levels = [_level(costs, block, setting) for setting in costs.cheaper(block, offered)]
        if layout == "uniform" and block.groups:  # a layer is removed as a whole, and costs nothing then
            removed = Level(counts=(0,) * len(block.groups), cost=0.0)
            levels = [*(level for level in levels if not level.is_removed), *[removed] * layer_removal]
        kept = tuple(level for level in levels if block.name != architecture.required_block or not level.is_removed)
        choices.append(Choice(block=block, levels=kept))
    unties = all(one.untied_precisions for one in capabilities.values())
    couplings = tuple(_coupling(choices, names, cost) for names, cost in costs.pairs.items())
    return Space(
        architecture=architecture,
        choices=tuple(choices),
        fixed_cost=costs.constant,
        couplings=couplings,
        untied_precisions=unties or not architecture.tied_embeddings,
    )


def _widths(block: Block, capabilities: Capabilities, layout: Layout) -> list[Counts]:
    """Return the widths that the runtime loads and the layout allows; the head has one, which is empty."""
    if not block.groups:
        return [()]
    offered = capabilities.levels(block)
    return portable_levels(block, offered) if layout == "portable" else offered


def _level(costs: Costs, block: Block, setting: Setting) -> Level:
    """Return a level with its cost; a block that is removed has no precision."""
    counts, precision = setting
    level = Level(counts=counts, cost=costs.block(block, counts, precision), precision=precision)
    return replace(level, precision="") if level.is_removed else level


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
