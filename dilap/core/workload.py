"""What is timed (a workload), and the latency to keep (a budget)."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from dilap.core.bounds import MAX_BATCH, MAX_BUDGET, MAX_THREADS, MAX_TOKENS
from dilap.core.errors import InvalidInput

Phase = Literal["decode", "prefill", "forward"]
PHASES: tuple[Phase, ...] = get_args(Phase)
Statistic = Literal["p50", "p90"]
FRACTIONS: Mapping[Statistic, float] = {"p50": 0.5, "p90": 0.9}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is timed, and in which configuration of the runtime.

    The phase `decode` is one token after `context` tokens, `prefill` is one prompt of `prompt_tokens`, `forward` is
    one pass of `batch` examples through a network without a KV cache, whose file says how large an example is. The
    configuration is the number of threads and the runtime's own switches by name, like `{"flash_attention": "off"}`;
    a switch that is not named has the runtime's plain default.
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
        if self.phase not in PHASES:
            raise ValueError(f"phase is {', '.join(PHASES[:-1])} or {PHASES[-1]}, got {self.phase!r}")
        if min(self.prompt_tokens, self.context, self.batch, self.threads) < 1:
            raise ValueError(f"prompt tokens, context, batch and threads are at least 1, got {self}")

    def describe(self) -> str:
        works = {
            "decode": f"decode at context {self.context}",
            "prefill": f"prefill of {self.prompt_tokens}",
            "forward": f"forward of batch {self.batch}",
        }
        return f"{works[self.phase]}, {self.precision}, {self.configuration}"

    def per_second(self, seconds: float) -> float:
        """Return how many tokens, or examples of a `forward`, a second are processed if one run takes `seconds`."""
        return {"decode": self.batch, "prefill": self.batch * self.prompt_tokens, "forward": self.batch}[
            self.phase
        ] / seconds

    @property
    def configuration(self) -> str:
        """Threads and switches in words, like `2 threads, flash attention off`."""
        switches = (f"{name.replace('_', ' ')} {value}" for name, value in sorted(self.switches.items()))
        return ", ".join([f"{self.threads} thread" + ("s" if self.threads > 1 else ""), *switches])


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A latency to keep: absolute seconds, or a fraction of the dense model's latency.

    Instead of a latency it may be a pruning `ratio`, the share of the decoder layers' weights to remove.
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
        if self.statistic not in FRACTIONS:
            raise ValueError(f"a latency is {' or '.join(FRACTIONS)}, got {self.statistic!r:.80}")
        if self.ratio is not None and self.ratio >= 1:
            raise ValueError(f"a pruning ratio lies between 0 and 1, got {self.ratio:g}")

    @classmethod
    def parse(cls, text: str, *, statistic: Statistic = "p50") -> "Budget":
        """Parse `40ms`, `0.5s`, `900us`, `70%` of the dense latency, or `1.4x` faster. Raises InvalidInput."""
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
        """Return the budget that removes this share of the decoder layers' weights. Raises InvalidInput."""
        if not 0 < ratio < 1:
            raise InvalidInput(f"--ratio is a share of the weights between 0 and 1, got {ratio:g}")
        return cls(ratio=ratio)

    def limit_seconds(self, *, dense_seconds: float) -> float:
        """Return the latency to keep, given the dense model's; a budget with a ratio has none."""
        assert self.ratio is None
        return self.seconds if self.seconds is not None else (self.fraction or 0.0) * dense_seconds

    def __str__(self) -> str:
        if self.ratio is not None:
            return f"ratio {self.ratio:g}"
        return f"{self.seconds * 1e3:g}ms" if self.seconds is not None else f"{(self.fraction or 0) * 100:.4g}%"
