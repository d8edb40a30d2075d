"""Arguments that several commands share."""

import argparse
from pathlib import Path

from dilap import __version__
from dilap.builtin import DEFAULT_MODEL
from dilap.errors import InvalidInput
from dilap.profilers import devices
from dilap.types import Workload

_EXIT_CODES = "exit codes: 0 done, 1 the result misses its budget, 2 bad input, 130 interrupted"


def parser(description: str, examples: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=description,
        epilog=f"examples:\n{examples}\n\n{_EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--version", action="version", version=f"dilap {__version__}")
    return made


def add_model(to: argparse.ArgumentParser) -> None:
    to.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        metavar="M",
        help=f"{DEFAULT_MODEL} (the default), a folder with config.json, a .gguf file or a hub id",
    )


def add_workload(to: argparse.ArgumentParser) -> None:
    defaults = Workload()
    group = to.add_argument_group("what is timed")
    group.add_argument("--backend", help="the runtime; the device's first one by default")
    group.add_argument("--phase", choices=["decode", "prefill"], default="decode", help="one token, or one prompt")
    group.add_argument(
        "--context", type=int, default=defaults.context, metavar="N", help=f"tokens before it ({defaults.context})"
    )
    group.add_argument(
        "--prompt-tokens",
        type=int,
        default=defaults.prompt_tokens,
        metavar="N",
        help=f"prompt length of a prefill ({defaults.prompt_tokens})",
    )
    group.add_argument("--precision", help="as it ships; by default what ships on the device in that runtime")
    group.add_argument("--threads", type=int, metavar="N", help="all physical cores by default")


def workload_of(arguments: argparse.Namespace, *, device: str, backend: str) -> Workload:
    """Raises InvalidInput for impossible numbers, Unavailable where the device is out of reach."""
    known = devices.get(device)
    threads = arguments.threads if arguments.threads is not None else known.default_threads()
    try:
        return Workload(
            phase=arguments.phase,
            prompt_tokens=arguments.prompt_tokens,
            context=arguments.context,
            precision=arguments.precision or known.default_precision(backend),
            threads=threads,
        )
    except ValueError as error:
        raise InvalidInput(str(error)) from error


def backend_of(arguments: argparse.Namespace, *, device: str) -> str:
    """The chosen runtime, or the device's first."""
    return str(arguments.backend or next(iter(devices.get(device).backends)))


def new_path(text: str) -> Path:
    return Path(text).expanduser()
