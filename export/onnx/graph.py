"""The ONNX graph of a decoder-only model of any widths, one for prefill and decode.

The graph is emitted operator by operator from the Architecture, not cut out of an exporter's graph of the dense model.

Inputs and outputs have the usual names (B batch, S new tokens, P past tokens, N key-value heads):

    input_ids                  B x S            int64
    attention_mask             B x (P + S)      int64 ones, in the form `onnxruntime`; the cache may have room for more
                                                than the P tokens that are used of it
    position_ids               B x S            int64, in the form `plain`, and for learned positions in either form
    logits_to_keep             1                int64, how many rows of logits are wanted, from the end; in the form
                                                `onnxruntime` optional (all)
    past_key_values.I.key      B x N x P x head_dim, and .value
    logits                     B x kept x vocabulary
    present.I.key              B x N x (P + S) x head_dim, and .value

In the form `onnxruntime` the rotated keys in the cache are already multiplied by the square root of the attention's
scale, so that a cache can be read only by the graph that wrote it.

Heads and head_dim of every cache tensor are concrete numbers, because ONNX Runtime GenAI sizes its caches by them. I
numbers the layers that have attention, without gaps: GenAI 0.18 copes with gaps, but older versions do not, nor do
programs that make the names from a number of layers.
"""

# Why the graph is emitted: transformers' OnnxExporter (5.23, tried on Llama and Mistral) took more than a minute for
# three tiny layers on a busy machine, and names its cache `input.past_key_values.layers.0.keys` and its constants
# `val_45`. Cutting widths out of its graph would mean to recognise head counts and reshapes by position, again for
# every version of three libraries. Emitting takes about twenty operators and a tenth of a second, leaves nothing to
# cache, and is checked in the same way: logits against torch after every export.

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import onnx_ir as ir

from dilap.core.errors import Unsupported
from dilap.core.numerics import LayerNumerics, Numerics, Rotary
from dilap.core.precisions import Mix
from dilap.core.shape import Architecture, LayerWidths
from dilap.export.onnx.emitter import MICROSOFT, Emitter, Values
from dilap.export.onnx.matrices import HEAD, BlockMatrices, Blocks, FloatMatrices, Matrices, PanelMatrices
from dilap.export.onnx.stacks import Stacks
from dilap.models.families import families

# `onnxruntime` uses its contrib operators, `plain` standard operators alone (TensorRT takes those).
Form = Literal["onnxruntime", "plain"]

_DTYPES = {"f32": ir.DataType.FLOAT, "f16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
_ACTIVATIONS = ("relu", "gelu", "gelu_pytorch_tanh", "silu")
_ALL_ROWS = np.iinfo(np.int64).max
_FLOATS = Mix(precision="f32")


def build_model(
    architecture: Architecture,
    numerics: Numerics,
    values: Values,
    *,
    form: Form,
    dtype: str = "f32",
    mix: Mix = _FLOATS,
    blocks: Blocks | None = None,
) -> ir.Model:
    """Return the model. Its weights are lazy tensors, which `onnx_ir.save` reads one at a time.

    `dtype`, of the activations and of matrices in floats, is f32, f16 or bf16. In `mix`, f32 stands for floats; parts
    in int8 or int4 need the dtype f32, the form `onnxruntime` and `blocks`. Head and embedding, where they are not
    named, have 8 bits even where the others have 4, as in llama.cpp's 4-bit files. Raises Unsupported for an activation
    that the graph does not compute.
    """
    if numerics.activation not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise Unsupported(f"activation {numerics.activation!r} cannot be exported to ONNX yet; known: {known}")
    if architecture.experts is not None and numerics.activation != "silu":
        raise Unsupported(f"ONNX Runtime computes experts with silu only, the model has {numerics.activation}")
    fused, stacks = form == "onnxruntime", Stacks()
    emitter = Emitter(dtype=_DTYPES[dtype], values=stacks.of_values(values), contrib=fused)
    matrices: dict[str, Matrices] = {"f32": PanelMatrices(emitter) if fused else FloatMatrices(emitter)}
    if blocks is not None:
        assert fused and dtype == "f32"  # noqa: PT018
        read = stacks.of_blocks(blocks)
        matrices |= {one: BlockMatrices(emitter, read, bits) for one, bits in (("int8", 8), ("int4", 4))}
    coarse = "f32" if mix.precision == "f32" else "int8"
    whole = replace(mix, precisions={"head": coarse, "embedding": coarse, **mix.precisions})
    return _Builder(architecture, numerics, emitter, stacks, matrices=matrices, mix=whole, fused=fused).build()


class _Builder:
    """Emits one graph, part after part, every one with the matrices of its precision in `mix`.

    `_residual` is the residual stream, `_update` the sublayer output not yet added to it, `_matrices` those of the part
    that is emitted.
    """

    def __init__(
        self,
        architecture: Architecture,
        numerics: Numerics,
        emitter: Emitter,
        stacks: Stacks,
        *,
        matrices: Mapping[str, Matrices],
        mix: Mix,
        fused: bool,
    ) -> None:
        self._architecture, self._numerics, self._fused = architecture, numerics, fused
        self._by_precision, self._mix = matrices, mix
        self._emitter, self._stacks, self._op = emitter, stacks, emitter.op
        self._family = families()[architecture.family].exported_paths
        self._embeddings = (f"{self._family.embeddings}.weight", (architecture.vocab_size, architecture.hidden_size))
        layers = list(zip(architecture.layers, numerics.layers, strict=True))
        self._attentions = [(widths, one) for widths, one in layers if widths.num_heads]
        self._update: ir.Value | None = None

    def build(self) -> ir.Model:
        self._declare_inputs()
        self._begin("embedding")
        self._residual = self._embedding()
        if self._fused:
            self._lengths = self._fused_lengths()
        else:
            self._masks = self._plain_masks()
        self._turns = self._rotations()
        present: list[tuple[Sequence[ir.Value], int]] = []
        for index, widths in enumerate(self._architecture.layers):
            layer = f"{self._family.layers}.{index}"
            if widths.num_heads:
                self._begin(f"layers.{index}.attention")
                self._update, cache = self._attention(layer, len(present))
                present.append((cache, widths.num_kv_heads))
            if widths.num_channels:
                self._begin(f"layers.{index}.ffn")
                self._update = self._ffn(layer, widths.num_channels)
        self._begin("head")
        self._emitter.output(self._logits(), "logits", ("batch", "kept", self._architecture.vocab_size))
        for index, (cache, num_kv_heads) in enumerate(present):
            shape = ("batch", num_kv_heads, "total_sequence", self._architecture.head_dim)
            for part, tensor in zip(("key", "value"), cache, strict=True):
                self._emitter.output(tensor, f"present.{index}.{part}", shape)
        return self._emitter.model()

    def _begin(self, part: str) -> None:
        self._matrices = self._by_precision[self._mix.of(part)]

    def _declare_inputs(self) -> None:
        emitter = self._emitter
        self._ids = emitter.input("input_ids", ("batch", "sequence"))
        if self._fused:
            self._mask = emitter.input("attention_mask", ("batch", "total_sequence"))
        if not self._fused or self._architecture.num_positions:
            self._position_ids = emitter.input("position_ids", ("batch", "sequence"))
        self._rows = emitter.input("logits_to_keep", (1,))
        if self._fused:  # a default makes it optional: stock consumers, which do not know it, get every row
            self._rows.const_value = ir.tensor(np.array([_ALL_ROWS]), name=self._rows.name)
            emitter.graph.register_initializer(self._rows)

    def _embedding(self) -> ir.Value:
        hidden = self._matrices.gather(self._ids, *self._embeddings)
        if self._numerics.embedding_scale != 1:
            hidden = self._op("Mul", hidden, self._emitter.number("embedding_scale", self._numerics.embedding_scale))
        if not self._architecture.num_positions:
            return hidden
        shape = (self._architecture.num_positions, self._architecture.hidden_size)
        table = self._emitter.weight(f"{self._family.positions}.weight", shape)
        rows = self._op("Add", self._position_ids, self._emitter.integers(self._family.position_offset))
        return self._op("Add", hidden, self._op("Gather", table, rows))

    def _logits(self) -> ir.Value:
        hidden = self._norm(self._family.final_norm)
        first = self._op("Neg", self._rows)
        rows = self._op("Slice", hidden, first, self._emitter.integers(_ALL_ROWS), self._emitter.integers(1))
        if self._architecture.tied_embeddings and self._mix.of("head") == self._mix.of("embedding"):
            logits = self._matrices.tied_matmul(rows, *self._embeddings)
        else:
            if self._architecture.tied_embeddings:  # in two precisions, it is stored twice
                self._stacks.add(HEAD.removesuffix(".weight"), {self._family.embeddings: self._embeddings[1][0]})
            logits = self._matrices.matmul(rows, HEAD, self._embeddings[1])
        return self._capped(logits, "logits_softcap", self._numerics.logits_softcap)

    def _capped(self, x: ir.Value, name: str, cap: float | None) -> ir.Value:
        """Return x under a soft cap c, c tanh(x / c); `name` is the constant's."""
        if cap is None:
            return x
        value = self._emitter.number(name, cap)
        return self._op("Mul", self._op("Tanh", self._op("Div", x, value)), value)

    # sublayers

    def _attention(self, layer: str, number: int) -> tuple[ir.Value, Sequence[ir.Value]]:
        """Return what attention adds to the residual stream, and the cache with the new tokens.

        `number` counts the layers that have attention.
        """
        architecture, family = self._architecture, self._family
        widths, numerics = self._attentions[number]
        x = self._entering(layer, family.attention_norm)
        inputs = self._projections(x, layer, widths)
        past = [self._past(number, part, widths.num_kv_heads) for part in ("key", "value")]
        attend = self._fused_attention if self._fused else self._plain_attention
        mixed, *present = attend(inputs, past, widths, numerics)
        shape = (architecture.hidden_size, widths.num_heads * architecture.head_dim)
        y = self._linear(mixed, f"{layer}.{family.attention_out}", shape, bias=architecture.out_bias)
        return self._leaving(y, layer, family.attention_norm_behind), present

    def _projections(self, x: ir.Value, layer: str, widths: LayerWidths) -> Sequence[ir.Value]:
        """Return query, key and value, or one tensor that holds all three, as GroupQueryAttention takes it."""
        architecture, family = self._architecture, self._family
        heads = {family.query: widths.num_heads, family.key: widths.num_kv_heads, family.value: widths.num_kv_heads}
        rows = {f"{layer}.{path}": count * architecture.head_dim for path, count in heads.items()}
        if self._fused and not architecture.qk_norm:
            return (self._stacked_linear(x, f"{layer}.self_attn.qkv_proj", rows, bias=architecture.qkv_bias),)
        query, key, value = self._linears(x, rows, bias=architecture.qkv_bias)
        if architecture.qk_norm:
            query = self._qk_norm(query, f"{layer}.{family.query_norm}", widths.num_heads)
            key = self._qk_norm(key, f"{layer}.{family.key_norm}", widths.num_kv_heads)
        return query, key, value

    def _past(self, index: int, part: str, num_kv_heads: int) -> ir.Value:
        shape = ("batch", num_kv_heads, "past_sequence", self._architecture.head_dim)
        return self._emitter.input(f"past_key_values.{index}.{part}", shape, self._emitter.dtype)

    def _ffn(self, layer: str, num_channels: int) -> ir.Value:
        architecture, family = self._architecture, self._family
        x = self._entering(layer, family.ffn_norm)
        if architecture.experts is not None:
            return self._leaving(self._mixture(x, layer, num_channels), layer, family.ffn_norm_behind)
        rows = {f"{layer}.{path}": num_channels for path in family.ffn_in}
        first, *up = self._ffn_inputs(x, layer, rows)
        y = self._activation(first)
        if up:
            y = self._op("Mul", y, up[0])
        shape = (architecture.hidden_size, num_channels)
        y = self._linear(y, f"{layer}.{family.ffn_out}", shape, bias=architecture.ffn_out_bias)
        return self._leaving(y, layer, family.ffn_norm_behind)

    def _mixture(self, x: ir.Value, layer: str, num_channels: int) -> ir.Value:
        """Return what a layer's experts give."""
        architecture, experts = self._architecture, self._architecture.experts
        assert experts is not None
        shape = num_channels // experts.num_channels, experts.num_channels, architecture.hidden_size
        name = f"{layer}.{self._family.router}.weight"
        router = self._emitter.weight(name, (shape[0], shape[2]), transposed=True)  # in floats: it decides who computes
        scores = self._op("Reshape", self._op("MatMul", x, router, name=name), self._emitter.integers(-1, shape[0]))
        path, count = f"{layer}.{self._family.experts}", experts.num_active
        found = self._matrices.mixture(x, scores, path, shape, num_active=count)
        return found if experts.normed else self._op("Mul", found, self._chosen_share(x, scores, count))

    def _chosen_share(self, x: ir.Value, scores: ir.Value, num_active: int) -> ir.Value:
        """Return, for every token of `x`, the sum of the probabilities of its experts."""
        probabilities = self._op("Softmax", scores, axis=-1)
        chosen, _ = self._emitter.ops("TopK", probabilities, self._emitter.integers(num_active), num_outputs=2)
        share = self._op("ReduceSum", chosen, self._emitter.integers(-1), keepdims=1)
        tokens = self._op("Shape", x, start=0, end=2)
        return self._op("Reshape", share, self._op("Concat", tokens, self._emitter.integers(1), axis=0))

    def _ffn_inputs(self, x: ir.Value, layer: str, rows: Mapping[str, int]) -> Sequence[ir.Value]:
        """Return the products with gate and up, or the only one of an FFN without a gate."""
        bias = self._architecture.ffn_bias
        if self._fused and len(rows) > 1:
            stacked = self._stacked_linear(x, f"{layer}.mlp.gate_up_proj", rows, bias=bias)
            return self._emitter.ops("Split", stacked, axis=-1, num_outputs=len(rows))
        return self._linears(x, rows, bias=bias)

    def _activation(self, x: ir.Value) -> ir.Value:
        name = self._numerics.activation
        if name == "silu":
            return self._op("Mul", x, self._op("Sigmoid", x))
        if name == "gelu_pytorch_tanh":
            return self._op("Gelu", x, approximate="tanh")
        return self._op(name.capitalize(), x)

    # attention on ONNX Runtime

    def _fused_lengths(self) -> tuple[ir.Value, ...]:
        """Return what every GroupQueryAttention reads: last positions and total length."""
        mask = self._mask
        lengths = self._op("ReduceSum", mask, self._emitter.integers(1), keepdims=0)
        last = self._op("Cast", self._op("Sub", lengths, self._emitter.integers(1)), to=ir.DataType.INT32)
        total = self._op("Squeeze", self._op("Shape", mask, start=1, end=2))
        return last, self._op("Cast", total, to=ir.DataType.INT32)

    def _fused_attention(
        self, inputs: Sequence[ir.Value], past: Sequence[ir.Value], widths: LayerWidths, numerics: LayerNumerics
    ) -> Sequence[ir.Value]:
        turns = self._turns[numerics.rotary]
        return self._emitter.ops(
            "GroupQueryAttention",
            *inputs,
            *[None] * (3 - len(inputs)),
            *past,
            *self._lengths,
            *turns,
            num_outputs=3,
            domain=MICROSOFT,
            num_heads=widths.num_heads,
            kv_num_heads=widths.num_kv_heads,
            scale=1.0 if turns else self._numerics.attention_scale,
            do_rotary=int(bool(turns)),
            local_window_size=numerics.window or -1,
            softcap=self._numerics.attention_softcap or 0.0,
        )

    # attention in standard operators

    def _plain_masks(self) -> dict[int | None, ir.Value]:
        """Return the additive masks (B x 1 x S x (P + S)), by the windows of layers."""
        positions = self._position_ids
        first, _ = self._attentions[0]
        past = self._op("Shape", self._past(0, "key", first.num_kv_heads), start=2, end=3)
        new = self._op("Shape", self._ids, start=1, end=2)
        total = self._op("Squeeze", self._op("Add", past, new))
        keys = self._op("Range", self._emitter.integer(0), total, self._emitter.integer(1))
        queries = self._op("Unsqueeze", positions, self._emitter.integers(1, 3))
        visible = self._op("LessOrEqual", keys, queries)
        lowest = np.finfo(np.float16 if self._emitter.dtype == ir.DataType.FLOAT16 else np.float32).min
        shown, hidden = self._emitter.number("visible", 0.0), self._emitter.number("hidden", float(lowest))
        masks: dict[int | None, ir.Value] = {}
        for window in dict.fromkeys(numerics.window for _, numerics in self._attentions):
            seen = visible
            if window is not None:
                beyond = self._op("Sub", queries, self._emitter.integers(window))  # the latest key that is not seen
                seen = self._op("And", visible, self._op("Greater", keys, beyond))
            masks[window] = self._op("Where", seen, shown, hidden)
        return masks

    def _plain_attention(
        self, inputs: Sequence[ir.Value], past: Sequence[ir.Value], widths: LayerWidths, numerics: LayerNumerics
    ) -> Sequence[ir.Value]:
        counts = (widths.num_heads, widths.num_kv_heads, widths.num_kv_heads)
        query, key, value = (self._split_heads(x, count) for x, count in zip(inputs, counts, strict=True))
        if turns := self._turns[numerics.rotary]:
            query, key = self._rotate(query, *turns), self._rotate(key, *turns)
        key, value = (self._op("Concat", old, new, axis=2) for old, new in zip(past, (key, value), strict=True))
        query = self._op("Mul", query, self._emitter.number("attention_scale", self._numerics.attention_scale))
        keys, values = (self._repeat_heads(x, widths) for x in (key, value))
        scores = self._op("MatMul", query, self._op("Transpose", keys, perm=[0, 1, 3, 2]))
        scores = self._capped(scores, "attention_softcap", self._numerics.attention_softcap)
        weights = self._op("Softmax", self._op("Add", scores, self._masks[numerics.window]), axis=-1)
        mixed = self._op("Transpose", self._op("MatMul", weights, values), perm=[0, 2, 1, 3])
        width = widths.num_heads * self._architecture.head_dim
        return self._op("Reshape", mixed, self._emitter.integers(0, 0, width)), key, value

    def _split_heads(self, x: ir.Value, num_heads: int) -> ir.Value:
        """Turn B x S x (heads * head_dim) into B x heads x S x head_dim."""
        split = self._op("Reshape", x, self._emitter.integers(0, 0, num_heads, self._architecture.head_dim))
        return self._op("Transpose", split, perm=[0, 2, 1, 3])

    def _repeat_heads(self, x: ir.Value, widths: LayerWidths) -> ir.Value:
        """Repeat every key-value head once for each of its query heads."""
        ratio = widths.num_heads // widths.num_kv_heads
        if ratio == 1:
            return x
        repeated = self._op(
            "Expand", self._op("Unsqueeze", x, self._emitter.integers(2)), self._emitter.integers(1, 1, ratio, 1, 1)
        )
        return self._op(
            "Reshape", repeated, self._emitter.integers(0, widths.num_heads, -1, self._architecture.head_dim)
        )

    def _rotate(self, x: ir.Value, cosines: ir.Value, sines: ir.Value) -> ir.Value:
        """Apply the rotary embedding: rotate the pairs that the two halves of every head make."""
        first, second = self._emitter.ops("Split", x, axis=-1, num_outputs=2)
        turned_first = self._op("Sub", self._op("Mul", first, cosines), self._op("Mul", second, sines))
        turned_second = self._op("Add", self._op("Mul", second, cosines), self._op("Mul", first, sines))
        return self._op("Concat", turned_first, turned_second, axis=-1)

    # norms

    def _entering(self, layer: str, norm: str | None) -> ir.Value:
        """Return what a sublayer of `layer` reads, where `norm` is the path of the norm before it, if it has one."""
        return self._norm(f"{layer}.{norm}") if norm else self._stream()

    def _leaving(self, y: ir.Value, layer: str, norm: str | None) -> ir.Value:
        """Return what a sublayer of `layer` with the output y adds to the residual stream.

        `norm` is the path of the norm behind the sublayer, None where it has none.
        """
        return self._normed(y, self._vectors(f"{layer}.{norm}")) if norm else y

    def _stream(self) -> ir.Value:
        """Return the residual stream, to which the last sublayer's output is added first."""
        if self._update is not None:
            self._residual, self._update = self._op("Add", self._residual, self._update), None
        return self._residual

    def _vectors(self, path: str) -> list[ir.Value]:
        """Return the weight of the norm at `path`, and the bias of a LayerNorm."""
        names = ("weight", "bias")[: self._architecture.norm_vectors]
        return [self._emitter.weight(f"{path}.{name}", (self._architecture.hidden_size,)) for name in names]

    def _normed(self, x: ir.Value, vectors: Sequence[ir.Value]) -> ir.Value:
        if len(vectors) == 2:
            return self._op("LayerNormalization", x, *vectors, epsilon=self._numerics.norm_eps)
        return self._rms_norm(x, *vectors)

    def _norm(self, path: str) -> ir.Value:
        """Return the norm of the residual stream, to which the last sublayer's output is added first."""
        vectors = self._vectors(path)
        if self._fused and self._update is not None:
            normed, _, _, self._residual = self._emitter.ops(
                "SkipLayerNormalization" if len(vectors) == 2 else "SkipSimplifiedLayerNormalization",
                self._residual,
                self._update,
                *vectors,
                num_outputs=4,
                domain=MICROSOFT,
                epsilon=self._numerics.norm_eps,
            )
            self._update = None
            return normed
        return self._normed(self._stream(), vectors)

    def _rms_norm(self, x: ir.Value, weight: ir.Value) -> ir.Value:
        """Return the RMSNorm over the last axis, in f32 as in torch; ONNX Runtime fuses its nodes on loading."""
        wide = x if self._emitter.dtype == ir.DataType.FLOAT else self._op("Cast", x, to=ir.DataType.FLOAT)
        two, eps = (
            self._emitter.constant(name, np.array(number, np.float32))
            for name, number in (("two", 2.0), ("norm_eps", self._numerics.norm_eps))
        )
        mean = self._op("ReduceMean", self._op("Pow", wide, two), self._emitter.integers(-1), keepdims=1)
        normed = self._op("Div", wide, self._op("Sqrt", self._op("Add", mean, eps)))
        if self._emitter.dtype != ir.DataType.FLOAT:
            normed = self._op("Cast", normed, to=self._emitter.dtype)
        return self._op("Mul", normed, weight)

    def _qk_norm(self, x: ir.Value, path: str, num_heads: int) -> ir.Value:
        """Return the RMSNorm of all heads in one (OLMo 2) or of every head by itself (Qwen3).

        Shapes in and out are B x S x (heads * head_dim).
        """
        head_dim = self._architecture.head_dim
        if self._architecture.qk_norm == "joint":
            return self._rms_norm(x, self._emitter.weight(f"{path}.weight", (num_heads * head_dim,)))
        split = self._op("Reshape", x, self._emitter.integers(0, 0, num_heads, head_dim))
        normed = self._rms_norm(split, self._emitter.weight(f"{path}.weight", (head_dim,)))
        return self._op("Reshape", normed, self._emitter.integers(0, 0, num_heads * head_dim))

    # numbers

    def _rotations(self) -> dict[Rotary | None, tuple[ir.Value, ...]]:
        """Return the cosines and sines of the layers' rotary embeddings; none for a layer that has no embedding."""
        different = dict.fromkeys(numerics.rotary for _, numerics in self._attentions if numerics.rotary)
        return {None: ()} | {rotary: self._rotation(rotary, number) for number, rotary in enumerate(different)}

    def _rotation(self, rotary: Rotary, number: int) -> tuple[ir.Value, ...]:
        """Return the cosines and sines of a rotary embedding, whose tables are called by its number.

        In the form `onnxruntime` they are tables (context x head_dim / 2), in the form `plain` those of the new tokens
        (B x 1 x S x head_dim / 2).
        """
        positions = np.arange(self._numerics.context_length, dtype=np.float32)
        angles = np.outer(positions, np.array(rotary.frequencies, np.float32))
        tables = {"cosines": np.cos(angles), "sines": np.sin(angles)}
        # Queries and keys take the square root of the scale each: MLAS multiplies one row at once only by a scale of 1.
        magnitude = rotary.magnitude * (self._numerics.attention_scale**0.5 if self._fused else 1)
        found = [self._emitter.number(f"{name}.{number}", table * magnitude) for name, table in tables.items()]
        if self._fused:
            return tuple(found)
        rows = (self._op("Gather", table, self._position_ids) for table in found)
        return tuple(self._op("Unsqueeze", one, self._emitter.integers(1)) for one in rows)

    def _stacked_linear(self, x: ir.Value, path: str, rows: Mapping[str, int], *, bias: bool) -> ir.Value:
        """Apply several of torch's Linears to `x` as one, called `path`; `rows` are the rows of each, by path."""
        shape = (sum(rows.values()), self._architecture.hidden_size)
        return self._linear(x, self._stacks.add(path, rows), shape, bias=bias)

    def _linears(self, x: ir.Value, rows: Mapping[str, int], *, bias: bool) -> list[ir.Value]:
        """Apply torch's Linears to `x` one by one; `rows` are the rows of each, by path."""
        hidden_size = self._architecture.hidden_size
        return [self._linear(x, path, (count, hidden_size), bias=bias) for path, count in rows.items()]

    def _linear(self, x: ir.Value, path: str, shape: tuple[int, int], *, bias: bool) -> ir.Value:
        """Apply torch's Linear at `path`, whose weight has that shape, to `x`."""
        y = self._matrices.matmul(x, f"{path}.weight", shape)
        return self._op("Add", y, self._emitter.weight(f"{path}.bias", shape[:1])) if bias else y
