"""Arguments of the commands that prune, and the job that they ask for."""

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING

from dilap.cli import arguments
from dilap.core.bounds import MAX_BATCH, MAX_TOKENS
from dilap.core.workload import Budget
from dilap.job.options import RANGES, JobOptions
from dilap.models.options import CalibrationOptions
from dilap.models.recovery.options import RecoveryOptions
from dilap.profilers.devices.device import Device
from dilap.search.layouts import LAYOUTS
from dilap.search.options import LibraryOptions, SearchOptions

if TYPE_CHECKING:
    from dilap.job.network_options import NetworkOptions


def add_search(made: argparse.ArgumentParser) -> None:
    search, library = SearchOptions(), LibraryOptions()
    group = made.add_argument_group("the search")
    group.add_argument(
        "--layout",
        choices=LAYOUTS,
        help="free: any widths; portable: those that more runtimes load; uniform: equal in all layers (the freest that "
        "the runtime loads)",
    )
    group.add_argument(
        "--table", metavar="FILE", help="a latency table; by default the one in tables/ that fits, measured first"
    )
    group.add_argument(
        "--importance",
        choices=["wanda", "obs"],
        default=library.order,
        help="rank units by weight times activation, or by what the refitted layer loses without them "
        f"({library.order})",
    )
    group.add_argument(
        "--step",
        type=arguments.share,
        default=search.step,
        metavar="SHARE",
        help=f"of the dense latency between two linearisations, above 0 and at most 1 ({search.step:g})",
    )
    group.add_argument(
        "--evaluations",
        type=arguments.whole(*RANGES["evaluations"]),
        default=search.evaluations,
        metavar="N",
        help=f"networks that are tried on the real KL at the end, {_range('evaluations')} ({search.evaluations})",
    )
    group.add_argument(
        "--seed",
        type=arguments.whole(*RANGES["seed"]),
        default=search.seed,
        metavar="N",
        help=f"of all that is random, {_range('seed')} ({search.seed})",
    )


def add_text_and_recovery(
    made: argparse.ArgumentParser, *, mode: str = "none", steps: int | None = None, refit: str | None = "none"
) -> None:
    """Add the options about text and recovery; `mode`, `steps` and `refit` are this command's defaults.

    Without a default of `refit`, the command sets one when it knows the model.
    """
    text, recovery = CalibrationOptions(), RecoveryOptions()
    steps = steps or recovery.steps
    group = made.add_argument_group("text and recovery")
    group.add_argument(
        "--calib",
        default="self",
        metavar="TEXT",
        help="self (sampled from the model), c4, wikitext2 or ptb (random windows, as in the papers), a file (.txt .md "
        ".json .jsonl .csv .tsv .parquet, .gz too) or a hub set (user/name or user/name:configuration); for an image "
        "network photographs, and always given for one and for an encoder of texts (self)",
    )
    group.add_argument(
        "--calib-length",
        type=arguments.whole(*RANGES["calib_length"]),
        default=text.sequence_length,
        metavar="N",
        help=f"tokens of a sequence of it, {_range('calib_length')} ({text.sequence_length})",
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
    group.add_argument(
        "--refit",
        choices=["none", "score", "use"],
        default=refit,
        help="refit the projections of any method's plan in closed form: to tell its KL, or in place of the method's "
        f"own values ({refit or 'score'})",
    )
    group.add_argument(
        "--eval-text",
        metavar="TEXT",
        help="a file or hub set on which the models are scored, never searched on (python-docs; of an encoder of "
        "texts, half of --calib)",
    )
    group.add_argument(
        "--recover",
        choices=["none", "lora", "full"],
        default=mode,
        help=f"train on the dense model's answers afterwards: adapters, or whole layers ({mode})",
    )
    group.add_argument(
        "--recover-steps",
        type=arguments.whole(*RANGES["recover_steps"]),
        default=steps,
        metavar="N",
        help=f"steps of {recovery.batch_tokens} tokens, {_range('recover_steps')} ({steps})",
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
        default=(),
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
    group.add_argument(
        "--recover-8bit-states", action="store_true", help="AdamW's states in 8 bits: a quarter of their memory"
    )
    group.add_argument("--tracker", metavar="NAME", help="one of accelerate's: tensorboard, wandb, mlflow and so on")


def _range(name: str) -> str:
    least, most = RANGES[name]
    return f"{least} to {most:,}"


def add_networks(made: argparse.ArgumentParser) -> None:
    """Add the options about pruning networks that are no decoders, which also take --calib, and --recover full."""
    add_network_inputs(made).add_argument(
        "--eval-images",
        metavar="PHOTOS",
        help="scored, never searched on: a folder, with a folder for each class or a labels.csv for top-1 "
        "(half of --calib)",
    )


def add_network_inputs(made: argparse.ArgumentParser) -> "argparse._ArgumentGroup":
    """Add the options about what networks take that are no decoders."""
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
    return group


def asked_job(
    given: argparse.Namespace, *, device: Device, budget: Budget, method: str | None, settings: dict[str, str]
) -> "JobOptions | NetworkOptions":
    """Return the job that the arguments ask for, of whatever kind the model is.

    Without a `method` it has the default one of that kind. Raises InvalidInput for impossible values.
    """
    from dilap.job import asked  # importing torch takes seconds: bad input is refused first

    chosen = _chosen(given, asked.OPTIONS) | {"method": method, "settings": settings}
    return asked.asked_job(device=device, budget=budget, model=given.model, given=chosen)


def timed_job(given: argparse.Namespace, *, device: Device) -> "JobOptions | NetworkOptions":
    """Return the job whose latency table the arguments ask for. Raises InvalidInput for impossible values."""
    from dilap.job import asked  # importing torch takes seconds: bad input is refused first

    return asked.timed_job(device=device, model=given.model, given=_chosen(given, asked.OPTIONS))


def _chosen(given: argparse.Namespace, options: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in vars(given).items() if name in options}
