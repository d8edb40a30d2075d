"""Which GGUF architecture holds a model, its tensors in order, and its metadata; no weights here."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dilap.core.errors import Unsupported
from dilap.core.shape import Architecture, LayerWidths
from dilap.models.context import max_tokens_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# deci drops the attention of a layer whose FFN width is 0, so such a layer gets an FFN of zeros: 32 channels are
# the least that q8_0 and q4_0 blocks hold, and add nothing to the residual stream.
ZERO_CHANNELS = 32


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """What a GGUF header says beyond an Architecture.

    `rope_factors` divide the default rotary frequencies and `rope_magnitude` scales their sine and cosine: this
    holds linear, llama3 and yarn scaling alike, exactly as transformers computes them.
    """

    context_length: int = 4096
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_factors: tuple[float, ...] = ()
    rope_magnitude: float = 1.0


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One tensor of the file: its torch name, or the constant that fills it.

    `rotary_heads` is the number of heads whose rows are reordered, because llama.cpp's NORM rotary embedding
    turns neighbouring channels where transformers turns the two halves of a head.
    """

    name: str
    shape: tuple[int, ...]
    source: str = ""
    constant: float = 0.0
    rotary_heads: int = 0


def hyperparameters(config: "PreTrainedConfig", *, head_dim: int) -> Hyperparameters:
    """Read from a transformers config. Raises Unsupported for what llama.cpp's graphs do not compute."""
    if config.model_type == "opt":
        raise Unsupported("OPT cannot be exported to llama.cpp: it has no such architecture; use another backend")
    if config.hidden_act != "silu":
        raise Unsupported(f"llama.cpp computes these families with silu only, the model has {config.hidden_act}")
    rope = config.rope_parameters
    factors, magnitude = _rope_scaling(config, head_dim=head_dim)
    return Hyperparameters(
        context_length=max_tokens_of(config),
        norm_eps=config.rms_norm_eps,
        rope_theta=rope["rope_theta"],
        rope_factors=factors,
        rope_magnitude=magnitude,
    )


def _rope_scaling(config: "PreTrainedConfig", *, head_dim: int) -> tuple[tuple[float, ...], float]:
    """Divisors of the default frequencies (none without scaling) and the scale of sine and cosine."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: PLC0415

    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind == "default" and rope.get("partial_rotary_factor", 1.0) == 1.0:
        return (), 1.0
    if kind not in ("linear", "llama3", "yarn") or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise Unsupported(f"rotary embedding {rope} cannot be written to GGUF; known: default, linear, llama3, yarn")
    frequencies, magnitude = ROPE_INIT_FUNCTIONS[kind](config)
    default = [rope["rope_theta"] ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    return tuple(d / f for d, f in zip(default, frequencies.tolist(), strict=True)), float(magnitude)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How one model lies in a GGUF file; `name` is llama.cpp's architecture."""

    name: str
    architecture: Architecture
    hyperparameters: Hyperparameters

    @property
    def layers(self) -> tuple[LayerWidths, ...]:
        """The widths in the file: those of the model, plus the zeros that deci needs."""
        return tuple(_held(widths, first=i == 0) for i, widths in enumerate(self.architecture.layers))

    def metadata(self) -> dict[str, int | float | list[int]]:
        """Keys without their architecture prefix; widths are arrays only where llama.cpp reads arrays."""
        architecture, values = self.architecture, self.hyperparameters
        columns = {
            "attention.head_count": [layer.num_heads for layer in self.layers],
            "attention.head_count_kv": [layer.num_kv_heads for layer in self.layers],
            "feed_forward_length": [layer.num_channels for layer in self.layers],
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
            "rope.freq_base": values.rope_theta,
            "rope.scaling.attn_factor": values.rope_magnitude,
            **{key: widths if self.name == "deci" else widths[0] for key, widths in columns.items()},
        }

    def tensors(self) -> Iterator[TensorSpec]:
        """Every tensor, in file order."""
        hidden, vocab = self.architecture.hidden_size, self.architecture.vocab_size
        yield TensorSpec(name="token_embd.weight", shape=(vocab, hidden), source="model.embed_tokens.weight")
        if self.hyperparameters.rope_factors:
            yield TensorSpec(name="rope_freqs.weight", shape=(self.architecture.head_dim // 2,))
        for index, (widths, held) in enumerate(zip(self.architecture.layers, self.layers, strict=True)):
            yield from self._attention(index, held, zero=widths.num_heads == 0)
            yield from self._ffn(index, held, zero=widths.num_channels == 0)
        yield TensorSpec(name="output_norm.weight", shape=(hidden,), source="model.norm.weight")
        if not self.architecture.tied_embeddings:
            yield TensorSpec(name="output.weight", shape=(vocab, hidden), source="lm_head.weight")

    def _attention(self, index: int, held: LayerWidths, *, zero: bool) -> Iterator[TensorSpec]:
        if held.num_heads == 0:
            return
        architecture, hidden, head_dim = self.architecture, self.architecture.hidden_size, self.architecture.head_dim
        query, key_value = held.num_heads * head_dim, held.num_kv_heads * head_dim
        turned = (held.num_heads, held.num_kv_heads) if self.name in ("llama", "deci") else (0, 0)
        block = _Block(index=index, zero=zero)
        yield block.norm("attn_norm", "input_layernorm", hidden)
        projections = (("q", query, turned[0]), ("k", key_value, turned[1]), ("v", key_value, 0))
        for letter, rows, heads in projections:
            yield from block.linear(
                f"attn_{letter}", f"self_attn.{letter}_proj", (rows, hidden), bias=architecture.qkv_bias, heads=heads
            )
        if architecture.qk_norm:
            yield block.norm("attn_q_norm", "self_attn.q_norm", head_dim)
            yield block.norm("attn_k_norm", "self_attn.k_norm", head_dim)
        yield from block.linear("attn_output", "self_attn.o_proj", (hidden, query), bias=architecture.out_bias)

    def _ffn(self, index: int, held: LayerWidths, *, zero: bool) -> Iterator[TensorSpec]:
        hidden, width, bias = self.architecture.hidden_size, held.num_channels, self.architecture.ffn_bias
        out_bias = self.architecture.ffn_out_bias
        block = _Block(index=index, zero=zero)
        yield block.norm("ffn_norm", "post_attention_layernorm", hidden)
        yield from block.linear("ffn_gate", "mlp.gate_proj", (width, hidden), bias=bias)
        yield from block.linear("ffn_up", "mlp.up_proj", (width, hidden), bias=bias)
        yield from block.linear("ffn_down", "mlp.down_proj", (hidden, width), bias=out_bias)


@dataclass(frozen=True, kw_only=True)
class _Block:
    """Names of one layer's tensors in both worlds; `zero`: a sublayer that torch does not have."""

    index: int
    zero: bool

    def norm(self, name: str, source: str, size: int) -> TensorSpec:
        spec = TensorSpec(name=f"blk.{self.index}.{name}.weight", shape=(size,), constant=1.0)
        return spec if self.zero else replace(spec, source=f"model.layers.{self.index}.{source}.weight")

    def linear(
        self, name: str, source: str, shape: tuple[int, int], *, bias: bool, heads: int = 0
    ) -> Iterator[TensorSpec]:
        parts: dict[str, tuple[int, ...]] = {"weight": shape} | ({"bias": shape[:1]} if bias else {})
        for part, size in parts.items():
            spec = TensorSpec(name=f"blk.{self.index}.{name}.{part}", shape=size, rotary_heads=heads)
            yield spec if self.zero else replace(spec, source=f"model.layers.{self.index}.{source}.{part}")


def _held(widths: LayerWidths, *, first: bool) -> LayerWidths:
    """`widths` as the file holds them.

    llama.cpp takes the head size from layer 0 and reads it as 0 where that layer has no head, so an
    attention-free first layer gets one head of zeros.
    """
    if first and widths.num_heads == 0:
        widths = replace(widths, num_heads=1, num_kv_heads=1)
    return widths if widths.num_channels else replace(widths, num_channels=ZERO_CHANNELS)


def layout_of(architecture: Architecture, values: Hyperparameters) -> Layout:
    """The stock architecture where its loader holds the model, else deci. Raises Unsupported."""
    return Layout(name=_name(architecture, values), architecture=architecture, hyperparameters=values)


def _name(architecture: Architecture, values: Hyperparameters) -> str:
    first = architecture.layers[0]
    odd = next((i for i, w in enumerate(architecture.layers) if w != first or 0 in (w.num_heads, w.num_channels)), None)
    if architecture.num_positions:
        raise Unsupported("OPT cannot be exported to llama.cpp: it has no such architecture; use another backend")
    if architecture.qk_norm:
        if odd is not None:
            raise Unsupported(
                f"layer {odd}: llama.cpp holds Qwen3 (its q/k norms) only with equal widths and both sublayers in"
                f" every layer; got {_words(architecture.layers[odd])} against {_words(first)} in layer 0"
            )
        if architecture.out_bias or architecture.ffn_out_bias or values.rope_factors:
            raise Unsupported("llama.cpp holds Qwen3 without output biases and without rotary scaling only")
        return "qwen3"
    if odd is not None:
        return "deci"
    if architecture.family != "qwen2":  # llama.cpp computes the others as it does Llama
        return "llama"
    # llama.cpp's qwen2 declares the query projection square, and has no rotary factors and no output biases.
    square = first.num_heads * architecture.head_dim == architecture.hidden_size
    has_bias = architecture.out_bias or architecture.ffn_out_bias
    return "qwen2" if square and not values.rope_factors and not has_bias else "deci"


def _words(widths: LayerWidths) -> str:
    return f"{widths.num_heads} heads, {widths.num_kv_heads} KV heads, {widths.num_channels} channels"
