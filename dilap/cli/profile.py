"""dilap-profile: measure a latency table on a device, or say what can be used here."""

import argparse
import json
import sys

from dilap.cli import arguments, console, costs, doctor
from dilap.errors import InvalidInput

_EXAMPLES = """\
  dilap-profile --doctor
  dilap-profile --device host_cpu --model smollm2-135m --phase decode --context 256
  dilap-profile --device host_cpu --model ./my-llama --phase prefill --precision q4_0 --out tables/prefill.jsonl
A killed measurement goes on where it stopped when the same command is given again."""


def _parser() -> argparse.ArgumentParser:
    made = arguments.parser("Measure a latency table: what every width of every sublayer costs on a device.", _EXAMPLES)
    made.add_argument("--device", help="host_cpu, jetson_gpu, jetson_cpu, snapdragon_x or s23")
    made.add_argument(
        "--doctor", action="store_true", help="say which runtimes and devices are usable, and mend what is not"
    )
    arguments.add_model(made)
    made.add_argument("--out", metavar="FILE", help="the table; by default where dilap-prune looks for it, in tables/")
    made.add_argument("--json", action="store_true", help="print the fitted costs as JSON")
    arguments.add_devices(made)
    arguments.add_workload(made)
    return made


def _command() -> int:
    given = _parser().parse_args()
    if given.doctor:
        checks = doctor.examine()
        print(json.dumps([check.__dict__ for check in checks], indent=1) if given.json else doctor.report(checks))
        return 0
    if given.device is None:
        raise InvalidInput("name a device with --device, or ask --doctor what is usable")
    device = arguments.device_of(given, given.device)
    backend = arguments.backend_of(given, device=device)
    workload = arguments.workload_of(given, device=device, backend=backend)
    from dilap.anatomy import architecture_of  # torch and transformers: seconds that bad input should not cost
    from dilap.cli.bench import Bench
    from dilap.profilers.search_space import describe
    from dilap.source import load

    screen = console.Console()
    bench = Bench.of(device, backend, workload, screen, force=given.force)
    architecture = architecture_of(load(given.model).model)
    if reason := bench.backend.capabilities(architecture.family, precision=workload.precision).unsupported:
        raise InvalidInput(reason)
    screen.say(f"{given.model}: {describe(architecture)}\n{workload.describe()} on {given.device}, {backend}")
    path = arguments.new_path(given.out) if given.out else bench.table_path(given.model, architecture)
    table = bench.build_table(architecture, path)
    model = table.model()
    if given.json:
        json.dump(costs.document(model) | {"table": str(path)}, sys.stdout, indent=1)
    else:
        print(costs.text(model))
        print(f"\nthe table is in {path}")
    return 0


def main() -> None:
    console.run(_command)
