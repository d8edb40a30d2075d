"""The Python interface: what the commands do, as functions with the same options and the same defaults.

    import dilap

    result = dilap.prune("smollm2-135m", target="host_cpu", budget="70%", out="runs/mine")
    print(result.status, result.speedup, result.pruned.quality.kl)

`target` names the device, and `devices` is a file that says where your devices are. Files are written into `out`, and
what is worth keeping between runs (latency tables, configurations) into the folder `cache`, by default `~/.cache/dilap`
or `$XDG_CACHE_HOME/dilap`. `progress` is a function that is called with every line of progress, or a
`dilap.core.progress.Progress`; without it, progress bars are shown: widgets in a notebook, text on a terminal.
"""

import copy
import os
import sys
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dilap.core.artifact import Artifact
from dilap.core.errors import InvalidInput
from dilap.core.network_input import parse_input
from dilap.core.progress import Progress
from dilap.core.shape import UNMIXED
from dilap.core.workload import Budget, Statistic
from dilap.evaluation.document import Evaluation
from dilap.job import asked as asking
from dilap.job import compare as comparing
from dilap.job import evaluate as evaluating
from dilap.job import export as exporting
from dilap.job.asked import OPTIONS, asked_job, start
from dilap.job.comparison import Row
from dilap.job.lines import LineBar
from dilap.job.networks import is_network
from dilap.job.profile import Profile
from dilap.job.result import PruneResult
from dilap.job.shards import Shard
from dilap.methods import METHODS, NETWORK_METHODS, named
from dilap.models.builtin import DEFAULT_MODEL
from dilap.models.load import Source, load
from dilap.models.processes import with_helpers
from dilap.profilers.devices.device import Device
from dilap.profilers.devices.locations import known_devices

__all__ = ["compare", "evaluate", "export", "load", "profile", "prune"]
_TIMED_OPTIONS = {
    "backend", "phase", "context", "prompt_tokens", "precision", "threads", "configuration", "estimate", "force",
    "merge_adapter", "vocabulary", "input_", "seq_length", "processor", "weights", "batch",
}  # fmt: skip
_EVALUATION_OPTIONS = {one.name for one in fields(evaluating.EvaluationOptions)} - {
    "subject", "tasks", "costs_on", "data_dir", "out",
}  # fmt: skip
Told = Callable[[str], None] | Progress | None
Place = str | os.PathLike[str]


def prune(
    model: Place | Source = DEFAULT_MODEL,
    *,
    out: Place,
    budget: str | Budget | None = None,
    ratio: float | None = None,
    stat: Statistic = "p50",
    target: str = "host_cpu",
    devices: Place | None = None,
    cache: Place | None = None,
    progress: Told = None,
    **options: Any,
) -> PruneResult[Any] | None:
    """Prune `model` to a budget and return what was measured on `target`; None where the dense model keeps the budget.

    `budget` is like `"40ms"`, `"70%"` of the dense latency or `"1.4x"` faster; instead, `ratio` is the share of the
    weights to remove (of a decoder, those of its layers). `options` are those of `dilap.job.options.job_options`:
    `method`, `precision`, `recover`, `seed` and so on; of another network, those of
    `dilap.job.network_options.network_options`: `calib`, `eval_images`, `input_`, `batch` and so on, or for an encoder
    of texts `eval_text` and `seq_length`. A model that is
    passed as a `Source` is not changed. Raises DilapError with a one-line message; the same call, made again, goes on
    with what was done so far. Of several processes that `torchrun` or `accelerate launch` started, the main one does
    that, and the others help it and get None.
    """
    source = replace(model, model=copy.deepcopy(model.model)) if isinstance(model, Source) else None
    if isinstance(model, Source):
        for name in ("merge_adapter", "vocabulary", "compute"):
            if name in options:
                raise InvalidInput(f"the model is loaded already: give {name} to dilap.load instead")
        options["merge_adapter"] = model.merge_adapter
        options["vocabulary"] = None if model.vocabulary is None else model.vocabulary.name
    found = _devices(target, devices)
    asked = asked_job(
        device=found[0],
        budget=_budget(budget, ratio, stat),
        model=model.name if isinstance(model, Source) else os.fspath(model),
        given=_known(options, among=set(OPTIONS)),
    )
    given: dict[str, Any] = {"devices": found, "out": Path(out), "progress": _progress(progress)}
    return with_helpers(lambda: start(asked, **given, source=source, tables=_tables(cache)))


def compare(
    model: Place = DEFAULT_MODEL,
    *,
    out: Place,
    budgets: Sequence[str | Budget] | str | Budget = (),
    ratios: Sequence[float] | float = (),
    methods: Sequence[str] = ("all",),
    settings: Mapping[str, Mapping[str, str]] | None = None,
    stat: Statistic = "p50",
    target: str = "host_cpu",
    devices: Place | None = None,
    cache: Place | None = None,
    keep_models: bool = False,
    shard: str | None = None,
    progress: Told = None,
    **options: Any,
) -> list[Row]:
    """Prune with several methods at the same measured latency and return one row for each method and budget.

    `settings` holds the settings of each method by the method's name. Recovery is by default that of `dilap-compare`,
    16 steps of full fine-tuning, and plans are scored with a closed-form refit too (`refit="score"`).
    `shard` is one part of the comparison, `"2/4"` for the second of four, in a folder
    beside `out`; the call without it takes over what those have done. Raises DilapError; the error of a single method
    is kept in its row instead.
    """
    asked = [_budget(one, None, stat) for one in _several(budgets)]
    asked = list(dict.fromkeys(asked + [_budget(None, one, stat) for one in _several(ratios)]))
    if not asked:
        raise InvalidInput("nothing to compare at: name budgets or ratios")
    is_other = options.get("input_") is not None or is_network(os.fspath(model))
    table = NETWORK_METHODS if is_other else METHODS
    names, chosen = named(_several(methods), table=table), settings or {}
    if strange := sorted(set(chosen) - set(names)):
        raise InvalidInput(f"settings of {strange[0]!r}, which is not compared; methods: {', '.join(names)}")
    found = _devices(target, devices)
    known = _known(options, among=set(OPTIONS) - {"method", "settings"})  # it has `methods`, and settings of each
    scored = {} if is_other else {"refit": "score"}
    base = asked_job(
        device=found[0],
        budget=asked[0],
        model=os.fspath(model),
        given={"recover": "full", "recover_steps": 16, **scored, **known},
    )
    return comparing.compare(
        base,
        budgets=asked,
        settings={name: chosen.get(name, {}) for name in names},
        devices=found,
        out=Path(out),
        progress=_progress(progress),
        keep_models=keep_models,
        tables=_tables(cache),
        shard=None if shard is None else Shard.parse(shard),
    )


def profile(
    model: Place = DEFAULT_MODEL,
    *,
    target: str = "host_cpu",
    out: Place | None = None,
    devices: Place | None = None,
    cache: Place | None = None,
    progress: Told = None,
    **options: Any,
) -> Profile[Any]:
    """Measure a model's latency table on `target` and return the fitted cost of every width of every sublayer.

    `options` are those of `prune` about what is timed: `backend`, `phase`, `context`, `precision`, `threads` and so on;
    of a network that is no decoder `input_`, `seq_length`, `batch`, `precision` and so on.
    """
    found = _devices(target, devices)
    asked = asking.timed_job(device=found[0], model=os.fspath(model), given=_known(options, among=_TIMED_OPTIONS))
    return asking.profile(
        asked,
        devices=found,
        out=None if out is None else Path(out),
        tables=_tables(cache),
        progress=_progress(progress),
    )


def export(
    checkpoint: Place,
    *,
    backend: str,
    out: Place,
    precision: str | None = None,
    precisions: Mapping[str, str] = UNMIXED,
    plan: Place | None = None,
    tokenizer: Place | None = None,
    merge_adapter: Place | None = None,
    vocabulary: Place | None = None,
    compute: str = "auto",
    input_: str | None = None,
    processor: Place | None = None,
    weights: Place | None = None,
    calib: Place | None = None,
    progress: Told = None,
) -> Artifact:
    """Write a checkpoint in a runtime's format into the new folder `out`, checked against torch.

    `precisions` has those of parts that differ from `precision`: `head`, `embedding`, `layers.N.attention`,
    `layers.N.ffn`, or `attention` and `ffn` for all layers. `plan` is a run's plan.json, whose precisions are taken for
    parts that are not named. The checkpoint may be an image network: `input_` is then what it takes, as in
    `3x224x224`, `processor` a folder whose preprocessor_config.json says how photographs become that, `calib` are
    photographs from which 8 bits take their ranges, and `weights` those of `my_module:build`. `compute` is the device
    on which torch computes.
    """
    return exporting.export(
        os.fspath(checkpoint),
        backend=backend,
        precision=precision,
        precisions=precisions,
        plan=None if plan is None else Path(plan),
        tokenizer=None if tokenizer is None else Path(tokenizer),
        merge_adapter=None if merge_adapter is None else os.fspath(merge_adapter),
        vocabulary=None if vocabulary is None else os.fspath(vocabulary),
        compute=compute,
        input_=None if input_ is None else parse_input(input_),
        processor=None if processor is None else Path(processor),
        weights=None if weights is None else Path(weights),
        calib=None if calib is None else os.fspath(calib),
        out=Path(out),
        progress=_progress(progress),
    )


def evaluate(
    subject: Place,
    *,
    tasks: Sequence[str] = (),
    costs_on: str | None = None,
    data_dir: Place | None = None,
    out: Place | None = None,
    devices: Place | None = None,
    progress: Told = None,
    **options: Any,
) -> Evaluation:
    """Score a checkpoint in torch, or an artifact through its runtime.

    Scored are lm-eval's `tasks`, text beside a `reference` model, and memory and latency on the device `costs_on`. The
    other options are those of `EvaluationOptions`. Raises DilapError.
    """
    asked = evaluating.EvaluationOptions(
        subject=os.fspath(subject),
        tasks=tuple(tasks),
        costs_on=None if costs_on is None else _devices(costs_on, devices)[0],
        data_dir=None if data_dir is None else Path(data_dir),
        out=None if out is None else Path(out),
        **_known(options, among=_EVALUATION_OPTIONS),
    )
    return evaluating.evaluate(asked, progress=_progress(progress))


def _budget(budget: str | Budget | None, ratio: float | None, stat: Statistic) -> Budget:
    """Return the budget that is asked for. Raises InvalidInput unless exactly one of its two forms is given."""
    if (budget is None) == (ratio is None):
        raise InvalidInput('give a budget, like "70%" or "40ms", or a ratio of the weights, and not both')
    if ratio is not None:
        return Budget.of_ratio(ratio)
    return budget if isinstance(budget, Budget) else Budget.parse(str(budget), statistic=stat)


def _devices(target: str, file: Place | None) -> tuple[Device, ...]:
    """Return the devices that `target` names; the first one is pruned for. Raises InvalidInput."""
    return known_devices(None if file is None else Path(file)).group(target)


def _known(options: Mapping[str, Any], *, among: Set[str]) -> Mapping[str, Any]:
    """Return `options`, paths as text. Raises InvalidInput for an option that is not `among` the known ones."""
    if odd := sorted(set(options) - among):
        raise InvalidInput(f"there is no option {odd[0]!r}; there are: {', '.join(sorted(among))}")
    return {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in options.items()}


def _several(given: Any) -> list[Any]:
    """Return the items of a list; one that is no list is the only item."""
    return [given] if isinstance(given, str | Budget | float | int) else list(given)


def _tables(cache: Place | None) -> Path:
    """Return the folder of latency tables, in `cache` or in the user's own cache folder."""
    home = os.environ.get("XDG_CACHE_HOME")
    folder = Path(cache) if cache is not None else (Path(home) if home else Path.home() / ".cache") / "dilap"
    return folder / "tables"


def _progress(told: Told) -> Progress:
    if told is None:
        return Bars()
    return Lines(told) if callable(told) else told


class Bars:
    """A `Progress` through tqdm: its bars are widgets in a notebook, text on a terminal, and lines elsewhere."""

    def say(self, text: str) -> None:
        from tqdm.auto import tqdm  # noqa: PLC0415 - it looks for widgets, and warns where there are none

        tqdm.write(text)

    def bar(self, title: str, *, total: int | None, unit: str) -> AbstractContextManager[Any]:
        from tqdm import auto  # noqa: PLC0415

        if auto.notebook_tqdm is auto.std_tqdm and not sys.stderr.isatty():
            return LineBar(self.say, title, total=total, unit=unit)
        found: AbstractContextManager[Any] = auto.tqdm(desc=title, total=total, unit=unit, unit_scale=True, leave=False)
        return found


class Lines:
    """A `Progress` that calls a function with every line and shows no bars."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.say = tell

    def bar(self, title: str, *, total: int | None, unit: str) -> AbstractContextManager[Any]:  # noqa: ARG002
        def ignore(*_: object, **__: object) -> None:
            pass

        return nullcontext(SimpleNamespace(update=ignore, set_postfix_str=ignore, set_postfix=ignore, n=0, total=total))
