"""The figures of a report as Vega-Lite, each with its caption and its data as a table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dilap.codec import digest
from dilap.profilers.table import LatencyTable
from dilap.report.inputs import Contents, Run
from dilap.report.summary import SummaryRow, mean_accuracy

Cell = str | int | float | None
Spec = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """`spec` is Vega-Lite without its data; `rows` are the data, with the keys of `columns` (key: heading)."""

    name: str
    title: str
    caption: str
    columns: Mapping[str, str]
    rows: Sequence[Mapping[str, Cell]]
    spec: Spec


def figures(contents: Contents, summary: Sequence[SummaryRow]) -> list[Figure]:
    """Those that the contents have data for."""
    made = [
        *_tradeoffs(summary),
        *_accuracies(contents),
        *_widths(contents.runs),
        *_costs(contents.runs),
        *_predictions(contents.runs),
        *_recoveries(contents.runs),
    ]
    return [figure for figure in made if figure.rows]


def _field(name: str, title: str, kind: str = "quantitative", **more: Any) -> Spec:
    return {"field": name, "type": kind, "title": title, **more}


def _tooltip(columns: Mapping[str, str], rows: Sequence[Mapping[str, Cell]]) -> list[Spec]:
    numeric = {key for key in columns if any(isinstance(row[key], float) for row in rows)}
    return [
        {"field": key, "title": title, "type": "quantitative", "format": ".4~g"}
        if key in numeric
        else {"field": key, "title": title, "type": "nominal"}
        for key, title in columns.items()
    ]


def _tradeoffs(summary: Sequence[SummaryRow]) -> list[Figure]:
    """Quality against measured latency, once for each measure of quality."""
    measures = (
        ("kl", "KL to the dense model (nats a token)", False),
        ("perplexity", "Perplexity", False),
        ("mean_accuracy", "Mean accuracy of the tasks", True),
    )
    if len(summary) < 2:
        return []
    return [_tradeoff(summary, key, title, is_gain) for key, title, is_gain in measures]


def _tradeoff(summary: Sequence[SummaryRow], key: str, title: str, is_gain: bool) -> Figure:
    rows = [
        {
            "run": row.run,
            "method": "dense" if row.method == "none" else row.method,
            "budget": row.budget,
            "status": row.status,
            "ms": row.seconds * 1e3,
            "low": row.seconds_low * 1e3,
            "high": row.seconds_high * 1e3,
            "of_dense": row.of_dense,
            "value": value,
        }
        for row in summary
        if (value := getattr(row, key)) is not None
    ]
    front = _front(rows, is_gain=is_gain)
    columns = {
        "run": "Run",
        "method": "Method",
        "budget": "Budget",
        "status": "Budget kept?",
        "ms": "Latency (ms)",
        "low": "95 % low",
        "high": "95 % high",
        "of_dense": "Share of dense",
        "value": title,
    }
    x = _field("ms", "Measured latency (ms)", scale={"zero": False, "nice": True})
    y = _field("value", title, scale={"zero": not is_gain, "nice": True})
    method = _field("method", "Method", "nominal")
    spec = {
        "height": 320,
        "layer": [
            {
                "data": {"values": front},
                "mark": {"type": "line", "interpolate": "step-after", "strokeDash": [5, 4], "aria": False},
                "encoding": {"x": x, "y": y, "color": {"value": "gray"}},
            },
            *_points(x, {"y": y}, method, tooltip=_tooltip(columns, rows), size=110),
        ],
    }
    better = "up" if is_gain else "down"
    caption = (
        f"Every run at its latency measured on the device (lines: 95 % interval of the median). Better is left and "
        f"{better}; the dashed line joins the runs that no other beats in both."
    )
    names = {"kl": "KL", "perplexity": "Perplexity", "mean_accuracy": "Accuracy"}
    return Figure(
        name=f"tradeoff-{key.replace('_', '-')}",
        title=f"{names[key]} against measured latency",
        caption=caption,
        columns=columns,
        rows=rows,
        spec=spec,
    )


def _points(
    x: Mapping[str, Any], place: Mapping[str, Any], series: Mapping[str, Any], *, tooltip: Any, size: int
) -> list[dict[str, Any]]:
    """Layers: a line from `low` to `high` of every row, and its point on top."""
    low = _field("low", x["title"])
    # Not "color": layers share its scale, and the points' legend would lose its colours or its shapes to the lines'.
    line = {"x": low, "x2": {"field": "high"}, **place, "stroke": {**series, "legend": None}}
    point = {"x": x, **place, "color": series, "shape": series, "tooltip": tooltip}
    return [
        {"mark": {"type": "rule", "strokeWidth": 2, "aria": False}, "encoding": line},
        {"mark": {"type": "point", "filled": True, "size": size, "opacity": 1}, "encoding": point},
    ]


def _front(rows: Sequence[Mapping[str, Any]], *, is_gain: bool) -> list[Mapping[str, Any]]:
    """The rows that no other beats in latency and value, fastest first."""
    sign = -1 if is_gain else 1
    front: list[Mapping[str, Any]] = []
    for row in sorted(rows, key=lambda one: (one["ms"], sign * one["value"])):
        if not front or sign * row["value"] < sign * front[-1]["value"]:
            front.append(row)
    return front


def _accuracies(contents: Contents) -> list[Figure]:
    """Every task of every evaluation, with the standard error."""
    evaluations = contents.all_evaluations
    rows: list[dict[str, Any]] = [
        {
            "model": name,
            "task": task,
            "rows": evaluation.facts[task].num_rows,
            "shots": evaluation.facts[task].num_fewshot,
            "acc": metrics["acc"],
            "low": metrics["acc"] - metrics.get("acc_stderr", 0.0),
            "high": metrics["acc"] + metrics.get("acc_stderr", 0.0),
        }
        for name, evaluation in evaluations
        for task, metrics in evaluation.tasks.items()
        if "acc" in metrics
    ]
    columns = {"model": "Model", "task": "Task", "rows": "Rows", "shots": "Examples", "acc": "Accuracy"}
    columns |= {"low": "- standard error", "high": "+ standard error"}
    task, model = _field("task", "Task", "nominal"), _field("model", "Model", "nominal")
    x = _field("acc", "Accuracy", scale={"zero": False})
    place = {"y": task, "yOffset": {"field": "model", "type": "nominal"}}
    spec = {
        "height": 14 * max(2, len(evaluations)) * len({row["task"] for row in rows}),
        "layer": _points(x, place, model, tooltip=_tooltip(columns, rows), size=80),
    }
    means = ", ".join(f"{name} {mean:.1%}" for name, one in evaluations if (mean := mean_accuracy(one)) is not None)
    caption = f"lm-eval's accuracy by task; lines are one standard error. Means: {means}."
    return [Figure(name="accuracy", title="Accuracy by task", caption=caption, columns=columns, rows=rows, spec=spec)]


def _widths(runs: Sequence[Run]) -> list[Figure]:
    """What every layer keeps: one picture for attention heads, one for channels."""
    return [
        _kept(runs, "num_heads", "heads", "Attention heads kept by layer", "query heads"),
        _kept(runs, "num_channels", "channels", "Feed-forward channels kept by layer", "channels"),
    ]


def _kept(runs: Sequence[Run], attribute: str, name: str, title: str, unit: str) -> Figure:
    rows = [
        {
            "run": run.name,
            "layer": index,
            "kept": getattr(layer, attribute),
            "kv_heads": layer.num_kv_heads,
            "dense": getattr(dense, attribute),
            "share": getattr(layer, attribute) / max(1, getattr(dense, attribute)),
        }
        for run in runs
        for index, (layer, dense) in enumerate(
            zip(run.widths, run.result.dense.artifact.architecture.layers, strict=True)
        )
    ]
    columns = {"run": "Run", "layer": "Layer", "kept": f"Kept {unit}", "dense": f"Dense {unit}", "share": "Share"}
    if name == "heads":
        columns["kv_heads"] = "Kept KV heads"
    spec = {
        "height": 34 * len(runs),
        "mark": {"type": "rect", "cornerRadius": 2},
        "encoding": {
            "x": _field("layer", "Layer", "ordinal", axis={"labelAngle": 0, "labelOverlap": True}),
            "y": _field("run", "", "nominal", axis={"labelLimit": 110}),
            "color": _field(
                "share",
                "Share kept",
                scale={"domain": [0, 1], "scheme": "viridis"},
                legend={"format": ".0%", "orient": "top", "gradientLength": 180},
            ),
            "tooltip": _tooltip(columns, rows),
        },
        "config": {"scale": {"bandPaddingInner": 0.08}},
    }
    caption = f"The share of {unit} that each decoder layer keeps; 0 is a sublayer that was removed."
    return Figure(name=f"kept-{name}", title=title, caption=caption, columns=columns, rows=rows, spec=spec)


def _tables(runs: Sequence[Run]) -> list[tuple[str, LatencyTable]]:
    """Each different table once, under the name of the first run that used it."""
    found: dict[str, tuple[str, LatencyTable]] = {}
    for run in runs:
        if run.table is not None:
            key = digest([run.table.header.created, len(run.table.entries)])
            found.setdefault(key, (run.name, run.table))
    return list(found.values())


def _costs(runs: Sequence[Run]) -> list[Figure]:
    """What a layer's width costs in the runtime, as the table was fitted."""
    channels, heads = [], []
    for name, table in _tables(runs):
        model = table.model()
        for work, seconds in zip(model.ffn.work, model.ffn.seconds, strict=True):
            channels.append({"table": name, "width": int(work), "microseconds": seconds * 1e6})
        dense = model.architecture.layers[0]
        ratio = dense.num_heads // max(1, dense.num_kv_heads)
        for kv_heads in range(dense.num_kv_heads + 1):
            seconds = model.attention_seconds(kv_heads * ratio, kv_heads) if kv_heads else 0.0
            heads.append({"table": name, "width": kv_heads, "microseconds": seconds * 1e6})
    return [
        _curve(channels, "cost-channels", "Cost of feed-forward channels", "Channels of a layer"),
        _curve(heads, "cost-heads", "Cost of KV heads", "KV heads of a layer, each with its query heads"),
    ]


def _curve(rows: list[dict[str, Any]], name: str, title: str, x_title: str) -> Figure:
    columns = {"table": "Table of", "width": x_title, "microseconds": "Microseconds a layer"}
    color = _field("table", "Table of", "nominal")
    spec = {
        "height": 260,
        "mark": {"type": "line", "point": {"filled": True, "size": 50}},
        "encoding": {
            "x": _field("width", x_title, axis={"tickMinStep": 1}),
            "y": _field("microseconds", "Microseconds a layer"),
            "color": color,
            "tooltip": _tooltip(columns, rows),
        },
    }
    caption = "Latency that one layer adds, from whole-model measurements of probe models on the device."
    return Figure(name=name, title=title, caption=caption, columns=columns, rows=rows, spec=spec)


def _predictions(runs: Sequence[Run]) -> list[Figure]:
    """Held-out plans of every table, and what the runs were predicted to take."""
    rows: list[dict[str, Any]] = []
    for name, table in _tables(runs):
        model = table.model()
        rows += [
            _prediction(f"{name}, held-out {number}", "held-out plan", model.predict(one.widths), one.seconds)
            for number, one in enumerate(model.holdout, start=1)
        ]
    rows += [
        _prediction(run.name, "run", run.result.predicted_seconds, run.result.pruned.seconds)
        for run in runs
        if run.result.predicted_seconds is not None
    ]
    columns = {"plan": "Plan", "kind": "Kind", "predicted": "Predicted (ms)", "measured": "Measured (ms)"}
    columns["error"] = "Prediction is off by"
    ends = [value for row in rows for value in (row["predicted"], row["measured"])] or [0.0]
    line = [{"predicted": value, "measured": value} for value in (min(ends), max(ends))]
    kind = _field("kind", "Kind", "nominal")
    x = _field("predicted", "Predicted (ms)", scale={"zero": False})
    y = _field("measured", "Measured (ms)", scale={"zero": False})
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
                "encoding": {"x": x, "y": y, "color": kind, "shape": kind, "tooltip": _tooltip(columns, rows)},
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


def _recoveries(runs: Sequence[Run]) -> list[Figure]:
    rows: list[dict[str, Any]] = [
        {"run": run.name, "step": step, "kl": kl}
        for run in runs
        for step, kl in enumerate(run.result.recovery_kls, start=1)
    ]
    columns = {"run": "Run", "step": "Step", "kl": "KL (nats a token)"}
    spec = {
        "height": 260,
        "mark": {"type": "line", "point": {"filled": True, "size": 40}},
        "encoding": {
            "x": _field("step", "Step of recovery", axis={"tickMinStep": 1}),
            "y": _field("kl", "KL to the dense model", scale={"zero": False}),
            "color": _field("run", "Run", "nominal"),
            "tooltip": _tooltip(columns, rows),
        },
    }
    caption = "KL to the dense model on each step's own text while the pruned model learns from it."
    return [Figure(name="recovery", title="Recovery", caption=caption, columns=columns, rows=rows, spec=spec)]
