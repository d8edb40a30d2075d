"""The figures of latency tables: what a width costs, and how well the sum of costs predicts a model."""

from collections.abc import Sequence
from typing import Any

from dilap.core.codec import digest
from dilap.core.errors import InvalidInput
from dilap.profilers.tables.model import LatencyModel
from dilap.profilers.tables.table import LatencyTable
from dilap.report.figure import Figure, field, tooltip
from dilap.report.inputs import Run


def _models(runs: Sequence[Run]) -> list[tuple[str, LatencyModel]]:
    """Return the fit of every different table, with the name of the first run that used the table.

    Tables that cannot be fitted any more are left out.
    """
    found: dict[str, tuple[str, LatencyTable]] = {}
    for run in runs:
        if run.table is not None:
            key = digest([run.table.header.created, len(run.table.entries)])
            found.setdefault(key, (run.name, run.table))
    return [(name, model) for name, table in found.values() if (model := _model(table)) is not None]


def _model(table: LatencyTable) -> LatencyModel | None:
    """Return the fit of a table, or None where too little of the table counts.

    Earlier versions also fitted what was measured beside other load, which does not count any more.
    """
    try:
        return table.model()
    except InvalidInput:
        return None


def costs(runs: Sequence[Run]) -> list[Figure]:
    """Return the figures of what a layer of any width costs: one for channels, one for KV heads."""
    channels, heads = [], []
    for name, model in _models(runs):
        dense = model.architecture.layers[0]
        ratio = dense.num_heads // max(1, dense.num_kv_heads)
        for precision, found in model.by_precision.items():
            label = f"{name}, {precision}" if precision else name
            for work, seconds in zip(found.ffn.work, found.ffn.seconds, strict=True):
                channels.append({"table": label, "width": int(work), "microseconds": seconds * 1e6})
            for kv_heads in range(dense.num_kv_heads + 1):
                seconds = model.attention_seconds(kv_heads * ratio, kv_heads, precision)
                heads.append({"table": label, "width": kv_heads, "microseconds": seconds * 1e6})
    return [
        _curve(channels, "cost-channels", "Cost of feed-forward channels", "Channels of a layer"),
        _curve(heads, "cost-heads", "Cost of KV heads", "KV heads of a layer, each with its query heads"),
    ]


def _curve(rows: list[dict[str, Any]], name: str, title: str, x_title: str) -> Figure:
    columns = {"table": "Table of", "width": x_title, "microseconds": "Microseconds a layer"}
    color = field("table", "Table of", "nominal")
    spec = {
        "height": 260,
        "mark": {"type": "line", "point": {"filled": True, "size": 50}},
        "encoding": {
            "x": field("width", x_title, axis={"tickMinStep": 1}),
            "y": field("microseconds", "Microseconds a layer"),
            "color": color,
            "tooltip": tooltip(columns, rows),
        },
    }
    caption = "Latency that one layer adds, from whole-model measurements of probe models on the device."
    return Figure(name=name, title=title, caption=caption, columns=columns, rows=rows, spec=spec)


def predictions(runs: Sequence[Run]) -> list[Figure]:
    """Return the figure of predicted against measured latency, of the tables' held-out plans and of the runs."""
    rows: list[dict[str, Any]] = []
    for name, model in _models(runs):
        rows += [
            _prediction(
                f"{name}, held-out {number}", "held-out plan", model.predict(one.widths, one.precisions), one.seconds
            )
            for number, one in enumerate(model.holdout, start=1)
        ]
    rows += [
        _prediction(run.name, "run", run.result.predicted_seconds, run.result.pruned.seconds)
        for run in runs
        if run.result.predicted_seconds is not None and not run.result.is_estimate
    ]
    columns = {"plan": "Plan", "kind": "Kind", "predicted": "Predicted (ms)", "measured": "Measured (ms)"}
    columns["error"] = "Prediction is off by"
    ends = [value for row in rows for value in (row["predicted"], row["measured"])] or [0.0]
    line = [{"predicted": value, "measured": value} for value in (min(ends), max(ends))]
    kind = field("kind", "Kind", "nominal")
    x = field("predicted", "Predicted (ms)", scale={"zero": False})
    y = field("measured", "Measured (ms)", scale={"zero": False})
    spec = {
        "height": 320,
        "layer": [
            {
                "data": {"values": line},
                "mark": {"type": "line", "strokeDash": [4, 4], "aria": False},
                "encoding": {"x": x, "y": y, "color": {"value": "gray"}},
            },
            {
                "mark": {"type": "point", "filled": True, "size": 90, "opacity": 1},
                "encoding": {"x": x, "y": y, "color": kind, "shape": kind, "tooltip": tooltip(columns, rows)},
            },
        ],
    }
    caption = (
        "Whole-model latency as the table predicts it, against what was measured. Held-out plans are random ones that "
        "took no part in the fit; on the dashed line the two agree."
    )
    return [
        Figure(
            name="prediction",
            title="Predicted against measured",
            caption=caption,
            columns=columns,
            rows=rows,
            spec=spec,
        )
    ]


def _prediction(plan: str, kind: str, predicted: float, measured: float) -> dict[str, Any]:
    error = f"{predicted / measured - 1:+.1%}"
    return {"plan": plan, "kind": kind, "predicted": predicted * 1e3, "measured": measured * 1e3, "error": error}
