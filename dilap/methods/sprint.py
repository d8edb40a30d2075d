"""SPRINT: remove the sublayer that costs least quality per second saved, and tune the next feed-forward network.

Written from the published description alone. Sublayers are numbered: 2 * layer for attention, one more for the
feed-forward network.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from dilap.core.codec import digest
from dilap.core.errors import Infeasible, InvalidInput, Unsupported
from dilap.core.groups import Block
from dilap.core.plan import Plan
from dilap.methods.sublayer_damage import Direction, Distance, Metric, Norm, distance, ranked, tuned_projection
from dilap.methods.sublayer_seconds import generation_seconds, saved_seconds
from dilap.methods.units import restored
from dilap.models.anatomy import Sublayer, decoder_layers, sublayers
from dilap.models.families import family_of
from dilap.models.reference import perplexity
from dilap.models.skipping import sublayer_skipped
from dilap.models.statistics import LayerCall, State, layer_calls, run_layer
from dilap.models.tensor_file import Tensors
from dilap.search.method import Pruned, PruneTask
from dilap.search.refit import refit_refusal

States = list[State]
_KINDS = ("attention", "ffn")


@dataclass(frozen=True, kw_only=True)
class Sprint:
    """SPRINT with its published settings.

    There are 5 candidates per iteration. The importance of a sublayer is the change at the output of the next
    feed-forward network, divided by the latency saved unless `latency_aware` is false; all of that network's down
    projection is tuned. With several `metrics` (`l1_sentence,cos_token`) the ranks by each are summed; by default there
    is the one of `distance` and `norm`. The sublayer that is `tuned` is the next one of its kind or of any, or `none`:
    the change is then that of the sublayer's own output. `tune=false` scores the same change without tuning, and
    `update_tuned=false` only scores with tuned projections and leaves them out of the model. The share `ratio` of the
    projection's output rows or, by `direction`, of its input columns is tuned. `ridge` is added because the published
    normal equations have no dampening, and our fewer tokens make them singular; 0 is the original.

    By default as many sublayers go as the limit asks for; `num_remove` removes that many, whatever the limit is. The
    perplexity on held-out text is reported after the numbers of removals in `eval_steps` (`4,8`) and at the first
    predicted speed-ups of at least those in `eval_speedups` (`1.2,1.4`).

    The latencies are those of the latency `table`, measured on the `device`, or those of a torch model that reads
    prompts and generates, as the authors measure them: `batch` prompts of `prompt_tokens` and `new_tokens` more (0: the
    prompt alone), the median of `iterations`.

    `batch_sequences` are scored at once, 0 as many as have 2,048 tokens. The 8 activation checkpoints save memory and
    change no result. With a GPU (`compute_on=cuda`) the layers lie there, but for the last `host_layers`, which are
    moved there when they run; streams stay in host memory.
    """

    distance: Distance = "l1"
    norm: Norm = "sentence"
    metrics: str = ""
    latency_aware: bool = True
    candidates: int = 5
    tuned: Literal["ffn", "attention", "next", "none"] = "ffn"
    tune: bool = True
    update_tuned: bool = True
    ratio: float = 1.0
    direction: Direction = "out_channel"
    ridge: float = 0.01
    num_remove: int = 0
    eval_steps: str = ""
    eval_speedups: str = ""
    latency: Literal["table", "device", "generation"] = "table"
    prompt_tokens: int = 1024
    new_tokens: int = field(default=512, metadata={"least": 0})
    batch: int = 1
    iterations: int = 3
    batch_sequences: int = 0
    checkpoints: int = field(default=8, metadata={"least": 0})
    compute_on: str = "cpu"
    host_layers: int = 0

    def __post_init__(self) -> None:
        """Raise InvalidInput for settings that say nothing, before any work."""
        _ = self.every_metric, self.numbers("eval_steps"), self.numbers("eval_speedups")
        if self.compute_on != "cpu" and not torch.cuda.is_available():
            raise Unsupported(f"there is no GPU to compute on ({self.compute_on}); leave out --set compute_on")

    @property
    def every_metric(self) -> tuple[Metric, ...]:
        own = Metric(distance=self.distance, norm=self.norm)
        return tuple(map(Metric.parse, self.metrics.split(","))) if self.metrics else (own,)

    def numbers(self, setting: str) -> list[float]:
        """Return the numbers in a setting that is a list, ascending. Raises InvalidInput."""
        text = getattr(self, setting)
        try:
            return sorted(float(one) for one in text.split(",") if one.strip())
        except ValueError:
            raise InvalidInput(
                f"method sprint: {setting} are numbers with commas between them, got {text!r:.40}"
            ) from None

    def __call__(self, task: PruneTask) -> Pruned:
        if not (task.rules.attention_removal and task.rules.ffn_removal):
            raise Unsupported("SPRINT removes single sublayers, which this runtime or layout does not load")
        if self.tunes and (reason := refit_refusal(task.model)):
            raise Unsupported(f"SPRINT tunes projections that are only added, and {reason}; use --set tune=false")
        outs = list(sublayers(task.model))
        with restored(outs), _placed(decoder_layers(task.model), self):
            run = _Run(self, task, outs)
            plan = run.after(self.num_remove) if self.num_remove else task.cost_limit.first(run.plans())
        removed, weights = next((gone, weights) for found, gone, weights in run.made if found == plan)
        parameters = {f"{outs[sublayer].path}.weight": weight for sublayer, weight in weights.items()}
        names = [outs[one].name for one in removed]
        facts = {"removed_sublayers": names, **({"perplexities": run.perplexities} if run.perplexities else {})}
        return Pruned(plan=plan, parameters=parameters, facts=facts)

    @property
    def tunes(self) -> bool:
        return self.tune and self.tuned != "none"


@contextmanager
def _placed(layers: nn.ModuleList, sprint: Sprint) -> Iterator[None]:
    """Put the layers that are not kept in host memory where they compute, and back at the end."""
    for layer in layers[: max(0, len(layers) - sprint.host_layers)]:
        layer.to(sprint.compute_on)
    try:
        yield
    finally:
        layers.to("cpu")


@dataclass(frozen=True, kw_only=True)
class _Tuned:
    """A candidate after tuning: its importance by every metric, and the new projection of the sublayer `tuned`."""

    importances: tuple[float, ...]
    tuned: int
    weight: torch.Tensor


@dataclass
class _Run:
    """The removal of sublayers one by one.

    `made` are the plans so far, with the numbers of the sublayers that they remove and the projections tuned for them.
    `perplexities` are those on held-out text, by what they were asked for.
    """

    sprint: Sprint
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
                return used * limit.limit / limit.aim
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
        steps = [f"{step:g} sublayers removed" for step in self.sprint.numbers("eval_steps") if step == number]
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
        layer, place = self.layers[sublayer // 2], torch.device(self.sprint.compute_on)
        device = None if place.type == "cpu" else place
        home = next(layer.parameters()).device
        layer.to(place)  # moves those that are kept in host memory
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
        hook = out.register_forward_pre_hook(lambda _, given: inputs.append(given[0].detach().cpu()))
        for call, state in zip(self.calls, self._entering(candidate), strict=True):
            hidden = self._through(call, state, range(candidate + 1, end))
            self._run(call, hidden, end)
            residuals.append(hidden)
        hook.remove()
        wanted = self._wanted(candidate, end)
        a = torch.cat([one.reshape(-1, one.shape[-1]) for one in inputs])
        bias = 0.0 if out.bias is None else out.bias.detach().cpu()
        scale = family_of(self.task.model.config).residual_scale(self.task.model.config)
        gaps = [((y - x) / scale - bias).reshape(-1, y.shape[-1]) for y, x in zip(wanted, residuals, strict=True)]
        weight = tuned_projection(
            out.weight.cpu(),
            a,
            torch.cat(gaps),
            ridge=self.sprint.ridge,
            ratio=self.sprint.ratio,
            direction=self.sprint.direction,
        )
        found = [
            x + scale * (z.float() @ weight.T + bias).reshape(x.shape) for x, z in zip(residuals, inputs, strict=True)
        ]
        return _Tuned(importances=self._importances(candidate, wanted, found), tuned=end, weight=weight)
