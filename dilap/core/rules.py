"""Which widths can be used: what a runtime says that it loads, and what a layout allows a plan."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TypeVar

from dilap.core.costs import Counts
from dilap.core.errors import Unsupported
from dilap.core.groups import Block, Group
from dilap.core.plan import Plan
from dilap.core.shape import Architecture, LayerWidths

T = TypeVar("T")
PORTABLE_FFN_MULTIPLE = 256  # channels
_MOST_LEVELS = 12  # of attention, and of experts


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """The models that a runtime loads; searches are offered no other widths.

    `unsupported` is the reason why the runtime cannot load the family at all. `head_dim_multiple` and `hidden_multiple`
    are what its kernels and quantised tables need. `ffn_multiple` is the step of FFN widths that fills kernels and
    quantisation blocks: other widths load, but run no faster than the next multiple, so a search is not offered them.
    It does not concern experts, which are removed whole.
    `layer_removal` says whether whole layers may be removed, which no shape of what is left shows. `output_biases` says
    whether output projections may have a bias that the family lacks. `mixed_precisions` says whether parts of a model
    may have other precisions than the rest, `untied_precisions` whether a head that is tied to the embedding may have
    another one than the embedding. `max_tokens` is the longest sequence that
    artifacts for the runtime hold, even where the model itself holds more.
    """

    unsupported: str | None = None
    per_layer_widths: bool = True
    attention_removal: bool = True
    ffn_removal: bool = True
    layer_removal: bool = True
    ffn_multiple: int = 1
    head_dim_multiple: int = 1
    hidden_multiple: int = 1
    output_biases: bool = True
    mixed_precisions: bool = True
    untied_precisions: bool = True
    max_tokens: int | None = None

    def refusal(self, architecture: Architecture) -> str | None:
        """Return why a model of that shape is not loaded, naming what is wrong with it; None where it is loaded."""
        if self.unsupported:
            return self.unsupported
        sizes = (
            ("head_dim", architecture.head_dim, self.head_dim_multiple),
            ("hidden_size", architecture.hidden_size, self.hidden_multiple),
        )
        for name, size, multiple in sizes:
            if size % multiple:
                return f"{name} is {size}, and it needs a multiple of {multiple}"
        refusals = (self._layer_refusal(index, architecture) for index in range(len(architecture.layers)))
        return next(filter(None, refusals), None)

    def levels(self, block: Block) -> list[Counts]:
        """Return the widths of a block that are worth offering to a search, ascending, the full one included.

        Removal comes first, where the runtime loads it. Attention has at most 12 other levels: an even spread of the
        numbers of KV groups, with an even spread of the numbers of query slots. So have experts.
        """
        sizes = [group.num_units for group in block.groups]
        if block.kind == "attention":
            axes = [
                spread(range(group.least, group.num_units + 1), count)
                for group, count in zip(block.groups, _how_many(*sizes), strict=True)
            ]
            found = sorted(product(*axes), key=lambda level: (level[0] * level[1], level[0]))
            return [*[(0, 0)] * self.attention_removal, *found]
        if block.has_experts:
            widths = spread(range(block.main.least, sizes[0] + 1), _MOST_LEVELS)
        else:
            step = max(1, round(sizes[0] / 12 / self.ffn_multiple)) * self.ffn_multiple
            widths = sorted({*range(step, sizes[0], step), sizes[0]})
        return [(width,) for width in [0] * self.ffn_removal + widths]

    def _layer_refusal(self, index: int, architecture: Architecture) -> str | None:
        layer, first, experts = architecture.layers[index], architecture.layers[0], architecture.experts
        units, per_unit = ("channels", 1) if experts is None else ("experts", experts.num_channels)
        if not layer.num_heads and not self.attention_removal:
            return f"layers.{index}.kv_groups is removed, and it needs attention in every layer"
        if not layer.num_channels and not self.ffn_removal:
            return f"layers.{index}.{units} is removed, and it needs a feed-forward network in every layer"
        if self.per_layer_widths:
            return None
        kinds = (
            ("kv_groups", layer.num_kv_heads, first.num_kv_heads),
            ("query_slots", layer.num_heads, first.num_heads),
            (units, layer.num_channels // per_unit, first.num_channels // per_unit),
        )
        for kind, width, wanted in kinds:
            if width != wanted:
                heads = " query heads" if kind == "query_slots" else ""
                return (
                    f"layers.{index}.{kind} keeps {width}{heads} where layer 0 keeps {wanted}, and it needs equal"
                    " widths in every layer"
                )
        return None


@dataclass(frozen=True, kw_only=True)
class NetworkCapabilities:
    """What a runtime makes of image networks.

    `channel_multiple` is the step of numbers of channels that fills its kernels: others run no faster than the next
    multiple, so a method is not offered them. `switches` are the names of those of its switches that concern networks.
    `unsupported_texts` is why it holds no encoders of texts, None where it does.
    """

    channel_multiple: int = 1
    switches: frozenset[str] = frozenset()
    unsupported_texts: str | None = None


@dataclass(frozen=True, kw_only=True)
class WidthRules:
    """The plans that a runtime and a layout allow, whether or not a width makes the model faster.

    `ffn_multiple` is about channels that can be removed one by one, and not about experts.
    `attention_removal` and `ffn_removal` are about a layer that keeps its other sublayer, `layer_removal` about whole
    layers. `output_biases` says that output projections may get a bias that the family lacks.
    """

    ffn_multiple: int = 1
    head_pruning: bool = True
    attention_removal: bool = True
    ffn_removal: bool = True
    layer_removal: bool = True
    equal_widths: bool = False
    output_biases: bool = True

    def rounded(self, group: Group, wanted: int) -> int:
        """Return the allowed number of units nearest to `wanted`, at least the group's `least`."""
        if group.name.endswith(".channels"):
            wanted = max(1, round(wanted / self.ffn_multiple)) * self.ffn_multiple
        elif not (self.head_pruning or group.name.endswith(".experts")):
            wanted = group.num_units
        return min(max(group.least, wanted), group.num_units)

    def require(self, plan: Plan) -> None:
        """Raise Unsupported, naming the first layer that is not allowed."""
        kept = [widths for widths in plan.all_widths() if not widths.is_empty]
        if self.equal_widths and len(set(kept)) > 1:
            raise Unsupported("this method gives layers their own widths, the runtime or layout needs equal ones")
        for index, (dense, widths) in enumerate(zip(plan.architecture.layers, plan.all_widths(), strict=True)):
            multiple = self.ffn_multiple if plan.architecture.experts is None else 1
            if widths != dense and (reason := self._refusal(dense, widths, ffn_multiple=multiple)):
                raise Unsupported(f"layer {index}: this runtime or layout loads no {reason}; choose another method")

    def _refusal(self, dense: LayerWidths, widths: LayerWidths, *, ffn_multiple: int) -> str | None:
        if widths.is_empty:
            return None if self.layer_removal else "model without this layer"
        if widths.num_heads == 0 and not self.attention_removal:
            return "layer without attention"
        if widths.num_channels == 0 and not self.ffn_removal:
            return "layer without a feed-forward network"
        if 0 < widths.num_heads < dense.num_heads and not self.head_pruning:
            return "layer with fewer heads"
        if widths.num_channels not in (0, dense.num_channels) and widths.num_channels % ffn_multiple:
            return f"{widths.num_channels} channels but multiples of {ffn_multiple}"
        return None


def _how_many(num_groups: int, num_slots: int) -> tuple[int, int]:
    """Return how many numbers of KV groups and of query slots to offer, such that their product is no more than 12.

    Of the two, whichever is larger falls; KV groups are preferred, because each also takes its keys and values along.
    """
    while num_groups * num_slots > _MOST_LEVELS:
        if num_groups > num_slots:
            num_groups -= 1
        else:
            num_slots -= 1
    return num_groups, num_slots


def portable_levels(block: Block, levels: Sequence[Counts]) -> list[Counts]:
    """Return the widths of a block that more runtimes load: no single heads, and many whole multiples of channels.

    Experts, which are not cut, may be of any number.
    """
    full = tuple(group.num_units for group in block.groups)
    if block.kind == "attention":
        return [level for level in levels if level == full or not level[0]]
    if block.has_experts:
        return [level for level in levels if level[0]]
    return [*((width,) for width in range(PORTABLE_FFN_MULTIPLE, full[0], PORTABLE_FFN_MULTIPLE)), full]


def spread(values: Sequence[T], count: int) -> list[T]:
    """Return at most `count` of the values, evenly spread, the first and the last included; `count` is at least 2."""
    if len(values) <= count:
        return list(values)
    return [values[round(index * (len(values) - 1) / (count - 1))] for index in range(count)]
