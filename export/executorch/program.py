"""A decoder as an ExecuTorch program: `forward(tokens, input_pos)` with its KV cache inside, and `score` to judge it.

`forward` gives only the last position's logits, as deployed programs do. `score` gives those of all positions, for at
most SCORED_TOKENS tokens at once, so that evaluation needs no run for every token. It has the same weights, stored
once, and the same kernels, but a cache of its own, and takes no memory where it is not loaded.

This is our own module and not `executorch.examples.models.llama`, which has one width for all layers, no LayerNorm and
not every bias, is an example and no interface, and can only be lowered as a whole, which takes minutes for 30 layers.
Here, everything around ExecuTorch's `update_cache` and `custom_sdpa` is made of blocks that are lowered once for every
shape (`dilap.export.executorch.blocks`). The graph between them is traced with placeholder operators, which become
calls of the blocks' delegates at the end.
"""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from executorch.exir import EdgeProgramManager, ExecutorchBackendConfig, ExecutorchProgramManager, to_edge
from executorch.exir.delegate import executorch_call_delegate, get_lowered_module_name
from executorch.exir.passes import MemoryPlanningPass, _quant_patterns_and_replacements
from executorch.extension.llm.custom_ops import custom_ops
from torch import nn
from torch.export import ExportedProgram
from torch.fx import Node
from torch.nn import functional

from dilap.core.shape import Architecture, LayerWidths
from dilap.export.executorch.blocks import EDGE, BlockShape, Delegate, Kind, qk_norm_sizes, template
from dilap.export.executorch.header import Header
from dilap.export.executorch.quantisation import quantised_groups, quantised_rows
from dilap.models.families import families

Values = Callable[[str, tuple[int, ...]], torch.Tensor]  # a tensor's name and shape -> its content in f32
REGISTERED = (custom_ops, _quant_patterns_and_replacements)  # imported for the operators that they define
# What the code of a block depends on, beside the hidden size and the widths of its layer.
_DEPENDS_ON: Mapping[Kind, tuple[str, ...]] = {
    "attention_in": ("head_dim", "norm_vectors", "qkv_bias", "qk_norm"),
    "attention_out": ("head_dim", "norm_vectors", "out_bias"),
    "ffn": ("norm_vectors", "ffn_matrices", "ffn_bias", "ffn_out_bias"),
    "head": ("vocab_size", "norm_vectors"),
}
_NOTHING = Architecture(
    family="",
    hidden_size=1,
    head_dim=1,
    vocab_size=1,
    tied_embeddings=False,
    ffn_matrices=2,
    norm_vectors=1,
    qkv_bias=False,
    out_bias=False,
    ffn_bias=False,
    qk_norm=False,
    num_positions=0,
    layers=(),
)


@torch.no_grad()
def build(header: Header, values: Values) -> ExecutorchProgramManager:
    """Return the program, ready to be written."""
    decoder = Decoder(header, values)
    methods = {
        "forward": _lowered(decoder, decoder.delegates, max_tokens=header.max_context),
        "score": _lowered(Score(decoder), decoder.delegates, max_tokens=header.max_scored),
    }
    manager = EdgeProgramManager(methods, header.metadata(), EDGE)
    # The caller's tensors serve as they are: planned inputs would be copied before every run.
    planning = MemoryPlanningPass(alloc_graph_input=False)
    return manager.to_executorch(ExecutorchBackendConfig(memory_planning_pass=planning))


def _lowered(module: nn.Module, delegates: Sequence[Delegate], *, max_tokens: int) -> ExportedProgram:
    # two tokens, because a length of one would be taken for a constant
    example = (torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, dtype=torch.long))
    tokens = torch.export.Dim("tokens", min=1, max=max_tokens)
    traced = torch.export.export(module, example, dynamic_shapes=({1: tokens}, None), strict=False)
    program: ExportedProgram = to_edge(traced, compile_config=EDGE).exported_program()
    _call_delegates_(program, delegates)
    return program


@torch.library.custom_op("dilap::attention_in", mutates_args=())
def attention_in(inputs: list[torch.Tensor], block: int, heads: list[int], head_dim: int) -> list[torch.Tensor]:
    """Placeholder for block number `block`: an output (1 x tokens x count x head_dim) for every count in `heads`."""
    raise NotImplementedError


@attention_in.register_fake
def _(inputs: list[torch.Tensor], _: int, heads: list[int], head_dim: int) -> list[torch.Tensor]:
    return [inputs[0].new_empty(1, inputs[0].shape[1], count, head_dim) for count in heads]


@torch.library.custom_op("dilap::block", mutates_args=())
def block_of_width(inputs: list[torch.Tensor], block: int, width: int) -> list[torch.Tensor]:
    """Placeholder for block number `block` with one output (1 x tokens x width)."""
    raise NotImplementedError


@block_of_width.register_fake
def _(inputs: list[torch.Tensor], _: int, width: int) -> list[torch.Tensor]:
    return [inputs[0].new_empty(1, inputs[0].shape[1], width)]


@dataclass(frozen=True, kw_only=True)
class _Call:
    """A block as the decoder calls it: its number and the names of the buffers that hold its vectors."""

    block: int
    vectors: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _View:
    """The part of the cache that new tokens see in layers with a window, `length` tokens from the token `begin` on.

    `mask` (new tokens x length) is added to the scores. One over the whole cache would cost every token a product with
    all 2048 keys, because ExecuTorch's attention skips none under a mask.
    """

    begin: Any
    length: Any
    mask: torch.Tensor


class Decoder(nn.Module):
    """The graph between the blocks. `forward` gives the logits (1 x vocabulary) of the last token."""

    embedding: torch.Tensor
    embedding_scales: torch.Tensor
    positions: torch.Tensor

    def __init__(self, header: Header, values: Values) -> None:
        super().__init__()
        self.header = header
        self.delegates: list[Delegate] = []
        self._values = values
        self._family = families()[header.architecture.family].exported_paths
        layers = zip(header.architecture.layers, header.numerics.layers, strict=True)
        with_attention = [numerics for widths, numerics in layers if widths.num_heads]
        self._rotaries = list(dict.fromkeys(one.rotary for one in with_attention if one.rotary))
        windows = dict.fromkeys(one.window for one in with_attention if one.window)
        self._windows = [window for window in windows if window < header.max_context]
        self._make_embedding_()
        self._make_positions_()
        self._layers = [tuple(self._layer(index)) for index in range(len(header.architecture.layers))]
        self._head = self._make_head_(max_tokens=1)
        self._wide_head = self._make_head_(max_tokens=header.max_scored)

    def _make_embedding_(self) -> None:
        model, factor = self.header.architecture, self.header.numerics.embedding_scale
        table = self._values(f"{self._family.embeddings}.weight", (model.vocab_size, model.hidden_size))
        precision = self.header.precision_of("embedding")
        if precision != "f32":
            table, scales = quantised_groups(table) if precision == "8da4w" else quantised_rows(table)
            self.register_buffer("embedding_scales", scales * factor)
        elif factor != 1:  # a large table is not copied without need
            table = table * factor
        self.register_buffer("embedding", table)

    def _make_positions_(self) -> None:
        header, model = self.header, self.header.architecture
        if model.num_positions:
            name = f"{self._family.positions}.weight"
            rows = self._values(name, (model.num_positions, model.hidden_size))[self._family.position_offset :]
            self.register_buffer("positions", rows[: header.max_context].clone())
        for number, rotary in enumerate(self._rotaries):
            angles = torch.outer(torch.arange(header.max_context), torch.tensor(rotary.frequencies)).repeat(1, 2)
            self.register_buffer(f"cos_{number}", angles.cos() * rotary.magnitude)
            self.register_buffer(f"sin_{number}", angles.sin() * rotary.magnitude)

    def _layer(self, index: int) -> Iterator[_Call]:
        """Make the blocks of a layer: two for attention, one for the feed-forward network, none for what it lacks."""
        model, family, prefix = self.header.architecture, self._family, f"{self._family.layers}.{index}"
        widths = model.layers[index]
        if widths.num_heads:
            qk_norms: list[tuple[str, int]] = []
            if model.qk_norm:
                names = (f"{prefix}.{path}.weight" for path in (family.query_norm, family.key_norm))
                qk_norms = list(zip(names, qk_norm_sizes(model, widths), strict=True))
            paths = {"query": family.query, "key": family.key, "value": family.value}
            for name in ("keys", "values"):
                cache = torch.zeros(1, self.header.max_context, widths.num_kv_heads, model.head_dim)
                self.register_buffer(f"{name}_{index}", cache, persistent=False)
            matrices = {name: f"{prefix}.{path}" for name, path in paths.items()}
            turns = self.header.numerics.layers[index].rotary is not None
            inside, before = replace(widths, num_channels=0), self._norm(prefix, family.attention_norm)
            part = f"layers.{index}.attention"
            yield self._block("attention_in", part, inside, matrices, before=before, qk_norms=qk_norms, turns=turns)
            out = LayerWidths(num_heads=widths.num_heads, num_kv_heads=widths.num_heads, num_channels=0)
            behind = self._norm(prefix, family.attention_norm_behind)
            matrices = {"out": f"{prefix}.{family.attention_out}"}
            yield self._block("attention_out", part, out, matrices, behind=behind)
        if widths.num_channels:
            *gate, up = (f"{prefix}.{path}" for path in family.ffn_in)
            matrices = {"gate": gate[0]} if gate else {}
            matrices |= {"up": up, "down": f"{prefix}.{family.ffn_out}"}
            ffn = LayerWidths(num_heads=0, num_kv_heads=0, num_channels=widths.num_channels)
            before, behind = self._norm(prefix, family.ffn_norm), self._norm(prefix, family.ffn_norm_behind)
            yield self._block("ffn", f"layers.{index}.ffn", ffn, matrices, before=before, behind=behind)

    def _make_head_(self, *, max_tokens: int) -> _Call:
        model = self.header.architecture
        none = LayerWidths(num_heads=0, num_kv_heads=0, num_channels=0)
        matrix = self._family.embeddings if model.tied_embeddings else "lm_head"
        before = self._norm(*self._family.final_norm.rsplit(".", 1))
        return self._block("head", "head", none, {"out": matrix}, before=before, max_tokens=max_tokens)

    def _norm(self, prefix: str, path: str | None) -> list[tuple[str, int]]:
        """Return names and sizes of the vectors of the norm at `path` in `prefix`; none where there is no norm."""
        model = self.header.architecture
        names = ("weight", "bias")[: model.norm_vectors] if path else ()
        return [(f"{prefix}.{path}.{name}", model.hidden_size) for name in names]

    def _block(
        self,
        kind: Kind,
        part: str,
        widths: LayerWidths,
        matrices: dict[str, str],
        *,
        before: Sequence[tuple[str, int]] = (),
        qk_norms: Sequence[tuple[str, int]] = (),
        behind: Sequence[tuple[str, int]] = (),
        turns: bool = False,
        max_tokens: int | None = None,
    ) -> _Call:
        """Lower a block with the model's matrices, and keep the vectors of its norms as buffers.

        `part` is what it has its precision from. `matrices` are paths in the model; vectors are given with their sizes.
        """
        header, vectors = self.header, [*before, *qk_norms, *behind]
        shape = BlockShape(
            kind=kind,
            precision=header.precision_of(part),
            norm_eps=header.numerics.norm_eps,
            activation=header.numerics.activation if kind == "ffn" else "",
            architecture=_relevant(header.architecture, kind),
            widths=widths,
            turns=turns,
            norm_before=bool(before),
            norm_behind=bool(behind),
            softcap=header.numerics.logits_softcap if kind == "head" else None,
            max_tokens=max_tokens or header.max_context,
        )
        block = shape.build()
        for name, linear in block.linears().items():
            linear.weight = nn.Parameter(
                self._values(f"{matrices[name]}.weight", tuple(linear.weight.shape)), requires_grad=False
            )
            if linear.bias is not None:
                bias = self._values(f"{matrices[name]}.bias", tuple(linear.bias.shape))
                linear.bias = nn.Parameter(bias, requires_grad=False)
        block.quantise_()
        self.delegates.append(template(shape).filled(block))
        number = len(self.delegates) - 1
        names = tuple(f"vector_{number}_{index}" for index in range(len(vectors)))
        for name, (source, size) in zip(names, vectors, strict=True):
            self.register_buffer(name, self._values(source, (size,)).clone())
        return _Call(block=number, vectors=names)

    def forward(self, tokens: torch.Tensor, input_pos: torch.Tensor) -> torch.Tensor:
        # The logits of all positions would make a prefill of SmolLM2-135M a quarter slower.
        return self._logits(self._head, self._hidden(tokens, input_pos)[:, -1:])[:, 0]

    def score(self, tokens: torch.Tensor, input_pos: torch.Tensor) -> torch.Tensor:
        """Return the logits (tokens x vocabulary) of at most SCORED_TOKENS tokens."""
        return self._logits(self._wide_head, self._hidden(tokens, input_pos))[0]

    def _hidden(self, tokens: torch.Tensor, input_pos: torch.Tensor) -> torch.Tensor:
        """Return the residual stream (1 x tokens x hidden) after the last layer."""
        start, count = input_pos[0].item(), tokens.shape[1]
        torch._check(start >= 0)
        torch._check(start < self.header.max_context)
        torch._check(start + count <= self.header.max_context)
        x = self._embed(tokens, start)
        angles = {rotary: self._angles(number, start, count) for number, rotary in enumerate(self._rotaries)}
        views: dict[int | None, _View] = {one: self._view(one, input_pos, count) for one in self._windows}
        for index, (widths, calls) in enumerate(zip(self.header.architecture.layers, self._layers, strict=True)):
            if widths.num_heads:
                numerics = self.header.numerics.layers[index]
                turns = angles[numerics.rotary] if numerics.rotary else []
                x = self._attention(x, turns, index, start, views.get(numerics.window))
            if widths.num_channels:
                x = self._run(calls[-1], [x], width=x.shape[-1])
        return x

    def _logits(self, head: _Call, x: torch.Tensor) -> torch.Tensor:
        return self._run(head, [x], width=self.header.architecture.vocab_size)

    def _run(self, call: _Call, inputs: list[torch.Tensor], *, width: int) -> torch.Tensor:
        found: list[torch.Tensor] = block_of_width([*inputs, *self._vectors(call)], call.block, width)
        return found[0]

    def _vectors(self, call: _Call) -> list[torch.Tensor]:
        return [getattr(self, name) for name in call.vectors]

    def _embed(self, tokens: torch.Tensor, start: Any) -> torch.Tensor:
        """Return the residual stream (1 x tokens x hidden) before the first layer."""
        precision, ops = self.header.precision_of("embedding"), cast(Any, torch.ops.quantized_decomposed)
        if precision == "f32":
            x: torch.Tensor = functional.embedding(tokens, self.embedding)
        else:
            rows, limits = (ops.embedding_4bit, (-8, 7)) if precision == "8da4w" else (ops.embedding_byte, (-128, 127))
            x = rows.dtype(self.embedding, self.embedding_scales, None, *limits, tokens, dtype=torch.float32)
        if self.header.architecture.num_positions:
            return x + self.positions.narrow(0, start, tokens.shape[1])
        return x

    def _angles(self, rotary: int, start: Any, count: Any) -> list[torch.Tensor]:
        """Return cosines and sines (1 x tokens x 1 x head_dim) of a rotary embedding, by its number."""
        tables: list[torch.Tensor] = [getattr(self, f"{name}_{rotary}") for name in ("cos", "sin")]
        rows = (table.narrow(0, start, count) for table in tables)
        return [row.view(1, -1, 1, self.header.architecture.head_dim) for row in rows]

    def _view(self, window: int, input_pos: torch.Tensor, count: Any) -> "_View":
        """Return what `count` tokens see where every one sees the `window` latest tokens, itself included."""
        first = (input_pos - (window - 1)).clamp(min=0)
        begin, length = first[0].item(), (input_pos + count - first)[0].item()
        torch._check(begin >= 0)
        torch._check(length >= 1)
        torch._check(begin + length <= self.header.max_context)
        distances = (torch.arange(count) + input_pos).int()[:, None] - (torch.arange(length) + first).int()
        is_seen = (distances >= 0) & (distances < window)
        return _View(begin=begin, length=length, mask=torch.where(is_seen, 0.0, -torch.inf))

    def _attention(
        self, x: torch.Tensor, angles: list[torch.Tensor], index: int, start: Any, view: "_View | None"
    ) -> torch.Tensor:
        widths, (before, after, *_) = self.header.architecture.layers[index], self._layers[index]
        keys, values = getattr(self, f"keys_{index}"), getattr(self, f"values_{index}")
        counts = [widths.num_heads, widths.num_kv_heads, widths.num_kv_heads]
        inputs = [x, *self._vectors(before), *angles]
        query, key, value = attention_in(inputs, before.block, counts, self.header.architecture.head_dim)
        torch.ops.llama.update_cache(key, keys, start)
        torch.ops.llama.update_cache(value, values, start)
        scale = self.header.numerics.attention_scale
        if view is None:
            heads = torch.ops.llama.custom_sdpa(query, keys, values, start, None, 0.0, True, scale)
        else:
            keys, values = (cache.narrow(1, view.begin, view.length) for cache in (keys, values))
            heads = torch.ops.llama.custom_sdpa(query, keys, values, 0, view.mask, 0.0, False, scale)
        return self._run(after, [x, heads], width=x.shape[-1])


class Score(nn.Module):
    """The decoder's `score` as a module, because only modules can be traced."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, tokens: torch.Tensor, input_pos: torch.Tensor) -> torch.Tensor:
        return self.decoder.score(tokens, input_pos)


def _relevant(architecture: Architecture, kind: Kind) -> Architecture:
    """Return the architecture with only what a block's code depends on, so that models share lowered blocks."""
    return replace(_NOTHING, **{name: getattr(architecture, name) for name in ("hidden_size", *_DEPENDS_ON[kind])})


def _call_delegates_(program: ExportedProgram, delegates: Sequence[Delegate]) -> None:
    """Turn every placeholder operator into a call of its block's delegate."""
    # Tracing through the delegates of 30 layers themselves would take four times as long.
    module, graph = program.graph_module, program.graph
    for node in list(graph.nodes):
        name = str(getattr(node.target, "_op", node.target))
        if node.op == "call_function" and name in ("dilap.attention_in.default", "dilap.block.default"):
            delegate = delegates[node.args[1]]
            with graph.inserting_before(node):
                lowered = graph.get_attr(get_lowered_module_name(module, delegate.module))
                arguments = (node.args[0][index] for index in delegate.arguments)
                call = graph.call_function(executorch_call_delegate, (lowered, *arguments))
                _take_results_(node, call, delegate.results)
    graph.eliminate_dead_code()
    graph.lint()
    module.recompile()


def _take_results_(node: Node, call: Node, results: tuple[int, ...]) -> None:
    """Replace a placeholder operator's outputs by the delegate's; each of its users takes one output."""
    by_output = dict(zip(results, node.meta["val"], strict=True))
    call.meta["val"] = tuple(by_output[index] for index in range(len(results)))
    for user in list(node.users):
        result = results[cast(int, user.args[1])]
        with node.graph.inserting_before(node):
            item = node.graph.call_function(operator.getitem, (call, result))
            item.meta["val"] = by_output[result]
        user.replace_all_uses_with(item)
        node.graph.erase_node(user)
    node.graph.erase_node(node)
