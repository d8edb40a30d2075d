"""The quality of a plan before any training, told alike for all methods: cut alone, and refitted in closed form."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from dilap.core.plan import Plan, full_plan
from dilap.models.anatomy import ExpertSublayer, Sublayer, all_sublayers
from dilap.models.cut import Parameters
from dilap.models.reference import Teacher
from dilap.search.library import LevelFit
from dilap.search.options import RefitOptions
from dilap.search.refit import best_refit, refit_refusal
from dilap.search.supernet import Supernet

_DEFAULTS = RefitOptions()


@dataclass(frozen=True, kw_only=True)
class PlanScores:
    """KL of a plan's units with the dense model's own values (`kl_cut`), and with refitted projections (`kl_refit`).

    The latter are the `parameters`. Both are without any precision of the plan's; `kl_refit` is None for families whose
    projections cannot be refitted in sequence.
    """

    kl_cut: float
    kl_refit: float | None = None
    parameters: Parameters = field(default_factory=dict)


def scores_of_plan(
    model: PreTrainedModel,
    plan: Plan,
    tokens: torch.Tensor,
    *,
    validation: Teacher,
    unseen: Teacher,
    options: RefitOptions = _DEFAULTS,
    progress: Callable[[int], None] = lambda _: None,
) -> PlanScores:
    """Score a plan of the dense `model` on the text of `unseen`; the model is left as it was.

    Projections are refitted on `tokens` (sequences x length), in the first way that lowers the KL on the text of
    `validation`, or stay.
    """
    net = Supernet(model, _library(model, plan))
    config = (1,) * len(net.sublayers)
    kl_cut = net.kl(unseen, config)
    if refit_refusal(model) is not None:
        net.close()
        return PlanScores(kl_cut=kl_cut)
    found = best_refit(net, config, tokens, teacher=validation, options=options, progress=progress)
    kl_refit = net.kl(unseen, config, parameters=found.parameters)
    net.close()
    return PlanScores(kl_cut=kl_cut, kl_refit=kl_refit, parameters=found.parameters)


def _library(model: PreTrainedModel, plan: Plan) -> list[list[LevelFit]]:
    """Return two levels of every sublayer: all its units, and those that the plan keeps, with their own values."""
    every = full_plan(plan.architecture, base=plan.base).kept
    return [[_fit(one, every), _fit(one, plan.kept)] for one in all_sublayers(model)]


def _fit(one: Sublayer | ExpertSublayer, kept: Mapping[str, tuple[int, ...]]) -> LevelFit:
    units = {group.name: kept[group.name] for group in one.block.groups}
    columns, weight = one.columns(units), one.weight.detach()
    weight = weight.index_select(
        1 if isinstance(one, Sublayer) else 0, columns
    )  # a copy: the model's own is written to
    return LevelFit(units=units, columns=columns, weight=weight, error=0.0)
