"""A figure in the form of Vega-Lite, with its caption and its data as a table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Cell = str | int | float | None
Spec = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure of a report. `spec` is Vega-Lite without data; `rows` are the data, and `columns` has their headings."""

    name: str
    title: str
    caption: str
    columns: Mapping[str, str]
    rows: Sequence[Mapping[str, Cell]]
    spec: Spec


def field(name: str, title: str, kind: str = "quantitative", **more: Any) -> Spec:
    return {"field": name, "type": kind, "title": title, **more}


def tooltip(columns: Mapping[str, str], rows: Sequence[Mapping[str, Cell]]) -> list[Spec]:
    numeric = {key for key in columns if any(isinstance(row[key], float) for row in rows)}
    return [
        {"field": key, "title": title, "type": "quantitative", "format": ".4~g"}
        if key in numeric
        else {"field": key, "title": title, "type": "nominal"}
        for key, title in columns.items()
    ]
