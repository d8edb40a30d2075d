"""The searches against which DiLAP's is held keep the limit, choose well where it is easy, and leave nothing behind."""

from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import torch
from standins.models import random_tokens, tiny_search_task

from dilap.models.reference import Teacher
from dilap.search.dilap import allocate, linear_model
from dilap.search.options import RelaxationOptions, SearchOptions
from dilap.search.task import Search, SearchResult, SearchTask
from tools.search_rivals import Gates, TrainingEvaluator, Weightings, single_changes, trained_inner_loop

OPTIONS = SearchOptions(step=0.2, evaluations=4, restarts=3, relaxation=RelaxationOptions(steps=40))


@cache
def base_task() -> SearchTask:
    return tiny_search_task(OPTIONS)


@cache
def lessons() -> Teacher:
    return Teacher.of(base_task().evaluator.net.model, random_tokens(8, 24, seed=2))


def trained(task: SearchTask) -> SearchResult:
    return trained_inner_loop(task, lessons=lessons())


SEARCHES: dict[str, Search] = {
    "single changes": single_changes,
    "weightings": Weightings(starts=4, failures=2),
    "gates": Gates(steps=8, batch_tokens=48),
    "trained": trained,
}


@pytest.mark.parametrize("name", SEARCHES)
def test_a_rival_keeps_the_limit_and_leaves_the_dense_model_behind(name: str) -> None:
    task = base_task()
    net = task.evaluator.net
    before = {key: value.clone() for key, value in net.model.state_dict().items()}
    with TrainingEvaluator(net=net, teacher=task.evaluator.teacher, lessons=lessons()).restored():
        found = SEARCHES[name](task)
    assert task.space.cost(found.config) <= task.limit * (1 + 1e-9)
    assert all(torch.equal(before[key], value) for key, value in net.model.state_dict().items())


def test_gates_shares_of_levels_have_the_gradient_of_the_kl() -> None:
    task, gates = base_task(), Gates()
    net, teacher = task.evaluator.net, task.evaluator.teacher
    shares = [torch.full((size,), 1 / size, requires_grad=True) for size in net.sizes]
    rows = torch.arange(len(teacher.tokens))
    gates._kl(net, teacher, rows, shares).backward()

    def kl(index: int, change: float) -> float:
        """Return the KL with the share of one sublayer's last level changed, by masked projections."""
        weights = [net.outs[number].weight for number in range(len(shares))]
        for number, own in enumerate(shares):
            parts = own.detach().clone()
            if number == index:
                parts[-1] += change
            weights[number].zero_()
            for part, fit in zip(parts.tolist(), net.library[number], strict=True):
                weights[number][:, fit.columns] += part * fit.weight
        value = teacher.kl(net.model)
        for number in range(len(shares)):
            net.restore(number)
        return value

    with torch.no_grad():
        slopes = [(kl(index, 0.01) - kl(index, -0.01)) / 0.02 for index in range(len(shares))]
    found = [float(own.grad[-1]) for own in shares if own.grad is not None]
    assert torch.allclose(torch.tensor(found), torch.tensor(slopes), rtol=0.05, atol=2e-4)


def test_training_lowers_the_kl_at_the_config_that_is_set() -> None:
    task = base_task()
    net = task.evaluator.net
    config = tuple(1 for _ in net.sizes)
    trainer = TrainingEvaluator(net=net, teacher=lessons(), lessons=lessons(), steps=10, learning_rate=1e-2)
    before = net.kl(lessons(), config)
    with trainer.restored():
        net.set(config)
        trainer.train(0)
        after = net.kl(lessons(), config)
    assert after < before
    assert net.kl(lessons(), config) == pytest.approx(before, rel=1e-5)


def test_single_changes_are_summed_exactly() -> None:
    task = replace(base_task(), options=replace(OPTIONS, evaluations=0))
    space, kl = task.space, task.evaluator.kl
    costs = [
        [kl((*space.dense[:index], level, *space.dense[index + 1 :])) for level in range(len(choice.levels))]
        for index, choice in enumerate(space.choices)
    ]

    def total(config: tuple[int, ...]) -> float:
        return sum(own[level] for own, level in zip(costs, config, strict=True))

    every = product(*(range(len(choice.levels)) for choice in space.choices))
    best = min(total(config) for config in every if space.cost(config) <= task.limit)
    assert total(single_changes(task).config) == pytest.approx(best, abs=1e-6)


def test_no_starts_leave_the_relaxation_out(monkeypatch: pytest.MonkeyPatch) -> None:
    task = base_task()
    quadratic = linear_model(task, task.space.dense, number=0)
    monkeypatch.delattr("dilap.search.dilap.relax")
    options = replace(OPTIONS, restarts=0)
    config = allocate(quadratic, task.space, limit=task.limit, previous=task.space.dense, options=options)
    assert task.space.cost(config) <= task.limit * (1 + 1e-9)
