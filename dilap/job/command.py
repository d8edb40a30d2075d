"""The command line that asks for the job of a finished result, for reports."""

import shlex
from collections.abc import Mapping

from dilap.core.documents import value_at
from dilap.job.result import PruneResult

# For every flag, where its value is in a job's options, and its default. A flag at its default is left out.
_FLAGS: Mapping[str, tuple[tuple[str, ...], str | float | None]] = {
    "--model": (("model",), "smollm2-135m"),
    "--backend": (("backend",), None),
    "--phase": (("workload", "phase"), "decode"),
    "--context": (("workload", "context"), 256),
    "--prompt-tokens": (("workload", "prompt_tokens"), 128),
    "--precision": (("workload", "precision"), None),
    "--stat": (("budget", "statistic"), "p50"),
    "--configuration": (("configuration",), "fastest"),
    "--layout": (("layout",), None),
    "--method": (("method",), "dilap"),
    "--table": (("table",), None),
    "--calib": (("calibration", "source"), "self"),
    "--calib-length": (("calibration", "sequence_length"), 256),
    "--eval-text": (("evaluation_text",), "python-docs"),
    "--importance": (("levels", "library", "order"), "obs"),
    "--step": (("levels", "search", "step"), 0.1),
    "--evaluations": (("levels", "search", "evaluations"), 40),
    "--recover": (("recovery", "mode"), "none"),
    "--seed": (("seed",), 0),
}


def command_line(result: PruneResult) -> str:
    """Return the `dilap-prune` command for the job of a result, which an earlier version may have written."""
    options, budget = result.options, result.budget
    words = ["dilap-prune", "--target", result.target]
    asked = ["--ratio", f"{budget.ratio:g}"] if budget.ratio is not None else ["--budget", str(budget)]
    words += asked
    for flag, (path, default) in _FLAGS.items():
        value = value_at(options, *path)
        if value is not None and value != default:
            words += [flag, str(value)]
    tried = value_at(options, "threads_tried") or [value_at(options, "workload", "threads")]
    if isinstance(tried, list | tuple) and len(tried) == 1 and tried[0] is not None:  # several are the default
        words += ["--threads", str(tried[0])]
    if value_at(options, "recovery", "mode") not in (None, "none"):
        words += ["--recover-steps", str(value_at(options, "recovery", "steps"))]
    words += [f"--{name}" for name in ("force", "estimate") if options.get(name)]
    settings = value_at(options, "settings")
    for name, value in settings.items() if isinstance(settings, Mapping) else ():
        words += ["--set", f"{name}={value}"]
    return shlex.join(words)
