"""dilap-prune: make a model smaller so that it keeps a latency budget on a device."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dilap.cli import arguments, console
from dilap.cli.job_arguments import add_search, add_text_and_recovery, job_options
from dilap.core.codec import encode
from dilap.core.errors import InvalidInput
from dilap.core.workload import Budget
from dilap.job import result
from dilap.job.outputs import home_of, name_of
from dilap.methods import METHODS
from dilap.profilers.devices.device import DEVICES, Device

if TYPE_CHECKING:
    from dilap.job.options import JobOptions

_EXAMPLES = """\
  dilap-prune --target host_cpu --budget 70%
  dilap-prune --target host_cpu --budget 40ms --model ./my-llama --precision q4_0 --out runs/forty
  dilap-prune --target host_cpu --budget 70% --method flap --set metric=WIFN
  dilap-prune --target host_cpu --ratio 0.2 --method my_module:MyMethod
  dilap-prune --pattern 2:4 --method sparsegpt --rebuild barber
  dilap-prune --target host_cpu --budget 1.4x --table tables/here.jsonl --calib corpus.jsonl --recover lora
  dilap-prune --target host_cpu --budget 60% --vocabulary needs.txt    # only the tokens of that text, and bytes
  dilap-prune --target jetson_cpu --budget 40ms                 # where it is stands in devices.toml
  dilap-prune --target s23 --budget 60% --estimate              # no device: published numbers stand for it
A killed run goes on where it stopped when the same command is given again."""


def _parser() -> argparse.ArgumentParser:
    made = arguments.parser(
        "Prune a model to a latency budget that is measured on the device, and prove it.", _EXAMPLES
    )
    made.add_argument(
        "--target", help=f"the device: {', '.join(DEVICES)}; NAME:2 for the second (needed unless --pattern)"
    )
    asked = made.add_mutually_exclusive_group(required=True)
    asked.add_argument("--budget", help="40ms, 70%% (of the dense latency) or 1.4x (faster than dense)")
    asked.add_argument(
        "--ratio", type=arguments.share, help="instead: the share of the decoder layers' weights to remove"
    )
    asked.add_argument("--pattern", help="instead: zeros inside matrices, 0.5 (a share), 2:4 or 4:8 (N of M kept)")
    made.add_argument("--stat", choices=["p50", "p90"], default="p50", help="the latency the budget is about (p50)")
    arguments.add_model(made)
    arguments.add_compute(made)
    made.add_argument("--out", metavar="DIR", help="the run's folder (runs/MODEL-TARGET-BUDGET)")
    made.add_argument("--json", action="store_true", help="print the result as JSON")
    made.add_argument("--dry-run", action="store_true", help="print memory and time of every stage, and do nothing")
    arguments.add_devices(made)
    arguments.add_workload(made)
    _add_method(made)
    _add_sparse(made)
    add_search(made)
    add_text_and_recovery(made)
    return made


def _add_method(made: argparse.ArgumentParser) -> None:
    group = made.add_argument_group("the method")
    group.add_argument(
        "--method",
        metavar="NAME",
        help=f"{', '.join(METHODS)}, or your own as module:attribute; see the README (dilap). "
        "With --pattern: magnitude, wanda, sparsegpt (wanda)",
    )
    group.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the method; repeat for more"
    )


def _add_sparse(made: argparse.ArgumentParser) -> None:
    group = made.add_argument_group("zeros inside matrices (--pattern)")
    group.add_argument(
        "--propagate", choices=["pruned", "dense"], default="pruned", help="what later layers see (pruned)"
    )
    group.add_argument("--rebuild", choices=["barber"], help="swap zeros block by block afterwards")
    group.add_argument("--granularity", choices=["block", "layer", "output1", "input1"], help="where swaps are made")
    group.add_argument("--threshold", type=arguments.share, metavar="SHARE", help="of the swaps that would help")


def _sparse(given: argparse.Namespace) -> int:
    """Run the job for a pattern of zeros, and return the exit code."""
    from dilap.job import sparsify as sparse_job  # importing torch takes seconds: bad input is refused first
    from dilap.models.text import CalibrationOptions

    options = sparse_job.SparseOptions(
        pattern=given.pattern,
        method=given.method or "wanda",
        settings=_settings(given.set),
        model=given.model,
        merge_adapter=given.merge_adapter,
        vocabulary=given.vocabulary,
        propagate=given.propagate,
        rebuild=given.rebuild is not None,
        granularity=given.granularity,
        threshold=given.threshold,
        calibration=CalibrationOptions(source=given.calib, sequence_length=given.calib_length, seed=given.seed),
        evaluation_text=given.eval_text,
        compute=given.compute,
    )
    pattern, method = given.pattern.replace(":", "of"), options.method.replace(":", ".")
    model = name_of(given.model, merge_adapter=given.merge_adapter, vocabulary=given.vocabulary)
    name = f"{model}-{method}-{pattern}{'-barber' * options.rebuild}"
    out = arguments.new_path(given.out) if given.out else home_of(given.model) / "runs" / name
    done = sparse_job.sparsify(options, out=out, progress=console.Console())
    if given.json:
        console.show_json(encode(done) | {"out": str(out)})
    else:
        console.show(f"{sparse_job.table(done)}\n\neverything is in {out}")
    return 0


def _command() -> int:
    given = _parser().parse_args()
    if given.pattern is not None:
        return _sparse(given)
    if given.target is None:
        raise InvalidInput("name the device with --target; dilap-profile --list-devices lists them")
    budget = _budget(given)
    devices = arguments.devices_of(given, given.target)
    options = options_of(given, device=devices[0])
    if given.dry_run:
        return _dry_run(options)
    from dilap.job.prune import prune  # importing torch takes seconds: bad input is refused first

    out = arguments.new_path(given.out) if given.out else _default_out(given, budget)
    done = prune(options, devices=devices, out=out, progress=console.Console())
    if done is None:
        if given.json:
            console.show_json({"status": "already met"})
        return 0
    if given.json:
        console.show_json(result.summary(done) | {"out": str(out)})
    else:
        console.show(f"{result.table(done)}\n\neverything is in {out}")
    return 1 if done.status in ("missed", "uncertain") else 0


def _dry_run(options: "JobOptions") -> int:
    """Print what the job would take, and return the exit code: 1 where something does not fit."""
    from dilap.job import forecast

    needs, machine = forecast.of_job(options)
    console.show(forecast.table(needs, machine))
    return 1 if forecast.lacking(needs, machine) else 0


def options_of(given: argparse.Namespace, *, device: Device) -> "JobOptions":
    """Return the job that the arguments ask for. Raises InvalidInput for impossible values."""
    return job_options(
        given, device=device, budget=_budget(given), method=given.method or "dilap", settings=_settings(given.set)
    )


def _budget(given: argparse.Namespace) -> Budget:
    return Budget.parse(given.budget, statistic=given.stat) if given.ratio is None else Budget.of_ratio(given.ratio)


def _settings(pairs: Sequence[str]) -> dict[str, str]:
    """Return settings that are given as `name=value`. Raises InvalidInput for anything else."""
    for pair in pairs:
        if "=" not in pair:
            raise InvalidInput(f"--set takes NAME=VALUE, got {pair!r}")
    return dict(pair.split("=", 1) for pair in pairs)


def _default_out(given: argparse.Namespace, budget: Budget) -> Path:
    name = name_of(given.model, merge_adapter=given.merge_adapter, vocabulary=given.vocabulary)
    method = "" if given.method in (None, "dilap") else f"-{given.method.replace(':', '.')}"
    amount = str(budget).replace("%", "pct").replace(" ", "")
    return home_of(given.model) / "runs" / f"{name}-{given.target}-{amount}{method}"


def main() -> None:
    console.run(_command)
