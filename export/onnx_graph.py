"""The ONNX graph of a decoder-only model of any widths, one for prefill and decode.

The graph is emitted from the Architecture, not sliced out of an exporter's graph of the dense model. Both were tried.
transformers' OnnxExporter (5.23) took half a minute and more for three tiny layers; its fused graph names its
constants `val_45`, hides head counts in them, rotates outside the attention operator and differs between families and
versions. Emitting takes about twenty operators and a tenth of a second, leaves nothing to cache or to keep in step with
three libraries' versions, and is checked in the same way: logits against torch after every export.

Inputs and outputs have the names of the ecosystem (B batch, S new tokens, P past tokens, N key-value heads):

    input_ids                  B x S            int64
    attention_mask             B x (P + S)      int64 ones, in the form `onnxruntime`; P tokens are used of a cache
                                                that may have room for more
    position_ids               B x S            int64, in the form `plain`, and for learned positions in either form
    logits_to_keep             1                int64, how many rows of logits are wanted, from the end; in the form
                                                `onnxruntime` optional (all)
    past_key_values.I.key      B x N x P x head_dim, and .value
    logits                     B x kept x vocabulary
    present.I.key              B x N x (P + S) x head_dim, and .value

Heads and head_dim of every cache tensor are concrete numbers, because ONNX Runtime GenAI sizes its caches by them. I
counts the layers that have attention, without gaps: GenAI 0.18 finds gaps by itself, older ones and whoever makes the
names from a number of layers do not.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.tape import Tape

from dilap.export.onnx_hyperparameters import POSITION_OFFSET, Hyperparameters
from dilap.modeling_dilap import FAMILIES
from dilap.types import Architecture, LayerWidths

# `onnxruntime` uses its contrib operators, `plain` standard operators alone (TensorRT takes those).
Form = Literal["onnxruntime", "plain"]
# The value of one tensor: its torch name and torch shape in, numbers out.
Values = Callable[[str, tuple[int, ...]], NDArray[np.floating]]

OPSET = 20  # the highest that TensorRT 10.3 parses
_MICROSOFT = "com.microsoft"
_IR_VERSION = 10
_DTYPES = {"f32": ir.DataType.FLOAT, "f16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
_ALL_ROWS = np.iinfo(np.int64).max


def build_model(
    architecture: Architecture, numbers: Hyperparameters, values: Values, *, form: Form, dtype: str = "f32"
) -> ir.Model:
    """The graph with its weights as lazy tensors, which `onnx_ir.save` reads one at a time; `dtype` f32, f16, bf16."""
    return _Builder(architecture, numbers, values, form, _DTYPES[dtype]).build()


class _Builder:
    """Emits one graph. `_residual` is the residual stream, `_update` what the last sublayer has yet to add to it."""

    def __init__(
        self, architecture: Architecture, numbers: Hyperparameters, values: Values, form: Form, dtype: ir.DataType
    ) -> None:
        self._architecture, self._numbers, self._values = architecture, numbers, values
        self._fused, self._dtype = form == "onnxruntime", dtype
        self._family = FAMILIES[architecture.family]
        self._stack = self._family.layers.rpartition(".")[0]
        opsets = {"": OPSET, _MICROSOFT: 1} if self._fused else {"": OPSET}
        self._graph = ir.Graph([], [], nodes=[], opset_imports=opsets, name="decoder")
        self._tape = Tape(self._graph)
        self._made: dict[str, ir.Value] = {}  # constants and weights by name
        self._update: ir.Value | None = None

    def build(self) -> ir.Model:
        self._declare_inputs()
        self._residual = self._embedding()
        positions = self._fused_positions() if self._fused else self._plain_positions()
        cache_index = 0
        for index, widths in enumerate(self._architecture.layers):
            layer = f"{self._family.layers}.{index}"
            if widths.num_heads:
                self._update = self._attention(layer, widths, positions, cache_index)
                cache_index += 1
            if widths.num_channels:
                self._update = self._ffn(layer, widths.num_channels)
        self._graph.outputs.insert(0, self._logits())
        return ir.Model(self._graph, ir_version=_IR_VERSION, producer_name="dilap")

    def _declare_inputs(self) -> None:
        self._input("input_ids", ("batch", "sequence"))
        if self._fused:
            self._input("attention_mask", ("batch", "total_sequence"))
        if not self._fused or self._architecture.num_positions:
            self._input("position_ids", ("batch", "sequence"))
        rows = self._input("logits_to_keep", (1,))
        if self._fused:  # a default makes it optional: stock consumers, which do not know it, get every row
            rows.const_value = ir.tensor(np.array([_ALL_ROWS]), name=rows.name)
            self._graph.register_initializer(rows)

    def _embedding(self) -> ir.Value:
        hidden = self._op("Gather", self._embedding_table(), self._made["input_ids"])
        if not self._architecture.num_positions:
            return hidden
        shape = (self._architecture.num_positions, self._architecture.hidden_size)
        table = self._weight(f"{self._stack}.embed_positions.weight", shape)
        rows = self._op("Add", self._made["position_ids"], self._integers(POSITION_OFFSET))
        return self._op("Add", hidden, self._op("Gather", table, rows))

    def _embedding_table(self) -> ir.Value:
        shape = (self._architecture.vocab_size, self._architecture.hidden_size)
        return self._weight(f"{self._stack}.embed_tokens.weight", shape)

    def _logits(self) -> ir.Value:
        architecture = self._architecture
        norm = "final_layer_norm" if architecture.num_positions else "norm"
        hidden = self._norm(f"{self._stack}.{norm}")
        first = self._op("Neg", self._made["logits_to_keep"])
        rows = self._op("Slice", hidden, first, self._integers(_ALL_ROWS), self._integers(1))
        shape = (architecture.vocab_size, architecture.hidden_size)
        if architecture.tied_embeddings:
            weight = self._op("Transpose", self._embedding_table(), perm=[1, 0])
        else:
            weight = self._weight("lm_head.weight", shape, transposed=True)
        logits = self._op("MatMul", rows, weight, name="lm_head")
        return self._named(logits, "logits", ("batch", "kept", architecture.vocab_size))

    # sublayers

    def _attention(self, layer: str, widths: LayerWidths, positions: Sequence[ir.Value], cache_index: int) -> ir.Value:
        architecture, family = self._architecture, self._family
        x = self._norm(f"{layer}.{family.attention_norm}")
        heads = {family.query: widths.num_heads, family.key: widths.num_kv_heads, family.value: widths.num_kv_heads}
        query, key, value = (
            self._linear(
                x,
                f"{layer}.{path}",
                count * architecture.head_dim,
                architecture.hidden_size,
                bias=architecture.qkv_bias,
            )
            for path, count in heads.items()
        )
        if architecture.qk_norm:
            query = self._head_norm(query, f"{layer}.self_attn.q_norm", widths.num_heads)
            key = self._head_norm(key, f"{layer}.self_attn.k_norm", widths.num_kv_heads)
        shape = ("batch", widths.num_kv_heads, "past_sequence", architecture.head_dim)
        past = [self._input(f"past_key_values.{cache_index}.{part}", shape, self._dtype) for part in ("key", "value")]
        attend = self._fused_attention if self._fused else self._plain_attention
        mixed, *present = attend((query, key, value), past, positions, widths)
        for part, tensor in zip(("key", "value"), present, strict=True):
            dims = ("batch", widths.num_kv_heads, "total_sequence", architecture.head_dim)
            self._graph.outputs.append(self._named(tensor, f"present.{cache_index}.{part}", dims))
        return self._linear(
            mixed,
            f"{layer}.{family.attention_out}",
            architecture.hidden_size,
            widths.num_heads * architecture.head_dim,
            bias=architecture.out_bias,
        )

    def _ffn(self, layer: str, num_channels: int) -> ir.Value:
        hidden_size, bias = self._architecture.hidden_size, self._architecture.ffn_bias
        x = self._norm(f"{layer}.{self._family.ffn_norm}")
        first, *up = (
            self._linear(x, f"{layer}.{path}", num_channels, hidden_size, bias=bias) for path in self._family.ffn_in
        )
        y = self._activation(first)
        if up:
            y = self._op("Mul", y, up[0])
        return self._linear(y, f"{layer}.{self._family.ffn_out}", hidden_size, num_channels, bias=bias)

    def _activation(self, x: ir.Value) -> ir.Value:
        kind = self._numbers.activation
        if kind == "silu":
            return self._op("Mul", x, self._op("Sigmoid", x))
        return self._op("Relu" if kind == "relu" else "Gelu", x)

    # attention on ONNX Runtime

    def _fused_positions(self) -> tuple[ir.Value, ...]:
        """What every GroupQueryAttention reads: last positions, total length, cosines and sines of every position."""
        mask = self._made["attention_mask"]
        lengths = self._op("ReduceSum", mask, self._integers(1), keepdims=0)
        last = self._op("Cast", self._op("Sub", lengths, self._integers(1)), to=ir.DataType.INT32)
        total = self._op("Squeeze", self._op("Shape", mask, start=1, end=2))
        return last, self._op("Cast", total, to=ir.DataType.INT32), *self._rotations()

    def _fused_attention(
        self, inputs: Sequence[ir.Value], past: Sequence[ir.Value], positions: Sequence[ir.Value], widths: LayerWidths
    ) -> Sequence[ir.Value]:
        return self._tape.op_multi_out(
            "GroupQueryAttention",
            [*inputs, *past, *positions],
            {
                "num_heads": widths.num_heads,
                "kv_num_heads": widths.num_kv_heads,
                "scale": self._scale(),
                "do_rotary": int(bool(self._numbers.rope_frequencies)),
            },
            domain=_MICROSOFT,
            num_outputs=3,
        )

    # attention in standard operators

    def _plain_positions(self) -> tuple[ir.Value, ...]:
        """The additive mask (B x 1 x S x (P + S)); cosines and sines of the new tokens (B x 1 x S x head_dim / 2)."""
        positions = self._made["position_ids"]
        past = self._past_length()
        new = self._op("Shape", self._made["input_ids"], start=1, end=2)
        total = self._op("Squeeze", self._op("Add", past, new))
        keys = self._op("Range", self._integers(0, scalar=True), total, self._integers(1, scalar=True))
        queries = self._op("Unsqueeze", positions, self._integers(1, 3))
        visible = self._op("LessOrEqual", keys, queries)
        lowest = np.finfo(np.float16 if self._dtype == ir.DataType.FLOAT16 else np.float32).min
        mask = self._op("Where", visible, self._number("visible", 0.0), self._number("hidden", float(lowest)))
        rotations = [
            self._op("Unsqueeze", self._op("Gather", table, positions), self._integers(1))
            for table in self._rotations()
        ]
        return mask, *rotations

    def _plain_attention(
        self, inputs: Sequence[ir.Value], past: Sequence[ir.Value], positions: Sequence[ir.Value], widths: LayerWidths
    ) -> Sequence[ir.Value]:
        counts = (widths.num_heads, widths.num_kv_heads, widths.num_kv_heads)
        query, key, value = (self._split_heads(x, count) for x, count in zip(inputs, counts, strict=True))
        mask, *rotations = positions
        if rotations:
            query, key = self._rotate(query, *rotations), self._rotate(key, *rotations)
        key, value = (self._op("Concat", old, new, axis=2) for old, new in zip(past, (key, value), strict=True))
        query = self._op("Mul", query, self._number("attention_scale", self._scale()))
        keys, values = (self._repeat_heads(x, widths) for x in (key, value))
        scores = self._op("MatMul", query, self._op("Transpose", keys, perm=[0, 1, 3, 2]))
        weights = self._op("Softmax", self._op("Add", scores, mask), axis=-1)
        mixed = self._op("Transpose", self._op("MatMul", weights, values), perm=[0, 2, 1, 3])
        width = widths.num_heads * self._architecture.head_dim
        return self._op("Reshape", mixed, self._integers(0, 0, width)), key, value

    def _split_heads(self, x: ir.Value, num_heads: int) -> ir.Value:
        """B x S x (heads * head_dim) to B x heads x S x head_dim."""
        split = self._op("Reshape", x, self._integers(0, 0, num_heads, self._architecture.head_dim))
        return self._op("Transpose", split, perm=[0, 2, 1, 3])

    def _repeat_heads(self, x: ir.Value, widths: LayerWidths) -> ir.Value:
        """Every key-value head once for each of its query heads."""
        ratio = widths.num_heads // widths.num_kv_heads
        if ratio == 1:
            return x
        repeated = self._op("Expand", self._op("Unsqueeze", x, self._integers(2)), self._integers(1, 1, ratio, 1, 1))
        return self._op("Reshape", repeated, self._integers(0, widths.num_heads, -1, self._architecture.head_dim))

    def _rotate(self, x: ir.Value, cosines: ir.Value, sines: ir.Value) -> ir.Value:
        """The two halves of every head turned against one another."""
        first, second = self._tape.op_multi_out("Split", [x], {"axis": -1, "num_outputs": 2}, num_outputs=2)
        turned_first = self._op("Sub", self._op("Mul", first, cosines), self._op("Mul", second, sines))
        turned_second = self._op("Add", self._op("Mul", second, cosines), self._op("Mul", first, sines))
        return self._op("Concat", turned_first, turned_second, axis=-1)

    def _past_length(self) -> ir.Value:
        first = next(widths for widths in self._architecture.layers if widths.num_heads)
        shape = ("batch", first.num_kv_heads, "past_sequence", self._architecture.head_dim)
        return self._op("Shape", self._input("past_key_values.0.key", shape, self._dtype), start=2, end=3)

    # norms

    def _norm(self, path: str) -> ir.Value:
        """The norm of the residual stream, the last sublayer's output added to it first."""
        names = ("weight", "bias")[: self._architecture.norm_vectors]
        vectors = [self._weight(f"{path}.{name}", (self._architecture.hidden_size,)) for name in names]
        layer_norm = len(vectors) == 2
        if self._fused and self._update is not None:
            normed, _, _, self._residual = self._tape.op_multi_out(
                "SkipLayerNormalization" if layer_norm else "SkipSimplifiedLayerNormalization",
                [self._residual, self._update, *vectors],
                {"epsilon": self._numbers.norm_eps},
                domain=_MICROSOFT,
                num_outputs=4,
            )
            self._update = None
            return normed
        if self._update is not None:
            self._residual, self._update = self._op("Add", self._residual, self._update), None
        if layer_norm:
            return self._op("LayerNormalization", self._residual, *vectors, epsilon=self._numbers.norm_eps)
        return self._rms_norm(self._residual, *vectors)

    def _rms_norm(self, x: ir.Value, weight: ir.Value) -> ir.Value:
        """Over the last axis, in f32 as torch does it; ONNX Runtime fuses these nodes when it loads them."""
        wide = x if self._dtype == ir.DataType.FLOAT else self._op("Cast", x, to=ir.DataType.FLOAT)
        two, eps = (
            self._constant(name, np.array(number, np.float32))
            for name, number in (("two", 2.0), ("norm_eps", self._numbers.norm_eps))
        )
        mean = self._op("ReduceMean", self._op("Pow", wide, two), self._integers(-1), keepdims=1)
        normed = self._op("Div", wide, self._op("Sqrt", self._op("Add", mean, eps)))
        if self._dtype != ir.DataType.FLOAT:
            normed = self._op("Cast", normed, to=self._dtype)
        return self._op("Mul", normed, weight)

    def _head_norm(self, x: ir.Value, path: str, num_heads: int) -> ir.Value:
        """RMSNorm of every head by itself (Qwen3); B x S x (heads * head_dim) in and out."""
        head_dim = self._architecture.head_dim
        split = self._op("Reshape", x, self._integers(0, 0, num_heads, head_dim))
        normed = self._rms_norm(split, self._weight(f"{path}.weight", (head_dim,)))
        return self._op("Reshape", normed, self._integers(0, 0, num_heads * head_dim))

    # numbers

    def _scale(self) -> float:
        return float(self._architecture.head_dim**-0.5)

    def _rotations(self) -> tuple[ir.Value, ...]:
        """Tables of cosines and sines, context x head_dim / 2; none for learned positions."""
        if not self._numbers.rope_frequencies:
            return ()
        positions = np.arange(self._numbers.context_length, dtype=np.float32)
        angles = np.outer(positions, np.array(self._numbers.rope_frequencies, np.float32))
        tables = {"cosines": np.cos(angles), "sines": np.sin(angles)}
        return tuple(self._number(name, table * self._numbers.rope_magnitude) for name, table in tables.items())

    def _number(self, name: str, values: float | NDArray[np.floating]) -> ir.Value:
        """A constant in the dtype of the graph."""
        return self._constant(name, np.asarray(values, np.float32).astype(self._dtype.numpy()))

    def _integers(self, *values: int, scalar: bool = False) -> ir.Value:
        name = ("integer." if scalar else "integers.") + ".".join(map(str, values))
        return self._constant(name, np.array(values[0] if scalar else values, np.int64))

    def _constant(self, name: str, array: NDArray[np.generic]) -> ir.Value:
        if name not in self._made:
            self._made[name] = self._tape.initializer(ir.tensor(array, name=name))
        return self._made[name]

    def _weight(self, name: str, shape: tuple[int, ...], *, transposed: bool = False) -> ir.Value:
        """The torch tensor `name` of torch shape `shape`, read when the model is saved."""
        if name in self._made:
            return self._made[name]
        dtype, values = self._dtype, self._values

        def read() -> ir.TensorProtocol:
            array = values(name, shape)
            return ir.Tensor(np.ascontiguousarray(array.T if transposed else array, dtype=dtype.numpy()), name=name)

        dims = ir.Shape(shape[::-1] if transposed else shape)
        self._made[name] = self._tape.initializer(ir.LazyTensor(read, dtype, dims, name=name))
        return self._made[name]

    # nodes

    def _linear(self, x: ir.Value, path: str, rows: int, columns: int, *, bias: bool) -> ir.Value:
        """Torch's Linear at `path`, its weight rows x columns."""
        weight = self._weight(f"{path}.weight", (rows, columns), transposed=True)
        y = self._op("MatMul", x, weight, name=path)
        return self._op("Add", y, self._weight(f"{path}.bias", (rows,))) if bias else y

    def _op(
        self, kind: str, *inputs: ir.Value, name: str | None = None, **attributes: float | int | Sequence[int]
    ) -> ir.Value:
        return self._tape.op(kind, inputs, attributes, name=name)

    def _input(self, name: str, shape: tuple[str | int, ...], dtype: ir.DataType = ir.DataType.INT64) -> ir.Value:
        if name not in self._made:
            self._made[name] = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
            self._graph.inputs.append(self._made[name])
        return self._made[name]

    def _named(self, value: ir.Value, name: str, shape: tuple[str | int, ...]) -> ir.Value:
        value.name, value.shape, value.type = name, ir.Shape(shape), ir.TensorType(self._dtype)
        return value
