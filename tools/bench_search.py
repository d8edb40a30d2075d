"""KL to the dense model at equal predicted latency: DiLAP's search, two baselines and ablations, over seeds.

    tools/bench_search                                   3 seeds, budgets 85 %, 70 %, 55 %, self-made calibration text
    tools/bench_search --calib corpus.txt --seeds 1      another calibration text, one seed
    tools/bench_search --refit                           also after the closed-form refit that ends a run
    tools/bench_search --importance wanda --only "no swaps"

Everything but the allocation is the same: model, latency table, level library, text. The KL is on text that no search
saw, before any recovery. A killed run goes on where it was.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dilap.cli.arguments import Several
from dilap.cli.console import Console, run
from dilap.core import registry
from dilap.core.codec import written_aside
from dilap.core.errors import InvalidInput
from dilap.core.space import Space
from dilap.core.workload import Workload
from dilap.job.bench import Bench
from dilap.methods import SEARCHES
from dilap.models.anatomy import architecture_of
from dilap.models.builtin import DEFAULT_MODEL
from dilap.models.load import Source, load
from dilap.models.options import CalibrationOptions
from dilap.models.reference import Teacher
from dilap.models.text import calibration, evaluation_text
from dilap.profilers.devices.device import get
from dilap.search.journal import Evaluator
from dilap.search.layouts import build_space
from dilap.search.library import fit_choices
from dilap.search.library_file import Library, kept_library
from dilap.search.options import LibraryOptions, SearchOptions
from dilap.search.refit import best_refit
from dilap.search.supernet import Supernet
from dilap.search.task import SearchTask


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A search that chooses the widths, with its options and the name that the table gives it."""

    name: str
    method: str
    options: SearchOptions


def _variants(given: argparse.Namespace, *, seed: int) -> list[Variant]:
    full = SearchOptions(evaluations=given.evaluations, seed=seed)
    rounds = replace(full, evaluations=0)
    variants = [
        Variant(name="equal ratios", method="uniform", options=full),
        Variant(name="DP on layer error", method="layer_error", options=full),
        Variant(name="one round, no swaps", method="dilap", options=replace(rounds, step=1.0)),
        Variant(name="diagonal only, no swaps", method="dilap", options=replace(rounds, cross_terms=False)),
        Variant(name="no swaps", method="dilap", options=rounds),
        Variant(name="DiLAP", method="dilap", options=full),
    ]
    chosen = [variant for variant in variants if given.only in (None, variant.name)]
    if not chosen:
        raise InvalidInput(f"unknown allocation {given.only!r}; known: {', '.join(one.name for one in variants)}")
    return chosen


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--table", type=Path, help="by default the one in tables/ that fits, measured first")
    parser.add_argument("--calib", default="self")
    parser.add_argument("--eval-text", default="python-docs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--budgets", action=Several, convert=int, default=[85, 70, 55], help="per cent of the dense latency"
    )
    parser.add_argument("--importance", choices=["wanda", "obs"], default=LibraryOptions().order)
    parser.add_argument("--evaluations", type=int, default=SearchOptions().evaluations)
    parser.add_argument("--only", metavar="ALLOCATION", help="one line of the table")
    parser.add_argument("--refit", action="store_true", help="also take the KL after the closed-form refit")
    parser.add_argument("--out", type=Path, default=Path("runs/bench_search"))
    return parser.parse_args()


def _space(given: argparse.Namespace, source: Source, console: Console) -> Space:
    workload = Workload(threads=get("host_cpu").default_threads())
    bench = Bench.of([get("host_cpu")], "llamacpp", workload, console)
    architecture = architecture_of(source.model)
    capabilities = bench.backend.capabilities(architecture, precision=workload.precision)
    table = bench.build_table(architecture, given.table or bench.table_path(given.model, architecture))
    model = table.model()
    return build_space(model, architecture, {"": capabilities}, layout="free")


class Study:
    """The benchmark for one seed: its text, level library and journal, which are kept in a folder."""

    def __init__(self, given: argparse.Namespace, source: Source, space: Space, seed: int) -> None:
        self.given, self.source, self.space, self.seed = given, source, space, seed
        self.folder = given.out / f"{Path(given.calib).name}-{given.importance}-{seed}"
        self.folder.mkdir(parents=True, exist_ok=True)
        text = self._text()
        self.train = text["train"]
        self.teacher = Teacher.of(source.model, text["validation"])
        unseen = evaluation_text(given.eval_text, source.tokenizer, num_sequences=32, length=256)
        self.exam = Teacher.of(source.model, unseen.tokens)
        self.net = Supernet(source.model, self._library())

    def _text(self) -> dict[str, torch.Tensor]:
        path = self.folder / "text.safetensors"
        if not path.exists():
            options = CalibrationOptions(source=self.given.calib, seed=self.seed)
            text = calibration(self.source.model, self.source.tokenizer, options)
            with written_aside(path) as temporary:
                save_file({"train": text.train.contiguous(), "validation": text.validation.contiguous()}, temporary)
        return load_file(path)

    def _library(self) -> Library:
        options = LibraryOptions(order=self.given.importance)
        fit = partial(fit_choices, self.source.model, tokens=self.train, options=options)
        return kept_library(self.folder / "library", self.space.choices, fit)

    def score(self, variant: Variant, budget: int) -> dict[str, float]:
        """Return KL on unseen and on validation text, the share of the dense latency, and the search's seconds.

        Scores are kept, and made only once.
        """
        path = self.folder / f"{budget}-{variant.name.replace(' ', '_')}{'-refitted' * self.given.refit}.json"
        if not path.exists():
            result = self._score(variant, budget)
            with written_aside(path) as temporary:
                temporary.write_text(json.dumps(result), encoding="utf-8")
        scores: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
        return scores

    def _score(self, variant: Variant, budget: int) -> dict[str, float]:
        net = self.net
        evaluator = Evaluator(net=net, teacher=self.teacher, journal=self.folder / "journal")
        limit = budget / 100 * self.space.cost(self.space.dense)
        start = time.monotonic()
        task = SearchTask(evaluator=evaluator, space=self.space, limit=limit, options=variant.options)
        found = registry.get(SEARCHES, variant.method, kind="method")(task)
        seconds = time.monotonic() - start
        scores = {
            "kl": net.kl(self.exam, found.config),
            "validation": found.kl,
            "latency": self.space.cost(found.config) / self.space.cost(self.space.dense),
            "search_seconds": seconds,
        }
        if self.given.refit:
            refit = best_refit(net, found.config, self.train, teacher=self.teacher)
            scores["kl"] = net.kl(self.exam, found.config, parameters=refit.parameters)
        net.close()  # makes the model dense again for the next study
        return scores


def _cell(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.3f} ({', '.join(f'{value:.3f}' for value in values)})"


def _main() -> int:
    given = _arguments()
    console = Console()
    source = load(given.model)
    space = _space(given, source, console)
    scores: dict[tuple[int, str], list[dict[str, float]]] = {}
    for seed in range(given.seeds):
        study = Study(given, source, space, seed)
        for budget in given.budgets:
            for variant in _variants(given, seed=seed):
                one = study.score(variant, budget)
                scores.setdefault((budget, variant.name), []).append(one)
                console.say(
                    f"seed {seed}, {budget} %, {variant.name}: KL {one['kl']:.3f}, latency {one['latency']:.1%}, "
                    f"{one['search_seconds']:.0f} s"
                )
    print(
        f"KL to dense {given.model} on {given.eval_text}, calibration {given.calib}, {given.seeds} seeds: mean (each)"
    )
    print(f"| allocation | {' | '.join(f'{budget} %' for budget in given.budgets)} |")
    print(f"|---|{'---|' * len(given.budgets)}")
    for variant in _variants(given, seed=0):
        cells = [_cell([one["kl"] for one in scores[budget, variant.name]]) for budget in given.budgets]
        print(f"| {variant.name} | {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    run(_main)
