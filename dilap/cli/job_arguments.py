"""Arguments of the commands that prune, and the job that they ask for."""

import argparse
import inspect
from typing import TYPE_CHECKING

from dilap.cli import arguments
from dilap.core.workload import Budget
from dilap.profilers.devices.device import Device
from dilap.search.layouts import LAYOUTS

if TYPE_CHECKING:
    from dilap.job.options import JobOptions


def add_search(made: argparse.ArgumentParser) -> None:
    from dilap.job.options import RANGES
    from dilap.search.library import LibraryOptions
    from dilap.search.task import SearchOptions

    search, library = SearchOptions(), LibraryOptions()
    group = made.add_argument_group("the search")
    group.add_argument("--layout", choices=LAYOUTS, help="restrict plans to what more runtimes load; see the README")
    group.add_argument(
        "--table", metavar="FILE", help="a latency table; by default the one in tables/ that fits, measured first"
    )
    group.add_argument("--importance", choices=["wanda", "obs"], default=library.order, help=f"({library.order})")
    group.add_argument(
        "--step",
        type=arguments.share,
        default=search.step,
        metavar="SHARE",
        help=f"of the dense latency between two linearisations ({search.step:g})",
    )
    group.add_argument(
        "--evaluations",
        type=arguments.whole(*RANGES["evaluations"]),
        default=search.evaluations,
        metavar="N",
        help=f"({search.evaluations})",
    )
    group.add_argument(
        "--seed", type=arguments.whole(*RANGES["seed"]), default=search.seed, metavar="N", help=f"({search.seed})"
    )


def add_text_and_recovery(
    made: argparse.ArgumentParser, *, mode: str = "none", steps: int | None = None, refit: str = "none"
) -> None:
    """Add the options about text and recovery; `mode`, `steps` and `refit` are this command's defaults."""
    from dilap.job.options import RANGES
    from dilap.models.distil import RecoveryOptions
    from dilap.models.text import CalibrationOptions

    text, steps = CalibrationOptions(), steps or RecoveryOptions().steps
    group = made.add_argument_group("text and recovery")
    group.add_argument(
        "--calib",
        default="self",
        help="self (sampled from the model), c4, wikitext2 or ptb (random windows, as in the papers), a file (.txt .md "
        ".json .jsonl .csv .tsv .parquet, .gz too) or a hub set (user/name or user/name:configuration)",
    )
    group.add_argument(
        "--calib-length",
        type=arguments.whole(*RANGES["calib_length"]),
        default=text.sequence_length,
        metavar="N",
        help=f"tokens a sequence ({text.sequence_length})",
    )
    group.add_argument(
        "--calib-sequences",
        type=arguments.whole(*RANGES["calib_sequences"]),
        default=text.train_sequences,
        metavar="N",
        help=f"sequences to calibrate on ({text.train_sequences}); {text.validation_sequences} more are held out",
    )
    group.add_argument(
        "--data-dir",
        metavar="DIR",
        help="where c4, wikitext2 and ptb lie: DIR/c4/train.jsonl.gz and so on; the hub by default",
    )
    group.add_argument(
        "--train-text",
        metavar="TEXT",
        help="for methods that train: an instruction set (yahma/alpaca-cleaned, a file with the columns "
        "instruction, input and output) or any other text; by default the calibration text",
    )
    group.add_argument(
        "--train-steps",
        type=arguments.whole(*RANGES["train_steps"]),
        metavar="N",
        help="batches that methods train on; by default as their settings say",
    )
    group.add_argument("--eval-text", default="python-docs", metavar="TEXT", help="scored, never searched on")
    group.add_argument(
        "--refit",
        choices=["none", "score", "use"],
        default=refit,
        help="refit the projections of any method's plan in closed form: to tell its KL, or in place of the method's "
        f"own values ({refit})",
    )
    group.add_argument("--recover", choices=["none", "lora", "full"], default=mode, help=f"({mode})")
    group.add_argument(
        "--recover-steps", type=arguments.whole(*RANGES["recover_steps"]), default=steps, metavar="N", help=f"({steps})"
    )


def job_options(
    given: argparse.Namespace,
    *,
    device: Device,
    budget: Budget,
    method: str = "dilap",
    settings: dict[str, str] | None = None,
) -> "JobOptions":
    """Return the job that the arguments ask for. Raises InvalidInput for impossible values."""
    from dilap.job import options  # importing torch takes seconds: bad input is refused first

    known = set(inspect.signature(options.job_options).parameters) - {"device", "budget", "method", "settings"}
    chosen = {name: value for name, value in vars(given).items() if name in known}
    return options.job_options(device=device, budget=budget, method=method, settings=settings or {}, **chosen)
