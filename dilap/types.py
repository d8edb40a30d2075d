"""The values that travel through DiLAP: torch-free, frozen, with units in their names."""

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from dilap.codec import digest
from dilap.documents import is_plain_name
from dilap.errors import InvalidInput

Phase = Literal["decode", "prefill"]
Statistic = Literal["p50", "p90"]
Status = Literal["ok", "noisy", "contended", "estimated"]
FRACTIONS: Mapping[Statistic, float] = {"p50": 0.5, "p90": 0.9}
GroupKind = Literal["kv_groups", "query_slots", "channels"]
# Bits a weight takes, its share of the scales included: 32 weights have one, in f16 (GGUF, ExecuTorch) or f32 (ONNX).
PRECISION_BITS: Mapping[str, float] = {
    "f32": 32,
    "f16": 16,
    "bf16": 16,
    "q8_0": 8.5,
    "q4_0": 4.5,
    "8da4w": 4.5,
    "int8": 9,
    "int4": 5,
}


# What no model, machine or file of ours has: beyond it a number is a slip, or damage, and is not computed with.
MAX_TOKENS = 1 << 24  # of a prompt or a context: the longest published are 10 million
MAX_THREADS = 512  # llama.cpp ends the process for more
MAX_BATCH = 1 << 16
MAX_WIDTH = 1 << 24  # heads, channels, hidden size; a vocabulary
MAX_LAYERS = 4096
MAX_BUDGET = 1e6  # seconds: 11 days a token


@dataclass(frozen=True, kw_only=True)
class LayerWidths:
    """Widths of one decoder layer. 0 heads: no attention; 0 channels: no feed-forward network."""

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
class Architecture:
    """The shape of a decoder-only model, without its weights.

    `num_positions` counts learned position rows (0 with rotary embeddings); `norm_vectors` the vectors of
    one norm (1: RMSNorm, 2: LayerNorm); `ffn_matrices` is 3 with a gate, else 2; `ffn_bias` is that of the matrices
    before the activation, `ffn_out_bias` that of the one after it.
    """

    family: str
    hidden_size: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool
    ffn_matrices: int
    norm_vectors: int
    qkv_bias: bool
    out_bias: bool
    ffn_bias: bool
    ffn_out_bias: bool = False
    qk_norm: bool
    num_positions: int
    layers: tuple[LayerWidths, ...]

    def __post_init__(self) -> None:
        for name in ("hidden_size", "head_dim", "vocab_size"):
            if not 0 < getattr(self, name) <= MAX_WIDTH:
                raise ValueError(f"{name} is from 1 to {MAX_WIDTH:,}, got {getattr(self, name)}")
        if self.ffn_matrices not in (2, 3) or self.norm_vectors not in (0, 1, 2):
            raise ValueError(f"{self.ffn_matrices} feed-forward matrices, {self.norm_vectors} norm vectors")
        if not 0 <= self.num_positions <= MAX_TOKENS or len(self.layers) > MAX_LAYERS:
            raise ValueError(f"{self.num_positions} positions, {len(self.layers)} layers")

    def attention_parameters(self, layer: LayerWidths) -> int:
        """Weights and biases of a layer's attention sublayer, its norm included."""
        if layer.num_heads == 0:
            return 0
        query, key_value = layer.num_heads * self.head_dim, 2 * layer.num_kv_heads * self.head_dim
        return (
            (2 * query + key_value) * self.hidden_size
            + (query + key_value) * self.qkv_bias
            + self.hidden_size * self.out_bias
            + 2 * self.head_dim * self.qk_norm
            + self.norm_vectors * self.hidden_size
        )

    def ffn_parameters(self, layer: LayerWidths) -> int:
        """Weights and biases of a layer's feed-forward sublayer, its norm included."""
        if layer.num_channels == 0:
            return 0
        return (
            self.ffn_matrices * self.hidden_size * layer.num_channels
            + (self.ffn_matrices - 1) * layer.num_channels * self.ffn_bias
            + self.hidden_size * self.ffn_out_bias
            + self.norm_vectors * self.hidden_size
        )

    @property
    def num_parameters(self) -> int:
        """All parameters, a tied head counted once."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        layers = sum(self.attention_parameters(layer) + self.ffn_parameters(layer) for layer in self.layers)
        return embeddings + layers + (self.num_positions + self.norm_vectors) * self.hidden_size

    def decode_flops(self, *, context: int) -> int:
        """Multiply-adds counted twice, for one token that attends to `context` tokens."""
        weights = self.vocab_size * self.hidden_size + sum(
            self.attention_parameters(layer) + self.ffn_parameters(layer) for layer in self.layers
        )
        heads = sum(layer.num_heads for layer in self.layers)
        return 2 * weights + 4 * heads * self.head_dim * context

    def decode_bytes(self, *, context: int, precision: str, cache_bits: float) -> int:
        """Read or written for one token after `context` others: every weight, the cache of all tokens, one row of it.

        A table of embeddings is read as the head, tied or not; activations stay in caches and are not counted.
        """
        return self._weight_bytes(precision) + round((context + 1) * self._cache_row_bits(cache_bits) / 8)

    def prefill_bytes(self, *, prompt_tokens: int, precision: str, cache_bits: float) -> int:
        """Read or written for a prompt: every weight once, an embedding a token, the cache written and read."""
        embeddings = int(prompt_tokens * self.hidden_size * PRECISION_BITS[precision] / 8)
        cached = round(2 * prompt_tokens * self._cache_row_bits(cache_bits) / 8)
        return self._weight_bytes(precision) + embeddings + cached

    def _weight_bytes(self, precision: str) -> int:
        weights = self.vocab_size * self.hidden_size + sum(
            self.attention_parameters(layer) + self.ffn_parameters(layer) for layer in self.layers
        )
        return int(weights * PRECISION_BITS[precision] / 8)

    def _cache_row_bits(self, cache_bits: float) -> float:
        """Of one token's keys and values in all layers."""
        return 2 * cache_bits * self.head_dim * sum(layer.num_kv_heads for layer in self.layers)

    def prefill_flops(self, *, prompt_tokens: int) -> int:
        """Multiply-adds counted twice, for a prompt, with causal attention and the head at the last token."""
        head = self.vocab_size * self.hidden_size
        weights = sum(self.attention_parameters(layer) + self.ffn_parameters(layer) for layer in self.layers)
        heads = sum(layer.num_heads for layer in self.layers)
        pairs = prompt_tokens * (prompt_tokens + 1) // 2
        return 2 * (weights * prompt_tokens + head) + 4 * heads * self.head_dim * pairs


@dataclass(frozen=True, kw_only=True)
class Group:
    """Units that can be removed one by one from one layer; `name` is like `layers.3.channels`."""

    layer: int
    kind: GroupKind
    num_units: int

    @property
    def name(self) -> str:
        return group_name(self.layer, self.kind)


def group_name(layer: int, kind: GroupKind) -> str:
    return f"layers.{layer}.{kind}"


def groups_of(architecture: Architecture) -> tuple[Group, ...]:
    """The prunable groups, layer by layer.

    KV groups are a KV head with its query heads; query slots the same query head of every KV group; single
    query heads are no unit, because every runtime maps query head h to KV head h // ratio.
    """
    groups: list[Group] = []
    for index, layer in enumerate(architecture.layers):
        if layer.num_heads:
            ratio = layer.num_heads // layer.num_kv_heads
            groups.append(Group(layer=index, kind="kv_groups", num_units=layer.num_kv_heads))
            groups.append(Group(layer=index, kind="query_slots", num_units=ratio))
        if layer.num_channels:
            groups.append(Group(layer=index, kind="channels", num_units=layer.num_channels))
    return tuple(groups)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which units every group of a dense model keeps, as ascending indices; `base` is that model's digest.

    An attention sublayer is removed by keeping no KV group, a feed-forward one by keeping no channel; a layer
    that keeps neither is deleted.
    """

    base: str
    architecture: Architecture
    kept: dict[str, tuple[int, ...]]

    def __post_init__(self) -> None:
        groups = {group.name: group for group in groups_of(self.architecture)}
        if set(groups) != set(self.kept):
            odd = sorted(set(groups) ^ set(self.kept))[0]
            raise ValueError(f"the plan and its architecture disagree about group {odd}")
        for name, units in self.kept.items():
            if list(units) != sorted(set(units)) or (units and not 0 <= units[0] <= units[-1] < groups[name].num_units):
                raise ValueError(f"{name}: kept units are not ascending indices below {groups[name].num_units}")
            if not units and groups[name].kind == "query_slots":
                raise ValueError(f"{name}: an attention sublayer is removed through its kv_groups, not its slots")
        if not any(layer.num_heads for layer in self.all_widths()):
            raise ValueError("no layer keeps attention: the tokens could not see one another")

    @property
    def digest(self) -> str:
        return digest(asdict(self))

    def units(self, layer: int, kind: GroupKind) -> tuple[int, ...]:
        """The kept units of one group; none where the dense layer has no such group."""
        return self.kept.get(group_name(layer, kind), ())

    def all_widths(self) -> tuple[LayerWidths, ...]:
        """The widths of every dense layer, the deleted ones included."""
        widths = []
        for index in range(len(self.architecture.layers)):
            num_kv_heads = len(self.units(index, "kv_groups"))
            widths.append(
                LayerWidths(
                    num_heads=num_kv_heads * len(self.units(index, "query_slots")),
                    num_kv_heads=num_kv_heads,
                    num_channels=len(self.units(index, "channels")),
                )
            )
        return tuple(widths)

    def pruned_architecture(self) -> Architecture:
        """The architecture after shrinking, without the deleted layers."""
        return replace(self.architecture, layers=tuple(w for w in self.all_widths() if not w.is_empty))


def full_plan(architecture: Architecture, *, base: str) -> Plan:
    """The plan that keeps everything."""
    kept = {group.name: tuple(range(group.num_units)) for group in groups_of(architecture)}
    return Plan(base=base, architecture=architecture, kept=kept)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is timed: one decoded token after `context` tokens, or one prompt of `prompt_tokens`; and in which
    configuration: the number of threads, and the runtime's own switches by name, like `{"flash_attention": "off"}`.

    A switch that is not named has the runtime's plain default.
    """

    phase: Phase = "decode"
    prompt_tokens: int = 128
    context: int = 256
    batch: int = 1
    precision: str = "f16"
    threads: int = 1
    switches: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if max(self.prompt_tokens, self.context) > MAX_TOKENS or self.threads > MAX_THREADS or self.batch > MAX_BATCH:
            raise ValueError(
                f"at most {MAX_TOKENS:,} prompt tokens and context, {MAX_THREADS} threads and batch {MAX_BATCH:,}"
            )
        if self.phase not in ("decode", "prefill"):
            raise ValueError(f"phase is decode or prefill, got {self.phase!r}")
        if min(self.prompt_tokens, self.context, self.batch, self.threads) < 1:
            raise ValueError(f"prompt tokens, context, batch and threads are at least 1, got {self}")

    def describe(self) -> str:
        work = f"decode at context {self.context}" if self.phase == "decode" else f"prefill of {self.prompt_tokens}"
        return f"{work}, {self.precision}, {self.configuration}"

    @property
    def configuration(self) -> str:
        """Threads and switches in words, like `2 threads, flash attention off`."""
        switches = (f"{name.replace('_', ' ')} {value}" for name, value in sorted(self.switches.items()))
        return ", ".join([f"{self.threads} thread" + ("s" if self.threads > 1 else ""), *switches])


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A latency to keep: absolute seconds, or a fraction of the dense model's latency.

    Or, without any latency, a pruning `ratio`: the share of the decoder layers' weights to remove.
    """

    seconds: float | None = None
    fraction: float | None = None
    ratio: float | None = None
    statistic: Statistic = "p50"

    def __post_init__(self) -> None:
        given = [value for value in (self.seconds, self.fraction, self.ratio) if value is not None]
        if len(given) != 1 or not 0 < given[0] <= MAX_BUDGET:
            raise ValueError(
                f"a budget is one positive number of seconds, fraction or ratio, at most {MAX_BUDGET:g}, got {given}"
            )
        if self.ratio is not None and self.ratio >= 1:
            raise ValueError(f"a pruning ratio lies between 0 and 1, got {self.ratio:g}")

    @classmethod
    def parse(cls, text: str, *, statistic: Statistic = "p50") -> "Budget":
        """`40ms`, `0.5s`, `900us`, `70%` of the dense latency, or `1.4x` faster. Raises InvalidInput."""
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(us|ms|s|%|x)\s*", text)
        value = float(match[1]) if match else 0.0
        if not match or value == 0:
            raise InvalidInput(f"budget {text!r:.80} is not understood; write 40ms, 70% (of the dense latency) or 1.4x")
        scale = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
        try:
            if match[2] in scale:
                return cls(seconds=value * scale[match[2]], statistic=statistic)
            return cls(fraction=value / 100 if match[2] == "%" else 1 / value, statistic=statistic)
        except ValueError as error:
            raise InvalidInput(f"budget {text!r:.80} is out of all range: {error}") from error

    @classmethod
    def of_ratio(cls, ratio: float) -> "Budget":
        """A share of the decoder layers' weights to remove. Raises InvalidInput."""
        if not 0 < ratio < 1:
            raise InvalidInput(f"--ratio is a share of the weights between 0 and 1, got {ratio:g}")
        return cls(ratio=ratio)

    def limit_seconds(self, *, dense_seconds: float) -> float:
        """The latency to keep, given the dense model's; none is asked by a ratio."""
        assert self.ratio is None
        return self.seconds if self.seconds is not None else (self.fraction or 0.0) * dense_seconds

    def __str__(self) -> str:
        if self.ratio is not None:
            return f"ratio {self.ratio:g}"
        return f"{self.seconds * 1e3:g}ms" if self.seconds is not None else f"{(self.fraction or 0) * 100:.4g}%"


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """Where a number was measured. Tables are used only where every hard field agrees; `soft` fields may differ."""

    device: str
    machine: str
    processor: str
    num_cores: int
    memory_bytes: int
    last_level_cache_bytes: int
    power_mode: str
    runtime: str
    runtime_version: str
    runtime_build: str
    serial_sha256: str = ""
    soft: dict[str, str] = field(default_factory=dict)

    def differences(self, other: "Fingerprint") -> list[str]:
        """The hard fields that differ, as `field: mine / theirs`."""
        mine, theirs = asdict(self), asdict(other)
        return [f"{key}: {mine[key]} / {theirs[key]}" for key in mine if key != "soft" and mine[key] != theirs[key]]


@dataclass(frozen=True, kw_only=True)
class DeviceState:
    """What a device said of itself at one moment; None or nothing where it does not say.

    `clocks_khz` and `temperatures_celsius` are by the kernel's names, `pinned_khz` are the clocks that are held at one
    value; `throttle_events` only count up (over-current on a Jetson, thermal throttling on x86); `thermal_status` is
    Android's, 0 (none) to 6 (shutdown); `emulated` is a Python of another processor's kind.
    """

    power_mode: str = "unknown"
    governor: str = "unknown"
    num_cores: int | None = None
    affinity: str = "unknown"
    clocks_khz: dict[str, int] = field(default_factory=dict)
    pinned_khz: dict[str, int] = field(default_factory=dict)
    temperatures_celsius: dict[str, float] = field(default_factory=dict)
    throttle_events: int | None = None
    thermal_status: int | None = None
    ac_power: bool | None = None
    battery_percent: float | None = None
    load: float | None = None
    emulated: bool | None = None

    @property
    def hottest_celsius(self) -> float | None:
        return max(self.temperatures_celsius.values(), default=None)

    def slow_clocks(self, pinned_khz: Mapping[str, int]) -> list[str]:
        """The clocks below 97 % of what they are pinned to: the device throttles them."""
        return [name for name, khz in pinned_khz.items() if self.clocks_khz.get(name, khz) < 0.97 * khz]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate with its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError(f"an interval from {self.low} to {self.high}")

    @property
    def half_width(self) -> float:
        """Half the interval relative to the value."""
        return (self.high - self.low) / 2 / self.value


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Raw samples of one artifact under one workload; statistics are derived on reading.

    `rounds` gives the interleaving round of every sample, so that two measurements can be paired. `status`
    is `ok`, `noisy` (too many outliers or a wide interval), `contended` (other load on the cores) or `estimated` (no
    measurement at all, but a number in its place that a model of the device gave). `dropped_ns` keeps the samples of
    rounds that were left out because of drift or other load. `host_seconds` is the median time of a run as the host
    saw it, launch and wait included, where the samples are a GPU's own times. `states` are the device's before and
    after every fresh start; `forced` says what made it unfit and was overridden. An estimate knows no memory.
    `first_rounds` are the first rounds of the fresh starts; measurements of earlier versions have none and are read as
    of one start.
    """

    artifact_sha256: str
    workload: Workload
    fingerprint: Fingerprint
    samples_ns: tuple[int, ...]
    rounds: tuple[int, ...]
    peak_memory_bytes: int | None
    load_seconds: float
    started: str
    status: Status
    note: str = ""
    dropped_ns: tuple[int, ...] = ()
    host_seconds: float | None = None
    states: tuple[DeviceState, ...] = ()
    forced: tuple[str, ...] = ()
    first_rounds: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.samples_ns or min((*self.samples_ns, *self.dropped_ns)) <= 0:
            raise ValueError("a measurement needs samples, all positive")
        if min(self.rounds, default=0) < 0 or min(self.peak_memory_bytes or 0, self.load_seconds) < 0:
            raise ValueError("a measurement has no negative rounds, bytes or seconds")
        if len(self.rounds) != len(self.samples_ns):
            raise ValueError("every sample needs its round")

    @property
    def words(self) -> str:
        """What stands wherever its number does: its status, and whether an unfit device was forced."""
        status = "" if self.status == "ok" else self.status
        return ", ".join(filter(None, [status, "forced" if self.forced else ""])) or "ok"

    @property
    def mark(self) -> str:
        """A remark to put behind the number, like ` (noisy)`; empty where all is well."""
        return "" if self.words == "ok" else f" ({self.words})"

    @property
    def caveats(self) -> tuple[str, ...]:
        """What a reader has to know of the measurement, one sentence each, with the reasons."""
        reason = f": {self.note}" if self.note else ""
        status = () if self.status == "ok" else (f"measurement is {self.status}{reason}",)
        if self.status == "estimated":
            status = (f"latency is estimated{reason}",)
        if not self.forced:
            return status
        return (*status, f"measurement was taken in an unfit state (--force): {'; '.join(self.forced)}")

    def seconds(self, statistic: Statistic = "p50") -> float:
        return quantile(self.samples_ns, FRACTIONS[statistic]) / 1e9


def median_interval(values: Sequence[float]) -> Interval:
    """The median with a distribution-free interval from order statistics.

    It is right for independent values alone: what is claimed comes from `dilap.intervals`.
    """
    ordered = sorted(values)
    count = len(ordered)
    spread = 1.96 * math.sqrt(count) / 2  # normal approximation to the binomial of ranks
    low = max(0, math.floor((count - 1) / 2 - spread))
    high = min(count - 1, math.ceil((count - 1) / 2 + spread))
    return Interval(value=statistics.median(ordered), low=ordered[low], high=ordered[high])


def quantile(values: Sequence[float], fraction: float) -> float:
    """The linearly interpolated quantile."""
    ordered = sorted(values)
    position = fraction * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


@dataclass(frozen=True, kw_only=True)
class HowToRun:
    """The configuration in which a model file was measured, and how the stock runtime runs it in that configuration:
    commands, calls and environment variables by the name of the program or language."""

    work: str
    threads: int
    switches: dict[str, str]
    commands: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A model file in a runtime's format; written beside it as a JSON sidecar. `path` is relative to the sidecar.

    `companions` are the files beside it that the runtime reads too, by name, with their SHA-256; `sha256` is that of
    `path` alone, `num_bytes` counts all of them. `run` is there where the file's latency was measured.
    """

    path: str
    format: str
    backend: str
    precision: str
    plan_digest: str
    architecture: Architecture
    sha256: str
    num_bytes: int
    sqnr_db: float | None
    companions: dict[str, str] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if odd := next((name for name in (self.path, *self.companions) if not is_plain_name(name)), None):
            raise ValueError(f"{odd!r:.80} is no name of a file beside the sidecar")
        if self.num_bytes < 0:
            raise ValueError(f"{self.num_bytes} bytes")

    run: HowToRun | None = None
