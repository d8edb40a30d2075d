"""dilap-prune: make a model smaller so that it keeps a latency budget on a device."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dilap.cli import arguments, console
from dilap.cli.job_arguments import add_networks, add_search, add_text_and_recovery, asked_job
from dilap.core.codec import encode
from dilap.core.errors import InvalidInput
from dilap.core.workload import Budget
from dilap.job import ending, result
from dilap.job.networks import in_words, is_network
from dilap.job.options import CommonOptions, JobOptions
from dilap.job.outputs import home_of, name_of
from dilap.methods import METHODS, NETWORK_METHODS
from dilap.profilers.devices.device import Device

if TYPE_CHECKING:
    from dilap.job.network_options import NetworkOptions

_EXAMPLES = """\
  dilap-prune --target host_cpu --budget 70%
  dilap-prune --target host_cpu --budget 40ms --model ./my-llama --precision q4_0 --out runs/forty
  dilap-prune --target host_cpu --budget 70% --method flap --set metric=WIFN
  dilap-prune --target host_cpu --ratio 0.2 --method my_module:MyMethod
  dilap-prune --pattern 2:4 --method sparsegpt --rebuild barber
  dilap-prune --target host_cpu --budget 1.4x --table tables/here.jsonl --calib corpus.jsonl --recover lora
  dilap-prune --target host_cpu --budget 60% --vocabulary needs.txt    # only the tokens of that text, and bytes
  dilap-prune --target jetson_cpu --budget 40ms                 # where it is stands in devices.toml
  dilap-prune --target s23 --budget 60% --estimate              # no device: published numbers stand for it
image networks (classifiers of transformers, efficientnet-lite0, your own modules) are pruned with photographs:
  dilap-prune --target host_cpu --budget 60% --method uniform --model ./resnet-50 --calib photos/
  dilap-prune --target jetson_gpu --budget 4ms --model my_module:build --input 3x224x224 --calib photos/
encoders of texts (of the BERT family, all-minilm-l6-v2) are pruned with sentences:
  dilap-prune --target host_cpu --budget 70% --method uniform --model all-minilm-l6-v2 --calib corpus.txt
A killed run goes on where it stopped when the same command is given again."""
# Arguments that --pattern alone reads, and those that it reads beside them.
_OF_SPARSE = ("propagate", "rebuild", "granularity", "threshold", "metric", "retain", "dtype", "tasks", "delete_model")
_WITH_SPARSE = (
    *("pattern", "method", "set", "model", "merge_adapter", "vocabulary", "compute", "out", "json", "seed"),
    *("calib", "calib_length", "calib_sequences", "data_dir", "eval_text"),
)


def _parser() -> argparse.ArgumentParser:
    made = arguments.parser(
        "Prune a model to a latency budget that is measured on the device, and prove it.", _EXAMPLES
    )
    arguments.add_target(made, words=" (needed unless --pattern)")
    asked = made.add_mutually_exclusive_group(required=True)
    asked.add_argument("--budget", metavar="B", help="40ms, 70%% (of the dense latency) or 1.4x (faster than dense)")
    asked.add_argument(
        "--ratio",
        type=arguments.share,
        metavar="SHARE",
        help="instead: the share of the decoder layers' weights to remove",
    )
    asked.add_argument(
        "--pattern", metavar="P", help="instead: zeros inside matrices, 0.5 (a share), 2:4 or 4:8 (N of M kept)"
    )
    made.add_argument("--stat", choices=["p50", "p90"], default="p50", help="the latency the budget is about (p50)")
    arguments.add_model(made)
    arguments.add_compute(made)
    made.add_argument("--out", metavar="DIR", help="the run's folder (runs/MODEL-TARGET-BUDGET)")
    made.add_argument("--json", action="store_true", help="print the result as JSON")
    made.add_argument("--dry-run", action="store_true", help="print memory and time of every stage, and do nothing")
    arguments.add_devices(made)
    arguments.add_workload(made)
    _add_method(made)
    _add_sparse(made)
    add_search(made)
    add_text_and_recovery(made)
    add_networks(made)
    return made


def _add_method(made: argparse.ArgumentParser) -> None:
    group = made.add_argument_group("the method")
    group.add_argument(
        "--method",
        metavar="NAME",
        help=f"{', '.join(METHODS)}, or your own as module:attribute; see the README (dilap). "
        f"Of image networks and encoders: {', '.join(NETWORK_METHODS)} (dilap). "
        "With --pattern: magnitude, wanda, sparsegpt (wanda)",
    )
    group.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the method; repeat for more"
    )


def _add_sparse(made: argparse.ArgumentParser) -> None:
    group = made.add_argument_group("zeros inside matrices (--pattern)")
    group.add_argument(
        "--propagate", choices=["pruned", "dense"], default="pruned", help="what later layers see (pruned)"
    )
    group.add_argument("--rebuild", choices=["barber"], help="swap zeros block by block afterwards")
    group.add_argument("--granularity", choices=["block", "layer", "output1", "input1"], help="where swaps are made")
    group.add_argument("--threshold", type=arguments.share, metavar="SHARE", help="of the swaps that would help")
    group.add_argument(
        "--metric", choices=["WD", "W", "D"], default="WD", help="of swaps: weight times gradient, or one alone (WD)"
    )
    group.add_argument("--retain", action="store_true", help="after swaps, keep the values that SparseGPT gave weights")
    group.add_argument("--dtype", choices=["f32", "f16", "bf16"], help="prune and save in this type (the model's own)")
    group.add_argument(
        "--tasks",
        action=arguments.Several,
        default=[],
        metavar="TASK",
        help="score these of lm-eval's tasks (wikitext, arc_easy, ...), from --data-dir or the hub",
    )
    group.add_argument("--delete-model", action="store_true", help="keep the scores alone, and no checkpoint")


def _sparse(given: argparse.Namespace) -> int:
    """Run the job for a pattern of zeros, and return the exit code."""
    if is_network(given.model):
        raise InvalidInput(f"--pattern does not apply to {in_words(given.model)}: leave it away")
    from dilap.job import sparsify as sparse_job  # importing torch takes seconds: bad input is refused first
    from dilap.job.options import calibration_options
    from dilap.models.options import CORPORA

    options = sparse_job.SparseOptions(
        pattern=given.pattern,
        method=given.method or "wanda",
        settings=_settings(given.set),
        model=given.model,
        merge_adapter=given.merge_adapter,
        vocabulary=given.vocabulary,
        propagate=given.propagate,
        rebuild=given.rebuild is not None,
        granularity=given.granularity,
        threshold=given.threshold,
        metric=given.metric,
        retain=given.retain,
        dtype=given.dtype,
        tasks=tuple(given.tasks),
        data_dir=given.data_dir,
        delete_model=given.delete_model,
        calibration=calibration_options(
            given.calib,
            length=given.calib_length,
            sequences=given.calib_sequences,
            data_dir=None if given.tasks and given.calib not in CORPORA else given.data_dir,
            seed=given.seed,
        ),
        **({} if given.eval_text is None else {"evaluation_text": given.eval_text}),
        compute=given.compute,
    )
    pattern, method = given.pattern.replace(":", "of"), options.method.replace(":", ".")
    model = name_of(given.model, merge_adapter=given.merge_adapter, vocabulary=given.vocabulary)
    name = f"{model}-{method}-{pattern}{'-barber' * options.rebuild}"
    out = arguments.new_path(given.out) if given.out else home_of(given.model) / "runs" / name
    done = sparse_job.sparsify(options, out=out, progress=console.Console())
    if given.json:
        console.show_json(encode(done) | {"out": str(out)})
    else:
        console.show(f"{sparse_job.table(done)}\n\neverything is in {out}")
    return 0


def _command() -> int:
    parser = _parser()
    given = parser.parse_args()
    if given.pattern is not None:
        others = set(vars(given)) - {*_OF_SPARSE, *_WITH_SPARSE}
        arguments.refuse_given(parser, given, others, why="does not apply to zeros inside matrices (--pattern)")
        return _sparse(given)
    arguments.refuse_given(parser, given, _OF_SPARSE, why="is for zeros inside matrices: give --pattern, too")
    if given.target is None:
        raise InvalidInput("name the device with --target; dilap-profile --list-devices lists them")
    budget = _budget(given)
    devices = arguments.devices_of(given, given.target)
    options = options_of(given, device=devices[0])
    if given.dry_run:
        return _dry_run(options)
    from dilap.job.asked import start  # importing torch takes seconds: bad input is refused first

    out = arguments.new_path(given.out) if given.out else _default_out(given, budget)
    done = start(options, devices=devices, out=out, progress=console.Console())
    if done is None:
        if given.json:
            console.show_json({"status": "already met"})
        return 0
    if given.json:
        console.show_json(result.summary(done) | {"out": str(out)})
    else:
        console.show(f"{ending.text(done)}\n\neverything is in {out}")
    return 1 if done.status in ("missed", "uncertain") else 0


def _dry_run(options: CommonOptions) -> int:
    """Print what the job would take, and return the exit code: 1 where something does not fit."""
    from dilap.job import forecast  # importing torch takes seconds: bad input is refused first
    from dilap.job.kinds import kind_of
    from dilap.job.shortages import shortages

    needs_in, machine = kind_of(options).forecast(options)
    lacking = shortages(options, needs_in, machine)
    console.show("\n".join([forecast.table(needs_in(options), machine), *lacking]))
    return 1 if lacking else 0


def options_of(given: argparse.Namespace, *, device: Device) -> "JobOptions | NetworkOptions":
    """Return the job that the arguments ask for. Raises InvalidInput for impossible values."""
    return asked_job(given, device=device, budget=_budget(given), method=given.method, settings=_settings(given.set))


def _budget(given: argparse.Namespace) -> Budget:
    return Budget.parse(given.budget, statistic=given.stat) if given.ratio is None else Budget.of_ratio(given.ratio)


def _settings(pairs: Sequence[str]) -> dict[str, str]:
    """Return settings that are given as `name=value`. Raises InvalidInput for anything else."""
    for pair in pairs:
        if "=" not in pair:
            raise InvalidInput(f"--set takes NAME=VALUE, got {pair!r}")
    return dict(pair.split("=", 1) for pair in pairs)


def _default_out(given: argparse.Namespace, budget: Budget) -> Path:
    name = name_of(given.model, merge_adapter=given.merge_adapter, vocabulary=given.vocabulary)
    method = "" if given.method in (None, "dilap") else f"-{given.method.replace(':', '.')}"
    amount = str(budget).replace("%", "pct").replace(" ", "")
    return home_of(given.model) / "runs" / f"{name}-{given.target}-{amount}{method}"


def main() -> None:
    console.run(_command)


if __name__ == "__main__":
    main()
