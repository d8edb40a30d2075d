"""The removal of sublayers one by one, as SPRINT does it: score all, tune a few, remove one, and go on.

Sublayers are numbered: 2 * layer for attention, one more for the feed-forward network.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch

from dilap.core.codec import digest
from dilap.core.errors import Infeasible
from dilap.core.groups import Block
from dilap.core.plan import Plan
from dilap.methods.sprint_settings import SprintSettings
from dilap.methods.sublayer_damage import distance, ranked, tuned_projection
from dilap.methods.sublayer_seconds import generation_seconds, saved_seconds
from dilap.models.anatomy import Sublayer, decoder_layers
from dilap.models.compute_device import compute_device
from dilap.models.families import family_of
from dilap.models.reference import perplexity
from dilap.models.skipping import sublayer_skipped
from dilap.models.statistics import LayerCall, State, layer_calls, run_layer
from dilap.models.tensor_file import Tensors
from dilap.search.limit import upper_end
from dilap.search.method import PruneTask

States = list[State]
_KINDS = ("attention", "ffn")


@dataclass(frozen=True, kw_only=True)
class _Tuned:
    """A candidate after tuning: its importance by every metric, and the new projection of the sublayer `tuned`."""

    importances: tuple[float, ...]
    tuned: int
    weight: torch.Tensor


@dataclass
class Removal:
    """The removal of sublayers one by one.

    `made` are the plans so far, with the numbers of the sublayers that they remove and the projections tuned for them.
    `perplexities` are those on held-out text, by what they were asked for.
    """

    sprint: SprintSettings
    task: PruneTask
    outs: list[Sublayer]
    made: list[tuple[Plan, list[int], dict[int, torch.Tensor]]] = field(default_factory=list)
    perplexities: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.layers = decoder_layers(self.task.model)
        self.calls: list[LayerCall] = layer_calls(
            self.task.model,
            self.task.text.train,
            batch_tokens=self.sprint.batch_sequences * self.task.text.train.shape[1] or 2048,
        )
        self.alive = [True] * len(self.outs)
        spacing = self.sprint.checkpoints + 1
        self.marks = {0} | {2 * (j * len(self.layers) // spacing) for j in range(1, spacing)}
        self.saved: dict[int, States] = {0: [call.hidden for call in self.calls]}
        self.seconds = self._latencies()
        self.untuned: dict[int, tuple[float, ...]] = {}
        self.tuned: dict[int, _Tuned] = {}

    def _latencies(self) -> dict[str, float]:
        """Return the seconds that removing one sublayer saves, by kind; 1 of every kind where they do not count.

        They are those of a model without a quarter of the sublayers of a kind, taken from the late layers but for the
        last one.
        """
        kinds = dict.fromkeys(one.kind for one in self.outs)
        if not self.sprint.latency_aware:
            return dict.fromkeys(kinds, 1.0)
        layers = self.task.num_layers
        number = max(1, layers // 4)
        late = range(max(0, layers - 1 - number), layers - 1)
        gone = {kind: [one.block for one in self.outs if one.kind == kind and one.layer in late] for kind in kinds}
        asked: dict[str, list[Block]] = {"dense": [], **gone}
        if self.sprint.latency == "generation":
            found = self.task.once(
                "sprint-generation", lambda: {name: self._generation(one) for name, one in asked.items()}
            )
            seconds = {name: float(one) for name, one in found.items()}
        else:
            seconds = {name: self._cost(self.task.without(one)) for name, one in asked.items()}
        return saved_seconds(dense=seconds.pop("dense"), without=seconds, num_removed=len(late))

    def _generation(self, without: list[Block]) -> torch.Tensor:
        sprint = self.sprint
        seconds = generation_seconds(
            self.task.model,
            without,
            prompt_tokens=sprint.prompt_tokens,
            new_tokens=sprint.new_tokens,
            batch=sprint.batch,
            iterations=sprint.iterations,
        )
        return torch.tensor(seconds, dtype=torch.float64)

    def _cost(self, plan: Plan) -> float:
        """Return what a plan costs: as measured on the device where that is asked for and can be told, or predicted."""
        limit = self.task.cost_limit
        if self.sprint.latency == "device" and limit.measure is not None:
            used = limit.measure(plan.pruned_architecture(), plan.pruned_precisions())
            if used is not None:
                return upper_end(used) * limit.limit / limit.aim
        return limit.cost(plan)

    def after(self, number: int) -> Plan:
        """Return the plan that removes that many sublayers. Raises Infeasible where not so many can be removed."""
        for plan in self.plans():
            if len(self.made[-1][1]) == number:
                return plan
        raise Infeasible(f"SPRINT can remove {len(self.made[-1][1])} sublayers of this model, {number} are asked for")

    def plans(self) -> Iterator[Plan]:
        """Yield ever smaller plans; each removes one more sublayer than the one before."""
        removed: list[int] = []
        weights: dict[int, torch.Tensor] = {}
        order = f"sprint-{digest(self.seconds)[:8]}"  # a ratio's costs are weights, a budget's are seconds
        yield self._made(removed, weights)
        while True:
            found = self.task.once(f"{order}-{len(removed) + 1}", self._iteration)
            for candidate in (int(name) for name in found if name.isdecimal()):
                *importances, tuned = found[f"{candidate}.facts"].tolist()
                weight = found[str(candidate)]
                self.tuned[candidate] = _Tuned(importances=tuple(importances), tuned=int(tuned), weight=weight)
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
            found[f"{candidate}.facts"] = torch.tensor([*one.importances, one.tuned], dtype=torch.float64)
        return found

    def _made(self, removed: Sequence[int], weights: dict[int, torch.Tensor]) -> Plan:
        plan = self.task.without(self.outs[one].block for one in removed)
        self.made.append((plan, list(removed), dict(weights)))
        for name in self._due(plan, len(removed)):
            self.perplexities[name] = self._perplexity(removed)
            self.task.report(f"SPRINT, {name}: perplexity {self.perplexities[name]:.2f} on held-out text")
        return plan

    def _due(self, plan: Plan, number: int) -> Iterator[str]:
        """Yield what the perplexity is asked for at a plan, for the first time."""
        predict = self.task.cost_limit.predict
        speedup = predict(self.task.architecture.layers) / self.task.cost_limit.cost(plan)
        steps = [f"{number} sublayers removed"] * (
            self.sprint.evaluates_every_step or number in self.sprint.numbers("eval_steps")
        )
        speedups = [f"predicted speed-up {one:g}" for one in self.sprint.numbers("eval_speedups") if speedup >= one]
        yield from (name for name in (*steps, *speedups) if name not in self.perplexities)

    def _perplexity(self, removed: Sequence[int]) -> float:
        with ExitStack() as skipped:
            for one in removed:
                skipped.enter_context(sublayer_skipped(self.layers[one // 2], self.task.model, _KINDS[one % 2]))
            return perplexity(self.task.model, self.task.text.validation)

    def _remove(self, chosen: int, weights: dict[int, torch.Tensor]) -> None:
        """Remove a sublayer, write the projection tuned for it into the model, and forget what this changes."""
        self.alive[chosen] = False
        if (found := self.tuned.get(chosen)) is not None and self.sprint.tunes and self.sprint.update_tuned:
            weights[found.tuned] = found.weight
            weight = self.outs[found.tuned].out.weight
            weight.data = found.weight.to(weight)
        self.saved = {place: states for place, states in self.saved.items() if place <= chosen}
        ends = {s: self._end(s, before=chosen) for s in range(len(self.outs))}
        kept = {s for s, end in ends.items() if end is not None and end < chosen}
        self.untuned = {s: value for s, value in self.untuned.items() if s in kept}
        self.tuned = {s: value for s, value in self.tuned.items() if s in kept and s != chosen}

    def _end(self, sublayer: int, *, before: int | None = None) -> int | None:
        """Return the sublayer behind which the change by removing another is seen: the one that is tuned.

        That is the next one of the kind that is left, None where there is none; the sublayer `before` counts as left.
        """
        if self.sprint.tuned == "none":
            return sublayer
        kinds = {"ffn": (1,), "attention": (0,), "next": (0, 1)}[self.sprint.tuned]
        later = range(sublayer + 1, len(self.outs))
        return next((one for one in later if one % 2 in kinds and (self.alive[one] or one == before)), None)

    def _choose(self, progress: Callable[[int], None]) -> int | None:
        """Return the candidate of least importance after tuning; None where no sublayer can be removed."""
        self._score_all(progress)
        removable = [s for s in self.untuned if s % 2 or sum(self.alive[::2]) > 1]  # the last attention stays
        best = ranked({s: self.untuned[s] for s in removable})[: self.sprint.candidates]
        if not self.sprint.tunes:
            return best[0] if best else None
        for candidate in best:
            if candidate not in self.tuned:
                self.tuned[candidate] = self._tune(candidate)
                self._forget()
        tuned = ranked({s: self.tuned[s].importances for s in removable if s in self.tuned})
        return tuned[0] if tuned else None

    def _score_all(self, progress: Callable[[int], None]) -> None:
        """Compute the importance before tuning of every sublayer whose importance is not known.

        This goes through the sublayers in order, so that the streams computed for one are used for the next.
        """
        missing = [s for s in range(len(self.outs)) if self.alive[s] and s not in self.untuned]
        missing = [s for s in missing if self._end(s) is not None]
        for sublayer in missing:
            end = self._end(sublayer)
            assert end is not None
            self._forget(before=sublayer)
            entering = self._entering(sublayer)
            found = [
                self._through(call, state, range(sublayer + 1, end + 1))
                for call, state in zip(self.calls, entering, strict=True)
            ]
            self.untuned[sublayer] = self._importances(sublayer, self._wanted(sublayer, end), found)
            progress(1)
        self._forget()

    def _importances(self, sublayer: int, wanted: States, found: States) -> tuple[float, ...]:
        """Return the change of streams by every metric, divided by the seconds that removing the sublayer saves."""
        return tuple(
            sum(distance(y, x, kind=one.distance, norm=one.norm) for y, x in zip(wanted, found, strict=True))
            / self.seconds[_KINDS[sublayer % 2]]
            for one in self.sprint.every_metric
        )

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
        home = next(layer.parameters()).device
        device = compute_device(self.sprint.compute_on) if self.sprint.compute_on else None
        layer.to(device or home)  # moves one that is kept in host memory
        try:
            with sublayer_skipped(layer, self.task.model, _KINDS[1 - sublayer % 2]):
                return run_layer(layer, call.arguments[sublayer // 2], state, device)
        finally:
            layer.to(home)

    def _tune(self, candidate: int) -> _Tuned:
        """Fit the next feed-forward network's down projection, so that the stream after it is as before the removal."""
        end = self._end(candidate)
        assert end is not None
        out, inputs, residuals = self.outs[end].out, [], []
        home = self.calls[0].hidden.device
        hook = out.register_forward_pre_hook(lambda _, given: inputs.append(given[0].detach().to(home)))
        for call, state in zip(self.calls, self._entering(candidate), strict=True):
            hidden = self._through(call, state, range(candidate + 1, end))
            self._run(call, hidden, end)
            residuals.append(hidden)
        hook.remove()
        wanted = self._wanted(candidate, end)
        a = torch.cat([one.reshape(-1, one.shape[-1]) for one in inputs])
        bias = 0.0 if out.bias is None else out.bias.detach().to(home)
        scale = family_of(self.task.model.config).residual_scale(self.task.model.config)
        gaps = [((y - x) / scale - bias).reshape(-1, y.shape[-1]) for y, x in zip(wanted, residuals, strict=True)]
        weight = tuned_projection(
            out.weight.to(home),
            a,
            torch.cat(gaps),
            ridge=self.sprint.ridge,
            ratio=self.sprint.ratio,
            direction=self.sprint.direction,
            dtype=torch.float64 if self.sprint.fit_in == "f64" else torch.float32,
        )
        found = [
            x + scale * (z.float() @ weight.T + bias).reshape(x.shape) for x, z in zip(residuals, inputs, strict=True)
        ]
        return _Tuned(importances=self._importances(candidate, wanted, found), tuned=end, weight=weight)
