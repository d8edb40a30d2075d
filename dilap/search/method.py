"""The interface of every pruning method, DiLAP's own included.

A method is anything that is called with a `PruneTask` and returns a `Pruned`:

    def drop_narrow_channels(task: PruneTask) -> Pruned:
        ones = [one for one in sublayers(task.model) if len(one.block.groups) == 1]  # channels; heads have two groups
        scores = {one.block.main.name: one.out.weight.norm(dim=0) for one in ones}
        return Pruned(plan=task.keep_equal_shares(scores))

It may use the dense model, calibration text, `layer_statistics` of every layer's inputs, the groups with their units,
and a `CostLimit`, which turns any knob or any sequence of ever smaller plans into a plan that keeps the budget as
measured on the device. It must leave the model as it found it, and return a plan that the task's `rules` allow. A
method that is a frozen dataclass with `__call__` has its fields as settings, which `--set name=value` changes.
"""

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, Generic

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dilap.core.errors import Infeasible
from dilap.core.graph import Shape
from dilap.core.groups import Block, Group
from dilap.core.plan import Plan, full_plan
from dilap.core.rules import WidthRules
from dilap.core.shape import Architecture
from dilap.core.space import Space
from dilap.models.anatomy import blocks_of
from dilap.models.cut import Parameters
from dilap.models.processes import Team
from dilap.models.tensor_file import Tensors, computed_once
from dilap.models.text import Calibration
from dilap.search.limit import CostLimit
from dilap.search.options import LevelOptions
from dilap.search.weights import WeightCosts


class _NoBar:
    """A progress bar that shows nothing."""

    def update(self, n: int) -> None:
        pass


@contextlib.contextmanager
def _no_bar(title: str, *, total: int | None, unit: str) -> Any:  # noqa: ARG001
    yield _NoBar()


@dataclass(frozen=True, kw_only=True)
class PruneTask:
    """What a method gets: a model, calibration text, a limit on its cost, and everything that helps to meet it.

    `base` is the model's digest. `text` is calibration text in two splits; `training` is text for methods that train,
    None where that is the calibration text. `space` has the measured levels, for methods
    that choose among them; `levels` are those methods' settings. `rules` say which plans are allowed. `cache` is a
    folder for what is computed only once, which a killed run reads when it goes on, and so do the other budgets of a
    comparison: what lies there must not depend on the limit. `bar(title, total=, unit=)` is a context manager that
    gives an object with `update(n)`; `report` takes a line for the log. A method runs in one process; the `team` are
    those that it may ask to help it.
    """

    model: PreTrainedModel
    base: str
    text: Calibration
    cost_limit: CostLimit
    space: Space
    rules: WidthRules = field(default_factory=WidthRules)
    levels: LevelOptions = field(default_factory=LevelOptions)
    tokenizer: PreTrainedTokenizerBase | None = None
    training: torch.Tensor | None = None
    cache: Path | None = None
    seed: int = 0
    team: Team = field(default_factory=Team)
    bar: Callable[..., Any] = _no_bar
    report: Callable[[str], None] = lambda _: None

    def once(self, name: str, compute: Callable[[], Tensors]) -> Tensors:
        """Return tensors that do not depend on the limit (scores, statistics, an order of removals), computed once.

        They are kept in the task's cache as `name`.
        """
        return computed_once(None if self.cache is None else self.cache / f"{name}.safetensors", compute)

    @property
    def training_tokens(self) -> torch.Tensor:
        """What methods that train read (sequences x length)."""
        return self.text.train if self.training is None else self.training

    @property
    def architecture(self) -> Architecture:
        return self.space.architecture

    @property
    def groups(self) -> tuple[Group, ...]:
        """All groups of the dense model, without the tensors in which their units lie."""
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
        may_remove: bool = False,
    ) -> Plan:
        """Return the plan that keeps the best-scored units of every group in `scores` and all units of the others.

        As many units of a group stay as `counts` says, or else all but the share `ratio`, rounded down. This number is
        rounded to what `rules` allow and is never 0, unless the method `may_remove` sublayers whole by their scores and
        the rules allow that too; others remove them by `without`. Of units with equal scores the earlier one stays.
        """
        gone = self._removable(counts or {}) if may_remove else set()
        plan = full_plan(self.architecture, base=self.base)
        kept = dict(plan.kept)
        for group in self.groups:
            if group.name in gone:
                kept[group.name] = ()
            elif group.name in scores:
                wanted = counts[group.name] if counts else group.num_units - int((ratio or 0.0) * group.num_units)
                order = scores[group.name].argsort(descending=True, stable=True)
                kept[group.name] = tuple(order[: self.rules.rounded(group, wanted)].sort().values.tolist())
        return Plan(base=self.base, architecture=self.architecture, kept=kept)

    def _removable(self, counts: Mapping[str, int]) -> set[str]:
        """Return the groups of which no unit is left and whose sublayers may be removed; one of each kind stays."""
        allowed = {"attention": self.rules.attention_removal, "ffn": self.rules.ffn_removal}
        blocks = [one for one in self.architecture.blocks if allowed[one.kind]]
        gone = {one.main.name for one in blocks if counts.get(one.main.name, 1) == 0}
        if not self.rules.layer_removal:  # of a layer that would be empty, attention alone goes
            layers = {one.layer for one in blocks if one.kind == "attention" and one.main.name in gone}
            gone -= {one.main.name for one in blocks if one.kind == "ffn" and one.layer in layers}
        for kind in allowed:
            own = [one.main.name for one in self.architecture.blocks if one.kind == kind]
            if gone.issuperset(own):
                gone.discard(own[0])
        return gone

    def keep_equal_shares(self, scores: Mapping[str, torch.Tensor], *, output_biases: bool = False) -> Plan:
        """Return the plan that keeps the limit by removing the same share of every group, the lowest-scored units.

        Where query slots are scored beside KV groups, as many of both stay, in all layers alike, that a sublayer loses
        as much of its weights as possible up to that share. Layers have few KV groups, so removing one more of them in
        every layer changes the cost much at once. The share of the channels is therefore made as small afterwards as
        the limit allows.
        """

        def keep(ratio: float, part: float = 1.0) -> Plan:
            counts: dict[str, int] = {}
            for block in self.architecture.blocks:
                share = part * ratio if len(block.groups) == 1 else ratio
                has_slots = len(block.groups) > 1 and all(group.name in scores for group in block.groups)
                counts |= self._grid(block, share) if has_slots else self._number(block, share)
            return self.keep(scores, counts=counts)

        return self.cost_limit.bisect(keep, refine=keep, output_biases=output_biases)

    def keep_equal_shares_between(self, scores: Mapping[str, torch.Tensor], *, first: int, last: int) -> Plan:
        """Return `keep_equal_shares` of all layers but the first and last ones, or of all where that is not enough."""
        inner = range(first, self.num_layers - last)
        names = {group.name for block in self.architecture.blocks if block.layer in inner for group in block.groups}
        try:
            return self.keep_equal_shares({name: one for name, one in scores.items() if name in names})
        except Infeasible:
            self.report(f"the first {first} and last {last} layers are pruned too, because the others are not enough")
            return self.keep_equal_shares(scores)

    def _number(self, block: Block, share: float) -> dict[str, int]:
        return {block.main.name: block.main.num_units - int(share * block.main.num_units)}

    def _grid(self, block: Block, share: float) -> dict[str, int]:
        """Return how many KV groups and query slots stay of a block that loses this share of its weights or less."""
        costs = WeightCosts(architecture=self.architecture)
        least = (1 - share) * costs.block(block, tuple(group.num_units for group in block.groups)) * (1 - 1e-9)
        grid = product(*(range(group.least, group.num_units + 1) for group in block.groups))
        enough = [counts for counts in grid if costs.block(block, counts) >= least]
        best = min(enough, key=lambda counts: (costs.block(block, counts), -prod(counts)))
        return {group.name: count for group, count in zip(block.groups, best, strict=True)}

    def without(self, blocks: Iterable[Block]) -> Plan:
        """Return the plan that removes these blocks whole and keeps everything else."""
        kept = dict(full_plan(self.architecture, base=self.base).kept)
        return Plan(base=self.base, architecture=self.architecture, kept=kept | {one.main.name: () for one in blocks})

    def without_layers(self, layers: Iterable[int]) -> Plan:
        """Return the plan that removes these layers whole and keeps everything else. Raises Unsupported by `rules`."""
        gone = set(layers)
        plan = self.without(block for block in self.architecture.blocks if block.layer in gone)
        self.rules.require(plan)
        return plan


@dataclass(frozen=True, kw_only=True)
class Pruned(Generic[Shape]):
    """The result of a method: the units that stay, and new values of parameters if it makes up for the removed ones.

    `parameters` are parameters of decoder layers by name, in the dense shape or cut to the plan; an output projection's
    bias may be among them even where the dense model has none. So may embedding and head, if the plan gives them
    precisions: the values of all that it gives one lie on the grid of that precision. `facts` is what the run's result
    should say about the method's choice.
    """

    plan: Plan[Shape]
    parameters: Parameters = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


Method = Callable[[PruneTask], Pruned]
