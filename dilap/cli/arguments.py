"""Arguments that several commands share."""

import argparse
import math
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from dilap import __version__, backends
from dilap.cli.console import EXIT_CODES
from dilap.core.bounds import MAX_THREADS, MAX_TOKENS
from dilap.core.documents import int64
from dilap.core.errors import InvalidInput
from dilap.core.printable import joined
from dilap.core.workload import Workload
from dilap.models.builtin import BUILTIN_MODELS, BUILTIN_NETWORKS, DEFAULT_MODEL
from dilap.profilers.devices.device import DEVICES, Device, Registry
from dilap.profilers.devices.locations import default_file, devices_file, known_devices
from dilap.profilers.instruments.runners import RUNNERS


def parser(description: str, examples: str, *, lists_runtimes: bool = True) -> argparse.ArgumentParser:
    """Return a parser that has --version, and examples, runtimes and exit codes in its help."""
    runtimes = f"{_runtimes()}\n\n" if lists_runtimes else ""
    made = argparse.ArgumentParser(
        description=description,
        epilog=f"examples:\n{examples}\n\n{runtimes}{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--version", action="version", version=f"dilap {__version__}")
    return made


def _runtimes() -> str:
    """Return what `--backend` and `--precision` take, a line a runtime."""
    lines = [f"  {name:12}  {' '.join(backends.get(name).precisions())}" for name in backends.BACKENDS]
    return joined(["runtimes and their precisions, the default of dilap-export first:", *lines])


class Several(argparse.Action):
    """An argument with several items, separated by spaces or commas, or given again and again; none counts twice."""

    def __init__(self, *, convert: Callable[[str], object] = str, **keywords: Any) -> None:
        super().__init__(nargs="+", **keywords)
        self._convert = convert

    def __call__(self, _: object, namespace: argparse.Namespace, values: Any, __: object = None) -> None:
        try:
            items = [self._convert(one) for value in values for one in value.replace(",", " ").split()]
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise argparse.ArgumentError(self, str(error)) from error
        before = getattr(namespace, self.dest)
        earlier = [] if before is self.default else before
        setattr(namespace, self.dest, list(dict.fromkeys([*earlier, *items])))


def whole(least: int, most: int) -> Callable[[str], int]:
    """Return an argument's type: whole numbers from `least` to `most`, so that no absurd number is computed with."""

    def parse(text: str) -> int:
        try:
            value = int64(text)
        except ValueError:
            value = most + 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"a whole number from {least:,} to {most:,}, got {text!r:.40}")
        return value

    return parse


def amount(least: int, most: int) -> Callable[[str], int]:
    """Return an argument's type: whole numbers from `least` to `most`, which may end in K, M or B."""

    def parse(text: str) -> int:
        factor = {"K": 1e3, "M": 1e6, "B": 1e9}.get(text[-1:].upper())
        try:
            value = float(text[:-1]) * factor if factor else float(text)
        except ValueError:
            value = math.nan
        if not (least <= value <= most and value == int(value)):
            raise argparse.ArgumentTypeError(f"a number from {least:,} to {most:,}, 200M for one, got {text!r:.40}")
        return int(value)

    return parse


def share(text: str) -> float:
    """Parse an argument that is a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"a share between 0 and 1, got {text!r:.40}")
    return value


def refuse_given(
    parser: argparse.ArgumentParser, given: argparse.Namespace, names: Collection[str], *, why: str
) -> None:
    """Raise InvalidInput where one of these arguments has another value than its default, so that none is in vain."""
    for action in parser._actions:
        if action.dest in names and getattr(given, action.dest) != action.default:
            raise InvalidInput(f"{action.option_strings[0]} {why}")


def add_model(to: argparse.ArgumentParser) -> None:
    """Add the model, which may stand alone or behind --model."""
    group = to.add_mutually_exclusive_group()
    words = (
        f"{', '.join([*BUILTIN_MODELS, *BUILTIN_NETWORKS])} (the first is the default), a folder with config.json, "
        "a run's folder, a .gguf file or a hub id; my_module:build for an image network"
    )
    group.add_argument("model", nargs="?", default=argparse.SUPPRESS, metavar="MODEL", help=words)
    group.add_argument("--model", default=DEFAULT_MODEL, metavar="MODEL", help="the same, behind its name")
    add_changes(to)


def add_target(to: argparse.ArgumentParser, *, words: str = "", **options: Any) -> None:
    """Add the device, which --target and --device both name."""
    names = f"{', '.join(DEVICES)}; NAME:2 is the second of a kind in devices.toml{words}"
    to.add_argument("--target", "--device", dest="target", metavar="DEVICE", help=names, **options)


def add_changes(to: argparse.ArgumentParser) -> None:
    """Add the options that change a model when it is loaded."""
    to.add_argument(
        "--merge-adapter", metavar="DIR", help="the folder of a LoRA adapter that is merged into the model first (peft)"
    )
    to.add_argument(
        "--vocabulary",
        metavar="TEXT",
        help="keep only the tokens that this text needs (a file or hub set, like --eval-text), and all bytes",
    )


def add_compute(to: argparse.ArgumentParser) -> None:
    """Add the option that says what torch computes on."""
    to.add_argument(
        "--compute",
        default="auto",
        metavar="WHERE",
        help="what torch computes on: cpu, cuda, cuda:1, xpu, mps; auto is the accelerator if there is one (auto)",
    )


def add_workload(to: argparse.ArgumentParser) -> None:
    defaults = Workload()
    group = to.add_argument_group("what is timed")
    group.add_argument(
        "--backend", metavar="RUNTIME", help=f"{', '.join(backends.BACKENDS)} (the first that the device has)"
    )
    group.add_argument(
        "--phase", choices=["decode", "prefill"], default="decode", help="one token, or one prompt (decode)"
    )
    group.add_argument(
        "--context",
        type=whole(1, MAX_TOKENS),
        default=defaults.context,
        metavar="N",
        help=f"tokens before it ({defaults.context})",
    )
    group.add_argument(
        "--prompt-tokens",
        type=whole(1, MAX_TOKENS),
        default=defaults.prompt_tokens,
        metavar="N",
        help=f"prompt length of a prefill ({defaults.prompt_tokens})",
    )
    group.add_argument(
        "--precision",
        default="auto",
        metavar="FORMATS",
        help="auto: every part in the best one for the budget, percents are of the dense model as it ships on the "
        "device; q4_0: all in one; q4_0,q8_0,f16: what may be mixed (auto)",
    )
    group.add_argument(
        "--threads", type=whole(1, MAX_THREADS), metavar="N", help="by default all physical cores and fewer are tried"
    )
    group.add_argument(
        "--configuration",
        choices=["fastest", "plain"],
        default="fastest",
        help="of the runtime: try its switches and threads on the dense model first, or take its defaults (fastest)",
    )


def add_devices(to: argparse.ArgumentParser) -> None:
    """Add the options that say where the device is, and --estimate, which needs no device."""
    group = add_device_access(to)
    group.add_argument(
        "--estimate",
        action="store_true",
        help="ask no device: its published numbers stand for it, and everything is marked estimated and has a range",
    )


def add_device_access(to: argparse.ArgumentParser) -> "argparse._ArgumentGroup":
    group = to.add_argument_group("the device")
    group.add_argument(
        "--devices",
        metavar="FILE",
        help=f"where your devices are; $DILAP_DEVICES or {default_file()} by default",
    )
    group.add_argument(
        "--runner", metavar="PATH", help=f"the timing program of a device without Python: {', '.join(RUNNERS)}"
    )
    group.add_argument("--force", action="store_true", help="measure a device in an unfit state, and say so")
    return group


def file_of(arguments: argparse.Namespace) -> Path:
    """Return the file that says where the user's devices are; it may be missing."""
    return devices_file(new_path(arguments.devices) if arguments.devices else None)


def registry_of(arguments: argparse.Namespace) -> Registry:
    """Return the user's devices, or only the presets where there is no file of devices. Raises InvalidInput."""
    return known_devices(new_path(arguments.devices) if arguments.devices else None)


def devices_of(arguments: argparse.Namespace, name: str) -> tuple[Device, ...]:
    """Return the devices called `name` with the runner that was given; the first is the target. Raises InvalidInput."""
    return tuple(_with_runner(device, arguments.runner) for device in registry_of(arguments).group(name))


def _with_runner(device: Device, runner: str | None) -> Device:
    if runner is None:
        return device
    if device.location is None or device.location.adb is None:
        raise InvalidInput(f"--runner is for devices that are reached over adb, {device.label} is none")
    return replace(device, location=replace(device.location, runner=runner))


def new_path(text: str) -> Path:
    return Path(text).expanduser()
