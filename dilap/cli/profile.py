"""dilap-profile: measure a latency table on a device, or say what can be used here."""

import argparse
from collections.abc import Iterable
from dataclasses import asdict

from dilap.cli import arguments, console, costs
from dilap.cli.job_arguments import add_network_inputs, timed_job
from dilap.core.errors import InvalidInput
from dilap.profilers.devices import doctor

_EXAMPLES = """\
  dilap-profile --doctor
  dilap-profile --device host_cpu --model smollm2-135m --phase decode --context 256
  dilap-profile --list-devices
  dilap-profile --check jetson_cpu
  dilap-profile --device s23 --backend llamacpp --runner build-android/bin/llama-bench
  dilap-profile --device snapdragon_x --estimate
  dilap-profile --device host_cpu --model ./my-llama --phase prefill --precision q4_0 --out tables/prefill.jsonl
  dilap-profile --device host_cpu --precision q4_0,q8_0,f16
  dilap-profile --device host_cpu --backend onnxruntime --model efficientnet-lite0 --batch 8    # an image network
  dilap-profile --share tables/mine.jsonl --out mine-to-share.jsonl    # for others: nothing says whose machine it was
A killed measurement goes on where it stopped when the same command is given again."""


def _parser() -> argparse.ArgumentParser:
    made = arguments.parser("Measure a latency table: what every width of every sublayer costs on a device.", _EXAMPLES)
    arguments.add_target(made)
    made.add_argument("--list-devices", action="store_true", help="the devices that are known, and where yours are")
    made.add_argument(
        "--check",
        metavar="DEVICE",
        help="look at a device step by step, and say what mends what is wrong; exit code 1 where something is",
    )
    made.add_argument(
        "--doctor", action="store_true", help="say which runtimes and devices are usable, and mend what is not"
    )
    made.add_argument(
        "--share",
        metavar="TABLE",
        help="copy a measured table into --out without serial number, kernel, folders and time of day, for others",
    )
    arguments.add_model(made)
    made.add_argument("--out", metavar="FILE", help="the table; by default where dilap-prune looks for it, in tables/")
    made.add_argument("--json", action="store_true", help="print the fitted costs as JSON")
    arguments.add_devices(made)
    arguments.add_workload(made)
    add_network_inputs(made)
    return made


def _command() -> int:
    given = _parser().parse_args()
    if given.doctor:
        return _show(doctor.examine(arguments.registry_of(given)), as_json=given.json)
    if given.list_devices:
        return _show(doctor.list_devices(arguments.registry_of(given)), as_json=given.json)
    if given.check is not None:
        devices = arguments.devices_of(given, given.check)
        return _show(doctor.check_devices(devices, file=arguments.file_of(given)), as_json=given.json)
    if given.share is not None:
        from dilap.profilers.tables import sharing  # importing scipy takes a second, and not every command needs it

        made = sharing.share(arguments.new_path(given.share), arguments.new_path(given.out) if given.out else None)
        console.show_json({"shared": str(made)}) if given.json else console.show(f"what may be shared is in {made}")
        return 0
    if given.target is None:
        raise InvalidInput("name a device with --device, or ask --doctor what is usable")
    if given.estimate and given.out:
        raise InvalidInput("--estimate measures nothing, so it writes no table: leave --out away")
    devices = arguments.devices_of(given, given.target)
    asked = timed_job(given, device=devices[0])
    from dilap.job.asked import profile  # importing torch takes seconds: bad input is refused first

    out = arguments.new_path(given.out) if given.out else None
    done = profile(asked, devices=devices, out=out, progress=console.Console())
    costs.show(done, as_json=given.json)
    return 0


def _show(checks: Iterable[doctor.Check], *, as_json: bool) -> int:
    """Print checks as they are made, and return the exit code: 1 where a check of a device failed."""
    found = []
    for check in checks:
        found.append(check)
        if not as_json:
            console.show("\n".join(doctor.lines(check)))
    if as_json:
        console.show_json([asdict(check) for check in found])
    return int(any(check.kind == "check" and not check.usable for check in found))


def main() -> None:
    console.run(_command)


if __name__ == "__main__":
    main()
