"""What a plan is worth before any training: cut alone and refitted, by the same rule whichever method chose it."""

import pytest
import torch
from standins.models import NORMS_BEHIND, plan_for, random_tokens, tiny_model

from dilap.models.cut import shrink_
from dilap.models.reference import Teacher
from dilap.search.plan_scores import PlanScores, scores_of_plan

TRAIN, VALIDATION, UNSEEN = (random_tokens(8, 24, seed=seed) for seed in range(3))
KEPT = {
    "layers.0.channels": tuple(range(0, 96, 2)),
    "layers.1.kv_groups": (1,),
    "layers.1.query_slots": (0,),
    "layers.2.kv_groups": (),
}


def scored(family: str, kept: dict[str, tuple[int, ...]]) -> PlanScores:
    model = tiny_model(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    validation, unseen = (Teacher.of(model, tokens) for tokens in (VALIDATION, UNSEEN))
    found = scores_of_plan(model, plan_for(model, kept), TRAIN, validation=validation, unseen=unseen)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return found


@pytest.mark.parametrize("family", ["llama", "opt", "phi3"])
def test_scores_are_those_of_the_models_that_are_cut(family: str) -> None:
    found, teacher = scored(family, KEPT), Teacher.of(tiny_model(family), UNSEEN)
    plan = plan_for(tiny_model(family), KEPT)
    assert found.kl_cut == pytest.approx(teacher.kl(shrink_(tiny_model(family), plan)), rel=1e-3)
    refitted = shrink_(tiny_model(family), plan, parameters=found.parameters)
    assert found.kl_refit == pytest.approx(teacher.kl(refitted), rel=1e-3)


def test_a_plan_that_keeps_everything_changes_nothing() -> None:
    found = scored("llama", {})
    assert found.kl_cut == pytest.approx(0, abs=1e-5)
    assert found.kl_refit == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("family", NORMS_BEHIND)
def test_projections_in_front_of_a_norm_are_not_refitted(family: str) -> None:
    found = scored(family, {"layers.0.channels": tuple(range(48))})
    assert found.kl_cut > 0
    assert (found.kl_refit, dict(found.parameters)) == (None, {})


def test_experts_are_cut_alone() -> None:
    found = scored("qwen3_moe", {"layers.0.experts": (0, 2, 5)})
    assert found.kl_cut > 0
