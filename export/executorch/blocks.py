"""The parts of a decoder that ExecuTorch runs in its XNNPACK delegate, lowered once for every shape.

A layer is three blocks: what comes before its attention, what comes after it, and its feed-forward network; the KV
cache and the attention itself are ExecuTorch's custom operators and lie between them. A block is written so that the
delegate takes all of it: its matrices and constants are inside, everything else is an input.

Lowering takes seconds and depends on shapes alone: a delegate finds its constants by name, and their names are the
SHA-256 of their bytes. So a block lowered with any weights becomes the one of a layer by giving it that layer's
constants under their names, byte for byte what lowering them would have given.
"""

import functools
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
from executorch.exir._serialize._named_data_store import NamedDataStoreOutput
from executorch.exir.backend.partitioner import PartitionResult
from executorch.exir.backend.utils import tag_constant_data
from executorch.exir.delegate import executorch_call_delegate
from executorch.exir.lowered_backend_module import LoweredBackendModule
from torch import nn
from torch.export import ExportedProgram
from torch.nn import functional

from dilap.core.errors import Unsupported
from dilap.core.shape import Architecture, LayerWidths
from dilap.export.executorch.quantisation import constants, quantise_linear_
from dilap.models.compute_device import HOST

Kind = Literal["attention_in", "attention_out", "ffn", "head"]
EDGE = EdgeCompileConfig(_check_ir_validity=False)  # the check refuses operators that are not ATen's: the custom ones
_EXAMPLE_TOKENS = 5


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """Everything that decides the code of a block. Widths that its kind has no use for are 0.

    `turns` says that an `attention_in` block has a rotary embedding, `norm_before` and `norm_behind` that the block
    begins or ends with a norm.
    """

    kind: Kind
    precision: str
    norm_eps: float
    activation: str
    architecture: Architecture  # only what the code of its kind depends on
    widths: LayerWidths
    turns: bool = False
    norm_before: bool = False
    norm_behind: bool = False
    softcap: float | None = None  # of the logits
    max_tokens: int  # of one run, any number up to it: XNNPACK reserves memory for as many when it loads a program

    def build(self) -> "Block":
        """The module, its matrices without values."""
        with torch.device("meta"):
            return _MODULES[self.kind](self)


class Block(nn.Module):
    """Matrices by name, and the computation. Inputs: activations (1 x tokens x ...), then vectors."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.shape = shape

    def linears(self) -> dict[str, nn.Linear]:
        return {name: module for name, module in self.named_children() if isinstance(module, nn.Linear)}

    def quantise_(self) -> None:
        """Give the matrices the types of the block's precision."""
        if self.shape.precision != "f32":
            for linear in self.linears().values():
                quantise_linear_(linear, precision=self.shape.precision)

    def examples(self) -> tuple[torch.Tensor, ...]:
        """Inputs; dimension 1 of activations may have any length."""
        raise NotImplementedError


class Norm(nn.Module):
    """RMSNorm, or LayerNorm where it has a bias; XNNPACK averages images only, so a mean is a product."""

    mean: torch.Tensor
    eps: torch.Tensor

    def __init__(self, size: int, *, eps: float) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((1, size), 1 / size, device=HOST))
        self.register_buffer("eps", torch.full((1,), eps, device=HOST))

    def forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if bias is not None:
            x = x - functional.linear(x, self.mean)
        x = x * torch.rsqrt(functional.linear(x * x, self.mean, self.eps)) * weight
        return x if bias is None else x + bias


class GeluTanh(nn.Module):
    """GELU by tanh, written as a sigmoid, (1 + tanh z) / 2 = sigmoid(2 z): XNNPACK's own GELU is always that by erf."""

    linear: torch.Tensor
    cubic: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        factor = 2 * math.sqrt(2 / math.pi)
        self.register_buffer("linear", torch.full((1,), factor, device=HOST))
        self.register_buffer("cubic", torch.full((1,), 0.044715 * factor, device=HOST))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(x * (x * x * self.cubic + self.linear))


_ACTIVATIONS: Mapping[str, type[nn.Module]] = {"silu": nn.SiLU, "relu": nn.ReLU, "gelu_pytorch_tanh": GeluTanh}


def _norm_vectors(shape: BlockShape) -> list[torch.Tensor]:
    """Examples of a norm's vectors (hidden)."""
    return [torch.ones(shape.architecture.hidden_size) for _ in range(shape.architecture.norm_vectors)]


class AttentionIn(Block):
    """Norm if the block begins with one, query, key and value projections, q/k norms, rotary embedding.

    Inputs: residual stream, norm vectors (if any), q and k norm weights (if any), cosines and sines (1 x tokens x 1 x
    head_dim, if the block turns heads). Outputs: queries, keys, values (1 x tokens x heads x head_dim).
    """

    half_turn: torch.Tensor

    def __init__(self, shape: BlockShape) -> None:
        super().__init__(shape)
        model, widths = shape.architecture, shape.widths
        if shape.norm_before:
            self.norm = Norm(model.hidden_size, eps=shape.norm_eps)
        self.query = nn.Linear(model.hidden_size, widths.num_heads * model.head_dim, bias=model.qkv_bias)
        self.key = nn.Linear(model.hidden_size, widths.num_kv_heads * model.head_dim, bias=model.qkv_bias)
        self.value = nn.Linear(model.hidden_size, widths.num_kv_heads * model.head_dim, bias=model.qkv_bias)
        if model.qk_norm:
            query, key = qk_norm_sizes(model, widths)
            self.query_norm, self.key_norm = Norm(query, eps=shape.norm_eps), Norm(key, eps=shape.norm_eps)
        if shape.turns:
            self.register_buffer("half_turn", _half_turn(model.head_dim))

    def forward(self, x: torch.Tensor, *vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        model, widths = self.shape.architecture, self.shape.widths
        rest = vectors
        if self.shape.norm_before:
            x, rest = self.norm(x, *vectors[: model.norm_vectors]), vectors[model.norm_vectors :]
        query, key, value = self.query(x), self.key(x), self.value(x)
        is_joint = model.qk_norm == "joint"
        if is_joint:
            query, key = self.query_norm(query, rest[0]), self.key_norm(key, rest[1])
        query = query.view(1, -1, widths.num_heads, model.head_dim)
        key = key.view(1, -1, widths.num_kv_heads, model.head_dim)
        value = value.view(1, -1, widths.num_kv_heads, model.head_dim)
        if model.qk_norm and not is_joint:
            query, key = self.query_norm(query, rest[0]), self.key_norm(key, rest[1])
        if self.shape.turns:
            query, key = self._rotated(query, *rest[-2:]), self._rotated(key, *rest[-2:])
        return query, key, value

    def _rotated(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """A product turns the halves of a head, because XNNPACK slices no tensor of changing length."""
        return x * cos + functional.linear(x, self.half_turn) * sin

    def examples(self) -> tuple[torch.Tensor, ...]:
        model = self.shape.architecture
        vectors = _norm_vectors(self.shape) if self.shape.norm_before else []
        if model.qk_norm:
            vectors += [torch.ones(size) for size in qk_norm_sizes(model, self.shape.widths)]
        angles = [torch.ones(1, _EXAMPLE_TOKENS, 1, model.head_dim) for _ in range(2 * self.shape.turns)]
        return (torch.ones(1, _EXAMPLE_TOKENS, model.hidden_size), *vectors, *angles)


class AttentionOut(Block):
    """Output projection, normalised if the block ends with a norm, added to the residual stream.

    Inputs: residual stream, attention's output by head, norm vectors (if any).
    """

    def __init__(self, shape: BlockShape) -> None:
        super().__init__(shape)
        model = shape.architecture
        self.out = nn.Linear(shape.widths.num_heads * model.head_dim, model.hidden_size, bias=model.out_bias)
        if shape.norm_behind:
            self.norm = Norm(model.hidden_size, eps=shape.norm_eps)

    def forward(self, x: torch.Tensor, heads: torch.Tensor, *norm: torch.Tensor) -> torch.Tensor:
        y = self.out(heads.view(1, -1, self.out.in_features))
        found: torch.Tensor = x + (self.norm(y, *norm) if norm else y)
        return found

    def examples(self) -> tuple[torch.Tensor, ...]:
        model = self.shape.architecture
        heads = torch.ones(1, _EXAMPLE_TOKENS, self.shape.widths.num_heads, model.head_dim)
        vectors = _norm_vectors(self.shape) if self.shape.norm_behind else []
        return (torch.ones(1, _EXAMPLE_TOKENS, model.hidden_size), heads, *vectors)


class FeedForward(Block):
    """Feed-forward network with a norm before it, behind it or both, added to the residual stream.

    Inputs: residual stream, vectors of the norm before, of the norm behind.
    """

    def __init__(self, shape: BlockShape) -> None:
        super().__init__(shape)
        model, channels = shape.architecture, shape.widths.num_channels
        if shape.norm_before:
            self.norm = Norm(model.hidden_size, eps=shape.norm_eps)
        if shape.norm_behind:
            self.norm_behind = Norm(model.hidden_size, eps=shape.norm_eps)
        if model.ffn_matrices == 3:
            self.gate = nn.Linear(model.hidden_size, channels, bias=model.ffn_bias)
        self.up = nn.Linear(model.hidden_size, channels, bias=model.ffn_bias)
        self.activation = _ACTIVATIONS[shape.activation]()
        self.down = nn.Linear(channels, model.hidden_size, bias=model.ffn_out_bias)

    def forward(self, x: torch.Tensor, *vectors: torch.Tensor) -> torch.Tensor:
        before, behind = self._of_norms(vectors)
        read = self.norm(x, *before) if before else x
        inner = self.up(read)
        inner = self.activation(self.gate(read)) * inner if hasattr(self, "gate") else self.activation(inner)
        y = self.down(inner)
        found: torch.Tensor = x + (self.norm_behind(y, *behind) if behind else y)
        return found

    def _of_norms(self, vectors: Sequence[torch.Tensor]) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
        """Divide `vectors` into those of the norm before and those of the norm behind."""
        count = self.shape.architecture.norm_vectors * self.shape.norm_before
        return vectors[:count], vectors[count:]

    def examples(self) -> tuple[torch.Tensor, ...]:
        norms = (self.shape.norm_before, self.shape.norm_behind)
        # Tensors of their own: torch.export takes the same tensor twice for one input.
        vectors = [vector for has_norm in norms if has_norm for vector in _norm_vectors(self.shape)]
        return (torch.ones(1, _EXAMPLE_TOKENS, self.shape.architecture.hidden_size), *vectors)


class Head(Block):
    """Final norm and logits, under a soft cap if the model has one. Inputs: residual stream, norm vectors."""

    softcap: torch.Tensor

    def __init__(self, shape: BlockShape) -> None:
        super().__init__(shape)
        model = shape.architecture
        self.norm = Norm(model.hidden_size, eps=shape.norm_eps)
        self.out = nn.Linear(model.hidden_size, model.vocab_size, bias=False)
        if shape.softcap:
            self.register_buffer("softcap", torch.full((1,), shape.softcap, device=HOST))

    def forward(self, x: torch.Tensor, *norm: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.out(self.norm(x, *norm))
        return torch.tanh(found / self.softcap) * self.softcap if self.shape.softcap else found

    def examples(self) -> tuple[torch.Tensor, ...]:
        count = min(_EXAMPLE_TOKENS, self.shape.max_tokens)
        return (torch.ones(1, count, self.shape.architecture.hidden_size), *_norm_vectors(self.shape))


_MODULES: Mapping[Kind, type[Block]] = {
    "attention_in": AttentionIn,
    "attention_out": AttentionOut,
    "ffn": FeedForward,
    "head": Head,
}


def qk_norm_sizes(architecture: Architecture, widths: LayerWidths) -> tuple[int, int]:
    """Return how many channels the norm of the queries and that of the keys normalise at once."""
    if architecture.qk_norm == "joint":
        return widths.num_heads * architecture.head_dim, widths.num_kv_heads * architecture.head_dim
    return architecture.head_dim, architecture.head_dim


def _half_turn(head_dim: int) -> torch.Tensor:
    """The matrix that maps a head's halves (a, b) to (-b, a)."""
    half = head_dim // 2
    matrix = torch.zeros(head_dim, head_dim, device=HOST)
    matrix[torch.arange(half, device=HOST), torch.arange(half, head_dim, device=HOST)] = -1
    matrix[torch.arange(half, head_dim, device=HOST), torch.arange(half, device=HOST)] = 1
    return matrix


@dataclass(frozen=True, kw_only=True)
class Delegate:
    """A lowered block. `arguments[i]` is the block input that the delegate takes i-th; `results[i]` the delegate's
    output that is the block's i-th."""

    module: LoweredBackendModule
    arguments: tuple[int, ...]
    results: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Template:
    """A lowered block and the names of its matrices' constants, in the order of `constants`."""

    delegate: Delegate
    names: dict[str, tuple[str, ...]]

    def filled(self, block: Block) -> Delegate:
        """The delegate of a block of the same shape, quantised, with its own matrices."""
        module = self.delegate.module
        code, stored = module.processed_bytes, module.named_data_store_output
        data = {name: (stored.buffers[entry.buffer_index], entry) for name, entry in stored.pte_data.items()}
        for matrix, linear in block.linears().items():
            for old, (new, content) in zip(self.names[matrix], constants(linear), strict=True):
                _, entry = data.pop(old)
                code = code.replace(old.encode(), new.encode())
                data[new] = (content, entry)
        return Delegate(
            module=LoweredBackendModule(
                module.original_module, module.backend_id, code, module.compile_specs, _named_data(data)
            ),
            arguments=self.delegate.arguments,
            results=self.delegate.results,
        )


def _named_data(data: Mapping[str, tuple[bytes, Any]]) -> NamedDataStoreOutput:
    entries = {
        name: type(entry)(buffer_index=index, alignment=entry.alignment, tensor_layout=entry.tensor_layout)
        for index, (name, (_, entry)) in enumerate(data.items())
    }
    return NamedDataStoreOutput(buffers=[content for content, _ in data.values()], pte_data=entries, external_data={})


@functools.lru_cache(maxsize=256)  # a latency table has some 40 shapes; each holds its matrices once
def template(shape: BlockShape) -> Template:
    """The block of a shape, lowered with arbitrary matrices."""
    block = shape.build()
    generator = torch.Generator().manual_seed(0)
    for linear in block.linears().values():
        linear.weight = nn.Parameter(torch.randn(linear.weight.shape, generator=generator), requires_grad=False)
        if linear.bias is not None:
            linear.bias = nn.Parameter(torch.randn(linear.bias.shape, generator=generator), requires_grad=False)
    block.quantise_()
    names = {name: tuple(key for key, _ in constants(linear)) for name, linear in block.linears().items()}
    delegate = lower(block)
    missing = {key for keys in names.values() for key in keys} - set(delegate.module.named_data_store_output.pte_data)
    assert not missing, f"XNNPACK stores the matrices of {shape.kind} in another form than expected"
    return Template(delegate=delegate, names=names)


@torch.no_grad()
def lower(block: Block) -> Delegate:
    """The XNNPACK delegate of a whole block. Raises Unsupported where it cannot be one."""
    examples = block.examples()
    max_tokens = block.shape.max_tokens
    tokens = torch.export.Dim("tokens", min=1, max=max_tokens) if max_tokens > 1 else None
    dynamic = tuple({1: tokens} if tokens and example.dim() > 1 else None for example in examples)
    named = 2 if block.shape.kind == "attention_out" else 1  # inputs before the vectors
    forward_dynamic: Any = (*dynamic[:named], dynamic[named:]) if dynamic[named:] else dynamic
    program = torch.export.export(block, examples, dynamic_shapes=forward_dynamic, strict=False)
    if block.shape.precision != "f32":
        program = program.run_decompositions({})  # torchao's tensor subclasses become plain operators
    edge = to_edge_transform_and_lower(program, partitioner=[_Partitioner()], compile_config=EDGE)
    lowered = edge.exported_program()
    calls = [node for node in lowered.graph.nodes if node.op == "call_function"]
    if [node.target for node in calls if node.target != operator.getitem] != [executorch_call_delegate]:
        left = sorted({str(node.target) for node in calls} - {str(operator.getitem), str(executorch_call_delegate)})
        raise Unsupported(f"XNNPACK cannot take all of a {block.shape.kind} block: {left or 'it is in several parts'}")
    inputs = list(lowered.graph_signature.user_inputs)
    call = next(node for node in calls if node.target == executorch_call_delegate)
    outputs: Sequence[Any] = lowered.graph.output_node().args[0]
    arguments = tuple(inputs.index(argument.name) for argument in call.args[1:])
    module = getattr(lowered.graph_module, call.args[0].target)
    shapes = tuple(tuple(value.shape[2:]) for value in call.meta["val"])
    stand_in = torch.export.export(
        _StandIn(shapes),
        tuple(examples[index] for index in arguments),
        dynamic_shapes=(tuple(dynamic[index] for index in arguments),),
        strict=False,
    )
    return Delegate(
        module=LoweredBackendModule(
            stand_in, module.backend_id, module.processed_bytes, module.compile_specs, module.named_data_store_output
        ),
        arguments=arguments,
        results=tuple(output.args[1] for output in outputs),
    )


class _Partitioner(XnnpackPartitioner):  # type: ignore[misc] # ExecuTorch has no types
    """XNNPACK's partitioner, which by itself leaves the constants of sums and products outside."""

    def partition(self, exported_program: ExportedProgram) -> PartitionResult:
        found = super().partition(exported_program)
        tag_constant_data(exported_program)
        return found


class _StandIn(nn.Module):
    """What later passes run to learn a delegate's output shapes: with its real code they take three times as long."""

    def __init__(self, shapes: tuple[tuple[int, ...], ...]) -> None:
        super().__init__()
        self._shapes = shapes

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        activations = next(tensor for tensor in inputs if tensor.dim() > 1)
        return tuple(activations.new_empty(1, activations.shape[1], *shape) for shape in self._shapes)
