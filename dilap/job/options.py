"""The options of a prune job, with the defaults that the command line and the Python interface share."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal, get_args

from dilap import methods
from dilap.core.bounds import MAX_THREADS, MAX_TOKENS
from dilap.core.errors import InvalidInput
from dilap.core.workload import Budget, Phase, Workload
from dilap.job.precisions import asked_precisions
from dilap.models.builtin import DEFAULT_MODEL
from dilap.models.options import CORPORA, CalibrationOptions
from dilap.models.recovery.options import Mode, RecoveryOptions
from dilap.profilers.configuration import thread_counts
from dilap.profilers.devices.device import Device
from dilap.search.layouts import LAYOUTS, Layout
from dilap.search.options import LevelOptions, LibraryOptions, Order, SearchOptions

_AUTO = "auto"  # what torch computes on: an accelerator where there is one
# Whether a plan is refitted in closed form: not at all, to score it alone, or to take the refitted values.
Refit = Literal["none", "score", "use"]
# The whole numbers that an option takes, from the first to the second.
RANGES: Mapping[str, tuple[int, int]] = {
    "calib_length": (1, 1 << 20),
    "calib_sequences": (1, 1_000_000),
    "train_steps": (1, 1_000_000),
    "recover_steps": (1, 1_000_000),
    "recover_tokens": (1, 1_000_000_000_000),
    "recover_length": (2, MAX_TOKENS),
    "recover_batch": (1, 1 << 30),
    "recover_evaluate": (0, 1_000_000),
    "evaluations": (0, 100_000),
    "seed": (0, (1 << 32) - 1),
    "threads": (1, MAX_THREADS),
}
_CHOICES: Mapping[str, tuple[str, ...]] = {
    "configuration": ("fastest", "plain"),
    "layout": LAYOUTS,
    "importance": get_args(Order),
    "recover": get_args(Mode),
    "refit": get_args(Refit),
}
_NONE: Mapping[str, str] = MappingProxyType({})
_TIMED, _TEXT, _LIBRARY, _SEARCH, _RECOVERY = (
    Workload(), CalibrationOptions(), LibraryOptions(), SearchOptions(), RecoveryOptions()
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CommonOptions:
    """What a prune job of any kind of model is asked for.

    For the `fastest` configuration, the runtime's switches and `threads_tried` are tried, starting from `workload`;
    the `plain` one has the runtime's default switches. `seed` is that of everything random.
    """

    budget: Budget
    model: str
    target: str = "host_cpu"
    backend: str
    workload: Workload
    force: bool = False
    estimate: bool = False
    configuration: Literal["fastest", "plain"] = "fastest"
    threads_tried: tuple[int, ...] = ()
    method: str
    settings: dict[str, str] = field(default_factory=dict)
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class JobOptions(CommonOptions):
    """Everything that a prune job of a decoder is asked for: two jobs with equal options are the same job.

    `precisions` are those that parts of the model may have beside the workload's own, which is the artifact's; None
    stands for all that the runtime has. `merge_adapter` is the folder of an adapter that becomes part of the model,
    `vocabulary` the text whose tokens alone stay in it. Methods that
    train read `training_text`, by default the calibration text, for `train_steps` batches, by default as many as their
    settings say. `compute` is the device on which torch computes. The seed is set in the options of text, search and
    recovery.
    """

    model: str = DEFAULT_MODEL
    merge_adapter: str | None = None
    vocabulary: str | None = None
    backend: str = "llamacpp"
    workload: Workload = field(default_factory=Workload)
    precisions: tuple[str, ...] | None = ()
    layout: Layout | None = None
    method: str = "dilap"
    table: str | None = None
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    training_text: str | None = None
    train_steps: int | None = None
    evaluation_text: str = "python-docs"
    evaluation_sequences: int = 32
    levels: LevelOptions = field(default_factory=LevelOptions)
    recovery: RecoveryOptions = field(default_factory=RecoveryOptions)
    refit: Refit = "none"
    compute: str = _AUTO

    def __post_init__(self) -> None:
        search = replace(self.levels.search, seed=self.seed)
        seeded = {
            "calibration": replace(self.calibration, seed=self.seed),
            "levels": replace(self.levels, search=search),
            "recovery": replace(self.recovery, seed=self.seed),
        }
        for name, value in seeded.items():
            object.__setattr__(self, name, value)

    @property
    def text(self) -> CalibrationOptions:
        """Options of the calibration text, with enough sequences to train on that recovery need not repeat any."""
        recovery, text = self.recovery, self.calibration
        is_read = recovery.mode != "none" and not recovery.data
        wanted = recovery.num_steps * recovery.batch_tokens // text.sequence_length if is_read else 0
        return replace(text, train_sequences=max(text.train_sequences, wanted))


def job_options(
    *,
    device: Device,
    budget: Budget,
    model: str = DEFAULT_MODEL,
    merge_adapter: str | None = None,
    vocabulary: str | None = None,
    method: str = "dilap",
    settings: Mapping[str, str] = _NONE,
    backend: str | None = None,
    phase: Phase = "decode",
    context: int = _TIMED.context,
    prompt_tokens: int = _TIMED.prompt_tokens,
    precision: str | None = None,
    threads: int | None = None,
    configuration: Literal["fastest", "plain"] = "fastest",
    layout: Layout | None = None,
    table: str | None = None,
    importance: Order = _LIBRARY.order,
    step: float = _SEARCH.step,
    evaluations: int = _SEARCH.evaluations,
    calib: str = _TEXT.source,
    calib_length: int = _TEXT.sequence_length,
    calib_sequences: int = _TEXT.train_sequences,
    data_dir: str | None = None,
    train_text: str | None = None,
    train_steps: int | None = None,
    eval_text: str = "python-docs",
    refit: Refit = "none",
    recover: Mode = _RECOVERY.mode,
    recover_steps: int = _RECOVERY.steps,
    recover_tokens: int | None = None,
    recover_data: Sequence[str | os.PathLike[str]] | str = (),
    recover_length: int = _RECOVERY.sequence_length,
    recover_batch: int = _RECOVERY.batch_tokens,
    recover_rate: float | None = None,
    recover_next_token: float = 0.0,
    recover_hidden: float = 0.0,
    recover_evaluate: int = 0,
    recover_checkpoint_activations: bool = False,
    recover_8bit_states: bool = False,
    tracker: str | None = None,
    seed: int = 0,
    compute: str = _AUTO,
    estimate: bool = False,
    force: bool = False,
) -> JobOptions:
    """Return the job that these options of `dilap-prune` ask for; its `--help` says what each of them is.

    None stands for the default of `device`: its first runtime, and for `threads` a choice between all physical cores
    and fewer. `precision` is one for everything, several with commas between them, or `auto` (or None): then every part
    may have any that the runtime has, and the artifact's own is what ships on the device. Raises InvalidInput for
    impossible values.
    """
    if not (math.isfinite(step) and 0 < step <= 1):
        raise InvalidInput(f"--step is a share of the dense latency above 0, got {step:g}")
    require_known(configuration=configuration, layout=layout, importance=importance, recover=recover, refit=refit)
    require_in_range(
        calib_length=calib_length,
        calib_sequences=calib_sequences,
        train_steps=train_steps,
        recover_steps=recover_steps,
        recover_tokens=recover_tokens,
        recover_length=recover_length,
        recover_batch=recover_batch,
        recover_evaluate=recover_evaluate,
        evaluations=evaluations,
        seed=seed,
        threads=threads,
    )
    _require_rates(recover_rate=recover_rate, recover_next_token=recover_next_token, recover_hidden=recover_hidden)
    if recover == "none":
        _require_recovery(
            recover_tokens=recover_tokens,
            recover_data=recover_data,
            recover_rate=recover_rate,
            recover_next_token=recover_next_token,
            recover_hidden=recover_hidden,
            recover_evaluate=recover_evaluate,
            recover_checkpoint_activations=recover_checkpoint_activations,
            recover_8bit_states=recover_8bit_states,
            tracker=tracker,
        )
    _require_compute(compute)
    backend = backend or next(iter(device.backends))
    tried = thread_counts(device.default_threads()) if threads is None else (threads,)
    own, precisions = asked_precisions(precision, default=device.default_precision(backend))
    methods.require_known(method)
    _require_below_dense(budget, own, can_choose=precisions != () and methods.chooses_precision(method))
    try:
        workload = Workload(
            phase=phase,
            prompt_tokens=prompt_tokens,
            context=context,
            precision=own,
            threads=device.default_threads() if threads is None else threads,
        )
    except ValueError as error:
        raise InvalidInput(str(error)) from error
    search = SearchOptions(step=step, evaluations=evaluations)
    return JobOptions(
        budget=budget,
        model=model,
        merge_adapter=merge_adapter,
        vocabulary=vocabulary,
        target=device.label,
        backend=backend,
        workload=workload,
        precisions=precisions,
        force=force,
        estimate=estimate,
        configuration=configuration,
        threads_tried=tried,
        layout=layout,
        method=method,
        settings=dict(settings),
        table=table,
        calibration=calibration_options(calib, length=calib_length, sequences=calib_sequences, data_dir=data_dir),
        training_text=train_text,
        train_steps=train_steps,
        evaluation_text=eval_text,
        levels=LevelOptions(library=LibraryOptions(order=importance), search=search),
        recovery=RecoveryOptions(
            mode=recover,
            steps=recover_steps,
            tokens=recover_tokens,
            data=(recover_data,) if isinstance(recover_data, str) else tuple(os.fspath(one) for one in recover_data),
            sequence_length=recover_length,
            batch_tokens=recover_batch,
            full_rate=_RECOVERY.full_rate if recover_rate is None else recover_rate,
            lora_rate=_RECOVERY.lora_rate if recover_rate is None else recover_rate,
            next_token=recover_next_token,
            hidden=recover_hidden,
            evaluate_every=recover_evaluate,
            checkpoint_activations=recover_checkpoint_activations,
            has_8bit_states=recover_8bit_states,
            tracker=tracker,
        ),
        refit=refit,
        seed=seed,
        compute=compute,
    )


def _require_below_dense(budget: Budget, precision: str, *, can_choose: bool) -> None:
    """Raise InvalidInput for more than the dense model takes; that buys better precisions where those are chosen."""
    if budget.fraction is not None and budget.fraction > 1 and not can_choose:
        raise InvalidInput(
            f"budget {budget} is more than the dense model takes in {precision}: give less than 100%, or let better "
            "precisions be chosen (--precision auto, --method dilap)"
        )


def calibration_options(
    source: str, *, length: int, sequences: int, data_dir: str | None, seed: int = 0
) -> CalibrationOptions:
    """Return the options of a calibration text. Raises InvalidInput for a folder of data that nothing is read from."""
    if data_dir is not None and source not in CORPORA:
        raise InvalidInput(f"--data-dir has the files of --calib {', '.join(CORPORA)}; --calib {source} reads none")
    return CalibrationOptions(
        source=source, data_dir=data_dir, sequence_length=length, train_sequences=sequences, seed=seed
    )


def require_known(**given: str | None) -> None:
    """Raise InvalidInput for an option with a value that it does not have; None is the default of the device."""
    for name, value in given.items():
        if value is not None and value not in _CHOICES[name]:
            raise InvalidInput(f"{name} is one of {', '.join(_CHOICES[name])}, got {value!r:.80}")


def require_in_range(**given: int | None) -> None:
    """Raise InvalidInput for a number outside the range of its option; None is the default of the device."""
    for name, value in given.items():
        least, most = RANGES[name]
        if value is not None and not (type(value) is int and least <= value <= most):
            raise InvalidInput(f"{name} is a whole number from {least:,} to {most:,}, got {value!r:.80}")


def _require_recovery(**given: object) -> None:
    """Raise InvalidInput for an option of a recovery that nobody asked for."""
    if vain := [name for name, value in given.items() if value]:
        raise InvalidInput(
            f"--{vain[0].replace('_', '-')} is for a recovery: give --recover lora or --recover full, too"
        )


def _require_rates(**given: float | None) -> None:
    """Raise InvalidInput for a share of the loss, or a learning rate, that is none; None is the default."""
    for name, value in given.items():
        most = 1.0 if name != "recover_hidden" else 1e6
        if value is not None and not (math.isfinite(value) and 0 <= value <= most):
            raise InvalidInput(f"{name} is a number from 0 to {most:g}, got {value!r:.80}")


def _require_compute(name: str) -> None:
    """Raise InvalidInput where torch has no device of that name to compute on."""
    if name != _AUTO:
        from dilap.models.compute_device import compute_device  # noqa: PLC0415 (importing torch takes seconds)

        compute_device(name)
