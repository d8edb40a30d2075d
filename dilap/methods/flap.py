"""FLAP: units whose output hardly fluctuates are removed, and their mean output is added as a bias."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from dilap.core.errors import InvalidInput, Unsupported
from dilap.core.plan import Plan, full_plan
from dilap.core.shape import Architecture
from dilap.methods.units import by_unit, has_heads, masked_rows, out_statistics, removed_columns, unit_scores
from dilap.models.anatomy import Sublayer, norm_behind, sublayers
from dilap.models.statistics import InputStatistics, layer_statistics
from dilap.models.tensor_file import Tensors
from dilap.search.method import Pruned, PruneTask

Metric = Literal["IFV", "WIFV", "WIFN"]
Structure = Literal["UL-UM", "UL-MM", "AL-MM", "AL-AM"]


def metric_of(metric: Metric, weight: torch.Tensor, statistics: InputStatistics, *, squared: bool) -> torch.Tensor:
    """Return the fluctuation metric of every input of `weight` (inputs); FLAP squares that of attention."""
    weight = weight.detach().float()
    if metric == "WIFN":
        per_sequence = statistics.sum_squares.float() / max(1, statistics.num_sequences)
        values = weight.abs().mean(0) * per_sequence.sqrt()
    else:
        values = statistics.variance * (weight.square().sum(0) if metric == "WIFV" else 1.0)
    return values.square() if squared else values


def standardised(values: torch.Tensor) -> torch.Tensor:
    """Return the values minus their mean, divided by their standard deviation."""
    return (values - values.mean()) / values.std().clamp_min(1e-30)


def group_cost(architecture: Architecture) -> float:
    """Return how many times as many weights a KV group has as a channel.

    With head_dim d it is 4d/3 for multi-head attention and a gated feed-forward network.
    """
    layer = next(layer for layer in architecture.layers if layer.num_heads)
    ratio = layer.num_heads // layer.num_kv_heads
    return (2 * ratio + 2) * architecture.head_dim / architecture.ffn_matrices


def global_counts(
    scores: dict[str, torch.Tensor], costs: dict[str, float], *, ratio: float, strict: bool
) -> dict[str, int]:
    """Return the number of units kept in every group when all units compete in one ranking (AL-AM).

    The best units are kept up to the one with which the cost of those kept is nearest to the share 1 - `ratio`.
    `strict` keeps only units that are better than this one.
    """
    names = [name for name, values in scores.items() for _ in values]
    every, cost = torch.cat(list(scores.values())), torch.tensor([costs[name] for name in names], dtype=torch.float64)
    order = every.argsort(descending=True, stable=True)
    kept_cost = cost[order].cumsum(0)
    cut = int((kept_cost - (1 - ratio) * kept_cost[-1]).abs().argmin())
    if strict:
        threshold = every[order[cut]]
        return {name: int((values > threshold).sum()) for name, values in scores.items()}
    counts = dict.fromkeys(scores, 0)
    for index in order[: cut + 1].tolist():
        counts[names[index]] += 1
    return counts


@dataclass(frozen=True, kw_only=True)
class Flap:
    """FLAP with its published settings: metric WIFV, structure AL-AM, statistics of the dense model, biases added.

    The `structure` says first how layers (L) share what is removed and then how modules (M, attention or feed-forward)
    do: U is uniformly, A adaptively by score, and M manually, by `remove_heads`. That is the number of query heads that
    UL-MM and AL-MM remove in all, in whole KV groups; by default it is the same share as of everything.
    `upstream_compatible` truncates the cost of a head to an integer and leaves out the unit at the threshold, as the
    authors' code does. `compensate=false` adds no bias, for runtimes that load none. Statistics are of the first
    `nsamples` calibration sequences, of all by default. `masks_only` cuts nothing: what would go is set to zero in
    matrices of their dense shape, which makes nothing faster.
    """

    metric: Metric = "WIFV"
    structure: Structure = "AL-AM"
    remove_heads: int = -1
    nsamples: int = 0
    compensate: bool = True
    masks_only: bool = False
    upstream_compatible: bool = False

    def __call__(self, task: PruneTask) -> Pruned:
        if self.compensate and not task.rules.output_biases:
            raise Unsupported(
                "FLAP adds biases to the output projections, which this runtime or layout does not load for the "
                "family: use another backend, or --set compensate=false"
            )
        findings = self._findings(task)
        if self.structure == "UL-UM":
            plan = task.keep_equal_shares(findings.sums(), output_biases=self.compensate)
        else:
            plan = task.cost_limit.bisect(lambda ratio: findings.plan(self, task, ratio), output_biases=self.compensate)
        biases = findings.biases(plan) if self.compensate else {}
        if self.masks_only:
            whole = full_plan(task.architecture, base=task.base)
            facts = {"masked": {name: len(whole.kept[name]) - len(units) for name, units in plan.kept.items()}}
            return Pruned(plan=whole, parameters=masked_rows(task.model, plan) | biases, facts=facts)
        return Pruned(plan=plan, parameters=biases)

    def _findings(self, task: PruneTask) -> "_Findings":
        """Return the metrics and means of all sublayers, from the task's cache if they are there."""
        outs, found = list(sublayers(task.model)), task.once("flap", lambda: self._collected(task))
        return _Findings(
            sublayers=outs,
            metrics=[found[f"{one.name}.metric"] for one in outs],
            means=[found[f"{one.name}.mean"] for one in outs],
            only_added=all(norm_behind(task.model, one) is None for one in outs),
        )

    def _collected(self, task: PruneTask) -> Tensors:
        """Collect metrics and means of all sublayers in one pass of the dense model."""
        found: dict[str, torch.Tensor] = {}
        tokens = task.text.train
        if self.nsamples > len(tokens):
            raise InvalidInput(
                f"method flap: nsamples is {self.nsamples}, but there are {len(tokens)} calibration sequences; take "
                "more --calib-sequences"
            )
        tokens = tokens[: self.nsamples or None]
        with task.bar("FLAP", total=task.num_layers * tokens.numel(), unit="tok") as bar:
            outs = list(sublayers(task.model))
            for step in layer_statistics(task.model, tokens, progress=bar.update):
                for one in (one for one in outs if one.layer == step.index):
                    statistics = out_statistics(step, one)
                    squared = has_heads(one)
                    found[f"{one.name}.mean"] = statistics.mean.float()
                    found[f"{one.name}.metric"] = metric_of(self.metric, one.out.weight, statistics, squared=squared)
        return found


@dataclass(frozen=True, kw_only=True)
class _Findings:
    """What the pass of the dense model found: metric and mean of every input of every sublayer's output projection.

    `only_added` says that sublayers' outputs are only added to the residual stream, and not normalised first.
    """

    sublayers: list[Sublayer]
    metrics: list[torch.Tensor]
    means: list[torch.Tensor]
    only_added: bool = True

    def plan(self, flap: Flap, task: PruneTask, ratio: float) -> Plan:
        """Return the plan of any structure but UL-UM that removes about the share `ratio` of the weights."""
        values = self.metrics if flap.structure == "UL-MM" else [standardised(one) for one in self.metrics]
        scores = {name: rows.mean(1) for name, rows in self._by_unit(values).items()}
        cost = group_cost(task.architecture)
        if flap.upstream_compatible:
            cost = math.floor(cost)
        costs = {one.block.main.name: cost if has_heads(one) else 1.0 for one in self.sublayers}
        if flap.structure == "AL-AM":
            counts = global_counts(scores, costs, ratio=ratio, strict=flap.upstream_compatible)
        else:
            counts = self._manual_counts(flap, scores, costs, ratio)
        return task.keep(scores, counts=counts, may_remove=True)

    def sums(self) -> dict[str, torch.Tensor]:
        """Return the scores of UL-UM by group, query slots included: of every unit the sum over its inputs."""
        found: dict[str, torch.Tensor] = {}
        for one, columns in zip(self.sublayers, self.metrics, strict=True):
            found |= unit_scores(columns, one)
        return found

    def _by_unit(self, values: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        pairs = zip(self.sublayers, values, strict=True)
        return {one.block.main.name: by_unit(columns, one) for one, columns in pairs}

    def _manual_counts(
        self, flap: Flap, scores: dict[str, torch.Tensor], costs: dict[str, float], ratio: float
    ) -> dict[str, int]:
        """Return the units kept in every group by UL-MM and AL-MM.

        A given number of KV groups is removed, and as many channels as are then still to be removed for `ratio`.
        """
        heads = {one.block.main.name for one in self.sublayers if has_heads(one)}
        asked = flap.remove_heads // next(one.block.groups[1].num_units for one in self.sublayers if has_heads(one))
        groups = {name: values for name, values in scores.items() if name in heads}
        channels = {name: values for name, values in scores.items() if name not in heads}
        cost = costs[next(iter(groups))]
        num_groups, num_channels = (sum(len(values) for values in kind.values()) for kind in (groups, channels))
        removed_groups = round(ratio * num_groups) if flap.remove_heads < 0 else min(asked, num_groups)
        if flap.structure == "UL-MM":
            removed_groups = removed_groups // len(groups) * len(groups)
        removed_channels = math.floor(ratio * (num_groups * cost + num_channels) - cost * removed_groups)
        removed_channels = min(max(0, removed_channels), num_channels)
        if flap.structure == "AL-MM":
            return _lowest(groups, removed_groups) | _lowest(channels, removed_channels)
        return {name: len(values) - removed_groups // len(groups) for name, values in groups.items()} | {
            name: len(values) - removed_channels // len(channels) for name, values in channels.items()
        }

    def biases(self, plan: Plan) -> dict[str, torch.Tensor]:
        """Return biases by parameter name: the mean output of the removed inputs, added to the bias that there is.

        The mean output is W[:, removed] mean[removed], with W the output projection. That of a sublayer that is removed
        whole goes to the last one before it that stays, because nothing reads the stream between them.
        """
        found: dict[str, torch.Tensor] = {}
        last: str | None = None
        for one, mean in zip(self.sublayers, self.means, strict=True):
            removed = removed_columns(plan, one)
            weight = one.out.weight.detach()[:, removed].float()
            bias = weight @ mean[removed].to(weight.device)
            if one.out.bias is not None:
                bias = bias + one.out.bias.detach().float()
            if plan.kept[one.block.main.name]:
                last = f"{one.path}.bias"
                found[last] = bias
                continue
            if last is not None and self.only_added:
                found[last] = found[last] + bias
            if one.out.bias is not None:  # where only masks are made, it stays
                found[f"{one.path}.bias"] = torch.zeros_like(bias)
        return found


def _lowest(scores: dict[str, torch.Tensor], removed: int) -> dict[str, int]:
    """Return the number of units kept in every group when the `removed` lowest-scored ones of all are removed."""
    names = [name for name, values in scores.items() for _ in values]
    order = torch.cat(list(scores.values())).argsort(stable=True)
    counts = {name: len(values) for name, values in scores.items()}
    for index in order[:removed].tolist():
        counts[names[index]] -= 1
    return counts
