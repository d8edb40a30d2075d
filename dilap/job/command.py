"""The command line that asks for the job of a finished result, for reports."""

import shlex
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from dilap.core.documents import value_at
from dilap.core.network_input import TokenInput
from dilap.core.workload import Budget
from dilap.job.network_options import ExampleOptions, NetworkOptions
from dilap.job.options import JobOptions
from dilap.job.precisions import AUTO
from dilap.job.result import PruneResult

# For every flag, where its value is in a job's options. A flag at the default of `JobOptions` is left out.
_FLAGS: Mapping[str, tuple[str, ...]] = {
    "--model": ("model",),
    "--merge-adapter": ("merge_adapter",),
    "--vocabulary": ("vocabulary",),
    "--compute": ("compute",),
    "--backend": ("backend",),
    "--phase": ("workload", "phase"),
    "--context": ("workload", "context"),
    "--prompt-tokens": ("workload", "prompt_tokens"),
    "--stat": ("budget", "statistic"),
    "--configuration": ("configuration",),
    "--layout": ("layout",),
    "--method": ("method",),
    "--table": ("table",),
    "--calib": ("calibration", "source"),
    "--calib-length": ("calibration", "sequence_length"),
    "--eval-text": ("evaluation_text",),
    "--importance": ("levels", "library", "order"),
    "--step": ("levels", "search", "step"),
    "--evaluations": ("levels", "search", "evaluations"),
    "--recover": ("recovery", "mode"),
    "--recover-tokens": ("recovery", "tokens"),
    "--recover-length": ("recovery", "sequence_length"),
    "--recover-batch": ("recovery", "batch_tokens"),
    "--recover-next-token": ("recovery", "next_token"),
    "--recover-hidden": ("recovery", "hidden"),
    "--recover-evaluate": ("recovery", "evaluate_every"),
    "--tracker": ("recovery", "tracker"),
    "--seed": ("seed",),
}
_NETWORK_FLAGS: Mapping[str, tuple[str, ...]] = {
    "--model": ("model",),
    "--processor": ("processor",),
    "--weights": ("weights",),
    "--table": ("table",),
    "--backend": ("backend",),
    "--batch": ("workload", "batch"),
    "--stat": ("budget", "statistic"),
    "--configuration": ("configuration",),
    "--method": ("method",),
    "--calib": ("examples", "source"),
    "--recover": ("recovery", "mode"),
    "--seed": ("seed",),
}
_OF_THE_DEVICE = ("--backend",)  # its default depends on it, so it is always given


def command_line(result: PruneResult[Any]) -> str:
    """Return the `dilap-prune` command for the job of a result, which an earlier version may have written."""
    options, budget = result.options, result.budget
    words = ["dilap-prune", "--target", result.target]
    asked = ["--ratio", f"{budget.ratio:g}"] if budget.ratio is not None else ["--budget", str(budget)]
    words += asked
    flags, defaults = _FLAGS, asdict(JobOptions(budget=Budget(fraction=1.0)))
    if result.is_of_network:
        default = NetworkOptions(budget=Budget(fraction=1.0), model="", examples=ExampleOptions(source=""))
        flags, defaults = _NETWORK_FLAGS, asdict(default)
        words += _shown(options, is_of_texts=isinstance(result.dense.artifact.input, TokenInput))
    for flag, path in flags.items():
        value = value_at(options, *path)
        is_default = flag not in _OF_THE_DEVICE and value == value_at(defaults, *path)
        if value is not None and not is_default:
            words += [flag, str(value)]
    words += ["--precision", _precision(options)]
    tried = value_at(options, "threads_tried") or [value_at(options, "workload", "threads")]
    if isinstance(tried, list | tuple) and len(tried) == 1 and tried[0] is not None:  # several are the default
        words += ["--threads", str(tried[0])]
    if value_at(options, "recovery", "mode") not in (None, "none"):
        words += _of_recovery(options, value_at(defaults, "recovery"))
    words += [f"--{name}" for name in ("force", "estimate") if options.get(name)]
    settings = value_at(options, "settings")
    for name, value in settings.items() if isinstance(settings, Mapping) else ():
        words += ["--set", f"{name}={value}"]
    return shlex.join(words)


def _of_recovery(options: Mapping[str, Any], defaults: Any) -> list[str]:
    """Return the words about a recovery whose flags are not simply values; an earlier version had steps alone."""
    words = ["--recover-steps", str(value_at(options, "recovery", "steps"))]
    if data := value_at(options, "recovery", "data"):
        words += ["--recover-data", *map(str, data)]
    rate = f"{value_at(options, 'recovery', 'mode')}_rate"
    if (own := value_at(options, "recovery", rate)) not in (None, defaults.get(rate)):
        words += ["--recover-rate", f"{own:g}"]
    if value_at(options, "recovery", "checkpoint_activations"):
        words.append("--recover-checkpoint-activations")
    if value_at(options, "recovery", "has_8bit_states"):
        words.append("--recover-8bit-states")
    return words


def _shown(options: Mapping[str, Any], *, is_of_texts: bool) -> list[str]:
    """Return the words that ask for what a network that is no decoder takes and is scored on, where that was asked."""
    words, found, scored = list[str](), value_at(options, "input"), value_at(options, "examples", "evaluation")
    if found is not None and is_of_texts:
        words += ["--seq-length", str(value_at(found, "length"))]
    elif found is not None:
        words += ["--input", "x".join(str(value_at(found, side)) for side in ("channels", "height", "width"))]
    if scored is not None:
        words += ["--eval-text" if is_of_texts else "--eval-images", str(scored)]
    return words


def _precision(options: Mapping[str, Any]) -> str:
    """Return what `--precision` asks for; an earlier version knew no precisions of parts."""
    parts = options.get("precisions", ())
    return AUTO if parts is None else ",".join(parts) or str(value_at(options, "workload", "precision"))
