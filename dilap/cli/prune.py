"""dilap-prune: a model, a device and a latency budget in; a smaller model that keeps the budget out."""

import argparse
import json
import sys
from pathlib import Path

from dilap.cli import arguments, console, result
from dilap.errors import InvalidInput
from dilap.methods import METHODS
from dilap.profilers.devices import DEVICES
from dilap.profilers.search_space import LAYOUTS
from dilap.types import Budget

_EXAMPLES = """\
  dilap-prune --target host_cpu --budget 70%
  dilap-prune --target host_cpu --budget 40ms --model ./my-llama --precision q4_0 --out runs/forty
  dilap-prune --target host_cpu --budget 1.4x --table tables/here.jsonl --calib corpus.jsonl --recover lora
  dilap-prune --target jetson_cpu --budget 40ms                 # where it is stands in devices.toml
  dilap-prune --target s23 --budget 60% --estimate              # no device: published numbers stand for it
A killed run goes on where it stopped when the same command is given again."""


def _parser() -> argparse.ArgumentParser:
    made = arguments.parser(
        "Prune a model to a latency budget that is measured on the device, and prove it.", _EXAMPLES
    )
    made.add_argument("--target", required=True, help=f"the device: {', '.join(DEVICES)}; NAME:2 for the second")
    made.add_argument("--budget", required=True, help="40ms, 70%% (of the dense latency) or 1.4x (faster than dense)")
    made.add_argument("--stat", choices=["p50", "p90"], default="p50", help="the latency the budget is about (p50)")
    arguments.add_model(made)
    made.add_argument("--out", metavar="DIR", help="the run's folder (runs/MODEL-TARGET-BUDGET)")
    made.add_argument("--json", action="store_true", help="print the result as JSON")
    arguments.add_devices(made)
    arguments.add_workload(made)
    _add_search(made)
    _add_text_and_recovery(made)
    return made


def _add_search(made: argparse.ArgumentParser) -> None:
    from dilap.library import LibraryOptions
    from dilap.methods.task import SearchOptions

    search, library = SearchOptions(), LibraryOptions()
    group = made.add_argument_group("the search")
    group.add_argument("--method", default="dilap", help=f"how widths are chosen: {', '.join(METHODS)} (dilap)")
    group.add_argument("--layout", choices=LAYOUTS, help="restrict plans to what more runtimes load; see the README")
    group.add_argument(
        "--table", metavar="FILE", help="a latency table; by default the one in tables/ that fits, measured first"
    )
    group.add_argument("--importance", choices=["wanda", "obs"], default=library.order, help=f"({library.order})")
    group.add_argument(
        "--step",
        type=float,
        default=search.step,
        metavar="SHARE",
        help=f"of the dense latency between two linearisations ({search.step:g})",
    )
    group.add_argument(
        "--evaluations", type=int, default=search.evaluations, metavar="N", help=f"({search.evaluations})"
    )
    group.add_argument("--seed", type=int, default=search.seed, metavar="N", help=f"({search.seed})")


def _add_text_and_recovery(made: argparse.ArgumentParser) -> None:
    from dilap.recover import RecoveryOptions
    from dilap.text import CalibrationOptions

    text, recovery = CalibrationOptions(), RecoveryOptions()
    group = made.add_argument_group("text and recovery")
    group.add_argument("--calib", default="self", help="self (sampled from the model), a text or jsonl file, a hub set")
    group.add_argument("--calib-length", type=int, default=text.sequence_length, metavar="N", help="tokens a sequence")
    group.add_argument("--eval-text", default="python-docs", metavar="TEXT", help="scored, never searched on")
    group.add_argument("--recover", choices=["none", "lora", "full"], default=recovery.mode, help=f"({recovery.mode})")
    group.add_argument("--recover-steps", type=int, default=recovery.steps, metavar="N", help=f"({recovery.steps})")


def _command() -> int:
    given = _parser().parse_args()
    budget = Budget.parse(given.budget, statistic=given.stat)
    device, *helpers = arguments.devices_of(given, given.target)
    backend = arguments.backend_of(given, device=device)
    workload = arguments.workload_of(given, device=device, backend=backend)
    from dilap.cli.job import prune  # torch and transformers: seconds that bad input should not cost
    from dilap.cli.stages import JobOptions
    from dilap.library import LibraryOptions
    from dilap.methods.task import SearchOptions
    from dilap.recover import RecoveryOptions
    from dilap.text import CalibrationOptions

    if not 0 < given.step <= 1:
        raise InvalidInput(f"--step is a share of the dense latency between 0 and 1, got {given.step:g}")
    for name in ("evaluations", "calib_length", "recover_steps"):
        if getattr(given, name) < (0 if name == "evaluations" else 1):
            raise InvalidInput(f"--{name.replace('_', '-')} is too small: {getattr(given, name)}")
    options = JobOptions(
        budget=budget,
        model=given.model,
        target=given.target,
        backend=backend,
        workload=workload,
        force=given.force,
        estimate=given.estimate,
        layout=given.layout,
        method=given.method,
        table=given.table,
        calibration=CalibrationOptions(source=given.calib, sequence_length=given.calib_length, seed=given.seed),
        evaluation_text=given.eval_text,
        library=LibraryOptions(order=given.importance),
        search=SearchOptions(step=given.step, evaluations=given.evaluations, seed=given.seed),
        recovery=RecoveryOptions(mode=given.recover, steps=given.recover_steps, seed=given.seed),
    )
    out = arguments.new_path(given.out) if given.out else _default_out(given.model, given.target, budget)
    done = prune(options, device=device, helpers=helpers, out=out, console=console.Console())
    if done is None:
        if given.json:
            json.dump({"status": "already met"}, sys.stdout)
        return 0
    if given.json:
        json.dump(result.summary(done) | {"out": str(out)}, sys.stdout, indent=1)
    else:
        print(f"{result.table(done)}\n\neverything is in {out}")
    return 1 if done.status == "missed" else 0


def _default_out(model: str, target: str, budget: Budget) -> Path:
    name = Path(model).name.removesuffix(".gguf")
    return Path("runs") / f"{name}-{target}-{str(budget).replace('%', 'pct')}"


def main() -> None:
    console.run(_command)
