"""The common parts of methods that choose one measured level per sublayer: a level library, a search, a refit."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from dilap.core.codec import digest
from dilap.core.costs import Counts
from dilap.core.graph import Shape
from dilap.core.plan import Plan
from dilap.core.space import Choice, Space, plan_of
from dilap.models.anatomy import ExpertSublayer, all_sublayers
from dilap.models.processes import Team
from dilap.models.reference import Teacher
from dilap.models.statistics import layer_statistics
from dilap.search.allocation import Config
from dilap.search.journal import Evaluator, Part
from dilap.search.library import fit_choices, fits_of_levels, width_choices
from dilap.search.library_file import Fits, Library, kept_library, load_library
from dilap.search.limit import CostLimit
from dilap.search.method import Pruned, PruneTask
from dilap.search.options import LibraryOptions
from dilap.search.refit import refit_refusal
from dilap.search.supernet import HeadLevel, Supernet
from dilap.search.task import Asked_co, Search, SearchResult, SearchTask


class Levels(NamedTuple):
    """A level library with its name, and the folder where it is kept, None without a cache."""

    library: Library
    name: str
    folder: Path | None


def prune_by_levels(task: PruneTask, search: Search) -> Pruned:
    """Prune to the config that `search` finds, corrected by its measured latency, refit the projections, and round.

    Where the family's projections cannot be refitted in sequence, the library's stay, and a line says why; they are
    only rounded.
    """
    evaluator = evaluator_of(task, compensated_library(task, task.levels.library))
    net, found = evaluator.net, search_levels(task, search, evaluator)
    plan, options = plan_at(task, net, found.config), task.levels.refit
    if reason := refit_refusal(task.model):
        task.report(f"refit: skipped, the projections of the search stay: {reason}")
        if not net.is_rounded(found.config):
            return Pruned(plan=plan, parameters=net.parameters(found.config))
        options = replace(options, corrections=())
    with task.bar("refit", total=task.num_layers * task.text.train.numel(), unit="tok") as bar:
        refit = evaluator.refit(found.config, task.text.train, options=options, progress=bar.update)
    task.report(f"refit: KL on the validation split {found.kl:.3f} -> {refit.kl:.3f}")
    return Pruned(plan=plan, parameters=refit.parameters)


def prune_by_library(task: PruneTask, search: Search, levels: Levels) -> Pruned:
    """Prune to the config that `search` finds, with the library's own projections."""
    evaluator = evaluator_of(task, levels)
    config, net = search_levels(task, search, evaluator).config, evaluator.net
    return Pruned(plan=plan_at(task, net, config), parameters=net.parameters(config))


def evaluator_of(task: PruneTask, levels: Levels) -> Evaluator:
    """Return what answers a search among the levels of the task's space, of which the library has a fit each.

    The answers are kept in the task's cache. Where the library is there too, the team computes them together.
    """
    net = Supernet(task.model, levels.library, head_levels=head_levels(task.space))
    team = Team() if levels.folder is None else task.team
    teacher, journal = validation_teacher(task), None if task.cache is None else task.cache / f"journal-{levels.name}"
    if team.processes.count > 1:
        team.share_model("dense", task.model, digest=task.base)
        keep_states = bool(head_levels(task.space))
        with team.helped(_keep_part, levels.folder, task.space, task.text.validation, keep_states):
            pass  # this process has all of it
    return Evaluator(net=net, teacher=teacher, journal=journal, team=team)


def _dense_model(team: Team) -> PreTrainedModel:
    """Return a helper's copy of the dense model, which the part of an earlier search may have left in other levels."""
    if "part" in team.kept:
        team.kept.pop("part").net.close()
    return team.models["dense"]


def _keep_part(team: Team, folder: Path, space: Space, validation: torch.Tensor, keep_states: bool) -> None:
    """Let a helper keep its part of what answers a search."""
    model = _dense_model(team)
    teacher = Teacher.of(model, team.processes.share(validation), keep_states=keep_states)
    library = _of_levels(space, load_library(folder, width_choices(space.choices)))
    net = Supernet(model, library, head_levels=head_levels(space))
    team.kept["part"] = Part(net=net, teacher=teacher, processes=team.processes)


def head_levels(space: Space) -> tuple[HeadLevel, ...]:
    """Return the levels of the head, the last choice of a space, with the precision of the embedding at each.

    The embedding takes no time that depends on its precision. None are returned where the head has no choice.
    """
    if space.choices[-1].block.groups:
        return ()
    _, *others = space.choices[-1].precisions
    changed = (HeadLevel(head=one, embedding=space.embedding_precision(one)) for one in others)
    return HeadLevel(), *changed


def search_levels(task: PruneTask, search: Search, evaluator: Evaluator) -> SearchResult:
    """Return what `search` finds within the task's limit; the evaluator's model is dense again afterwards."""
    first = SearchTask(
        evaluator=evaluator,
        space=task.space,
        limit=task.cost_limit.limit,
        options=task.levels.search,
        report=task.report,
    )
    net = evaluator.net
    found = search_within(first, search, task.cost_limit, plan=lambda config: plan_at(task, net, config))
    net.close()
    return found


def search_within(
    first: SearchTask[Asked_co],
    search: Callable[[SearchTask[Asked_co]], SearchResult],
    cost_limit: CostLimit,
    *,
    plan: Callable[[Config], Plan[Shape]],
) -> SearchResult:
    """Return what `search` finds within the limit of a task, which is corrected by what the plans found measure.

    The search for a corrected limit starts from the result before it, and is not polished again.
    """
    results: list[SearchResult] = []
    space = first.space

    def choose(limit: float) -> SearchResult:
        asked = first
        if results:
            limit = max(limit, space.cost(space.fastest))
            options = replace(first.options, evaluations=0)  # of 10 more moves at most one was kept
            asked = replace(first, limit=limit, previous=results[-1], options=options)
        results.append(search(asked))
        return results[-1]

    return cost_limit.meet(
        choose,
        cost=lambda one: space.cost(one.config),
        architecture=lambda one: plan(one.config).pruned_architecture(),
        precisions=lambda one: plan(one.config).pruned_precisions(),
    )


def level_library(task: PruneTask, fit: Callable[[Sequence[Choice]], Fits], *, name: str) -> Levels:
    """Return the library of the levels that `fit` fits, which is kept in the task's cache.

    Its name is `name` with a digest of the levels. `fit` is called only for what is not kept yet, and with one level of
    each width, because precisions share fits.
    """
    wide, folder = width_choices(task.space.choices), None
    if task.cache is not None:
        folder = task.cache / f"{name}-{_digest([_widths(one) for one in wide])}"
        fitted = kept_library(folder, wide, fit)
    else:
        by_name = dict(fit(wide))
        fitted = [by_name[choice.name] for choice in wide]
    of_levels = _digest([[one.precisions, _widths(one)] for one in task.space.choices])
    return Levels(library=_of_levels(task.space, fitted), name=f"{name}-{of_levels}", folder=folder)


def _of_levels(space: Space, fitted: Library) -> Library:
    """Return a fit for every level of a space, given one for each width."""
    choices = [choice for choice in space.choices if choice.block.groups]
    return [fits_of_levels(choice, fits) for choice, fits in zip(choices, fitted, strict=True)]


def _widths(choice: Choice) -> list[Counts]:
    return [level.counts for level in choice.levels]


def _digest(described: object) -> str:
    return digest(described)[:8]


def compensated_library(task: PruneTask, options: LibraryOptions) -> Levels:
    """Return the library of these options, built on the training split.

    Methods with equal options share it.
    """
    # An expert is judged by the tokens that are sent to it, which no process has all of.
    team = Team() if any(isinstance(one, ExpertSublayer) for one in all_sublayers(task.model)) else task.team
    tokens, processes = task.text.train, team.processes

    def fit(choices: Sequence[Choice]) -> Fits:
        team.share_model("dense", task.model, digest=task.base)
        with (
            task.bar("library", total=task.num_layers * tokens.numel(), unit="tok") as bar,
            team.helped(_add_statistics, tokens, options),
        ):
            yield from fit_choices(
                task.model, choices, tokens, options=options, processes=processes, progress=bar.update
            )

    return level_library(task, fit, name=f"library-{digest(asdict(options))[:8]}")


def _add_statistics(team: Team, tokens: torch.Tensor, options: LibraryOptions) -> None:
    """Let a helper add the statistics of its share of the tokens to those of `fit_choices`."""
    for _ in layer_statistics(
        _dense_model(team), tokens, covariance=True, batch_tokens=options.batch_tokens, processes=team.processes
    ):
        pass


def validation_teacher(task: PruneTask) -> Teacher:
    """Return what the dense model predicts on the validation split, with its final states where heads differ."""
    keep_states = bool(head_levels(task.space))
    name = "teacher-validation-states" if keep_states else "teacher-validation"
    path = None if task.cache is None else task.cache / f"{name}.safetensors"
    return Teacher.once(path, task.model, task.text.validation, keep_states=keep_states)


def plan_at(task: PruneTask, net: Supernet, config: Config) -> Plan:
    """Return the plan that keeps the library's units at `config`, with its precisions."""
    precisions = task.space.precisions(config)
    if "head" in precisions:
        precisions["embedding"] = task.space.embedding_precision(precisions["head"])
    return plan_of(task.space, [fit.units for fit in net.fits(config)], base=task.base, precisions=precisions)
