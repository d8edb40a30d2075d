"""KL to the dense model at equal predicted latency: DiLAP's search, its parts left out, and other searches, over seeds.

    tools/bench_search                                   3 seeds, budgets 85 %, 70 %, 55 %, self-made calibration text
    tools/bench_search --calib corpus.txt --seeds 1      another calibration text, one seed
    tools/bench_search --refit --recover-steps 40        also after the closed-form refit, and after the same recovery
    tools/bench_search --precision auto                  widths and number formats are chosen
    tools/bench_search --importance wanda --only "no swaps"

Everything but the allocation is the same: model, latency table, level library, text. The KL is on text that no search
saw. All searches but the first two end with the same swaps on the real KL, unless their names say otherwise. With
several number formats the searches that know only widths are left out. A killed run goes on where it was.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dilap.cli.arguments import Several
from dilap.cli.console import Console, run
from dilap.core import registry
from dilap.core.codec import remove, written_aside
from dilap.core.errors import InvalidInput
from dilap.core.space import Space, plan_of
from dilap.core.workload import Workload
from dilap.job.bench import Bench
from dilap.methods import SEARCHES
from dilap.models.anatomy import architecture_of
from dilap.models.builtin import DEFAULT_MODEL
from dilap.models.cut import Parameters, shrink_
from dilap.models.load import Source, load
from dilap.models.options import CalibrationOptions
from dilap.models.recovery.lessons import KeptLessons
from dilap.models.recovery.options import RecoveryOptions
from dilap.models.recovery.train import recover_
from dilap.models.reference import Teacher
from dilap.models.text import calibration, evaluation_text
from dilap.profilers.devices.device import get
from dilap.search.allocation import Config
from dilap.search.journal import Evaluator
from dilap.search.layouts import build_space
from dilap.search.levels import head_levels
from dilap.search.library import fit_choices, fits_of_levels, width_choices
from dilap.search.library_file import Library, kept_library
from dilap.search.options import LibraryOptions, SearchOptions
from dilap.search.refit import best_refit
from dilap.search.supernet import Supernet
from dilap.search.task import Search, SearchTask
from tools.search_rivals import Gates, TrainingEvaluator, Weightings, single_changes, trained_inner_loop


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A search, with its options and the name that the table gives it.

    `search` is the name of one of the product's, or one of its rivals; `mixes` says that it can choose formats.
    """

    name: str
    search: str | Search
    options: SearchOptions
    mixes: bool = True


_WORDS = {"kl": "as searched", "refitted": "after the closed-form refit", "recovered": "after recovery"}
TRAINED = "inner loop trains adapters"


def _variants(given: argparse.Namespace, *, seed: int) -> list[Variant]:
    full = SearchOptions(evaluations=given.evaluations, seed=seed)
    rounds = replace(full, evaluations=0)
    one_round = replace(full, step=1.0, cross_terms=False)
    variants = [
        Variant(name="equal ratios", search="uniform", options=full, mixes=False),
        Variant(name="DP on layer error", search="layer_error", options=full, mixes=False),
        Variant(name="SPDY's weightings", search=Weightings(), options=full, mixes=False),
        Variant(name="Puzzle's scores", search=single_changes, options=full),
        Variant(name="hard-concrete gates", search=Gates(), options=full, mixes=False),
        Variant(name=TRAINED, search=TRAINED, options=full, mixes=False),
        Variant(name="one round, no swaps", search="dilap", options=replace(rounds, step=1.0)),
        Variant(name="diagonal only, no swaps", search="dilap", options=replace(rounds, cross_terms=False)),
        Variant(name="one round, Fisher diagonal", search="dilap", options=one_round),
        Variant(name="no swaps", search="dilap", options=rounds),
        Variant(name="no interactions", search="dilap", options=replace(full, cross_terms=False)),
        Variant(name="no relaxation", search="dilap", options=replace(full, restarts=0)),
        Variant(name="DiLAP", search="dilap", options=full),
    ]
    known = [variant for variant in variants if variant.mixes or given.precision not in ("auto", None)]
    for name in given.only:
        if name not in {one.name for one in known}:
            raise InvalidInput(f"unknown allocation {name!r}; known: {', '.join(one.name for one in known)}")
    return [variant for variant in known if not given.only or variant.name in given.only]


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
    parser.add_argument("--only", metavar="ALLOCATION", action="append", default=[], help="a line of the table")
    parser.add_argument("--precision", default="f16", help="one format for all parts, or auto for all the runtime has")
    parser.add_argument("--refit", action="store_true", help="also take the KL after the closed-form refit")
    parser.add_argument("--recover-steps", type=int, default=0, help="also take the KL after the same recovery")
    parser.add_argument("--out", type=Path, default=Path("runs/bench_search"))
    return parser.parse_args()


def _space(given: argparse.Namespace, source: Source, console: Console) -> Space:
    device = get("host_cpu")
    mixes = given.precision == "auto"
    precision = device.default_precision("llamacpp") if mixes else given.precision
    bench = Bench.of([device], "llamacpp", Workload(threads=device.default_threads(), precision=precision), console)
    architecture = architecture_of(source.model)
    bench = bench.mixing(None if mixes else (), architecture)
    table = bench.build_table(architecture, given.table or bench.table_path(given.model, architecture))
    offered = bench.precisions if mixes else ("",)
    capabilities = {one: bench.backend.capabilities(architecture, precision=one or precision) for one in offered}
    return build_space(table.model(), architecture, capabilities, layout="free")


class Study:
    """The benchmark for one seed: its text, level library and journal, which are kept in a folder."""

    def __init__(self, given: argparse.Namespace, source: Source, space: Space, seed: int) -> None:
        self.given, self.source, self.space, self.seed = given, source, space, seed
        self.folder = given.out / f"{Path(given.calib).name}-{given.importance}-{given.precision}-{seed}"
        self.folder.mkdir(parents=True, exist_ok=True)
        text = self._text()
        self.train = text["train"]
        of_head = head_levels(space)
        self.teacher = Teacher.of(source.model, text["validation"], keep_states=bool(of_head))
        unseen = evaluation_text(given.eval_text, source.tokenizer, num_sequences=32, length=256)
        self.exam = Teacher.of(source.model, unseen.tokens, keep_states=bool(of_head))
        self.net = Supernet(source.model, self._library(), head_levels=of_head)

    def _text(self) -> dict[str, torch.Tensor]:
        path = self.folder / "text.safetensors"
        if not path.exists():
            options = CalibrationOptions(source=self.given.calib, seed=self.seed)
            text = calibration(self.source.model, self.source.tokenizer, options)
            with written_aside(path) as temporary:
                save_file({"train": text.train.contiguous(), "validation": text.validation.contiguous()}, temporary)
        return load_file(path)

    def _library(self) -> Library:
        choices = [choice for choice in self.space.choices if choice.block.groups]
        options = LibraryOptions(order=self.given.importance)
        fit = partial(fit_choices, self.source.model, tokens=self.train, options=options)
        fitted = kept_library(self.folder / "library", width_choices(choices), fit)
        return [fits_of_levels(choice, fits) for choice, fits in zip(choices, fitted, strict=True)]

    def score(self, variant: Variant, budget: int) -> dict[str, float]:
        """Return KL on unseen and on validation text, the share of the dense latency, and the search's seconds.

        Scores are kept, and made only once.
        """
        path = self.folder / f"{budget}-{variant.name.replace(' ', '_')}{self._suffix()}.json"
        if not path.exists():
            result = self._score(variant, budget)
            with written_aside(path) as temporary:
                temporary.write_text(json.dumps(result), encoding="utf-8")
        scores: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
        return scores

    def _suffix(self) -> str:
        refitted = "-refitted" if self.given.refit else ""
        return refitted + (f"-recovered{self.given.recover_steps}" if self.given.recover_steps else "")

    def _score(self, variant: Variant, budget: int) -> dict[str, float]:
        net = self.net
        evaluator = Evaluator(net=net, teacher=self.teacher, journal=self.folder / "journal")
        limit = budget / 100 * self.space.cost(self.space.dense)
        task = SearchTask(evaluator=evaluator, space=self.space, limit=limit, options=variant.options)
        training = TrainingEvaluator(net=net, teacher=self.teacher, lessons=self.lessons)
        with training.restored() if variant.name == TRAINED else nullcontext():
            start = time.monotonic()
            found = self._search(variant)(task)
            scores = {"search_seconds": time.monotonic() - start}
            scores |= {
                "kl": net.kl(self.exam, found.config),
                "validation": found.kl,
                "latency": self.space.cost(found.config) / self.space.cost(self.space.dense),
            }
            parameters: Parameters = net.parameters(found.config)
            if self.given.refit and variant.name != TRAINED:  # its dense model is another one, which is no reference
                parameters = best_refit(net, found.config, self.train, teacher=self.teacher).parameters
                scores["refitted"] = net.kl(self.exam, found.config, parameters=parameters)
            if self.given.recover_steps:
                scores["recovered"] = self._recovered(found.config, parameters)
        net.close()  # makes the model dense again for the next study
        return scores

    def _search(self, variant: Variant) -> Search:
        if variant.search == TRAINED:
            return partial(trained_inner_loop, lessons=self.lessons)
        if isinstance(variant.search, str):
            search: Search = registry.get(SEARCHES, variant.search, kind="method")
            return search
        return variant.search

    @property
    def lessons(self) -> Teacher:
        """What the dense model says about the training split; it is asked once."""
        return Teacher.once(self.folder / "lessons.safetensors", self.source.model, self.train)

    def _recovered(self, config: Config, parameters: Parameters) -> float:
        """Return the KL on unseen text of the model cut to `config`, after the recovery that is asked for."""
        net = self.net
        net.close()
        plan = plan_of(self.space, [fit.units for fit in net.fits(config)], base="")
        model = shrink_(copy.deepcopy(self.source.model), plan, parameters=parameters)
        options = RecoveryOptions(mode="full", steps=self.given.recover_steps, seed=self.seed)
        lessons = KeptLessons(self.lessons, batch_tokens=options.batch_tokens, seed=self.seed)
        folder = self.folder / "recovery"
        recover_(model, lessons, options, validation=self.teacher, folder=folder)
        remove(folder)
        return self.exam.kl(model)


def _cell(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.3f} ({', '.join(f'{value:.3f}' for value in values)})"


def _table(given: argparse.Namespace, scores: Mapping[tuple[int, str], Sequence[Mapping[str, float]]], key: str) -> str:
    """Return a Markdown table of one of the scores: a line for every allocation, a column for every budget."""
    lines = [f"| allocation | {' | '.join(f'{budget} %' for budget in given.budgets)} |"]
    lines.append(f"|---|{'---|' * len(given.budgets)}")
    for variant in _variants(given, seed=0):
        cells = []
        for budget in given.budgets:
            values = [one[key] for one in scores[budget, variant.name] if key in one]
            cells.append(_cell(values) if values else "")
        lines.append(f"| {variant.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _main() -> int:
    given = _arguments()
    console = Console()
    _variants(given, seed=0)  # refuses unknown names before anything is loaded
    if given.precision == "auto" and given.recover_steps:
        raise InvalidInput("--recover-steps is for one --precision: a mixed model is not rounded here after recovery")
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
                    f"seed {seed}, {budget} %, {variant.name}: "
                    + ", ".join(f"{key} {one[key]:.3f}" for key in _WORDS if key in one)
                    + f", latency {one['latency']:.1%}, {one['search_seconds']:.0f} s"
                )
    for key, words in _WORDS.items():
        if any(key in one for found in scores.values() for one in found):
            print(
                f"KL to dense {given.model} on {given.eval_text} {words}, calibration {given.calib}, "
                f"{given.seeds} seeds: mean (each)\n{_table(given, scores, key)}"
            )
    return 0


if __name__ == "__main__":
    run(_main)
