"""What stands between a model of an unknown architecture and the nearest family that is known, in words."""

import re
from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

if TYPE_CHECKING:
    from dilap.models.families.family import Family

_ALIKE = 3  # letters with which names of related architectures begin


def nearest_words(config: PreTrainedConfig, known: Collection["Family"]) -> str:
    """Return the family whose modules differ least from those of the config's class, and how; empty where unknown."""
    if text := getattr(config, "text_config", None):
        return f"it is more than a model of text: give its text model alone, with the model_type {text.model_type!r}"
    activation = getattr(config, "hidden_act", None)
    return _nearest(_layer_parameters(config), config.model_type, known, activation=activation)


def nearest_words_of_tensors(names: Collection[str], kind: str, known: Collection["Family"]) -> str:
    """Return the same for a model of the type `kind`, of which transformers has no class, by its tensors' names."""
    found = [re.match(r"(.*?\.)?0\.(.+)", name) for name in names]
    stacks = [one[1] or "" for one in found if one]
    stack = max(stacks, key=stacks.count, default="")  # that of the decoder layers has most tensors
    return _nearest({one[2] for one in found if one and (one[1] or "") == stack}, kind, known, activation=None)


def _nearest(parameters: set[str], kind: str, known: Collection["Family"], *, activation: str | None) -> str:
    """Return the words for a model of the type `kind` whose layers have these parameters."""
    if not parameters:
        return ""
    modules = {name.rpartition(".")[0] for name in parameters}

    def distance(family: "Family") -> tuple[int, bool, bool]:
        is_related = family.name[:_ALIKE] == kind[:_ALIKE]
        return len(modules ^ _modules_of(family, modules)), not is_related, family.name != "llama"

    family = min(known, key=distance)
    own, wanted = sorted(modules - _modules_of(family, modules)), sorted(_modules_of(family, modules) - modules)
    if own and wanted:
        difference = f"has {_listed(own)} in place of {_listed(wanted)}"
    elif own or wanted:
        difference = f"has also {_listed(own)}" if own else f"has no {_listed(wanted)}"
    elif any(name.endswith("norm.bias") for name in parameters):
        difference = "has biases in its norms"
    else:
        beside = "" if activation is None else f" (activation {activation})"
        difference = f"may compute something else with modules of the same names{beside}"
    return f"the nearest is {family.name}, and this one {difference}"


def _modules_of(family: "Family", modules: Collection[str]) -> set[str]:
    """Return the modules in a layer of a family; of those that only some of its models have, those in `modules`."""
    norms = (family.attention_norm, family.attention_norm_behind, family.ffn_norm, family.ffn_norm_behind)
    optional = {family.query_norm, family.key_norm} & set(modules)
    return {*family.matrices, *filter(None, norms), *optional}


def _layer_parameters(config: PreTrainedConfig) -> set[str]:
    """Return the names of parameters in the layers that the config's class builds, without their values."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception:  # of any class of transformers, with any config; the sentence only gets shorter
        return set()
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return {name for layer in (stacks[0] if stacks else ()) for name, _ in layer.named_parameters()}


def _listed(paths: list[str]) -> str:
    shown = ", ".join(paths[:4])
    return f"{shown} and {len(paths) - 4} more" if len(paths) > 4 else shown
