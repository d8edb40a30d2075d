"""The common parts of methods that choose one measured level per sublayer: a level library, a search, a refit."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

from dilap.core.codec import digest
from dilap.core.plan import Plan
from dilap.core.space import Choice, plan_of
from dilap.models.reference import Teacher
from dilap.search.allocation import Config
from dilap.search.journal import Evaluator
from dilap.search.library import LibraryOptions, fit_choices
from dilap.search.library_file import Fits, Library, kept_library
from dilap.search.method import Pruned, PruneTask
from dilap.search.refit import best_refit, refit_refusal
from dilap.search.supernet import Supernet
from dilap.search.task import Search, SearchResult, SearchTask


def prune_by_levels(task: PruneTask, search: Search) -> Pruned:
    """Prune to the config that `search` finds, corrected by its measured latency, and refit the projections.

    Where the family's projections cannot be refitted in sequence, the library's stay, and a line says why.
    """
    library, name = compensated_library(task, task.levels.library)
    net, teacher = Supernet(task.model, library), validation_teacher(task)
    found = search_levels(task, search, net, teacher, journal=f"journal-{name}")
    if reason := refit_refusal(task.model):
        task.report(f"refit: skipped, the projections of the search stay: {reason}")
        return _by_library(task, net, found.config)
    with task.bar("refit", total=task.num_layers * task.text.train.numel(), unit="tok") as bar:
        refit = best_refit(
            net, found.config, task.text.train, teacher=teacher, options=task.levels.refit, progress=bar.update
        )
    task.report(f"refit: KL on the validation split {found.kl:.3f} -> {refit.kl:.3f}")
    parameters = {f"{one.path}.weight": refit.weights[one.name] for one in net.sublayers if one.name in refit.weights}
    return Pruned(plan=plan_at(task, library, found.config), parameters=parameters)


def prune_by_library(task: PruneTask, search: Search, library: Library, *, name: str) -> Pruned:
    """Prune to the config that `search` finds, with the library's own projections; `name` is the library's."""
    net = Supernet(task.model, library)
    found = search_levels(task, search, net, validation_teacher(task), journal=f"journal-{name}")
    return _by_library(task, net, found.config)


def _by_library(task: PruneTask, net: Supernet, config: Config) -> Pruned:
    """Return the plan of `config`, with the library's projections."""
    fits = {one.path: levels[level] for one, levels, level in zip(net.sublayers, net.library, config, strict=True)}
    parameters = {f"{path}.weight": fit.weight for path, fit in fits.items() if len(fit.columns)}
    return Pruned(plan=plan_at(task, net.library, config), parameters=parameters)


def search_levels(task: PruneTask, search: Search, net: Supernet, teacher: Teacher, *, journal: str) -> SearchResult:
    """Return what `search` finds within the task's limit; `net` is dense again afterwards.

    `journal` is the name of the folder in the task's cache where the answers to the search are kept. The search for a
    corrected limit starts from the result before it, and is not polished again.
    """
    first = SearchTask(
        evaluator=Evaluator(net=net, teacher=teacher, journal=None if task.cache is None else task.cache / journal),
        space=task.space,
        limit=task.cost_limit.limit,
        options=task.levels.search,
        report=task.report,
    )
    results: list[SearchResult] = []

    def choose(limit: float) -> SearchResult:
        asked = first
        if results:
            limit = max(limit, task.space.cost(task.space.fastest))
            options = replace(first.options, evaluations=0)  # of 10 more moves at most one was kept
            asked = replace(first, limit=limit, previous=results[-1], options=options)
        results.append(search(asked))
        return results[-1]

    def plan(result: SearchResult) -> Plan:
        return plan_at(task, net.library, result.config)

    found = task.cost_limit.meet(
        choose,
        cost=lambda one: task.space.cost(one.config),
        architecture=lambda one: plan(one).pruned_architecture(),
        precisions=lambda one: plan(one).pruned_precisions(),
    )
    net.close()
    return found


def level_library(task: PruneTask, fit: Callable[[Sequence[Choice]], Fits], *, name: str) -> tuple[Library, str]:
    """Return the library of the levels that `fit` fits, and its name in the task's cache, where it is kept.

    The name is `name` with a digest of the levels. `fit` is called only for what is not kept yet.
    """
    choices = task.space.choices
    name = f"{name}-{digest([[asdict(level) for level in choice.levels] for choice in choices])[:8]}"
    if task.cache is not None:
        return kept_library(task.cache / name, choices, fit), name
    fitted = dict(fit(choices))
    return [fitted[choice.name] for choice in choices], name


def compensated_library(task: PruneTask, options: LibraryOptions) -> tuple[Library, str]:
    """Return the library of these options, built on the training split, and its name in the task's cache.

    Methods with equal options share it.
    """

    def fit(choices: Sequence[Choice]) -> Fits:
        with task.bar("library", total=task.num_layers * task.text.train.numel(), unit="tok") as bar:
            yield from fit_choices(task.model, choices, task.text.train, options=options, progress=bar.update)

    return level_library(task, fit, name=f"library-{digest(asdict(options))[:8]}")


def validation_teacher(task: PruneTask) -> Teacher:
    """Return what the dense model predicts on the validation split."""
    path = None if task.cache is None else task.cache / "teacher-validation.safetensors"
    return Teacher.once(path, task.model, task.text.validation)


def plan_at(task: PruneTask, library: Library, config: Config) -> Plan:
    """Return the plan that keeps the library's units at `config`."""
    units = [levels[level].units for levels, level in zip(library, config, strict=True)]
    return plan_of(task.space, units, base=task.base, precisions=task.space.precisions(config))
