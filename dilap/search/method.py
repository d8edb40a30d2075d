"""The interface of every pruning method, DiLAP's own included.

A method is anything that is called with a `PruneTask` and returns a `Pruned`:

    def drop_narrow_channels(task: PruneTask) -> Pruned:
        ones = [one for one in sublayers(task.model) if len(one.block.groups) == 1]  # channels; heads have two groups
        scores = {one.block.main.name: one.out.weight.norm(dim=0) for one in ones}
        return Pruned(plan=task.keep_equal_shares(scores))

What it may use: the dense model, calibration text, `walk` for statistics of every layer's inputs, the groups with
their units, and a `Target`, which turns any knob or any sequence of ever smaller plans into a plan that keeps the
budget as measured on the device. What it must do: leave the model as it found it, and return a plan that `rules`
allow. A frozen dataclass with `__call__` has settings as well, which `--set name=value` changes.
"""

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dilap.core.groups import Block, Group
from dilap.core.plan import Plan, full_plan
from dilap.core.rules import WidthRules
from dilap.core.shape import Architecture
from dilap.core.space import Space
from dilap.models.anatomy import blocks_of
from dilap.models.cut import Parameters
from dilap.models.tensor_file import Tensors, computed_once
from dilap.models.text import Calibration
from dilap.search.library import LibraryOptions
from dilap.search.limit import Target
from dilap.search.refit import RefitOptions
from dilap.search.task import SearchOptions


@dataclass(frozen=True, kw_only=True)
class LevelOptions:
    """Settings of the methods that choose among measured levels."""

    library: LibraryOptions = field(default_factory=LibraryOptions)
    search: SearchOptions = field(default_factory=SearchOptions)
    refit: RefitOptions = field(default_factory=RefitOptions)


class _NoBar:
    """A progress bar that shows nothing."""

    def update(self, n: int) -> None:
        pass


@contextlib.contextmanager
def _no_bar(title: str, *, total: int | None, unit: str) -> Any:  # noqa: ARG001
    yield _NoBar()


@dataclass(frozen=True, kw_only=True)
class PruneTask:
    """What a method is asked.

    `text` is calibration text in two splits; `space` the measured levels, for methods that choose among them; `rules`
    what the runtime loads. `cache` is a folder for what is computed once, for a killed run that goes on as for the
    other budgets of a comparison: what lies there must not depend on the target. `bar(title, total=, unit=)` is a
    context manager with `update(n)`, `report` takes a line for the log.
    """

    model: PreTrainedModel
    base: str
    text: Calibration
    target: Target
    space: Space
    rules: WidthRules = field(default_factory=WidthRules)
    levels: LevelOptions = field(default_factory=LevelOptions)
    tokenizer: PreTrainedTokenizerBase | None = None
    cache: Path | None = None
    seed: int = 0
    bar: Callable[..., Any] = _no_bar
    report: Callable[[str], None] = lambda _: None

    def once(self, name: str, compute: Callable[[], Tensors]) -> Tensors:
        """Tensors that do not depend on the target, computed once: scores, statistics, an order of removals."""
        return computed_once(None if self.cache is None else self.cache / f"{name}.safetensors", compute)

    @property
    def architecture(self) -> Architecture:
        return self.space.architecture

    @property
    def groups(self) -> tuple[Group, ...]:
        """All groups of the dense model, without their tensors."""
        return tuple(group for block in self.architecture.blocks for group in block.groups)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The sublayers of the dense model, with all tensors in which their units lie."""
        return blocks_of(self.model)

    @property
    def num_layers(self) -> int:
        return len(self.architecture.layers)

    def keep(
        self,
        scores: Mapping[str, torch.Tensor],
        *,
        ratio: float | None = None,
        counts: Mapping[str, int] | None = None,
    ) -> Plan:
        """The plan that keeps the best-scored units of every group in `scores` and all units of the others.

        How many stay: all but the `ratio` of a group's units (rounded down), or its entry in `counts`. The number is
        rounded to what the runtime loads, and is never 0: a sublayer is removed by `without`, not by its scores. Of
        equal scores the earlier unit stays.
        """
        plan = full_plan(self.architecture, base=self.base)
        kept = dict(plan.kept)
        for group in self.groups:
            if group.name in scores:
                wanted = counts[group.name] if counts else group.num_units - int((ratio or 0.0) * group.num_units)
                order = scores[group.name].argsort(descending=True, stable=True)
                kept[group.name] = tuple(order[: self.rules.rounded(group, wanted)].sort().values.tolist())
        return Plan(base=self.base, architecture=self.architecture, kept=kept)

    def keep_equal_shares(self, scores: Mapping[str, torch.Tensor], *, output_biases: bool = False) -> Plan:
        """The plan that meets the target by dropping the same share of every group's units, the lowest-scored ones.

        Layers have few KV groups, so one more of them in every layer takes much at once: the share of the channels is
        then made as small as the target allows.
        """

        def keep(ratio: float, part: float = 1.0) -> Plan:
            counts: dict[str, int] = {}
            for block in self.architecture.blocks:
                share = part * ratio if len(block.groups) == 1 else ratio
                counts |= {group.name: group.num_units - int(share * group.num_units) for group in block.groups}
            return self.keep(scores, counts=counts)

        return self.target.bisect(keep, refine=keep, output_biases=output_biases)

    def without(self, blocks: Iterable[Block]) -> Plan:
        """The plan that removes whole blocks."""
        kept = dict(full_plan(self.architecture, base=self.base).kept)
        return Plan(base=self.base, architecture=self.architecture, kept=kept | {one.main.name: () for one in blocks})

    def without_layers(self, layers: Iterable[int]) -> Plan:
        """The plan that removes whole layers."""
        gone = set(layers)
        return self.without(block for block in self.architecture.blocks if block.layer in gone)


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """What a method answers: the units that stay, and new values of parameters, if it compensates for the rest.

    `parameters` are decoder layers' parameters by name, in the dense shape or cut to the plan; an output projection's
    bias may be among them where the dense model has none. `facts` is what the result should say of the method's choice.
    """

    plan: Plan
    parameters: Parameters = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


Method = Callable[[PruneTask], Pruned]
