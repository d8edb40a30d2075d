"""Tiny models, spaces with fabricated seconds and libraries for the tests of the core."""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dilap.core.groups import HEAD
from dilap.core.plan import Plan
from dilap.core.shape import UNMIXED, LayerWidths
from dilap.core.space import Choice, Level, Space, plan_of
from dilap.models.anatomy import architecture_of, exported_tensors, sublayers
from dilap.models.cut import shrink_
from dilap.models.reference import Teacher
from dilap.models.text import Calibration
from dilap.search.journal import Evaluator
from dilap.search.levels import head_levels
from dilap.search.library import LevelFit, fit_choices, fits_of_levels, width_choices
from dilap.search.limit import CostLimit
from dilap.search.method import PruneTask
from dilap.search.options import LibraryOptions, SearchOptions
from dilap.search.supernet import Supernet
from dilap.search.task import SearchTask
from dilap.search.weights import WeightCosts
from tools.tiny_models import CLASSES, VOCAB_SIZE, byte_level_tokenizer, plan_for, pruned_model, tiny_model

__all__ = [
    "CLASSES",
    "CLONES",
    "FAMILIES",
    "NORMS_BEHIND",
    "SPARSE",
    "VOCAB_SIZE",
    "byte_level_tokenizer",
    "plan_for",
    "pruned_model",
    "tiny_model",
]
CLONES = ("ministral", "seed_oss")  # Llama under another name: tests of families show it, and all others go without
SPARSE = ("qwen3_moe",)  # with experts, whose units lie in no output projection
FAMILIES = tuple(name for name in CLASSES if name not in (*CLONES, *SPARSE))
NORMS_BEHIND = ("olmo2", "gemma2", "gemma3_text")  # families with norms between sublayers and the residual stream
_DEFAULTS = LibraryOptions()
Kept = dict[str, tuple[int, ...]]


def needs_llamacpp() -> None:
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed")


@torch.no_grad()
def talking_model(tokenizer: Path) -> PreTrainedModel:
    """A llama that only ever prefers printable text."""
    model, words = tiny_model("llama"), AutoTokenizer.from_pretrained(tokenizer)
    silent = [token for token in range(VOCAB_SIZE) if not words.decode([token]).strip().isalnum()]
    model.lm_head.weight[silent] = 0
    return model


def compensated_model(family: str, kept: Kept, **changes: Any) -> PreTrainedModel:
    """`pruned_model` with random biases at the output projections, which most families lack."""
    model, generator = tiny_model(family, **changes), torch.Generator().manual_seed(1)
    biases = {f"{one.path}.bias": torch.randn(64, generator=generator) for one in sublayers(model)}
    return shrink_(model, plan_for(model, kept), parameters=biases)


def exported_llama(model: PreTrainedModel, **changes: Any) -> PreTrainedModel:
    """The tiny Llama with the tensors that a tiny model of its shape exports, so that both should compute the same."""
    llama = tiny_model("llama", **changes)
    llama.load_state_dict(dict(exported_tensors(model)))
    return llama


def tiny_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(byte_level_tokenizer(folder))


def random_tokens(num_sequences: int, length: int, *, vocab_size: int = VOCAB_SIZE, seed: int = 0) -> torch.Tensor:
    return torch.randint(vocab_size, (num_sequences, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def masked_(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """`model` in its dense shape with the output projections of removed units set to zero."""
    for one in sublayers(model):
        mask, columns = torch.zeros(one.out.in_features), one.columns(plan.kept)
        mask[columns] = 1
        one.out.weight.mul_(mask)
        if len(columns) == 0 and one.out.bias is not None:
            one.out.bias.zero_()
    return model


@torch.no_grad()
def logits(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=tokens).logits
    return found


@torch.no_grad()
def logits_with_cache(model: PreTrainedModel, tokens: torch.Tensor, *, prompt: int = 5) -> torch.Tensor:
    """The logits of all positions: a prompt first, then token by token through the KV cache."""
    out = model(input_ids=tokens[:, :prompt], use_cache=True)
    parts = [out.logits]
    for position in range(prompt, tokens.shape[1]):
        out = model(input_ids=tokens[:, position : position + 1], past_key_values=out.past_key_values, use_cache=True)
        parts.append(out.logits)
    return torch.cat(parts, 1)


def tiny_space(model: PreTrainedModel, *, fractions: tuple[float, ...] = (1.0, 0.5, 0.25)) -> Space:
    """Every grid of KV groups and query slots, some shares of the channels, and removal; a microsecond a parameter."""
    architecture = architecture_of(model)
    weights, choices = WeightCosts(architecture=architecture), []
    for block in architecture.blocks:
        sizes = [group.num_units for group in block.groups]
        if block.kind == "attention":
            counts = list(product(*(range(one.least, one.num_units + 1) for one in block.groups)))
        else:
            counts = [(round(sizes[0] * fraction),) for fraction in fractions]
        levels = [Level(counts=one, cost=1e-6 * weights.block(block, one)) for one in [*counts, (0,) * len(sizes)]]
        choices.append(Choice(block=block, levels=tuple(sorted(levels, key=lambda level: -level.cost))))
    return Space(architecture=architecture, choices=tuple(choices), fixed_cost=0.01)


def mixed_space(model: PreTrainedModel) -> Space:
    """`tiny_space` with levels in three precisions, and the head's; blocks of 32 fit into most widths."""
    shares = {"f16": 1.0, "q8_0": 0.6, "q4_0": 0.4}
    space = tiny_space(model, fractions=(1.0, 2 / 3, 1 / 3))
    choices = []
    for choice in space.choices:
        levels = [
            replace(level, precision=precision, cost=share * level.cost)
            for level in choice.levels
            for precision, share in shares.items()
            if precision == "f16" or not level.is_removed
        ]
        choices.append(replace(choice, levels=tuple(sorted(levels, key=lambda level: -level.cost))))
    of_head = (Level(counts=(), cost=0.02 * share, precision=precision) for precision, share in shares.items())
    head = Choice(block=HEAD, levels=tuple(of_head))
    return replace(space, choices=(*choices, head))


def mixed_net(model: PreTrainedModel, tokens: torch.Tensor) -> tuple[Space, Supernet]:
    """A supernet over `mixed_space`, its library fitted on `tokens`."""
    space = mixed_space(model)
    wide = replace(space, choices=tuple(width_choices(space.choices)))
    fitted = library_of(model, wide, tokens)
    library = [fits_of_levels(one, fits) for one, fits in zip(space.choices[:-1], fitted, strict=True)]
    return space, Supernet(model, library, head_levels=head_levels(space))


def level_at(space: Space, index: int, counts: Sequence[int], precision: str) -> int:
    """The index of the level of a choice with these counts and that precision."""
    levels = [(level.counts, level.precision) for level in space.choices[index].levels]
    return levels.index((tuple(counts), precision))


def tiny_net(
    model: PreTrainedModel, tokens: torch.Tensor, *, options: LibraryOptions = _DEFAULTS
) -> tuple[Space, Supernet]:
    """A supernet over `tiny_space`, its library fitted on `tokens`."""
    space = tiny_space(model)
    return space, Supernet(model, library_of(model, space, tokens, options=options))


def tiny_search_task(options: SearchOptions) -> SearchTask:
    """A Llama of 3 layers to be pruned to 60 % of its fabricated latency; methods leave nothing behind in it."""
    model = tiny_model("llama")
    space, net = tiny_net(model, random_tokens(8, 24))
    evaluator = Evaluator(net=net, teacher=Teacher.of(model, random_tokens(4, 24, seed=1)))
    return SearchTask(evaluator=evaluator, space=space, limit=0.6 * space.cost(space.dense), options=options)


def levels_of(net: Supernet, config: Sequence[int]) -> tuple[int, ...]:
    """`config` with other levels where the family has fewer of them."""
    return tuple(level % len(levels) for level, levels in zip(config, net.library, strict=True))


def library_of(
    model: PreTrainedModel, space: Space, tokens: torch.Tensor, *, options: LibraryOptions = _DEFAULTS
) -> list[list[LevelFit]]:
    """The levels of all choices of a space, fitted on `tokens`, in memory."""
    fitted = dict(fit_choices(model, space.choices, tokens, options=options))
    return [fitted[choice.name] for choice in space.choices]


def tiny_task(model: PreTrainedModel, *, share: float = 0.7, **changes: Any) -> PruneTask:
    """What a method is asked in the tests: a share of a fabricated latency, a microsecond a weight, of a tiny model."""
    space = tiny_space(model)

    def predict(widths: Sequence[LayerWidths], _: Mapping[str, str] = UNMIXED) -> float:
        weights = (space.architecture.attention_parameters(w) + space.architecture.ffn_parameters(w) for w in widths)
        return space.fixed_cost + 1e-6 * sum(weights)

    train, validation = random_tokens(8, 24), random_tokens(4, 24, seed=1)
    task = PruneTask(
        model=model,
        base="base",
        text=Calibration(name="random", train=train, validation=validation),
        cost_limit=CostLimit(limit=share * predict(space.architecture.layers), predict=predict),
        space=space,
    )
    return replace(task, **changes)


def projections(model: PreTrainedModel, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Output projections by sublayer name as parameters by their own names."""
    return {f"{one.path}.weight": weights[one.name] for one in sublayers(model) if one.name in weights}


def plan_at(space: Space, net: Supernet, config: tuple[int, ...]) -> Plan:
    units = [levels[index].units for levels, index in zip(net.library, config, strict=True)]
    return plan_of(space, units, base="base")
