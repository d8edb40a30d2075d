"""Arguments of the commands that prune, and the job that they ask for."""

import argparse
import inspect
from typing import TYPE_CHECKING

from dilap.cli import arguments
from dilap.core.bounds import MAX_BATCH, MAX_TOKENS
from dilap.core.errors import InvalidInput
from dilap.core.workload import Budget
from dilap.job.networks import in_words, is_network
from dilap.profilers.devices.device import Device
from dilap.search.layouts import LAYOUTS

if TYPE_CHECKING:
    from dilap.job.network_options import NetworkOptions
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
    from dilap.models.distil import RecoveryOptions
    from dilap.models.text import CalibrationOptions

    text, steps = CalibrationOptions(), steps or RecoveryOptions().steps
    group = made.add_argument_group("text and recovery")
    group.add_argument(
        "--calib",
        default="self",
        help="self (sampled from the model), a file (.txt .md .json .jsonl .csv .tsv .parquet, .gz too) or a hub set; "
        "photographs for an image network, and always given for one and for an encoder of texts",
    )
    group.add_argument(
        "--calib-length",
        type=arguments.whole(*RANGES["calib_length"]),
        default=text.sequence_length,
        metavar="N",
        help="tokens a sequence",
    )
    group.add_argument(
        "--eval-text",
        metavar="TEXT",
        help="scored, never searched on (python-docs; of an encoder of texts, half of --calib)",
    )
    group.add_argument("--recover", choices=["none", "lora", "full"], default=mode, help=f"({mode})")
    group.add_argument(
        "--recover-steps", type=arguments.whole(*RANGES["recover_steps"]), default=steps, metavar="N", help=f"({steps})"
    )


def add_networks(made: argparse.ArgumentParser) -> None:
    """Add the options about networks that are no decoders, which also take --calib, and --recover full."""
    group = made.add_argument_group("image networks and encoders of texts")
    group.add_argument("--input", dest="input_", metavar="CxHxW", help="3x224x224: needed for my_module:build")
    group.add_argument(
        "--processor", metavar="DIR", help="has preprocessor_config.json, which says how photographs become inputs"
    )
    group.add_argument("--weights", metavar="DIR", help="a checkpoint of what my_module:build returns")
    group.add_argument(
        "--batch", type=arguments.whole(1, MAX_BATCH), default=1, metavar="N", help="images or texts timed at once (1)"
    )
    group.add_argument(
        "--seq-length",
        type=arguments.whole(1, MAX_TOKENS),
        metavar="N",
        help="tokens that an encoder of texts takes of each (128)",
    )
    group.add_argument(
        "--eval-images",
        metavar="PHOTOS",
        help="scored, never searched on: a folder, with a folder for each class or a labels.csv for top-1 "
        "(half of --calib)",
    )


def asked_job(
    given: argparse.Namespace, *, device: Device, budget: Budget, method: str | None, settings: dict[str, str]
) -> "JobOptions | NetworkOptions":
    """Return the job that the arguments ask for, of whatever kind the model is.

    Without a `method` it has the default one of that kind. Raises InvalidInput for impossible values.
    """
    from dilap.job import asked  # importing torch takes seconds: bad input is refused first

    chosen = {name: value for name, value in vars(given).items() if name in asked.OPTIONS}
    return asked.asked_job(
        device=device, budget=budget, model=given.model, given=chosen | {"method": method, "settings": settings}
    )


def decoder_job(given: argparse.Namespace, *, device: Device, budget: Budget) -> "JobOptions":
    """Return the job of a decoder that the arguments ask for. Raises InvalidInput, also for another network."""
    if is_network(given.model):
        raise InvalidInput(f"this command knows decoders alone, and not {in_words(given.model)}; see dilap-prune")
    from dilap.job import options  # importing torch takes seconds: bad input is refused first

    known = set(inspect.signature(options.job_options).parameters) - {"device", "budget"}
    chosen = {name: value for name, value in vars(given).items() if name in known}
    return options.job_options(device=device, budget=budget, **chosen)
