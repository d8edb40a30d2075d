"""Methods that choose one measured level per sublayer: a library, a search over it, a closed-form refit at the end."""

from collections.abc import Callable
from dataclasses import replace

from dilap.allocation import Config
from dilap.evaluator import Evaluator
from dilap.library import LevelFit, LibraryOptions, build_library
from dilap.library_file import load_library, save_library
from dilap.methods.method import Pruned, PruneTask
from dilap.methods.task import Search, SearchResult, SearchTask
from dilap.refit import best_refit
from dilap.space import plan_of
from dilap.supernet import Supernet
from dilap.teacher import Teacher
from dilap.types import Architecture, Plan

Library = list[list[LevelFit]]


def prune_by_levels(task: PruneTask, search: Search) -> Pruned:
    """The config that `search` finds, corrected by its measured latency, every projection refitted in order."""
    library = level_library(task, build_for(task.levels.library), name="library")
    net = Supernet(task.model, library)
    teacher = Teacher.of(task.model, task.text.validation)
    found = search_levels(task, search, net, teacher)
    with task.bar("refit", total=task.num_layers * task.text.train.numel(), unit="tok") as bar:
        refit = best_refit(
            net, found.config, task.text.train, teacher=teacher, options=task.levels.refit, progress=bar.update
        )
    task.report(f"refit: KL on the validation split {found.kl:.3f} -> {refit.kl:.3f}")
    parameters = {f"{one.path}.weight": refit.weights[one.name] for one in net.sublayers if one.name in refit.weights}
    return Pruned(plan=plan_at(task, library, found.config), parameters=parameters)


def prune_by_library(task: PruneTask, search: Search, library: Library, *, journal: str) -> Pruned:
    """The config that `search` finds, with the library's own projections. `journal` names this library's answers."""
    net = Supernet(task.model, library)
    found = search_levels(task, search, net, Teacher.of(task.model, task.text.validation), journal=journal)
    fits = {one.path: levels[level] for one, levels, level in zip(net.sublayers, library, found.config, strict=True)}
    parameters = {f"{path}.weight": fit.weight for path, fit in fits.items() if len(fit.columns)}
    return Pruned(plan=plan_at(task, library, found.config), parameters=parameters)


def search_levels(
    task: PruneTask, search: Search, net: Supernet, teacher: Teacher, *, journal: str = "journal"
) -> SearchResult:
    """What `search` finds within the target's limit; `net` is left dense.

    A corrected limit starts from the result before it and is not polished again: of 10 more moves at most one was kept.
    """
    first = SearchTask(
        evaluator=Evaluator(net=net, teacher=teacher, journal=None if task.cache is None else task.cache / journal),
        space=task.space,
        limit=task.target.limit,
        options=task.levels.search,
        report=task.report,
    )
    results: list[SearchResult] = []

    def choose(limit: float) -> SearchResult:
        asked = first
        if results:
            limit = max(limit, task.space.seconds(task.space.fastest))
            options = replace(first.options, evaluations=0)
            asked = replace(first, limit=limit, previous=results[-1], options=options)
        results.append(search(asked))
        return results[-1]

    def architecture(result: SearchResult) -> Architecture:
        widths = tuple(layer for layer in task.space.widths(result.config) if not layer.is_empty)
        return replace(task.architecture, layers=widths)

    found = task.target.meet(choose, cost=lambda one: task.space.seconds(one.config), architecture=architecture)
    net.close()
    return found


def level_library(task: PruneTask, build: Callable[[PruneTask], Library], *, name: str) -> Library:
    """Every level made concrete by `build`; kept in the task's cache under `name`."""
    path = None if task.cache is None else task.cache / f"{name}.safetensors"
    if path is not None and path.exists():
        return load_library(path)
    library = build(task)
    if path is not None:
        save_library(path, library)
    return library


def build_for(options: LibraryOptions) -> Callable[[PruneTask], Library]:
    """Builds the compensated library on the training split."""

    def build(task: PruneTask) -> Library:
        with task.bar("library", total=task.num_layers * task.text.train.numel(), unit="tok") as bar:
            return build_library(task.model, task.space, task.text.train, options=options, progress=bar.update)

    return build


def plan_at(task: PruneTask, library: Library, config: Config) -> Plan:
    """The library's units at `config`."""
    units = [levels[level].units for levels, level in zip(library, config, strict=True)]
    return plan_of(task.space, units, base=task.base)
