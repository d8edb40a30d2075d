"""Which GGUF architecture holds a model, its tensors in order, and its metadata; no weights here."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from dilap.core.errors import Unsupported
from dilap.core.numerics import Numerics, Rotary
from dilap.core.shape import Architecture, Experts, LayerWidths
from dilap.export.gguf.gemma import GEMMA, Gemma, Metadata
from dilap.models.families import families
from dilap.models.families.family import GATE, UP, Family

# deci drops the attention of a layer whose FFN width is 0, so such a layer gets an FFN of zeros: 32 channels are
# the least that q8_0 and q4_0 blocks hold, and add nothing to the residual stream.
ZERO_CHANNELS = 32
# Divides a rotary frequency to an angle of nothing; infinity would be a damaged tensor to llama.cpp.
_UNTURNED = 1e30
_NORM_ROTARY = ("llama", "deci", "smollm3")  # architectures with the NORM rotary embedding (see TensorSpec)


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One tensor of the file: its torch name and a factor, or the constant that fills it.

    `part` is what a matrix has its precision from (see `dilap.core.precisions`); everything else has none.
    `rotary_heads` is the number of heads whose rows are reordered, because llama.cpp's NORM rotary embedding
    turns neighbouring channels where transformers turns the two halves of a head.
    """

    name: str
    shape: tuple[int, ...]
    part: str = ""
    source: str = ""
    constant: float = 0.0
    rotary_heads: int = 0
    factor: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How one model lies in a GGUF file; `name` is llama.cpp's architecture.

    `has_head` says that the head is a tensor of its own even where it is tied to the embedding.
    """

    name: str
    architecture: Architecture
    numerics: Numerics
    rotary: Rotary
    has_head: bool = False

    @property
    def rope_factors(self) -> tuple[float, ...]:
        """Divisors of the default rotary frequencies, which hold every scaling; none where there is none."""
        rotary, head_dim = self.rotary, self.architecture.head_dim
        if rotary.kind == "default" or self._gemma:
            return ()
        default = (rotary.base ** (-2 * i / head_dim) for i in range(head_dim // 2))
        pairs = zip(default, rotary.frequencies, strict=True)
        return tuple(plain / scaled if scaled else _UNTURNED for plain, scaled in pairs)

    @property
    def layers(self) -> tuple[LayerWidths, ...]:
        """The widths in the file: those of the model, plus the zeros that deci needs."""
        return tuple(_held(widths, first=i == 0) for i, widths in enumerate(self.architecture.layers))

    def metadata(self) -> Metadata:
        """Keys without their architecture prefix; widths are arrays only where llama.cpp reads arrays."""
        architecture, values, rotary = self.architecture, self.numerics, self.rotary
        columns = {
            "attention.head_count": [layer.num_heads for layer in self.layers],
            "attention.head_count_kv": [layer.num_kv_heads for layer in self.layers],
            "feed_forward_length": [architecture.active_channels(layer) for layer in self.layers],
        }
        return {
            "block_count": len(self.layers),
            "context_length": values.context_length,
            "embedding_length": architecture.hidden_size,
            "vocab_size": architecture.vocab_size,
            "attention.layer_norm_rms_epsilon": values.norm_eps,
            "attention.key_length": architecture.head_dim,
            "attention.value_length": architecture.head_dim,
            "rope.dimension_count": architecture.head_dim,
            "rope.freq_base": rotary.base,
            "rope.scaling.attn_factor": rotary.magnitude,
            **self._expert_keys(),
            **{key: widths if self.name == "deci" else widths[0] for key, widths in columns.items()},
            **(self._gemma.metadata(values) if self._gemma else {}),
        }

    def _expert_keys(self) -> dict[str, int]:
        experts = self.architecture.experts
        if experts is None:
            return {}
        return {
            "expert_count": self.layers[0].num_channels // experts.num_channels,
            "expert_used_count": experts.num_active,
            "expert_feed_forward_length": experts.num_channels,
        }

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader must know of the file."""
        return self._gemma.notes(self.numerics) if self._gemma else ()

    def tensors(self) -> Iterator[TensorSpec]:
        """Every tensor, in file order."""
        hidden, vocab, family = self.architecture.hidden_size, self.architecture.vocab_size, self._family
        yield TensorSpec(
            name="token_embd.weight", shape=(vocab, hidden), part="embedding", source=f"{family.embeddings}.weight"
        )
        if self.rope_factors:
            yield TensorSpec(name="rope_freqs.weight", shape=(self.architecture.head_dim // 2,))
        for index, (widths, held) in enumerate(zip(self.architecture.layers, self.layers, strict=True)):
            yield from self._attention(index, held, zero=widths.num_heads == 0)
            yield from self._ffn(index, held, zero=widths.num_channels == 0)
        yield TensorSpec(name="output_norm.weight", shape=(hidden,), source=f"{family.final_norm}.weight")
        is_tied = self.architecture.tied_embeddings
        # olmo2 is the only one of these whose loader asks for a head in any case
        if not is_tied or self.has_head or self.name == "olmo2":
            head = family.embeddings if is_tied else "lm_head"
            yield TensorSpec(name="output.weight", shape=(vocab, hidden), part="head", source=f"{head}.weight")

    @property
    def _family(self) -> Family:
        return families()[self.architecture.family].exported_paths

    @property
    def _gemma(self) -> Gemma | None:
        return GEMMA.get(self.architecture.family)

    @property
    def _query_factor(self) -> float:
        return self._gemma.query_factor(self.architecture, self.numerics) if self._gemma else 1.0

    @property
    def _stream_factor(self) -> float:
        return self._gemma.stream_factor(self.architecture, self.numerics) if self._gemma else 1.0

    def _attention(self, index: int, held: LayerWidths, *, zero: bool) -> Iterator[TensorSpec]:
        if held.num_heads == 0:
            return
        architecture, family = self.architecture, self._family
        hidden, head_dim = architecture.hidden_size, architecture.head_dim
        query, key_value = held.num_heads * head_dim, held.num_kv_heads * head_dim
        turned = (held.num_heads, held.num_kv_heads) if self.name in _NORM_ROTARY else (0, 0)
        block = _Block(index=index, kind="attention", layer=f"{family.layers}.{index}", zero=zero)
        if family.attention_norm:
            yield block.norm("attn_norm", family.attention_norm, hidden)
        projections = (
            ("attn_q", family.query, query, turned[0]),
            ("attn_k", family.key, key_value, turned[1]),
            ("attn_v", family.value, key_value, 0),
        )
        scaled = "attn_q_norm" if architecture.qk_norm else "attn_q"
        for name, source, rows, heads in projections:
            factor = self._query_factor if name == scaled else 1.0
            yield from block.linear(
                name, source, (rows, hidden), bias=architecture.qkv_bias, heads=heads, factor=factor
            )
        if architecture.qk_norm:
            is_joint = architecture.qk_norm == "joint"
            size = query if is_joint else head_dim
            yield block.norm("attn_q_norm", family.query_norm, size, factor=self._query_factor)
            yield block.norm("attn_k_norm", family.key_norm, key_value if is_joint else head_dim)
        yield from block.linear("attn_output", family.attention_out, (hidden, query), bias=architecture.out_bias)
        if family.attention_norm_behind:
            yield block.norm("post_attention_norm", family.attention_norm_behind, hidden, factor=self._stream_factor)

    def _ffn(self, index: int, held: LayerWidths, *, zero: bool) -> Iterator[TensorSpec]:
        architecture, family, width = self.architecture, self._family, held.num_channels
        hidden, bias = architecture.hidden_size, architecture.ffn_bias
        block = _Block(index=index, kind="ffn", layer=f"{family.layers}.{index}", zero=zero)
        if family.ffn_norm:
            yield block.norm("ffn_norm", family.ffn_norm, hidden)
        if architecture.experts is not None:
            yield from self._experts(block, architecture.experts, width // architecture.experts.num_channels)
            return
        for name, source in zip(("ffn_gate", "ffn_up"), family.ffn_in, strict=True):
            yield from block.linear(name, source, (width, hidden), bias=bias)
        yield from block.linear("ffn_down", family.ffn_out, (hidden, width), bias=architecture.ffn_out_bias)
        if family.ffn_norm_behind:
            yield block.norm("post_ffw_norm", family.ffn_norm_behind, hidden, factor=self._stream_factor)

    def _experts(self, block: "_Block", experts: Experts, num_experts: int) -> Iterator[TensorSpec]:
        """The router, and the experts' matrices as 3-D tensors."""
        family, hidden, width = self._family, self.architecture.hidden_size, experts.num_channels
        router = block.tensor("ffn_gate_inp", f"{family.router}.weight", (num_experts, hidden))
        yield replace(router, part="")  # in f32, as llama.cpp's own converter and quantiser leave it
        yield block.tensor("ffn_gate_exps", f"{family.experts}.{GATE}", (num_experts, width, hidden))
        yield block.tensor("ffn_up_exps", f"{family.experts}.{UP}", (num_experts, width, hidden))
        yield block.tensor("ffn_down_exps", f"{family.experts}.down_proj", (num_experts, hidden, width))


@dataclass(frozen=True, kw_only=True)
class _Block:
    """Names of a sublayer's tensors in the file and in torch, where its layer is at the path `layer`.

    `kind` is attention or ffn; `zero` stands for a sublayer that torch does not have.
    """

    index: int
    kind: str
    layer: str
    zero: bool

    @property
    def part(self) -> str:
        return f"layers.{self.index}.{self.kind}"

    def norm(self, name: str, source: str, size: int, *, factor: float = 1.0) -> TensorSpec:
        spec = TensorSpec(name=f"blk.{self.index}.{name}.weight", shape=(size,), constant=1.0, factor=factor)
        return spec if self.zero else replace(spec, source=f"{self.layer}.{source}.weight")

    def tensor(self, name: str, source: str, shape: tuple[int, ...]) -> TensorSpec:
        return TensorSpec(
            name=f"blk.{self.index}.{name}.weight", shape=shape, part=self.part, source=f"{self.layer}.{source}"
        )

    def linear(
        self, name: str, source: str, shape: tuple[int, int], *, bias: bool, heads: int = 0, factor: float = 1.0
    ) -> Iterator[TensorSpec]:
        weight = TensorSpec(
            name=f"blk.{self.index}.{name}.weight", shape=shape, part=self.part, rotary_heads=heads, factor=factor
        )
        yield weight if self.zero else replace(weight, source=f"{self.layer}.{source}.weight")
        if bias:
            added = replace(weight, name=f"blk.{self.index}.{name}.bias", shape=shape[:1], part="")
            yield added if self.zero else replace(added, source=f"{self.layer}.{source}.bias")


def _held(widths: LayerWidths, *, first: bool) -> LayerWidths:
    """`widths` as the file holds them.

    llama.cpp takes the head size from layer 0 and reads it as 0 where that layer has no head, so an
    attention-free first layer gets one head of zeros.
    """
    if first and widths.num_heads == 0:
        widths = replace(widths, num_heads=1, num_kv_heads=1)
    return widths if widths.num_channels else replace(widths, num_channels=ZERO_CHANNELS)


def layout_of(architecture: Architecture, numerics: Numerics) -> Layout:
    """The stock architecture where its loader holds the model, else deci. Raises Unsupported."""
    turned = [(layer.window is not None, layer.rotary) for layer in numerics.layers if layer.rotary]
    if not turned:
        raise Unsupported("OPT cannot be exported to llama.cpp: it has no such architecture; use another backend")
    _, rotary = min(turned, key=lambda one: one[0])  # that of layers that do not slide, if there are any
    activation = "gelu_pytorch_tanh" if architecture.family in GEMMA else "silu"
    if numerics.activation != activation:
        raise Unsupported(f"llama.cpp computes this family with {activation} only, the model has {numerics.activation}")
    name = _name(architecture, numerics, rotary)
    return Layout(name=name, architecture=architecture, numerics=numerics, rotary=rotary)


def _name(architecture: Architecture, numerics: Numerics, rotary: Rotary) -> str:
    """llama.cpp's name of the architecture. Raises Unsupported for what none of them holds."""
    first, is_scaled = architecture.layers[0], rotary.kind != "default" and architecture.family not in GEMMA
    has_bias = architecture.out_bias or architecture.ffn_out_bias
    is_square = first.num_heads * architecture.head_dim == architecture.hidden_size
    odd = next((i for i, w in enumerate(architecture.layers) if w != first or 0 in (w.num_heads, w.num_channels)), None)
    if (stock := _stock_only(architecture, numerics)) is not None:
        name, words = stock
        if odd is not None:
            raise Unsupported(
                f"layer {odd}: llama.cpp holds {words} only with equal widths and both sublayers in every layer; got"
                f" {_words(architecture.layers[odd], architecture)} against {_words(first, architecture)} in layer 0"
            )
        if has_bias or is_scaled:
            raise Unsupported(f"llama.cpp holds {words} without output biases and without rotary scaling only")
        if name == "olmo2" and not is_square:
            got = _words(first, architecture)
            raise Unsupported(f"llama.cpp holds {words} only with heads that fill the hidden size; got {got}")
        return name
    if odd is not None:
        return "deci"
    if architecture.family != "qwen2":  # llama.cpp computes the others as it does Llama
        return "llama"
    # llama.cpp's qwen2 declares the query projection square, and has no rotary factors and no output biases.
    return "qwen2" if is_square and not is_scaled and not has_bias else "deci"


def _stock_only(architecture: Architecture, numerics: Numerics) -> tuple[str, str] | None:
    """llama.cpp's name of an architecture that `deci` cannot stand in for, and ours for it with the reason."""
    if architecture.experts is not None:
        return "qwen3moe", "Qwen3-MoE (its experts)"
    if gemma := GEMMA.get(architecture.family):
        gemma.require(architecture, numerics)
        return gemma.name, "Gemma (its norms)"
    if architecture.qk_norm == "joint":
        return "olmo2", "OLMo 2 (its norms)"
    if architecture.qk_norm:
        return "qwen3", "Qwen3 (its q/k norms)"
    turned = [layer.rotary is not None for layer in numerics.layers]
    if all(turned):
        return None
    for index, is_turned in enumerate(turned):
        if is_turned != (index % 4 != 3):
            raise Unsupported(
                f"layer {index}: llama.cpp turns the heads of SmolLM3 in all layers but every fourth, whatever a file"
                f" says; this layer {'turns' if is_turned else 'does not turn'} its heads: use another backend"
            )
    return "smollm3", "SmolLM3 (its layers without rotary embedding)"


def _words(widths: LayerWidths, architecture: Architecture) -> str:
    return f"{widths.num_heads} heads, {widths.num_kv_heads} KV heads, {architecture.ffn_words(widths)}"
