"""Ways to prune: names of methods, and of searches over measured levels. The interface is in `method.py`."""

import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import MappingProxyType
from typing import Any

from dilap import registry
from dilap.errors import InvalidInput

METHODS = {
    "dilap": "dilap.methods.dilap:prune",
    "equal_widths": "dilap.methods.equal_widths:prune",
    "uniform": "dilap.methods.uniform:prune",
    "layer_error": "dilap.methods.layer_error:prune",
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
SEARCHES = {
    "dilap": "dilap.methods.dilap:search",
    "equal_widths": "dilap.methods.equal_widths:search",
    "uniform": "dilap.methods.uniform:search",
    "layer_error": "dilap.methods.layer_error:search",
}
_NO_SETTINGS: Mapping[str, str] = MappingProxyType({})


def get(name: str, settings: Mapping[str, str] = _NO_SETTINGS, *, table: Mapping[str, str] | None = None) -> Any:
    """The `Method` of that name, or a user's own as `module:attribute`, with some of its settings changed.

    `table` are other objects with settings to choose from.

    Raises InvalidInput for an unknown name, setting or value.
    """
    found = registry.own(name, kind="method") if ":" in name else registry.get(table or METHODS, name, kind="method")
    if isinstance(found, type):
        return found(**_values(found, name, settings))
    if settings:
        raise InvalidInput(f"method {name} has no settings, got {', '.join(settings)}")
    return found


def _values(kind: type, name: str, settings: Mapping[str, str]) -> dict[str, Any]:
    hints = typing.get_type_hints(kind) if is_dataclass(kind) else {}
    known = [field.name for field in fields(kind)] if is_dataclass(kind) else []
    values = {}
    for key, text in settings.items():
        if key not in known:
            raise InvalidInput(f"method {name} has no setting {key!r}; it has {', '.join(known) or 'none'}")
        try:
            values[key] = _value(hints[key], text)
        except (ValueError, KeyError) as error:
            expected = getattr(hints[key], "__name__", hints[key])
            if choices := typing.get_args(hints[key]):
                expected = " or ".join(map(str, choices))
            raise InvalidInput(f"method {name}: {key} is {expected}, got {text!r}") from error
    return values


def _value(hint: Any, text: str) -> Any:
    if typing.get_origin(hint) is typing.Literal:
        return {str(choice): choice for choice in typing.get_args(hint)}[text]
    return {"true": True, "false": False}[text.lower()] if hint is bool else hint(text)
