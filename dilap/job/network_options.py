"""The options of a prune job of a network that is no decoder: of an image network, or of an encoder of texts."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from dilap import backends
from dilap.core.bounds import MAX_BATCH
from dilap.core.errors import InvalidInput
from dilap.core.images import ImageInput
from dilap.core.network_input import NetworkInput, TokenInput
from dilap.core.workload import Budget, Workload
from dilap.job.networks import in_words, reads_texts
from dilap.job.options import CommonOptions, require_in_range, require_known
from dilap.job.precisions import asked_precisions, offered_network_precisions
from dilap.models.builtin import BUILTIN_NETWORKS
from dilap.models.distil_network import NetworkMode, NetworkRecovery
from dilap.profilers.configuration import thread_counts
from dilap.profilers.devices.device import Device

_OF_DECODERS = "self"  # what --calib is by default
_RECOVERY = NetworkRecovery()


@dataclass(frozen=True, kw_only=True)
class ExampleOptions:
    """Where photographs or sentences are: `source` is searched on, `evaluation` is scored and never searched on.

    Without `evaluation`, half of those in `source` are set aside for it. Methods see at most `most_train` of them, and
    recovery is judged on at most `most_validation` others; `seed` says which.
    """

    source: str
    evaluation: str | None = None
    most_train: int = 512
    most_validation: int = 128
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class NetworkOptions(CommonOptions):
    """Everything that a prune job of such a network is asked for: two jobs with equal options are the same job.

    `precisions` are those that the network may have beside the workload's own, by which budgets are taken; None stands
    for all that the runtime has. `input`, `processor` and `weights` are those of
    `dilap.models.convolutional.load.load_network`, and `table` is the file of a latency table that was measured
    earlier. `examples` are None for a network that is only timed. The seed is set in the options of examples and
    recovery.
    """

    model: str = next(iter(BUILTIN_NETWORKS))
    backend: str = "onnxruntime"
    workload: Workload = field(default_factory=lambda: Workload(phase="forward", precision="f32"))
    precisions: tuple[str, ...] | None = ()
    method: str = "dilap"
    input: NetworkInput | None = None
    processor: str | None = None
    weights: str | None = None
    table: str | None = None
    examples: ExampleOptions | None = None
    recovery: NetworkRecovery = field(default_factory=NetworkRecovery)

    def __post_init__(self) -> None:
        if self.examples is not None:
            object.__setattr__(self, "examples", replace(self.examples, seed=self.seed))
        object.__setattr__(self, "recovery", replace(self.recovery, seed=self.seed))


def network_options(
    *,
    device: Device,
    budget: Budget,
    model: str,
    input_: str | None = None,
    seq_length: int | None = None,
    processor: str | None = None,
    weights: str | None = None,
    table: str | None = None,
    method: str = "dilap",
    settings: Mapping[str, str] | None = None,
    backend: str | None = None,
    batch: int = 1,
    precision: str | None = None,
    threads: int | None = None,
    configuration: Literal["fastest", "plain"] = "fastest",
    calib: str | None = None,
    eval_images: str | None = None,
    eval_text: str | None = None,
    recover: NetworkMode = _RECOVERY.mode,
    recover_steps: int = _RECOVERY.steps,
    seed: int = 0,
    estimate: bool = False,
    force: bool = False,
) -> NetworkOptions:
    """Return the job that these options of `dilap-prune` ask for; its `--help` says what each of them is.

    None stands for the default of `device`: its first runtime that runs such networks, and for `threads` a choice
    between all physical cores and fewer. `precision` is one, several with commas between them, or `auto` (or None):
    then the network may have any that the runtime has, and a budget is of its first one. Without `calib`, which is
    `self` for decoders alone, the network can only be timed. Raises InvalidInput for impossible values and options that
    do not apply to the network, and Unsupported for a runtime that runs no such networks.
    """
    require_known(configuration=configuration)
    require_in_range(recover_steps=recover_steps, seed=seed, threads=threads)
    is_of_texts = reads_texts(model)
    of_images = {"input": input_, "processor": processor, "weights": weights, "eval-images": eval_images}
    of_texts: dict[str, object] = {"seq-length": seq_length, "eval-text": eval_text}
    _require_absent(of_images if is_of_texts else of_texts, model)
    if recover not in ("none", "full"):
        raise InvalidInput(f"recover is none or full for {in_words(model)}, got {recover!r:.80}")
    if type(batch) is not int or not 1 <= batch <= MAX_BATCH:
        raise InvalidInput(f"batch is a whole number from 1 to {MAX_BATCH:,}, got {batch!r:.80}")
    examples = None
    if calib is not None and calib != _OF_DECODERS:
        examples = ExampleOptions(source=calib, evaluation=eval_text if is_of_texts else eval_images)
    runtime = backend or _first_backend(device)
    device.require_runtime(runtime)
    own, precisions = _precisions(runtime, precision, has_table=table is not None)
    return NetworkOptions(
        budget=budget,
        model=model,
        input=_token_input(seq_length) if input_ is None else ImageInput.parse(input_),
        processor=processor,
        weights=weights,
        table=table,
        target=device.label,
        backend=runtime,
        workload=Workload(
            phase="forward",
            batch=batch,
            precision=own,
            threads=device.default_threads() if threads is None else threads,
        ),
        precisions=precisions,
        force=force,
        estimate=estimate,
        configuration=configuration,
        threads_tried=thread_counts(device.default_threads()) if threads is None else (threads,),
        method=method,
        settings=dict(settings or {}),
        examples=examples,
        recovery=NetworkRecovery(mode=recover, steps=recover_steps),
        seed=seed,
    )


def _require_absent(options: Mapping[str, object], model: str) -> None:
    """Raise InvalidInput where an option is given that does not apply to the model."""
    for name, value in options.items():
        if value is not None:
            raise InvalidInput(f"--{name} does not apply to {in_words(model)}: leave it away")


def _token_input(length: int | None) -> TokenInput | None:
    """Return the input of texts of `length` tokens. Raises InvalidInput."""
    try:
        return None if length is None else TokenInput(length=length)
    except ValueError as error:
        raise InvalidInput(f"seq-length {length}: {error}") from error


def _first_backend(device: Device) -> str:
    """Return the first runtime of a device that runs image networks; the first one of all where none does."""
    able = (name for name in device.backends if backends.get(name).network_precisions())
    return next(able, next(iter(device.backends)))


def _precisions(backend: str, asked: str | None, *, has_table: bool) -> tuple[str, tuple[str, ...] | None]:
    """Return what `asked_precisions` returns, for such networks. Raises Unsupported, and InvalidInput with one table.

    A table that is given is of one precision, so that no other one is tried.
    """
    runtime = backends.get(backend)
    backends.require_networks(runtime)
    own, precisions = asked_precisions(asked, default=runtime.network_precisions()[0])
    offered_network_precisions(precisions, runtime, own=own)
    if has_table and precisions:
        raise InvalidInput(f"the latency table of --table is of one precision, got {', '.join(precisions)}: name one")
    return own, () if has_table else precisions
