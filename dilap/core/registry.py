"""Find objects by name, and import them only when they are asked for."""

import difflib
import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dilap.core.errors import InvalidInput, reason_of


def require(table: Mapping[str, str], name: str, *, kind: str) -> None:
    """Raise InvalidInput with the known names for an unknown one; `kind` says there what the names stand for."""
    if name not in table:
        close = difflib.get_close_matches(name, table, n=1)
        hint = f"; did you mean {close[0]!r}" if close else ""
        raise InvalidInput(f"unknown {kind} {name!r}{hint}; known: {', '.join(sorted(table))}")


def get(table: Mapping[str, str], name: str, *, kind: str) -> Any:
    """Return the object that `table` has under `name` as "module:attribute". Raises InvalidInput as `require` does."""
    require(table, name, kind=kind)
    module, attribute = table[name].split(":")
    return getattr(importlib.import_module(module), attribute)


def own(name: str, *, kind: str) -> Any:
    """Return the object that a user names as "module:attribute". Raises InvalidInput."""
    module, _, attribute = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # users keep modules there; last, so that no library is hidden
    try:
        return getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise InvalidInput(f"{kind} {name!r} cannot be imported: {reason_of(error)}") from error
    except AttributeError:
        raise InvalidInput(f"{kind} {name!r}: module {module} has no {attribute!r}") from None
