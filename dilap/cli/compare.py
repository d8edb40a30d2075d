"""dilap-compare: compare pruning methods at the same measured latency, before and after the same recovery."""

import argparse
from collections.abc import Mapping, Sequence

from dilap import methods
from dilap.cli import arguments, console
from dilap.cli.console import Console
from dilap.cli.job_arguments import add_networks, add_search, add_text_and_recovery, asked_job
from dilap.core.errors import InvalidInput
from dilap.core.workload import Budget
from dilap.job import comparison
from dilap.job.networks import is_network
from dilap.job.options import CommonOptions
from dilap.job.outputs import home_of, name_of
from dilap.job.shards import Shard
from dilap.methods import METHODS, NETWORK_METHODS

_EXAMPLES = """\
  dilap-compare --target host_cpu --budget 85% 70% 55% --methods all
  dilap-compare --target host_cpu --ratio 0.3 0.5 0.8 --methods dilap magnitude --keep-models
  dilap-compare --target host_cpu --budget 70% --methods dilap flap sleb my_module:MyMethod --recover lora
  dilap-compare --target host_cpu --budget 70% --methods flap loraprune --set flap.metric=WIFN --set loraprune.steps=50
  dilap-compare --target host_cpu --budget 70% --model efficientnet-lite0 --calib photos/    # an image network
  dilap-compare --target host_cpu --budget 70% --shard 2/4    # a quarter of it; the command without puts all together
  dilap-compare --target host_cpu --budget 85% 70% --dry-run        # memory and time of every method
  dilap-compare --list-methods
A killed comparison goes on where it stopped when the same command is given again; failed methods are tried again."""


def _parser() -> argparse.ArgumentParser:
    made = arguments.parser(
        "Prune with several methods to the same measured latency and compare what is left.", _EXAMPLES
    )
    arguments.add_target(made, required=True)
    made.add_argument(
        "--budget",
        action=arguments.Several,
        default=[],
        metavar="B",
        help="40ms, 70%% (of dense) or 1.4x, several (needed, or --ratio)",
    )
    made.add_argument(
        "--ratio",
        action=arguments.Several,
        convert=arguments.share,
        default=[],
        metavar="R",
        help="also, or instead: shares of the weights to remove",
    )
    made.add_argument("--stat", choices=["p50", "p90"], default="p50", help="the latency the budgets are about (p50)")
    made.add_argument(
        "--methods",
        action=arguments.Several,
        default=["all"],
        metavar="NAME",
        help=f"all, or some of {', '.join(METHODS)}, or your own as module:attribute (all); of other networks: "
        f"{', '.join(NETWORK_METHODS)}",
    )
    arguments.add_model(made)
    arguments.add_compute(made)
    made.add_argument("--out", metavar="DIR", help="the comparison's folder (runs/compare-MODEL-TARGET)")
    made.add_argument(
        "--set", action="append", default=[], metavar="METHOD.NAME=VALUE", help="a setting of a method; repeat for more"
    )
    made.add_argument("--list-methods", action=_ListMethods, nargs=0, help="what they do, and their sources")
    made.add_argument("--keep-models", action="store_true", help="keep every checkpoint and artifact")
    made.add_argument(
        "--shard",
        metavar="K/N",
        help="only the K-th of N parts, beside --out; without, what parts have done is taken over",
    )
    made.add_argument("--json", action="store_true", help="print compare.json")
    made.add_argument("--dry-run", action="store_true", help="print memory and time of every method, and do nothing")
    arguments.add_devices(made)
    arguments.add_workload(made)
    add_search(made)
    add_text_and_recovery(made, mode="full", steps=16, refit=None)
    add_networks(made)
    return made


class _ListMethods(argparse.Action):
    """An option that prints the methods and exits, like --version."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        width = max(map(len, METHODS))
        lines = [f"{name:{width}}  {methods.SOURCES[name]}" for name in METHODS]
        lines += ["", "of image networks:"]
        lines += [f"{name:{width}}  {source}" for name, source in methods.NETWORK_SOURCES.items()]
        console.show("\n".join(lines))
        parser.exit()


def _command() -> int:
    given = _parser().parse_args()
    budgets = [Budget.parse(text, statistic=given.stat) for text in given.budget]
    budgets += map(Budget.of_ratio, given.ratio)
    if not budgets:
        raise InvalidInput("nothing to compare at: name a --budget or a --ratio; --help has examples")
    is_other = given.input_ is not None or is_network(given.model)
    table = NETWORK_METHODS if is_other else METHODS
    names = methods.named(given.methods, table=table)
    settings = _settings(given.set, names, table)
    devices = arguments.devices_of(given, given.target)
    if given.refit is None:
        given.refit = "none" if is_other else "score"
    base = asked_job(given, device=devices[0], budget=budgets[0], method=None, settings={})
    model = name_of(given.model, merge_adapter=given.merge_adapter, vocabulary=given.vocabulary)
    default = f"compare-{model}-{given.target}"
    out = arguments.new_path(given.out) if given.out else home_of(given.model) / "runs" / default
    shard = None if given.shard is None else Shard.parse(given.shard)
    # Importing torch takes seconds: bad input is refused first.
    from dilap.job.compare import compare, jobs_of

    if given.dry_run:
        return _dry_run(jobs_of(base, budgets=budgets, settings=settings, shard=shard))
    rows = compare(
        base,
        budgets=budgets,
        settings=settings,
        devices=devices,
        out=out,
        progress=Console(),
        keep_models=given.keep_models,
        shard=shard,
    )
    if given.json:
        console.show_json(comparison.document(rows))
    else:
        place = out if shard is None else shard.folder(out)
        console.show(f"{comparison.markdown(rows)}\neverything is in {place}")
    return 0


def _dry_run(jobs: Sequence[CommonOptions]) -> int:
    """Print what the jobs of a comparison would take, and return the exit code: 1 where something does not fit."""
    from dilap.job import comparison_forecast
    from dilap.job.kinds import kind_of

    if not jobs:
        console.show("there are fewer runs than shards, and none for this one")
        return 0
    needs_in, machine = kind_of(jobs[0]).forecast(jobs[0])
    lacking = comparison_forecast.lacking(jobs, needs_in, machine)
    console.show("\n".join([*comparison_forecast.report(jobs, needs_in, machine), *lacking]))
    return 1 if lacking else 0


def _settings(pairs: Sequence[str], names: Sequence[str], table: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Return the settings of every method, given `METHOD.name=value` for one method, `name=value` for all that have it.

    Raises InvalidInput for a setting that no method has, before hours are spent.
    """
    found: dict[str, dict[str, str]] = {name: {} for name in names}
    known = {name: methods.settings_of(name, table=table) for name in names}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        method, _, setting = key.rpartition(".")
        chosen = [method] if method else [name for name in names if setting in known[name]]
        if not equals or not chosen or not set(chosen) <= set(names):
            raise InvalidInput(
                f"--set takes METHOD.NAME=VALUE, or NAME=VALUE of a setting that some have, got {pair!r}"
            )
        for name in chosen:
            found[name][setting] = value
    return found


def main() -> None:
    console.run(_command)


if __name__ == "__main__":
    main()
