"""Every method keeps the limit, repeats itself, and goes on where it was killed."""

from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from standins.models import tiny_model, tiny_search_task

from dilap.core import registry
from dilap.core.errors import Infeasible, InvalidInput
from dilap.methods import SEARCHES
from dilap.search.curvature import Curvature
from dilap.search.dilap import linear_model, polish, search
from dilap.search.journal import Evaluator
from dilap.search.options import RelaxationOptions, SearchOptions
from dilap.search.supernet import Supernet
from dilap.search.task import Search, SearchResult, SearchTask

OPTIONS = SearchOptions(step=0.15, evaluations=12, restarts=3, relaxation=RelaxationOptions(steps=80))


@cache
def base_task() -> SearchTask:
    return tiny_search_task(OPTIONS)


def task(*, share: float = 0.6) -> SearchTask:
    space = base_task().space
    return replace(base_task(), limit=share * space.cost(space.dense))


def method(name: str) -> Search:
    found: Search = registry.get(SEARCHES, name, kind="method")
    return found


@pytest.mark.parametrize("share", [0.95, 0.6, 0.35])
@pytest.mark.parametrize("name", SEARCHES)
def test_config_keeps_the_limit(name: str, share: float) -> None:
    asked = task(share=share)
    result = method(name)(asked)
    assert asked.space.cost(result.config) <= asked.limit * (1 + 1e-9)


@pytest.mark.parametrize("name", SEARCHES)
def test_reported_kl_is_the_real_one(name: str) -> None:
    result = method(name)(task())
    assert result.kl == task().evaluator.kl(result.config)


@pytest.mark.parametrize("name", SEARCHES)
def test_method_is_deterministic_for_a_seed(name: str) -> None:
    assert method(name)(task()) == method(name)(task())


@pytest.mark.parametrize("name", SEARCHES)
def test_impossible_limit_is_infeasible(name: str) -> None:
    asked = replace(task(), limit=0.5 * task().space.fixed_cost)
    with pytest.raises(Infeasible):
        method(name)(asked)


def test_equal_widths_keep_every_layer_where_none_may_be_removed() -> None:
    whole = task()
    choices = tuple(replace(choice, levels=choice.levels[:-1]) for choice in whole.space.choices)
    net = Supernet(tiny_model("llama"), [levels[:-1] for levels in whole.evaluator.net.library])
    asked = replace(whole, space=replace(whole.space, choices=choices), evaluator=replace(whole.evaluator, net=net))
    widths = asked.space.widths(method("equal_widths")(asked).config)
    assert len(set(widths)) == 1
    assert not widths[0].is_empty


@pytest.mark.parametrize("name", ["equal_widths", "layer_error", "uniform"])
def test_limit_above_the_dense_latency_gives_the_dense_model(name: str) -> None:
    """Not asked of DiLAP's own search, whose sampled curvature may favour a level that is as good."""
    assert method(name)(task(share=1.1)).kl == pytest.approx(0, abs=1e-5)


def test_uniform_gives_every_sublayer_the_same_share() -> None:
    asked = task(share=1.0)
    assert method("uniform")(asked).config == asked.space.dense
    levels = [
        choice.levels[k].cost / choice.levels[0].cost
        for choice, k in zip(asked.space.choices, method("uniform")(task(share=0.6)).config, strict=True)
    ]
    attention, ffn = levels[::2], levels[1::2]
    assert max(attention) - min(attention) < 0.5
    assert max(ffn) - min(ffn) < 0.5


def test_diagonal_search_of_one_round_is_the_best_by_brute_force() -> None:
    options = replace(OPTIONS, step=1.0, cross_terms=False, evaluations=0)
    asked = replace(task(), options=options)
    quadratic = linear_model(asked, asked.space.dense, number=0)
    configs = product(*(range(len(choice.levels)) for choice in asked.space.choices))
    losses = (quadratic.b + 0.5 * quadratic.Q.diagonal()).split(list(quadratic.sizes))
    tables = [part.tolist() for part in losses]
    best = min(
        sum(table[level] for table, level in zip(tables, config, strict=True))
        for config in configs
        if asked.space.cost(config) <= asked.limit
    )
    assert quadratic.value(search(asked).config) == pytest.approx(best, rel=1e-5)


def test_rounds_go_down_to_the_limit_in_equal_steps() -> None:
    """With others between them where the trust region halves a step."""
    asked = task(share=0.5)
    dense = asked.space.cost(asked.space.dense)
    limits = [one.limit / dense for one in search(asked).rounds]
    assert limits[-1] == pytest.approx(0.5)
    assert {0.85, 0.7, 0.55, 0.5} <= {round(limit, 9) for limit in limits}


class Killed(Exception):
    """Stands for a kill signal."""


@dataclass(frozen=True, kw_only=True)
class Mortal(Evaluator):
    """Dies when it is asked for more than `lives` answers."""

    lives: list[int]

    def _spend(self) -> None:
        if self.lives[0] == 0:
            raise Killed
        self.lives[0] -= 1

    def kls(self, config: object) -> torch.Tensor:
        self._spend()
        return super().kls(config)  # type: ignore[arg-type]

    def curvature(self, config: object, *, samples: int, seed: int) -> Curvature:
        self._spend()
        return super().curvature(config, samples=samples, seed=seed)  # type: ignore[arg-type]


@pytest.mark.parametrize("answers", [1, 2, 4, 6, 9, 15])
def test_killed_search_goes_on_to_the_identical_config(answers: int, tmp_path: Path) -> None:
    asked = task()
    evaluator = asked.evaluator
    mortal = Mortal(net=evaluator.net, teacher=evaluator.teacher, journal=tmp_path, lives=[answers])
    with pytest.raises(Killed):
        search(replace(asked, evaluator=mortal))
    evaluator.net.close()
    again = search(replace(asked, evaluator=replace(evaluator, journal=tmp_path)))
    assert again == search(asked)


def test_journal_answers_without_the_model(tmp_path: Path) -> None:
    evaluator = replace(task().evaluator, journal=tmp_path)
    config = (1, 1, 0, 0, 0, 0)
    value, curvature = evaluator.kl(config), evaluator.curvature(config, samples=1, seed=0)
    replayed = Evaluator(net=None, teacher=None, journal=tmp_path)  # type: ignore[arg-type]
    assert replayed.kl(config) == value
    found = replayed.curvature(config, samples=1, seed=0)
    assert (found.value, found.num_rows) == (curvature.value, curvature.num_rows)
    assert torch.equal(found.b, curvature.b)
    assert torch.equal(found.Q, curvature.Q)


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_damaged_journal_entry_is_invalid_input(suffix: str, tmp_path: Path) -> None:
    evaluator, config = replace(task().evaluator, journal=tmp_path), (1, 1, 0, 0, 0, 0)
    evaluator.kl(config)
    evaluator.curvature(config, samples=1, seed=0)
    (path,) = tmp_path.glob(f"*.{suffix}")
    path.write_bytes(b"{")
    with pytest.raises(InvalidInput, match=r"damaged journal entry .*; remove the file and run again"):
        evaluator.kl(config) if suffix == "json" else evaluator.curvature(config, samples=1, seed=0)


def test_journal_tells_configs_samples_and_seeds_apart(tmp_path: Path) -> None:
    evaluator = replace(task().evaluator, journal=tmp_path)
    for config in ((1, 0, 0, 0, 0, 0), (0, 1, 0, 0, 0, 0)):
        evaluator.kl(config)
    for samples, seed in ((1, 0), (2, 0), (1, 1)):
        evaluator.curvature((1, 0, 0, 0, 0, 0), samples=samples, seed=seed)
    assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.parametrize("seed", range(3))
def test_polish_never_worsens_the_real_kl(seed: int) -> None:
    asked = replace(task(), options=replace(OPTIONS, seed=seed))
    start = method("uniform")(asked)
    polished = polish(asked, start)
    assert polished.kl <= start.kl
    assert polished.kl == asked.evaluator.kl(polished.config)
    assert asked.space.cost(polished.config) <= asked.limit * (1 + 1e-9)


def test_polish_improves_a_bad_start() -> None:
    asked = task()
    start = SearchResult(config=asked.space.fastest, kl=asked.evaluator.kl(asked.space.fastest))
    assert polish(asked, start).kl < start.kl


def test_no_evaluations_means_no_polish() -> None:
    asked = replace(task(), options=replace(OPTIONS, evaluations=0))
    start = SearchResult(config=asked.space.fastest, kl=1.0)
    assert polish(asked, start) is start


@pytest.mark.parametrize("share", [0.55, 0.66])
def test_finished_search_moves_to_a_nearby_limit(share: float) -> None:
    previous = search(task())
    asked = replace(task(share=share), previous=previous)
    result = search(asked)
    assert asked.space.cost(result.config) <= asked.limit * (1 + 1e-9)
    assert result.config != previous.config
    assert result.kl == asked.evaluator.kl(result.config)
    assert result.rounds == previous.rounds


def test_progress_is_reported() -> None:
    lines: list[str] = []
    search(replace(task(), report=lines.append))
    assert lines[0].startswith("round 1: limit ")
    assert lines[-1].startswith("polish: ")
