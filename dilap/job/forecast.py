"""What a prune job will take, stage by stage, from the shape of the model alone: memory, and products to compute.

Counted are the tensors that a stage holds at once, and two FLOPs for every multiplication and addition of its matrix
products. What the device measures (latency tables, claims) and what exporters write depends on the runtime, and is no
part of it. Times are the FLOPs at the speed of one large product here.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import psutil
import torch

from dilap import backends
from dilap.core.groups import Block
from dilap.core.shape import Architecture
from dilap.job.options import JobOptions
from dilap.methods import chooses_precision
from dilap.models.compute import product_type
from dilap.models.compute_device import HOST, compute_device, memory_of
from dilap.models.load import is_mapped, shape_of

_BY_LEVELS = ("dilap", "equal_widths", "prune_then_quantise", "uniform", "layer_error", "quantise", "ziplm")
_SEARCHED = ("dilap", "equal_widths", "prune_then_quantise")
_F32 = 4
_BATCH = 2048  # tokens that run at once, but for the quadratic model and for recovery
_QUADRATIC_BATCH = 1024
_KEPT_BYTES = 2 << 30  # of changes of projections while a quadratic model is made, of cut layers, of rounded matrices
_PATHS = 3  # configs whose layers' inputs are kept
_MOST_F32_LIBRARY = 2 << 30  # a larger level library is kept in bf16
_SAMPLED_AT_ONCE = 32  # sequences of calibration text
_PIECES = {True: 512, False: 8192}  # tokens that recovery runs at once, on the host and elsewhere


@dataclass(frozen=True, kw_only=True)
class Need:
    """What one stage needs: bytes where torch computes, bytes of the host's memory beside, of files, and FLOPs.

    Of the first, `mapped_bytes` are weights that stay in their files, which the system forgets where memory is short.
    """

    stage: str
    device_bytes: int
    mapped_bytes: int = 0
    host_bytes: int = 0
    file_bytes: int = 0
    flops: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where a job would run: the memory of `device` and of the host, and how fast it multiplies, where that matters."""

    device: torch.device
    device_bytes: int
    host_bytes: int
    flops_per_second: float = math.inf

    @classmethod
    def here(cls, device: torch.device) -> "Machine":
        """Return this machine."""
        return cls(device=device, device_bytes=memory_of(device), host_bytes=psutil.virtual_memory().total)

    def timed(self, dtype: torch.dtype) -> "Machine":
        """Return the same machine with the speed at which `device` makes one product of matrices of `dtype`."""
        return replace(self, flops_per_second=_speed(self.device, product_type(dtype, self.device)))


def _speed(device: torch.device, dtype: torch.dtype) -> float:
    size = 1024 if device.type == HOST.type else 8192
    a = torch.ones(size, size, dtype=dtype, device=device)
    times = []
    for _ in range(4):  # the first one prepares the library
        start = time.perf_counter()
        float((a @ a)[0, 0])  # waits for the device
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


@dataclass(frozen=True, kw_only=True)
class _Shape:
    """Sizes of a model and of the text of a job, of which all needs consist."""

    architecture: Architecture
    weight_bytes: int  # of one weight
    options: JobOptions

    @property
    def layers(self) -> int:
        """Weights of all decoder layers."""
        widths = self.architecture.layers
        return sum(
            self.architecture.attention_parameters(one) + self.architecture.ffn_parameters(one) for one in widths
        )

    @property
    def model_bytes(self) -> int:
        return self.architecture.num_parameters * self.weight_bytes

    @property
    def head(self) -> int:
        """Weights of the head."""
        return self.architecture.vocab_size * self.architecture.hidden_size

    @property
    def projections(self) -> int:
        """Weights of all output projections."""
        return self.architecture.hidden_size * sum(self.inputs(block) for block in self.architecture.blocks)

    def mapped_bytes(self, stage: str) -> int:
        """Bytes of weights that need no memory of their own in a stage that goes through the layers one by one.

        A search writes into the output projections, which become copies.
        """
        if stage not in ("load the model", "prune", "level library", "search", "refit"):
            return 0
        at_once = self.head + self.layers // len(self.architecture.layers)
        written = self.projections if stage in ("search", "refit") else 0
        return max(0, self.model_bytes - self.weight_bytes * (at_once + written))

    @property
    def train(self) -> int:
        """Tokens of the training split that the search reads."""
        return self.options.calibration.train_sequences * self.options.calibration.sequence_length

    @property
    def validation(self) -> int:
        return self.options.calibration.validation_sequences * self.options.calibration.sequence_length

    @property
    def unseen(self) -> int:
        return self.options.evaluation_sequences * self.options.calibration.sequence_length

    def inputs(self, block: Block) -> int:
        """Columns of the output projection of a block."""
        full = self.architecture.widths_of(block, [group.num_units for group in block.groups])
        return full.num_heads * self.architecture.head_dim if block.kind == "attention" else full.num_channels

    def forward(self, tokens: int) -> float:
        """FLOPs of running tokens through all layers."""
        length = self.options.calibration.sequence_length
        heads = sum(one.num_heads for one in self.architecture.layers)
        return tokens * (2.0 * self.layers + 2 * heads * self.architecture.head_dim * length)

    def activations(self, tokens: int) -> int:
        """Bytes that a backward pass through all layers needs of a forward pass of so many tokens."""
        of_layers = (
            10 * self.architecture.hidden_size
            + (2 * one.num_heads + 2 * one.num_kv_heads) * self.architecture.head_dim
            + 4 * self.architecture.active_channels(one)
            for one in self.architecture.layers
        )
        return tokens * sum(of_layers) * max(2, self.weight_bytes)


def of_job(options: JobOptions) -> tuple[Callable[[JobOptions], list[Need]], Machine]:
    """Return what says the needs of such jobs of this model on this machine, and the machine: no weights are read."""
    architecture, weight_bytes = shape_of(options.model)
    device = compute_device(options.compute)
    dtype = torch.float32 if weight_bytes == _F32 else torch.bfloat16
    return partial(needs_on, device, architecture, weight_bytes=weight_bytes), Machine.here(device).timed(dtype)


def needs_on(device: torch.device, architecture: Architecture, options: JobOptions, *, weight_bytes: int) -> list[Need]:
    """Return the needs of a job's stages where it computes on `device`, with the weights that stay in their files."""
    found = needs_of(architecture, options, weight_bytes=weight_bytes, is_host=device == HOST)
    if device != HOST or options.merge_adapter is not None or not is_mapped(options.model):
        return found
    shape = _Shape(architecture=architecture, weight_bytes=weight_bytes, options=options)
    return [replace(one, mapped_bytes=shape.mapped_bytes(one.stage)) for one in found]


def needs_of(architecture: Architecture, options: JobOptions, *, weight_bytes: int, is_host: bool) -> list[Need]:
    """Return the needs of a job's stages, for a model whose weights have so many bytes each."""
    shape = _Shape(architecture=architecture, weight_bytes=weight_bytes, options=options)
    capabilities = backends.get(options.backend).capabilities(architecture, precision=options.workload.precision)
    found = [Need(stage="load the model", device_bytes=shape.model_bytes)]
    if options.calibration.source == "self":
        found.append(_sampling(shape))
    if options.method in _BY_LEVELS:
        found += _by_levels(shape, {block.name: capabilities.levels(block) for block in architecture.blocks})
    else:
        states = 2 * shape.train * architecture.hidden_size * weight_bytes
        found.append(Need(stage="prune", device_bytes=shape.model_bytes + states, flops=shape.forward(shape.train)))
    found.append(_scoring(shape))
    if options.recovery.mode != "none":
        found.append(_recovery(shape, is_host=is_host))
    return found


def _sampling(shape: _Shape) -> Need:
    options, architecture = shape.options.text, shape.architecture
    sequences = options.train_sequences + options.validation_sequences
    kv = sum(one.num_kv_heads for one in architecture.layers) * architecture.head_dim * 2
    cache = _SAMPLED_AT_ONCE * options.sequence_length * kv * shape.weight_bytes
    copy = architecture.num_parameters * 2 if shape.weight_bytes > 2 else 0  # in bf16, where that is faster
    tokens = sequences * options.sequence_length
    return Need(
        stage="calibration text",
        device_bytes=shape.model_bytes + copy + cache,
        flops=shape.forward(tokens) + 2.0 * tokens * shape.head,
    )


def _by_levels(shape: _Shape, levels: Mapping[str, Sequence[Sequence[int]]]) -> list[Need]:
    """Return the needs of a method that chooses among measured levels: its library, its search, its refit."""
    architecture, blocks, hidden = shape.architecture, shape.architecture.blocks, shape.architecture.hidden_size
    widest = max(shape.inputs(block) for block in blocks)
    states = 2 * shape.train * hidden * shape.weight_bytes
    kept = {block.name: _columns(shape, block, levels[block.name]) for block in blocks}
    entries = hidden * sum(map(sum, kept.values()))
    library = entries * (_F32 if _F32 * entries <= _MOST_F32_LIBRARY else 2)
    fits = sum(_fitting(shape.inputs(block), kept[block.name], hidden) for block in blocks)
    covariances = sum(2.0 * shape.inputs(block) ** 2 for block in blocks) * shape.train
    working = _F32 * (5 * widest**2 + 3 * widest * hidden)
    found = [
        Need(
            stage="level library",
            device_bytes=shape.model_bytes + states + working,
            file_bytes=library,
            flops=shape.forward(shape.train) + covariances + fits,
        )
    ]
    rounds, scored = _rounds(shape.options), _scored(shape.options)
    samples = shape.options.levels.search.label_samples
    pass_ = (2.0 + samples) * shape.forward(shape.validation) + (4 + 2 * samples) * shape.validation * shape.head
    changed = sum(len(kept[block.name]) * hidden * shape.inputs(block) for block in blocks)
    products = 2.0 * shape.options.calibration.validation_sequences * (1 + samples) * changed
    is_mixed = shape.options.precisions != () and chooses_precision(shape.options.method)
    rounded = _KEPT_BYTES + shape.model_bytes if is_mixed else 0
    for_models = min(_KEPT_BYTES, changed * shape.weight_bytes) + shape.activations(_QUADRATIC_BATCH)
    inputs_kept = _PATHS * len(architecture.layers) * shape.validation * hidden * shape.weight_bytes
    for_scores = min(_KEPT_BYTES, shape.layers * shape.weight_bytes) + inputs_kept
    found.append(
        Need(
            stage="search",
            device_bytes=shape.model_bytes + max(for_models, for_scores) + rounded,
            host_bytes=shape.validation * hidden * 2 * _F32,
            file_bytes=library,
            flops=rounds * (pass_ + products)
            + scored * (shape.forward(shape.validation) + shape.validation * 4 * shape.head),
        )
    )
    of_a_layer = max(
        2 * sum(shape.inputs(b) for b in blocks if b.layer == index) for index in range(len(architecture.layers))
    )
    traces = shape.train * (of_a_layer + 8 * hidden) * shape.weight_bytes
    problems = _F32 * widest * (2 * widest + 2 * hidden)
    found.append(
        Need(
            stage="refit",
            device_bytes=shape.model_bytes + 2 * states + traces + problems,
            host_bytes=shape.layers * _F32 if is_mixed else shape.projections * shape.weight_bytes,
            flops=3 * shape.forward(shape.train) + covariances,
        )
    )
    return found


def _columns(shape: _Shape, block: Block, levels: Sequence[Sequence[int]]) -> list[int]:
    """Return how many inputs of the output projection stay at every level."""
    full = math.prod(group.num_units for group in block.groups)
    return [shape.inputs(block) * math.prod(level) // full for level in levels]


def _fitting(inputs: int, kept: Sequence[int], hidden: int) -> float:
    """FLOPs of ranking the inputs of a projection and refitting it at every level."""
    ranking = 2.0 * inputs**3 / 3 + 2.0 * inputs**2 * (inputs + hidden)
    return ranking + sum(count**3 / 3 + 4.0 * count**2 * hidden for count in kept)


def _rounds(options: JobOptions) -> int:
    """Return how many quadratic models a search makes, at most: one a round, one for the polish."""
    if options.method not in _SEARCHED:
        return 0
    share = options.budget.fraction if options.budget.fraction is not None else 1 - (options.budget.ratio or 0.5)
    return math.ceil(max(0.0, 1 - share) / options.levels.search.step) + 2


def _scored(options: JobOptions) -> int:
    """Return about how many configs are scored."""
    return _rounds(options) + options.levels.search.evaluations if options.method in _SEARCHED else 1


def _scoring(shape: _Shape) -> Need:
    """Return the needs of scoring the dense and the pruned model on unseen text and on the validation split."""
    tokens, hidden = shape.unseen + shape.validation, shape.architecture.hidden_size
    return Need(
        stage="score both models",
        device_bytes=shape.model_bytes + 2 * _BATCH * hidden * shape.weight_bytes,
        host_bytes=tokens * hidden * 2 * _F32,
        flops=2 * (shape.forward(tokens) + 4.0 * tokens * shape.head),
    )


def _recovery(shape: _Shape, *, is_host: bool) -> Need:
    """Return the needs of the recovery; the pruned model is taken to have the weights of the dense one."""
    options, parameters = shape.options.recovery, shape.architecture.num_parameters
    is_full, tokens = options.mode == "full", options.num_steps * options.tokens_in_step
    rank = sum(
        2 * options.lora_rank * (shape.architecture.hidden_size + shape.inputs(b)) for b in shape.architecture.blocks
    )
    trained = shape.layers if is_full else rank
    student = parameters * (_F32 if is_full or shape.weight_bytes != 2 else 2)
    piece = options.piece_tokens or _PIECES[is_host]
    activations = shape.activations(piece)
    if options.checkpoint_activations:
        activations //= max(1, len(shape.architecture.layers) // 2)
    teacher = shape.model_bytes if options.data else 0
    kept = 0 if options.data else min(tokens, shape.train + tokens) * shape.architecture.hidden_size * _F32
    again = 1 if options.checkpoint_activations else 0
    passes = (3 if is_full else 2) + again + (1 if options.data else 0)
    heads = 8 if options.data else 4
    adam = 2 * trained * (1 if options.has_8bit_states else _F32)
    return Need(
        stage="recover",
        device_bytes=student + _F32 * trained + adam + activations + teacher,  # with gradients
        host_bytes=kept,
        file_bytes=2 * _F32 * trained + adam,
        flops=passes * shape.forward(tokens) + heads * float(tokens) * shape.head,
    )


def table(needs: Sequence[Need], machine: Machine) -> str:
    """Return the needs as text, a line for each stage."""
    lines = [f"{'stage':20}{'on ' + str(machine.device):>12}{'host':>10}{'files':>10}{'time':>10}"]
    for one in needs:
        sizes = f"{gigabytes(one.device_bytes):>12}{gigabytes(one.host_bytes):>10}{gigabytes(one.file_bytes):>10}"
        lines.append(f"{one.stage:20}{sizes}{in_words(one.flops / machine.flops_per_second):>10}")
    lines.append(speed_in_words(machine))
    if mapped := max(one.mapped_bytes for one in needs):
        lines.append(
            f"up to {gigabytes(mapped)} of it are weights that stay in their files, and are read again if need be"
        )
    return "\n".join(lines)


def speed_in_words(machine: Machine) -> str:
    """Say at which speed times are told, and what they leave out."""
    speed = f"{machine.flops_per_second / 1e12:.2f} TFLOP/s"
    return f"at {speed}, measured with one product; exports and measurements come on top"


def gigabytes(count: int) -> str:
    """Return a number of bytes in words."""
    return f"{count / 1e9:,.1f} GB"


def in_words(seconds: float) -> str:
    """Return a time in words."""
    if seconds < 120:
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
