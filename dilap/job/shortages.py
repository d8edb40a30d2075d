"""What of a job will not fit into the memory of a machine, and what to ask for instead."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from dilap.job.forecast import Machine, Need, gigabytes
from dilap.job.options import CommonOptions, JobOptions
from dilap.models.compute_device import HOST

Options = TypeVar("Options", bound=CommonOptions)


def lacking(needs: Sequence[Need], machine: Machine) -> list[str]:
    """Return in words what does not fit into the memory of a machine, the largest stage for each kind of memory."""
    on_device = {one.stage: one.device_bytes for one in needs}
    on_host = {one.stage: one.host_bytes for one in needs}
    if machine.device.type == HOST.type:
        both = {one.stage: one.device_bytes + one.host_bytes - one.mapped_bytes for one in needs}
        memories = [("memory", both, machine.host_bytes)]
    else:
        memories = [
            (f"the memory of {machine.device}", on_device, machine.device_bytes),
            ("the host's memory", on_host, machine.host_bytes),
        ]
    found = []
    for name, asked, there in memories:
        stage = max(asked, key=asked.__getitem__)
        if asked[stage] > there:
            found.append(
                f"the stage {stage!r} needs {gigabytes(asked[stage])} of {name}, and there are {gigabytes(there)}"
            )
    return found


def shortages(options: Options, needs_in: Callable[[Options], list[Need]], machine: Machine) -> list[str]:
    """Return in words what of a job will not fit into the memory of a machine, and what would; nothing where all does.

    `needs_in` says what such jobs need.
    """
    if not (found := lacking(needs_in(options), machine)):
        return []
    leaner: Iterable[tuple[str, Any]] = _leaner(options) if isinstance(options, JobOptions) else _without(options)
    fits = next((words for words, asked in leaner if not lacking(needs_in(asked), machine)), "")
    would = f"it would fit with {fits}" if fits else "no option helps: take a smaller model, or more memory"
    return [*(f"it does not fit: {one}" for one in found), would]


def _without(options: Any) -> Iterator[tuple[str, Any]]:
    """Yield the job of another network without recovery, with the words that ask for it."""
    if options.recovery.mode != "none":
        yield "--recover none", replace(options, recovery=replace(options.recovery, mode="none"))


def _leaner(options: JobOptions) -> Iterator[tuple[str, JobOptions]]:
    """Yield jobs that need less memory, those that give up least first, with the words that ask for it."""
    recovery, text = options.recovery, options.calibration
    fewer = replace(text, train_sequences=max(1, text.train_sequences // 4))
    few = f"--calib-sequences {fewer.train_sequences}"
    least = replace(options, recovery=replace(recovery, mode="none"))
    none = "" if recovery.mode == "none" else "--recover none "
    if none:
        again = replace(recovery, checkpoint_activations=True)
        yield "--recover-checkpoint-activations", replace(options, recovery=again)
        states = replace(again, has_8bit_states=True)
        yield "--recover-checkpoint-activations --recover-8bit-states", replace(options, recovery=states)
        lora = replace(options, recovery=replace(again, mode="lora"))
        yield "--recover lora --recover-checkpoint-activations", lora
    yield few, replace(options, calibration=fewer)
    if none:
        yield none.strip(), least
    yield f"{none}{few}", replace(least, calibration=fewer)
    yield f"{none}{few} --method flap", replace(least, calibration=fewer, method="flap")
