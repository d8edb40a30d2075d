"""The search over widths and precisions keeps the limit, is never worse than quantising alone, and rounds well."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from standins.models import logits, mixed_net, mixed_space, random_tokens, tiny_model, tiny_task

from dilap import methods
from dilap.core.errors import Infeasible, Unsupported
from dilap.models.cut import shrink_
from dilap.models.reference import Teacher
from dilap.models.rounding import rounded
from dilap.search import dilap, equal_widths, quantise
from dilap.search.dilap import unpruned_configs
from dilap.search.journal import Evaluator
from dilap.search.levels import compensated_library
from dilap.search.library_file import load_fits
from dilap.search.options import RefitOptions, RelaxationOptions, SearchOptions
from dilap.search.refit import best_refit, refit_sequentially
from dilap.search.supernet import Supernet
from dilap.search.task import SearchTask

TOKENS = random_tokens(32, 32)
OPTIONS = SearchOptions(step=0.2, evaluations=6, restarts=3, relaxation=RelaxationOptions(steps=60))
LIMITS = (0.8, 0.5, 0.3)  # of the dense cost; everything in 8 bits costs 0.65 of it, in 4 bits 0.48


@cache
def base_task() -> SearchTask:
    model = tiny_model("llama")
    space, net = mixed_net(model, random_tokens(8, 24))
    teacher = Teacher.of(model, random_tokens(4, 24, seed=1), keep_states=True)
    return SearchTask(
        evaluator=Evaluator(net=net, teacher=teacher),
        space=replace(space, fixed_cost=0.001),
        limit=space.cost(space.dense),
        options=OPTIONS,
    )


def task(share: float) -> SearchTask:
    space = base_task().space
    return replace(base_task(), limit=share * space.cost(space.dense))


@pytest.mark.parametrize("share", LIMITS)
@pytest.mark.parametrize("method", [dilap, equal_widths])
def test_a_search_with_precisions_keeps_the_limit_and_is_no_worse_than_quantising(method: object, share: float) -> None:
    asked = task(share)
    found = method.search(asked)  # type: ignore[attr-defined]
    assert asked.space.cost(found.config) <= asked.limit * (1 + 1e-9)
    assert found.kl == asked.evaluator.kl(found.config)
    plain = [
        asked.evaluator.kl(config)
        for config in unpruned_configs(asked.space)
        if asked.space.cost(config) <= asked.limit
    ]
    assert found.kl <= min(plain, default=float("inf"))
    assert asked.evaluator.net.is_rounded(found.config)


def test_equal_widths_are_equal_and_precisions_free() -> None:
    asked = task(0.5)
    found = equal_widths.search(asked)
    layers = [one for one in asked.space.widths(found.config) if not one.is_empty]
    assert len(set(layers)) == 1


def test_quantising_alone_has_one_precision_and_all_widths() -> None:
    space = base_task().space
    found = list(unpruned_configs(space))
    assert [set(space.precisions(config).values()) for config in found] == [{"q8_0"}, {"q4_0"}]
    assert {space.widths(config) for config in found} == {space.architecture.layers}


def rounding_config(net: Supernet, precision: str) -> tuple[int, ...]:
    """Half of the channels in layer 1, everything in one precision."""
    config = []
    for index, levels in enumerate(net.library):
        wanted = next(fit.counts for fit in levels if index != 3 or fit.counts[0] < levels[0].counts[0])
        config.append([(fit.counts, fit.precision) for fit in levels].index((wanted, precision)))
    return (*config, [one.head for one in net.head_levels].index(precision))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "opt", "phi3", "granite"])
def test_refitting_and_rounding_is_nearer_than_plain_rounding(family: str, tied: bool) -> None:
    model = tiny_model(family, tie_word_embeddings=tied)
    _, net = mixed_net(model, TOKENS)
    teacher = Teacher.of(model, random_tokens(8, 32, seed=1), keep_states=True)
    config = rounding_config(net, "q4_0")
    plain = net.kl(teacher, config)
    found = best_refit(net, config, TOKENS, teacher=teacher)
    assert found.kl < 0.95 * plain
    assert found.correction is not None


@pytest.mark.parametrize("family", ["gemma2", "olmo2", "qwen3_moe"])
def test_rounding_without_a_refit_is_compensated(family: str) -> None:
    model = tiny_model(family)
    _, net = mixed_net(model, TOKENS)
    teacher = Teacher.of(model, random_tokens(8, 32, seed=1), keep_states=True)
    config = rounding_config(net, "q4_0")
    plain = net.kl(teacher, config)
    found = best_refit(net, config, TOKENS, teacher=teacher, options=RefitOptions(corrections=()))
    assert found.kl < plain
    assert found.correction is None


@pytest.mark.parametrize("correction", [None, 1.0])
def test_refitted_parameters_lie_on_the_grids_of_their_precisions(correction: float | None) -> None:
    model = tiny_model("llama")
    _, net = mixed_net(model, TOKENS)
    config = rounding_config(net, "q4_0")
    found = refit_sequentially(net, config, TOKENS, correction=correction)
    names = [name for name, parameter in model.named_parameters() if parameter.dim() == 2]
    assert sorted(found) == sorted(names)
    for name, value in found.items():
        precision = "q8_0" if name == net.embedding_name else "q4_0"
        assert torch.equal(rounded(value, precision), value), name
    assert net.config == (0,) * 7
    assert all(parameter is net.dense[name] for name, parameter in model.named_parameters() if name in net.dense)


@pytest.mark.parametrize("tied", [False, True])
def test_a_pruned_model_with_precisions_has_the_kl_that_was_reported(tied: bool) -> None:
    model = tiny_model("llama", tie_word_embeddings=tied)
    lines: list[str] = []
    asked = tiny_task(model, share=0.4)
    space = mixed_space(model)
    limit = replace(asked.cost_limit, limit=0.4 * space.cost(space.dense))
    levels = replace(asked.levels, search=OPTIONS)
    asked = replace(asked, space=space, cost_limit=limit, levels=levels, report=lines.append)
    found = dilap.prune(asked)
    assert found.plan.precisions
    shrunk = shrink_(tiny_model("llama", tie_word_embeddings=tied), found.plan, parameters=found.parameters)
    kl = float(lines[-1].split("-> ")[1])
    found_logits, dense = (logits(one, asked.text.validation).log_softmax(-1) for one in (shrunk, model))
    real = torch.nn.functional.kl_div(found_logits, dense, log_target=True, reduction="none").sum(-1).mean()
    assert float(real) == pytest.approx(kl, abs=2e-3)


@pytest.mark.parametrize("name", ["layer_error", "ziplm"])
def test_methods_that_know_errors_of_widths_refuse_precisions(name: str) -> None:
    model = tiny_model("llama")
    with pytest.raises(Unsupported, match="compares widths and not precisions"):
        methods.get(name)(replace(tiny_task(model), space=mixed_space(model)))


def test_a_library_has_one_fit_of_each_width_on_disk(tmp_path: Path) -> None:
    model = tiny_model("llama")
    task = replace(tiny_task(model), space=mixed_space(model), cache=tmp_path)
    library = compensated_library(task, task.levels.library).library
    assert [len(levels) for levels in library] == [len(choice.levels) for choice in task.space.choices[:-1]]
    kept = [load_fits(path) for path in tmp_path.rglob("*.safetensors")]
    assert [len(fits) for fits in kept] == [len({fit.counts for fit in fits}) for fits in kept]
    assert len(kept) == 6


def test_a_head_that_is_read_from_the_embedding_has_its_precision() -> None:
    space = base_task().space
    assert space.embedding_precision("q4_0") == "q8_0"
    assert replace(space, untied_precisions=False).embedding_precision("q4_0") == "q4_0"


def test_quantising_finds_the_nearest_formats_within_the_limit() -> None:
    """Formats of the body and of the head are chosen apart, and all widths stay."""
    asked = task(0.8)
    found = quantise.search(asked)
    body, head = (asked.space.choices[:-1], asked.space.choices[-1])
    full = [
        {one.precision: k for k, one in enumerate(choice.levels) if one.counts == choice.levels[0].counts}
        for choice in body
    ]
    tried = [
        (*(own.get(name, 0) for own in full), level)
        for name in ("f16", "q8_0", "q4_0")
        for level in range(len(head.levels))
    ]
    kept = [config for config in tried if asked.space.cost(config) <= asked.limit]
    assert 1 < len(kept) < len(tried)
    assert found.kl == min(asked.evaluator.kl(config) for config in kept)


def test_a_limit_that_no_format_keeps_is_infeasible() -> None:
    with pytest.raises(Infeasible, match="no format of the dense model keeps"):
        quantise.search(task(0.05))
