"""All pruning methods and all searches over measured levels, by name, and how users change the settings of a method.

    from dilap import methods
    methods.get("flap", {"metric": "WIFN"})  # a callable: PruneTask -> Pruned

The interface of methods is in `dilap.search.method`.
"""

import typing
from collections.abc import Mapping, Sequence
from dataclasses import Field, fields, is_dataclass
from types import MappingProxyType
from typing import Any

from dilap.core import registry
from dilap.core.errors import InvalidInput

METHODS = {
    "dilap": "dilap.search.dilap:prune",
    "equal_widths": "dilap.search.equal_widths:prune",
    "quantise": "dilap.search.quantise:Quantise",
    "prune_then_quantise": "dilap.search.dilap:prune",
    "uniform": "dilap.search.uniform:prune",
    "layer_error": "dilap.search.layer_error:prune",
    "magnitude": "dilap.methods.magnitude:prune",
    "wanda_sp": "dilap.methods.wanda_sp:prune",
    "flap": "dilap.methods.flap:Flap",
    "llm_pruner": "dilap.methods.llm_pruner:LlmPruner",
    "loraprune": "dilap.methods.loraprune:LoraPrune",
    "compresso": "dilap.methods.compresso:Compresso",
    "ziplm": "dilap.methods.ziplm:ZipLm",
    "puzzle": "dilap.methods.puzzle:Puzzle",
    "shortgpt": "dilap.methods.shortgpt:ShortGpt",
    "sleb": "dilap.methods.sleb:Sleb",
    "sprint": "dilap.methods.sprint:Sprint",
    "llm_streamline": "dilap.methods.llm_streamline:Streamline",
}
_PRECISION = {"dilap", "equal_widths", "quantise"}  # the methods that choose the precision of every part of a model
# For networks that are no decoders: callables of the interface in `dilap.search.network_task`.
NETWORK_METHODS = {
    "dilap": "dilap.search.networks.prune:Dilap",
    "uniform": "dilap.methods.networks.magnitude:uniform",
    "magnitude": "dilap.methods.networks.magnitude:magnitude",
    "taylor": "dilap.methods.networks.taylor:Taylor",
    "halp": "dilap.methods.networks.halp:Halp",
    "torch_pruning": "dilap.methods.networks.torch_pruning:TorchPruning",
}
SEARCHES = {
    "dilap": "dilap.search.dilap:search",
    "equal_widths": "dilap.search.equal_widths:search",
    "uniform": "dilap.search.uniform:search",
    "layer_error": "dilap.search.layer_error:search",
}
# What each method does, where it comes from, and the licence of its authors' code where that is known. None of their
# code is here: all methods are written from their descriptions.
SOURCES = {
    "dilap": "levels of measured latency by a relinearised quadratic model of KL; this project",
    "equal_widths": "DiLAP for runtimes that need equal widths; this project",
    "quantise": "the dense model in the formats that keep the budget; GPTQ's rounding (arXiv 2210.17323, Apache-2.0)",
    "prune_then_quantise": "DiLAP's search in floats, then the format that ships; this project",
    "uniform": "equal shares of measured levels; this project",
    "layer_error": "exact selection on the error of every layer; this project",
    "magnitude": "norms of weights; FLAP's baseline mag-sp (arXiv 2312.11983, Apache-2.0)",
    "wanda_sp": "weights times activations; FLAP's structured Wanda (arXiv 2306.11695, MIT)",
    "flap": "fluctuation of activations, biases make up for the mean (arXiv 2312.11983, Apache-2.0)",
    "llm_pruner": "weights times gradients, summed over coupled matrices (arXiv 2305.11627, Apache-2.0)",
    "loraprune": "gradients of adapters, pruned while they train (arXiv 2305.18403, non-commercial)",
    "compresso": "hard-concrete gates trained with adapters (arXiv 2310.05015)",
    "ziplm": "optimal brain surgery, levels by SPDY's search (arXiv 2302.04089 and 2201.09096, no code)",
    "puzzle": "scores of single replaced blocks, exact selection (arXiv 2411.19146, Apache-2.0)",
    "shortgpt": "layers by block influence (arXiv 2403.03853; angular: 2403.17887)",
    "sleb": "layers tried one by one (arXiv 2402.09025, MIT)",
    "sprint": "sublayers by damage a second, the next network tuned (arXiv 2506.03510, research only)",
    "llm_streamline": "a window of layers replaced by a trained one (arXiv 2403.19135)",
}
NETWORK_SOURCES = {
    "dilap": "levels of measured latency, after a quadratic model of the distance from dense; this project",
    "uniform": "small filters, the same share of every group (arXiv 1608.08710)",
    "magnitude": "small filters by their L1 norms, compared over the network (arXiv 1608.08710)",
    "taylor": "parameters times gradients of batch norms, squared (arXiv 1906.10771)",
    "halp": "a knapsack of latencies in rounds of training (arXiv 2210.06659, non-commercial)",
    "torch_pruning": "torch-pruning's own pruner, run until the budget is kept (arXiv 2301.12900, MIT)",
}
# Tokens on which the authors calibrate, for methods that need no training and whose authors say it: FLAP's are 1,024
# sequences of 128, Puzzle's 16 of 8,192, SPRINT's 128 of 2,048. What other methods read is in their docstrings.
PUBLISHED_TOKENS = {"wanda_sp": 16_384, "flap": 131_072, "llm_pruner": 640, "puzzle": 131_072, "sprint": 262_144}
NOT_COMPARED = ("equal_widths",)  # this is DiLAP itself, for runtimes that need equal widths
TRAINED = ("loraprune", "compresso", "llm_streamline")  # their authors train, on corpora of their own
MAX_SETTING = 1_000_000  # largest number that a setting of a method (steps, tokens, rates) may have
_NO_SETTINGS: Mapping[str, str] = MappingProxyType({})


def get(name: str, settings: Mapping[str, str] = _NO_SETTINGS, *, table: Mapping[str, str] | None = None) -> Any:
    """Return the `Method` of that name, or a user's own as `module:attribute`, with some of its settings changed.

    `table` has the names to choose from, METHODS by default. Raises InvalidInput for an unknown name, setting or value.
    """
    found = _find(name, table or METHODS)
    if isinstance(found, type):
        return found(**_values(found, name, settings))
    if settings:
        raise InvalidInput(f"method {name} has no settings, got {', '.join(settings)}")
    return found


def require_known(name: str) -> None:
    """Raise InvalidInput for an unknown name of a method, without importing any; a user's own passes."""
    if ":" not in name:
        registry.require({**METHODS, **NETWORK_METHODS}, name, kind="method")


def trained_for(name: str, settings: Mapping[str, str], *, steps: int | None) -> Mapping[str, str]:
    """Return the settings of a method that trains with that number of steps, unless they have another; None is its own.

    The settings of other methods stay as they are.
    """
    return {"steps": str(steps), **settings} if steps is not None and name in TRAINED else settings


def chooses_precision(name: str) -> bool:
    """Return whether a method chooses precisions; for the others all parts are in the artifact's own."""
    return name in _PRECISION


def named(asked: Sequence[str], *, table: Mapping[str, str] = METHODS) -> list[str]:
    """Return the methods asked for, once each; `all` stands for all that are compared.

    `table` has the names to choose from. Raises InvalidInput.
    """
    if "all" in asked:
        return [name for name in table if name not in NOT_COMPARED]
    for name in asked:
        if ":" not in name and name not in table:
            raise InvalidInput(f"unknown method {name!r}; known: all, {', '.join(sorted(table))}")
    return list(dict.fromkeys(asked))


def settings_of(name: str, *, table: Mapping[str, str] = METHODS) -> list[str]:
    """Return the names of a method's settings. Raises InvalidInput for an unknown method."""
    found = _find(name, table)
    return [field.name for field in fields(found)] if is_dataclass(found) else []


def _find(name: str, table: Mapping[str, str]) -> Any:
    return registry.own(name, kind="method") if ":" in name else registry.get(table, name, kind="method")


def _values(kind: type, name: str, settings: Mapping[str, str]) -> dict[str, Any]:
    hints = typing.get_type_hints(kind) if is_dataclass(kind) else {}
    known = {field.name: field for field in fields(kind)} if is_dataclass(kind) else {}
    values = {}
    for key, text in settings.items():
        if key not in known:
            raise InvalidInput(f"method {name} has no setting {key!r}; it has {', '.join(known) or 'none'}")
        try:
            values[key] = _value(hints[key], text)
            _require_plausible(values[key], known[key])
        except (ValueError, KeyError) as error:
            expected = getattr(hints[key], "__name__", hints[key])
            if choices := typing.get_args(hints[key]):
                expected = " or ".join(map(str, choices))
            reason = f" ({error})" if isinstance(error, _OutOfRange) else ""
            raise InvalidInput(f"method {name}: {key} is {expected}, got {text!r:.80}{reason}") from error
    return values


def _value(hint: Any, text: str) -> Any:
    if typing.get_origin(hint) is typing.Literal:
        return {str(choice): choice for choice in typing.get_args(hint)}[text]
    return {"true": True, "false": False}[text.lower()] if hint is bool else hint(text)


class _OutOfRange(ValueError):
    """A number that is too small or too large for a setting."""


def _require_plausible(value: Any, setting: "Field[Any]") -> None:
    """Raise _OutOfRange for a number outside a setting's range.

    A whole number is at least 1, or its default where that is less, or `least` where the field's metadata have it.
    """
    if type(value) is int:
        least = setting.metadata.get("least", min(1, setting.default) if isinstance(setting.default, int) else 1)
        if not least <= value <= MAX_SETTING:
            raise _OutOfRange(f"from {least} to {MAX_SETTING:,}")
    elif type(value) is float and not 0 <= value <= MAX_SETTING:
        raise _OutOfRange(f"from 0 to {MAX_SETTING:,}")
