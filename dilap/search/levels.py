"""The common parts of methods that choose one measured level per sublayer: a level library, a search, a refit."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

from dilap.core.codec import digest
from dilap.core.costs import Counts
from dilap.core.graph import Shape
from dilap.core.plan import Plan
from dilap.core.space import Choice, Space, plan_of
from dilap.models.reference import Teacher
from dilap.search.allocation import Config
from dilap.search.journal import Evaluator
from dilap.search.library import fit_choices, fits_of_levels, width_choices
from dilap.search.library_file import Fits, Library, kept_library
from dilap.search.limit import CostLimit
from dilap.search.method import Pruned, PruneTask
from dilap.search.options import LibraryOptions
from dilap.search.refit import best_refit, refit_refusal
from dilap.search.supernet import HeadLevel, Supernet
from dilap.search.task import Asked_co, Search, SearchResult, SearchTask


def prune_by_levels(task: PruneTask, search: Search) -> Pruned:
    """Prune to the config that `search` finds, corrected by its measured latency, refit the projections, and round.

    Where the family's projections cannot be refitted in sequence, the library's stay, and a line says why; they are
    only rounded.
    """
    library, name = compensated_library(task, task.levels.library)
    net, teacher = supernet_of(task, library), validation_teacher(task)
    found = search_levels(task, search, net, teacher, journal=f"journal-{name}")
    plan, options = plan_at(task, net, found.config), task.levels.refit
    if reason := refit_refusal(task.model):
        task.report(f"refit: skipped, the projections of the search stay: {reason}")
        if not net.is_rounded(found.config):
            return Pruned(plan=plan, parameters=net.parameters(found.config))
        options = replace(options, corrections=())
    with task.bar("refit", total=task.num_layers * task.text.train.numel(), unit="tok") as bar:
        refit = best_refit(net, found.config, task.text.train, teacher=teacher, options=options, progress=bar.update)
    task.report(f"refit: KL on the validation split {found.kl:.3f} -> {refit.kl:.3f}")
    return Pruned(plan=plan, parameters=refit.parameters)


def prune_by_library(task: PruneTask, search: Search, library: Library, *, name: str) -> Pruned:
    """Prune to the config that `search` finds, with the library's own projections; `name` is the library's."""
    net = supernet_of(task, library)
    config = search_levels(task, search, net, validation_teacher(task), journal=f"journal-{name}").config
    return Pruned(plan=plan_at(task, net, config), parameters=net.parameters(config))


def supernet_of(task: PruneTask, library: Library) -> Supernet:
    """Return the task's model with the levels of its space; `library` has a fit for every level of its sublayers."""
    return Supernet(task.model, library, head_levels=head_levels(task.space))


def head_levels(space: Space) -> tuple[HeadLevel, ...]:
    """Return the levels of the head, the last choice of a space, with the precision of the embedding at each.

    The embedding takes no time that depends on its precision. None are returned where the head has no choice.
    """
    if space.choices[-1].block.groups:
        return ()
    _, *others = space.choices[-1].precisions
    changed = (HeadLevel(head=one, embedding=space.embedding_precision(one)) for one in others)
    return HeadLevel(), *changed


def search_levels(task: PruneTask, search: Search, net: Supernet, teacher: Teacher, *, journal: str) -> SearchResult:
    """Return what `search` finds within the task's limit; `net` is dense again afterwards.

    `journal` is the name of the folder in the task's cache where the answers to the search are kept.
    """
    first = SearchTask(
        evaluator=Evaluator(net=net, teacher=teacher, journal=None if task.cache is None else task.cache / journal),
        space=task.space,
        limit=task.cost_limit.limit,
        options=task.levels.search,
        report=task.report,
    )
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


def level_library(task: PruneTask, fit: Callable[[Sequence[Choice]], Fits], *, name: str) -> tuple[Library, str]:
    """Return the library of the levels that `fit` fits, and its name in the task's cache, where it is kept.

    The name is `name` with a digest of the levels. `fit` is called only for what is not kept yet, and with one level of
    each width, because precisions share fits.
    """
    choices = [choice for choice in task.space.choices if choice.block.groups]
    wide = width_choices(choices)
    widths = f"{name}-{_digest([_widths(one) for one in wide])}"
    if task.cache is not None:
        fitted = kept_library(task.cache / widths, wide, fit)
    else:
        by_name = dict(fit(wide))
        fitted = [by_name[choice.name] for choice in wide]
    library = [fits_of_levels(choice, fits) for choice, fits in zip(choices, fitted, strict=True)]
    return library, f"{name}-{_digest([[one.precisions, _widths(one)] for one in task.space.choices])}"


def _widths(choice: Choice) -> list[Counts]:
    return [level.counts for level in choice.levels]


def _digest(described: object) -> str:
    return digest(described)[:8]


def compensated_library(task: PruneTask, options: LibraryOptions) -> tuple[Library, str]:
    """Return the library of these options, built on the training split, and its name in the task's cache.

    Methods with equal options share it.
    """

    def fit(choices: Sequence[Choice]) -> Fits:
        with task.bar("library", total=task.num_layers * task.text.train.numel(), unit="tok") as bar:
            yield from fit_choices(task.model, choices, task.text.train, options=options, progress=bar.update)

    return level_library(task, fit, name=f"library-{digest(asdict(options))[:8]}")


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
