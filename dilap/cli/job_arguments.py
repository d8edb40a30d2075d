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


def add_text_and_recovery(made: argparse.ArgumentParser, *, mode: str = "none", steps: int | None = None) -> None:
    """Add the options about text and recovery; `mode` and `steps` are this command's defaults of the recovery."""
    from dilap.job.options import RANGES
    from dilap.models.recovery.options import RecoveryOptions
    from dilap.models.text import CalibrationOptions

    text, recovery = CalibrationOptions(), RecoveryOptions()
    steps = steps or recovery.steps
    group = made.add_argument_group("text and recovery")
    group.add_argument(
        "--calib",
        default="self",
        help="self (sampled from the model), a file (.txt .md .json .jsonl .csv .tsv .parquet, .gz too) or a hub set",
    )
    group.add_argument(
        "--calib-length",
        type=arguments.whole(*RANGES["calib_length"]),
        default=text.sequence_length,
        metavar="N",
        help="tokens a sequence",
    )
    group.add_argument("--eval-text", default="python-docs", metavar="TEXT", help="scored, never searched on")
    group.add_argument("--recover", choices=["none", "lora", "full"], default=mode, help=f"({mode})")
    group.add_argument(
        "--recover-steps", type=arguments.whole(*RANGES["recover_steps"]), default=steps, metavar="N", help=f"({steps})"
    )
    group.add_argument(
        "--recover-tokens",
        type=arguments.amount(*RANGES["recover_tokens"]),
        metavar="N",
        help="instead of the steps: 200M, 1.5B or 100000 tokens",
    )
    group.add_argument(
        "--recover-data",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="stream files or hub sets (user/name:configuration), packed; the calibration text otherwise",
    )
    group.add_argument(
        "--recover-length",
        type=arguments.whole(*RANGES["recover_length"]),
        default=recovery.sequence_length,
        metavar="N",
        help=f"tokens in a packed sequence ({recovery.sequence_length})",
    )
    group.add_argument(
        "--recover-batch",
        type=arguments.whole(*RANGES["recover_batch"]),
        default=recovery.batch_tokens,
        metavar="N",
        help=f"tokens in a step ({recovery.batch_tokens})",
    )
    group.add_argument(
        "--recover-rate",
        type=arguments.share,
        metavar="R",
        help=f"of a step, relative to the weights ({recovery.full_rate:g} for full, {recovery.lora_rate:g} for lora)",
    )
    group.add_argument(
        "--recover-next-token", type=arguments.share, default=0.0, metavar="SHARE", help="of its loss in the loss (0)"
    )
    group.add_argument(
        "--recover-hidden", type=float, default=0.0, metavar="WEIGHT", help="of the final hidden states' distance (0)"
    )
    group.add_argument(
        "--recover-evaluate",
        type=arguments.whole(*RANGES["recover_evaluate"]),
        default=0,
        metavar="N",
        help="score the validation split every N steps, and keep the best state (ten times in a run)",
    )
    group.add_argument(
        "--recover-checkpoint-activations", action="store_true", help="less memory, and a quarter more time"
    )
    group.add_argument("--tracker", metavar="NAME", help="one of accelerate's: tensorboard, wandb, mlflow and so on")


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
