"""SPRINT: remove the sublayer that costs least quality per second saved, and tune the next feed-forward network.

Written from the published description alone. Sublayers are numbered: 2 * layer for attention, one more for the
feed-forward network.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from dilap.core.codec import digest
from dilap.core.errors import Mismatch, Unsupported
from dilap.core.plan import Plan
from dilap.methods.units import restored
from dilap.models.anatomy import Sublayer, decoder_layers, sublayers
from dilap.models.compute_device import HOST
from dilap.models.families import family_of
from dilap.models.skipping import sublayer_skipped
from dilap.models.statistics import LayerCall, State, layer_calls, run_layer
from dilap.models.tensor_file import Tensors
from dilap.search.method import Pruned, PruneTask
from dilap.search.refit import refit_refusal

Distance = Literal["l1", "l2", "cos"]
Norm = Literal["sentence", "token", "channel", "element", "none"]
States = list[State]
_DIMS: dict[Norm, tuple[int, ...]] = {"sentence": (1, 2), "token": (2,), "channel": (1,), "element": (), "none": ()}
_KINDS = ("attention", "ffn")


def saved_seconds(*, dense: float, without: Mapping[str, float], num_removed: int) -> dict[str, float]:
    """Return the seconds that removing one sublayer saves, by kind.

    `without` has, by kind, the latency of a model without `num_removed` sublayers of that kind. Raises Mismatch where
    removing a kind saves no time: there is no importance per second then.
    """
    saved = {kind: (dense - seconds) / num_removed for kind, seconds in without.items()}
    for kind, seconds in saved.items():
        if seconds <= 0:
            raise Mismatch(f"removing {kind} sublayers saves no time here ({seconds:.3g} s); measure the table again")
    return saved


def distance(wanted: State, found: State, *, kind: Distance, norm: Norm) -> float:
    """Return the distance of two streams (sequences x tokens x hidden), summed over the vectors that `norm` says.

    What the authors call "l2" is called l1 here.
    """
    y, x = wanted.float(), found.float()
    if kind == "cos":
        dims = _DIMS[norm] or (2,)
        cosine = (y * x).sum(dims) / (y.square().sum(dims).sqrt() * x.square().sum(dims).sqrt()).clamp_min(1e-30)
        return float((1 - cosine).double().sum())
    power = 1 if kind == "l1" else 2
    difference, size = (y - x).abs() ** power, y.abs() ** power
    if dims := _DIMS[norm]:
        difference, size = difference.sum(dims), size.sum(dims)
    if norm == "none":
        return float(difference.double().sum() ** (1 / power))
    return float((difference / size.clamp_min(1e-30)).double().pow(1 / power).sum())


def tuned_projection(
    weight: torch.Tensor, inputs: torch.Tensor, wanted: torch.Tensor, *, ridge: float, ratio: float = 1.0
) -> torch.Tensor:
    """Return the projection W (outputs x inputs) with the least |A W' - B|^2, kept near to `weight` by a penalty.

    A are the `inputs` (tokens x inputs), B is the output `wanted` (tokens x outputs). The penalty on the squared
    difference from `weight` is `ridge` times the mean diagonal of A'A; without ridge it is the least-squares solution
    of least norm. Only the share `ratio` of the output rows is tuned, those with the largest sums of weight times
    activation norm. The authors' dampening is another one: its scale is that of the squared normal equations.
    """
    old, a, b = weight.detach().float(), inputs.float(), wanted.float()
    gram, right = a.T @ a, a.T @ b
    if ridge:
        damping = ridge * gram.diagonal().mean()
        factor = torch.linalg.cholesky(gram + damping * torch.eye(len(gram), device=gram.device))
        solved = torch.cholesky_solve(right + damping * old.T, factor).T
    else:
        wide = gram.to(HOST, torch.float64), right.to(HOST, torch.float64)  # accelerators have no such driver
        solved = torch.linalg.lstsq(*wide, driver="gelsd").solution.float().T.to(old.device)
    if not torch.isfinite(solved).all():
        return old
    rows = (old.abs() * a.square().sum(0).sqrt()).sum(1).argsort(descending=True, stable=True)
    chosen = rows[: int(ratio * len(rows))]
    result = old.clone()
    result[chosen] = solved[chosen]
    return result


@dataclass(frozen=True, kw_only=True)
class Sprint:
    """SPRINT with its published settings.

    There are 5 candidates per iteration. The importance of a sublayer is the change at the output of the next
    feed-forward network, divided by the latency saved; all of that network's down projection is tuned. The 8 activation
    checkpoints save memory and change no result. `ridge` is added because the published normal equations have no
    dampening, and our fewer tokens make them singular; 0 is the original. `tune=false` removes and does not tune.
    """

    distance: Distance = "l1"
    norm: Norm = "sentence"
    candidates: int = 5
    checkpoints: int = 8
    ridge: float = 0.01
    ratio: float = 1.0
    tune: bool = True

    def __call__(self, task: PruneTask) -> Pruned:
        if not (task.rules.attention_removal and task.rules.ffn_removal):
            raise Unsupported("SPRINT removes single sublayers, which this runtime or layout does not load")
        if self.tune and (reason := refit_refusal(task.model)):
            raise Unsupported(f"SPRINT tunes projections that are only added, and {reason}; use --set tune=false")
        outs = list(sublayers(task.model))
        with restored(outs):
            run = _Run(self, task, outs)
            plan = task.cost_limit.first(run.plans())
        removed, weights = next((gone, weights) for found, gone, weights in run.made if found == plan)
        parameters = {f"{outs[sublayer].path}.weight": weight for sublayer, weight in weights.items()}
        names = [outs[one].name for one in removed]
        return Pruned(plan=plan, parameters=parameters, facts={"removed_sublayers": names})


@dataclass(frozen=True, kw_only=True)
class _Tuned:
    """A candidate after tuning: its importance, and the new down projection of the sublayer with the number `tuned`."""

    importance: float
    tuned: int
    weight: torch.Tensor


@dataclass
class _Run:
    """The removal of sublayers one by one.

    `made` are the plans so far, with the numbers of the sublayers that they remove and the projections tuned for them.
    """

    sprint: Sprint
    task: PruneTask
    outs: list[Sublayer]
    made: list[tuple[Plan, list[int], dict[int, torch.Tensor]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.layers = decoder_layers(self.task.model)
        self.calls: list[LayerCall] = layer_calls(self.task.model, self.task.text.train, batch_tokens=2048)
        self.alive = [True] * len(self.outs)
        spacing = self.sprint.checkpoints + 1
        self.marks = {0} | {2 * (j * len(self.layers) // spacing) for j in range(1, spacing)}
        self.saved: dict[int, States] = {0: [call.hidden for call in self.calls]}
        self.seconds = self._latencies()
        self.untuned: dict[int, float] = {}
        self.tuned: dict[int, _Tuned] = {}

    def _latencies(self) -> dict[str, float]:
        """Return the seconds that removing one sublayer saves, by kind.

        They are predicted as the method measures them: for a model without a quarter of the sublayers of a kind, taken
        from the late layers but for the last one.
        """
        dense = self.task.architecture.layers
        number = max(1, len(dense) // 4)
        late = range(max(0, len(dense) - 1 - number), len(dense) - 1)

        def without(kind: str) -> float:
            gone = [one.block for one in self.outs if one.kind == kind and one.layer in late]
            return self.task.cost_limit.predict(list(self.task.without(gone).all_widths()))

        kinds = dict.fromkeys(one.kind for one in self.outs)
        return saved_seconds(
            dense=self.task.cost_limit.predict(dense),
            without={kind: without(kind) for kind in kinds},
            num_removed=len(late),
        )

    def plans(self) -> Iterator[Plan]:
        """Yield ever smaller plans; each removes one more sublayer than the one before."""
        removed: list[int] = []
        weights: dict[int, torch.Tensor] = {}
        order = f"sprint-{digest(self.seconds)[:8]}"  # a ratio's costs are weights, a budget's are seconds
        yield self._made(removed, weights)
        while True:
            found = self.task.once(f"{order}-{len(removed) + 1}", self._iteration)
            for candidate in (int(name) for name in found if name.isdecimal()):
                importance, tuned = found[f"{candidate}.facts"].tolist()
                self.tuned[candidate] = _Tuned(importance=importance, tuned=int(tuned), weight=found[str(candidate)])
            if (chosen := int(found["chosen"])) < 0:
                return
            removed.append(chosen)
            self._remove(chosen, weights)
            self.task.report(f"SPRINT removes {self.outs[chosen].name}")
            yield self._made(removed, weights)

    def _iteration(self) -> Tensors:
        """Choose the next sublayer; return it as `chosen`, -1 for none, with what was tuned for the choice.

        A killed run goes on from these tensors.
        """
        known = set(self.tuned)
        with self.task.bar("SPRINT", total=sum(self.alive), unit="sublayer") as bar:
            chosen = self._choose(bar.update)
        found = {"chosen": torch.tensor(-1 if chosen is None else chosen)}
        for candidate in set(self.tuned) - known:
            one = self.tuned[candidate]
            found[str(candidate)] = one.weight
            found[f"{candidate}.facts"] = torch.tensor([one.importance, one.tuned], dtype=torch.float64)
        return found

    def _made(self, removed: Sequence[int], weights: dict[int, torch.Tensor]) -> Plan:
        plan = self.task.without(self.outs[one].block for one in removed)
        self.made.append((plan, list(removed), dict(weights)))
        return plan

    def _remove(self, chosen: int, weights: dict[int, torch.Tensor]) -> None:
        """Remove a sublayer, write the projection tuned for it into the model, and forget what this changes."""
        self.alive[chosen] = False
        if (found := self.tuned.get(chosen)) is not None and self.sprint.tune:
            weights[found.tuned] = found.weight
            weight = self.outs[found.tuned].out.weight
            weight.data = found.weight.to(weight)
        self.saved = {place: states for place, states in self.saved.items() if place <= chosen}
        ends = {s: self._next_ffn(s, before=chosen) for s in range(len(self.outs))}
        kept = {s for s, end in ends.items() if end is not None and end < chosen}
        self.untuned = {s: value for s, value in self.untuned.items() if s in kept}
        self.tuned = {s: value for s, value in self.tuned.items() if s in kept and s != chosen}

    def _next_ffn(self, sublayer: int, *, before: int | None = None) -> int | None:
        """Return the next feed-forward network that is left, None for none; the sublayer `before` counts as left."""
        later = range(sublayer + 1, len(self.outs))
        return next((one for one in later if one % 2 and (self.alive[one] or one == before)), None)

    def _choose(self, progress: Callable[[int], None]) -> int | None:
        """Return the candidate of least importance after tuning; None where no sublayer can be removed."""
        self._score_all(progress)
        removable = [s for s in self.untuned if s % 2 or sum(self.alive[::2]) > 1]  # the last attention stays
        best = sorted(removable, key=lambda s: (self.untuned[s], s))[: self.sprint.candidates]
        if not self.sprint.tune:
            return best[0] if best else None
        for candidate in best:
            if candidate not in self.tuned:
                self.tuned[candidate] = self._tune(candidate)
                self._forget()
        tuned = [s for s in removable if s in self.tuned]
        return min(tuned, key=lambda s: (self.tuned[s].importance, s), default=None)

    def _score_all(self, progress: Callable[[int], None]) -> None:
        """Compute the importance before tuning of every sublayer whose importance is not known.

        This goes through the sublayers in order, so that the streams computed for one are used for the next.
        """
        missing = [s for s in range(len(self.outs)) if self.alive[s] and s not in self.untuned]
        missing = [s for s in missing if self._next_ffn(s) is not None]
        for sublayer in missing:
            end = self._next_ffn(sublayer)
            assert end is not None
            self._forget(before=sublayer)
            entering = self._entering(sublayer)
            found = [
                self._through(call, state, range(sublayer + 1, end + 1))
                for call, state in zip(self.calls, entering, strict=True)
            ]
            total = sum(
                distance(y, x, kind=self.sprint.distance, norm=self.sprint.norm)
                for y, x in zip(self._wanted(sublayer, end), found, strict=True)
            )
            self.untuned[sublayer] = total / self.seconds[_KINDS[sublayer % 2]]
            progress(1)
        self._forget()

    def _wanted(self, sublayer: int, end: int) -> States:
        """Return the streams after the sublayer `end` when none of those from `sublayer` on is removed."""
        if all(self.alive[sublayer : end + 1]):
            return self._entering(end + 1)
        span, entering = range(sublayer, end + 1), self._entering(sublayer)
        return [
            self._through(call, state, span, everything=True) for call, state in zip(self.calls, entering, strict=True)
        ]

    def _entering(self, sublayer: int) -> States:
        """Return the streams before a sublayer, computed from the nearest known ones; those on the way are kept."""
        start = max(place for place in self.saved if place <= sublayer)
        for one in range(start, sublayer):
            states = self.saved[one]
            if self.alive[one]:
                states = [self._run(call, state, one) for call, state in zip(self.calls, states, strict=True)]
            self.saved[one + 1] = states
        return self.saved[sublayer]

    def _forget(self, *, before: int | None = None) -> None:
        """Drop all streams but the checkpoints and those from the sublayer `before` on."""
        self.saved = {
            place: states
            for place, states in self.saved.items()
            if place in self.marks or (before is not None and place >= before)
        }

    def _through(self, call: LayerCall, state: State, span: range, *, everything: bool = False) -> State:
        """Return the stream after the sublayers of `span`; removed ones are skipped unless `everything` is set."""
        for one in span:
            if everything or self.alive[one]:
                state = self._run(call, state, one)
        return state

    @torch.no_grad()
    def _run(self, call: LayerCall, state: State, sublayer: int) -> State:
        """Run one sublayer alone, its residual connection included."""
        layer = self.layers[sublayer // 2]
        with sublayer_skipped(layer, self.task.model, _KINDS[1 - sublayer % 2]):
            return run_layer(layer, call.arguments[sublayer // 2], state)

    def _tune(self, candidate: int) -> _Tuned:
        """Fit the next feed-forward network's down projection, so that the stream after it is as before the removal."""
        end = self._next_ffn(candidate)
        assert end is not None
        out, inputs, residuals = self.outs[end].out, [], []
        hook = out.register_forward_pre_hook(lambda _, given: inputs.append(given[0].detach()))
        for call, state in zip(self.calls, self._entering(candidate), strict=True):
            hidden = self._through(call, state, range(candidate + 1, end))
            self._run(call, hidden, end)
            residuals.append(hidden)
        hook.remove()
        wanted = self._wanted(candidate, end)
        a = torch.cat([one.reshape(-1, one.shape[-1]) for one in inputs])
        bias = 0.0 if out.bias is None else out.bias.detach()
        scale = family_of(self.task.model.config).residual_scale(self.task.model.config)
        gaps = [((y - x) / scale - bias).reshape(-1, y.shape[-1]) for y, x in zip(wanted, residuals, strict=True)]
        weight = tuned_projection(out.weight, a, torch.cat(gaps), ridge=self.sprint.ridge, ratio=self.sprint.ratio)
        total = 0.0
        for y, x, z in zip(wanted, residuals, inputs, strict=True):
            found = x + scale * (z.float() @ weight.T + bias).reshape(y.shape)
            total += distance(y, found, kind=self.sprint.distance, norm=self.sprint.norm)
        return _Tuned(importance=total / self.seconds[_KINDS[candidate % 2]], tuned=end, weight=weight)
