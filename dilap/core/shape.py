"""The widths of a network, without its weights, and what follows from them: parameters, FLOPs, bytes."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from dilap.core.bounds import MAX_LAYERS, MAX_TOKENS, MAX_WIDTH
from dilap.core.groups import Block, Group

# Bits per weight, its share of the scales included: 32 weights share one, in f16 (GGUF, ExecuTorch) or f32 (ONNX).
PRECISION_BITS: Mapping[str, float] = {
    "f32": 32,
    "f16": 16,
    "bf16": 16,
    "q8_0": 8.5,
    "q5_0": 5.5,
    "iq4_nl": 4.5,
    "q4_0": 4.5,
    "8da8w": 8,  # one scale a row
    "8da4w": 4.5,
    "int8": 9,
    "int4": 5,
}
UNMIXED: Mapping[str, str] = MappingProxyType({})  # precisions of parts where all have that of the whole


def by_quality(precisions: Iterable[str]) -> tuple[str, ...]:
    """Return precisions, each once, of ever fewer bits; of two with as many bits, the better one comes first."""
    names = list(PRECISION_BITS)
    return tuple(sorted(set(precisions), key=lambda one: (-PRECISION_BITS[one], names.index(one))))


@dataclass(frozen=True, kw_only=True)
class LayerWidths:
    """Widths of one decoder layer; 0 heads mean no attention, 0 channels no feed-forward network.

    Where the feed-forward network consists of experts, the channels are those of all of them together.
    """

    num_heads: int
    num_kv_heads: int
    num_channels: int

    def __post_init__(self) -> None:
        widths = (self.num_heads, self.num_kv_heads, self.num_channels)
        if min(widths) < 0 or max(widths) > MAX_WIDTH:
            raise ValueError(f"a width is between 0 and {MAX_WIDTH:,}, got {self}")
        if (self.num_heads == 0) != (self.num_kv_heads == 0):
            raise ValueError(f"heads without KV heads, or the reverse, in {self}")
        if self.num_kv_heads and self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads is no multiple of num_kv_heads in {self}")

    @property
    def is_empty(self) -> bool:
        return self.num_heads == 0 and self.num_channels == 0


@dataclass(frozen=True, kw_only=True)
class Experts:
    """How the channels of every feed-forward network are divided into experts.

    An expert is a network of `num_channels`; a token is sent to the `num_active` experts that a router prefers.
    `normed` says whether the weights of their outputs are made to sum to 1.
    """

    num_channels: int
    num_active: int
    normed: bool

    def __post_init__(self) -> None:
        if not 0 < self.num_channels <= MAX_WIDTH or not 0 < self.num_active <= MAX_WIDTH:
            raise ValueError(f"experts have channels, and tokens are sent to some of them, got {self}")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The shape of a decoder-only model, without its weights.

    `num_positions` is the number of learned position embeddings (0 with rotary ones). `norm_vectors` is the number of
    vectors of one norm (1: RMSNorm, 2: LayerNorm), `sublayer_norms` how many norms a sublayer has, before or
    behind it. `ffn_matrices` is 3 with a gate, else 2. `ffn_bias` says whether the feed-forward matrices before the
    activation have biases, `ffn_out_bias` whether the one after it has. `qk_norm` says whether queries and keys are
    normalised, every head by itself (True: Qwen3) or all heads in one (`joint`: OLMo 2). `experts` is None where every
    token uses all channels.
    """

    family: str
    hidden_size: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool
    ffn_matrices: int
    norm_vectors: int
    sublayer_norms: int = 1
    qkv_bias: bool
    out_bias: bool
    ffn_bias: bool
    ffn_out_bias: bool = False
    qk_norm: Literal[False, True, "joint"]
    num_positions: int
    layers: tuple[LayerWidths, ...]
    experts: Experts | None = None

    def __post_init__(self) -> None:
        for name in ("hidden_size", "head_dim", "vocab_size"):
            if not 0 < getattr(self, name) <= MAX_WIDTH:
                raise ValueError(f"{name} is from 1 to {MAX_WIDTH:,}, got {getattr(self, name)}")
        if self.ffn_matrices not in (2, 3) or self.norm_vectors not in (0, 1, 2):
            raise ValueError(f"{self.ffn_matrices} feed-forward matrices, {self.norm_vectors} norm vectors")
        if not 0 <= self.num_positions <= MAX_TOKENS or len(self.layers) > MAX_LAYERS:
            raise ValueError(f"{self.num_positions} positions, {len(self.layers)} layers")
        if self.experts is not None:
            for index, layer in enumerate(self.layers):
                _require_experts(index, layer, self.experts)

    @property
    def envelope(self) -> "Architecture":
        """The narrowest architecture of equal layers, as many as this one has, in which all of its layers fit."""
        num_kv_heads = max((layer.num_kv_heads for layer in self.layers), default=0)
        ratio = max((layer.num_heads // layer.num_kv_heads for layer in self.layers if layer.num_kv_heads), default=0)
        widest = LayerWidths(
            num_heads=num_kv_heads * ratio,
            num_kv_heads=num_kv_heads,
            num_channels=max((layer.num_channels for layer in self.layers), default=0),
        )
        return replace(self, layers=(widest,) * len(self.layers))

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The sublayers that can be narrowed or removed, layer by layer, attention first.

        A KV group is a KV head with its query heads; a query slot is one query head of every KV group, the same in
        each. Single query heads cannot be removed, because every runtime maps query head h to KV head h // ratio. With
        one norm over all heads they stay or go together: without some of them it would divide the others by another
        number, on every token, and no weights make up for that. A token is sent to as many experts as ever, so no fewer
        stay, unless all go.
        """
        found: list[Block] = []
        for index, layer in enumerate(self.layers):
            if layer.num_heads:
                sizes = {"kv_groups": layer.num_kv_heads, "query_slots": layer.num_heads // layer.num_kv_heads}
                found.append(_block(index, "attention", sizes, least=sizes if self.qk_norm == "joint" else {}))
            if layer.num_channels and self.experts is not None:
                sizes = {"experts": layer.num_channels // self.experts.num_channels}
                found.append(_block(index, "ffn", sizes, least={"experts": self.experts.num_active}))
            elif layer.num_channels:
                found.append(_block(index, "ffn", {"channels": layer.num_channels}, least={}))
        return tuple(found)

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of what may have a precision of its own: the blocks, the head and the embedding."""
        return (*(block.name for block in self.blocks), "head", "embedding")

    def parts_left(self, counts: Mapping[str, int]) -> dict[str, str]:
        """Return the parts of which something is left, by name, and their names where empty layers are deleted."""
        found = {"head": "head", "embedding": "embedding"}
        kept = [(index, widths) for index, widths in enumerate(self.widths_at(counts)) if not widths.is_empty]
        for new, (old, widths) in enumerate(kept):
            sizes = {"attention": widths.num_heads, "ffn": widths.num_channels}
            found |= {f"layers.{old}.{kind}": f"layers.{new}.{kind}" for kind, size in sizes.items() if size}
        return found

    def widths_at(self, counts: Mapping[str, int]) -> tuple[LayerWidths, ...]:
        """Return the widths of every layer when `counts` units are left in each group, empty layers included.

        A group that `counts` does not name is one that its layer does not have.
        """
        return tuple(self._layer_at(f"layers.{index}", counts) for index in range(len(self.layers)))

    def pruned(self, counts: Mapping[str, int]) -> "Architecture":
        """Return the architecture with `counts` units left in each group, without the layers that are empty then."""
        return replace(self, layers=tuple(widths for widths in self.widths_at(counts) if not widths.is_empty))

    def _layer_at(self, name: str, counts: Mapping[str, int]) -> LayerWidths:
        num_kv_heads = counts.get(f"{name}.kv_groups", 0)
        return LayerWidths(
            num_heads=num_kv_heads * counts.get(f"{name}.query_slots", 0),
            num_kv_heads=num_kv_heads,
            num_channels=self._num_channels(name, counts),
        )

    def _num_channels(self, name: str, counts: Mapping[str, int]) -> int:
        if self.experts is None:
            return counts.get(f"{name}.channels", 0)
        return counts.get(f"{name}.experts", 0) * self.experts.num_channels

    def widths_of(self, block: Block, counts: Sequence[int]) -> LayerWidths:
        """Return the widths of a layer that has nothing but this block, with so many units left of its groups."""
        left = dict(zip((group.name for group in block.groups), counts, strict=True))
        return self._layer_at(f"layers.{block.layer}", left)

    @property
    def required_block(self) -> str:
        """Name of the block that no plan removes, the first attention; empty where there is none.

        A model needs at least one attention, and several runtimes need it in the first layer.
        """
        return next((block.name for block in self.blocks if block.kind == "attention"), "")

    def require_network(self, counts: Mapping[str, int]) -> None:
        """Raise ValueError where no decoder can have `counts` units in its groups."""
        for name, count in counts.items():
            if not count and name.endswith("query_slots"):
                raise ValueError(f"{name}: an attention sublayer is removed through its kv_groups, not its slots")
        if not any(layer.num_heads for layer in self.widths_at(counts)):
            raise ValueError("no layer keeps attention: the tokens could not see one another")

    def attention_parameters(self, layer: LayerWidths) -> int:
        """Return the number of weights and biases of a layer's attention sublayer, its norms included."""
        if layer.num_heads == 0:
            return 0
        query, key_value = layer.num_heads * self.head_dim, 2 * layer.num_kv_heads * self.head_dim
        return (
            (2 * query + key_value) * self.hidden_size
            + (query + key_value) * self.qkv_bias
            + self.hidden_size * self.out_bias
            + self._qk_norm_parameters(layer)
            + self.sublayer_norms * self.norm_vectors * self.hidden_size
        )

    def _qk_norm_parameters(self, layer: LayerWidths) -> int:
        num_heads = layer.num_heads + layer.num_kv_heads if self.qk_norm == "joint" else 2
        return num_heads * self.head_dim if self.qk_norm else 0

    def ffn_parameters(self, layer: LayerWidths) -> int:
        """Return the number of weights and biases of a layer's feed-forward sublayer, norms and router included."""
        if layer.num_channels == 0:
            return 0
        return (
            self.ffn_matrices * self.hidden_size * layer.num_channels
            + (self.ffn_matrices - 1) * layer.num_channels * self.ffn_bias
            + self.hidden_size * self.ffn_out_bias
            + self.sublayer_norms * self.norm_vectors * self.hidden_size
            + self._router_parameters(layer)
        )

    def active_ffn_parameters(self, layer: LayerWidths) -> int:
        """Return the number of weights and biases of a layer's feed-forward sublayer with which one token computes."""
        active = replace(layer, num_channels=self.active_channels(layer))
        unused_rows = self._router_parameters(layer) - self._router_parameters(active)  # the router is read whole
        return self.ffn_parameters(active) + unused_rows

    def active_channels(self, layer: LayerWidths) -> int:
        """Return the number of channels of a layer's feed-forward network with which one token computes."""
        if self.experts is None:
            return layer.num_channels
        return min(layer.num_channels, self.experts.num_active * self.experts.num_channels)

    def ffn_words(self, layer: LayerWidths) -> str:
        """Return in words how wide a layer's feed-forward network is."""
        if self.experts is None:
            return f"{layer.num_channels} channels"
        num_channels = self.experts.num_channels
        return f"{layer.num_channels // num_channels} experts of {num_channels} channels"

    def _router_parameters(self, layer: LayerWidths) -> int:
        return 0 if self.experts is None else self.hidden_size * layer.num_channels // self.experts.num_channels

    @property
    def _layer_parameters(self) -> int:
        return sum(self.attention_parameters(layer) + self.ffn_parameters(layer) for layer in self.layers)

    @property
    def _active_parameters(self) -> int:
        """The number of weights and biases of all layers with which one token computes."""
        return sum(self.attention_parameters(layer) + self.active_ffn_parameters(layer) for layer in self.layers)

    @property
    def num_parameters(self) -> int:
        """Number of all parameters; a head that is tied to the embeddings is counted once."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return embeddings + self._layer_parameters + (self.num_positions + self.norm_vectors) * self.hidden_size

    def decode_flops(self, *, context: int) -> int:
        """Return the FLOPs of one token that attends to `context` tokens; a multiply-add is two."""
        weights = self.vocab_size * self.hidden_size + self._active_parameters
        heads = sum(layer.num_heads for layer in self.layers)
        return 2 * weights + 4 * heads * self.head_dim * context

    def decode_bytes(
        self, *, context: int, precision: str, precisions: Mapping[str, str] = UNMIXED, cache_bits: float
    ) -> int:
        """Return the bytes that are read or written for one token after `context` others.

        `precisions` has, by name, the precision of the parts that do not have `precision`.

        They are all weights but those of experts that the token is not sent to, the keys and values of the earlier
        tokens, and those of the new one. The head is read whole, tied to the embeddings or not; activations stay in the
        processor's caches and are not counted.
        """
        weights = self._weight_bytes(self.active_ffn_parameters, precision, precisions)
        return weights + round((context + 1) * self._cache_row_bits(cache_bits) / 8)

    def prefill_bytes(
        self, *, prompt_tokens: int, precision: str, precisions: Mapping[str, str] = UNMIXED, cache_bits: float
    ) -> int:
        """Return the bytes that are read or written for a prompt, with parts in `precisions` as in `decode_bytes`.

        They are all weights once, one embedding per token, and the keys and values, written once and read once. The
        tokens of a prompt together are taken to be sent to all experts.
        """
        embedding_bits = PRECISION_BITS[precisions.get("embedding", precision)]
        embeddings = int(prompt_tokens * self.hidden_size * embedding_bits / 8)
        cached = round(2 * prompt_tokens * self._cache_row_bits(cache_bits) / 8)
        return self._weight_bytes(self.ffn_parameters, precision, precisions) + embeddings + cached

    def _weight_bytes(
        self, ffn_parameters: Callable[[LayerWidths], int], precision: str, precisions: Mapping[str, str]
    ) -> int:
        """Return the bytes of the head and of all layers, which have so many `ffn_parameters` each."""
        weights = {"head": self.vocab_size * self.hidden_size}
        for index, layer in enumerate(self.layers):
            weights[f"layers.{index}.attention"] = self.attention_parameters(layer)
            weights[f"layers.{index}.ffn"] = ffn_parameters(layer)
        bits = sum(count * PRECISION_BITS[precisions.get(part, precision)] for part, count in weights.items())
        return int(bits / 8)

    def _cache_row_bits(self, cache_bits: float) -> float:
        """Return the number of bits of one token's keys and values in all layers."""
        return 2 * cache_bits * self.head_dim * sum(layer.num_kv_heads for layer in self.layers)

    def prefill_flops(self, *, prompt_tokens: int) -> int:
        """Return the FLOPs of a prompt, with causal attention and the head at the last token; a multiply-add is two."""
        head = self.vocab_size * self.hidden_size
        weights = self._active_parameters
        heads = sum(layer.num_heads for layer in self.layers)
        pairs = prompt_tokens * (prompt_tokens + 1) // 2
        return 2 * (weights * prompt_tokens + head) + 4 * heads * self.head_dim * pairs


def _block(layer: int, kind: str, sizes: Mapping[str, int], *, least: Mapping[str, int]) -> Block:
    groups = tuple(
        Group(name=f"layers.{layer}.{name}", num_units=size, least=least.get(name, 1)) for name, size in sizes.items()
    )
    return Block(name=f"layers.{layer}.{kind}", layer=layer, kind=kind, groups=groups)


def _require_experts(index: int, layer: LayerWidths, experts: Experts) -> None:
    """Raise ValueError unless the channels of a layer are those of whole experts, enough of them for a token."""
    num_experts, rest = divmod(layer.num_channels, experts.num_channels)
    if rest or 0 < num_experts < experts.num_active:
        raise ValueError(
            f"layer {index}: {layer.num_channels} channels are not {experts.num_active} or more experts of "
            f"{experts.num_channels} channels"
        )
