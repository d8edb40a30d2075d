"""The figures of a report as Vega-Lite, each with its caption and its data as a table."""

from collections.abc import Mapping, Sequence
from typing import Any

from dilap.report.figure import Figure, field, tooltip
from dilap.report.inputs import Contents, Run
from dilap.report.latency_figures import costs, predictions
from dilap.report.summary import SummaryRow, mean_accuracy


def figures(contents: Contents, summary: Sequence[SummaryRow]) -> list[Figure]:
    """Return the figures that the contents have data for."""
    made = [
        *_tradeoffs(summary),
        *_accuracies(contents),
        *_widths(contents.runs),
        *costs(contents.runs),
        *predictions(contents.runs),
        *_recoveries(contents.runs),
    ]
    return [figure for figure in made if figure.rows]


def _tradeoffs(summary: Sequence[SummaryRow]) -> list[Figure]:
    """Return quality against latency, one figure for each measure of quality."""
    measures = (
        ("kl", f"KL to the dense model (nats a {_units(summary)})", False),
        ("cosine", "Cosine similarity of embeddings to the dense model's", True),
        ("perplexity", "Perplexity", False),
        ("agreement", "Photographs with the dense model's class", True),
        ("top1", "Top-1", True),
        ("mean_accuracy", "Mean accuracy of the tasks", True),
    )
    if len(summary) < 2:
        return []
    return [_tradeoff(summary, key, title, is_gain) for key, title, is_gain in measures]


def _units(summary: Sequence[SummaryRow]) -> str:
    """Say what KL is counted by."""
    found = {row.is_of_images for row in summary if row.kl is not None}
    return " or ".join(["token"] * (False in found) + ["photograph"] * (True in found))


def _tradeoff(summary: Sequence[SummaryRow], key: str, title: str, is_gain: bool) -> Figure:
    rows = [
        {
            "run": row.run,
            "method": "dense" if row.method == "none" else row.method,
            "budget": row.budget,
            "status": row.status,
            "ms": row.seconds * 1e3,
            "low": row.seconds_low and row.seconds_low * 1e3,
            "high": row.seconds_high and row.seconds_high * 1e3,
            "measurement": row.measurement,
            "through": "" if key == "mean_accuracy" else row.quality_through,
            "of_dense": row.of_dense,
            "value": value,
        }
        for row in summary
        if (value := getattr(row, key)) is not None
    ]
    front = _front([row for row in rows if row["measurement"] != "estimated"], is_gain=is_gain)
    columns = {
        "run": "Run",
        "method": "Method",
        "budget": "Budget",
        "status": "Budget kept?",
        "measurement": "Measurement",
        "ms": "Latency (ms)",
        "low": "95 % low",
        "high": "95 % high",
        "of_dense": "Share of dense",
        "value": title,
    }
    columns |= {"through": "Scored through"} if key != "mean_accuracy" else {}
    x = field("ms", "Latency (ms)", scale={"zero": False, "nice": True})
    y = field("value", title, scale={"zero": not is_gain, "nice": True})
    method = field("method", "Method", "nominal")
    spec = {
        "height": 320,
        "layer": [
            {
                "data": {"values": front},
                "mark": {"type": "line", "interpolate": "step-after", "strokeDash": [5, 4], "aria": False},
                "encoding": {"x": x, "y": y, "color": {"value": "gray"}},
            },
            *_points(x, {"y": y}, method, tooltip=tooltip(columns, rows), size=110),
        ],
    }
    better = "up" if is_gain else "down"
    caption = (
        f"{_latency_words(rows)} Better is left and {better}; the dashed line joins the measured runs that no other "
        f"beats in both.{_quality_words(rows)}"
    )
    names = {"kl": "KL", "perplexity": "Perplexity", "agreement": "Same class", "top1": "Top-1"}
    names |= {"mean_accuracy": "Accuracy", "cosine": "Cosine similarity"}
    return Figure(
        name=f"tradeoff-{key.replace('_', '-')}",
        title=f"{names[key]} against latency",
        caption=caption,
        columns=columns,
        rows=rows,
        spec=spec,
    )


def _latency_words(rows: Sequence[Mapping[str, Any]]) -> str:
    estimated = [row["run"] for row in rows if row["measurement"] == "estimated"]
    if len(estimated) == len(rows):
        return "Every run at its latency as it is estimated from published numbers: nothing was measured on a device."
    some = f" Estimated and measured on no device: {', '.join(estimated)}." if estimated else ""
    return f"Every run at its latency measured on the device (lines: 95 % interval).{some}"


def _quality_words(rows: Sequence[Mapping[str, Any]]) -> str:
    """Say for which runs the quality is that of the torch model, not of the artifact; empty where for none."""
    in_torch = [row["run"] for row in rows if row["through"] == "torch"]
    return f" Of the torch model in floats, not of the artifact: {', '.join(in_torch)}." if in_torch else ""


def _points(
    x: Mapping[str, Any], place: Mapping[str, Any], series: Mapping[str, Any], *, tooltip: Any, size: int
) -> list[dict[str, Any]]:
    """Return two layers: a line from `low` to `high` of every row, and its point on top."""
    low = field("low", x["title"])
    # "stroke", not "color": layers share the scale of "color", and the lines' legend would spoil that of the points.
    line = {"x": low, "x2": {"field": "high"}, **place, "stroke": {**series, "legend": None}}
    point = {"x": x, **place, "color": series, "shape": series, "tooltip": tooltip}
    return [
        {
            "transform": [{"filter": {"field": "low", "valid": True}}],
            "mark": {"type": "rule", "strokeWidth": 2, "aria": False},
            "encoding": line,
        },
        {"mark": {"type": "point", "filled": True, "size": size, "opacity": 1}, "encoding": point},
    ]


def _front(rows: Sequence[Mapping[str, Any]], *, is_gain: bool) -> list[Mapping[str, Any]]:
    """Return the rows that no other row beats in both latency and value, the fastest first."""
    sign = -1 if is_gain else 1
    front: list[Mapping[str, Any]] = []
    for row in sorted(rows, key=lambda one: (one["ms"], sign * one["value"])):
        if not front or sign * row["value"] < sign * front[-1]["value"]:
            front.append(row)
    return front


def _accuracies(contents: Contents) -> list[Figure]:
    """Return the accuracy of every task in every evaluation, with its standard error."""
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
    task, model = field("task", "Task", "nominal"), field("model", "Model", "nominal")
    x = field("acc", "Accuracy", scale={"zero": False})
    place = {"y": task, "yOffset": {"field": "model", "type": "nominal"}}
    spec = {
        "height": 14 * max(2, len(evaluations)) * len({row["task"] for row in rows}),
        "layer": _points(x, place, model, tooltip=tooltip(columns, rows), size=80),
    }
    means = ", ".join(f"{name} {mean:.1%}" for name, one in evaluations if (mean := mean_accuracy(one)) is not None)
    caption = f"lm-eval's accuracy by task; lines are one standard error. Means: {means}."
    return [Figure(name="accuracy", title="Accuracy by task", caption=caption, columns=columns, rows=rows, spec=spec)]


def _widths(runs: Sequence[Run]) -> list[Figure]:
    """Return what every layer keeps: figures for attention heads and channels of decoders, and for image networks."""
    decoders = [run for run in runs if run.widths]
    return [
        _kept(decoders, "num_heads", "heads", "Attention heads kept by layer", "query heads"),
        _kept(decoders, "num_channels", "channels", "Feed-forward channels kept by layer", "channels"),
        _kept_groups([run for run in runs if run.channels]),
    ]


def _kept_groups(runs: Sequence[Run]) -> Figure:
    """Return what every group of channels of image networks keeps."""
    rows = [
        {"run": run.name, "layer": number, "group": name, "kept": kept, "dense": dense, "share": kept / dense}
        for run in runs
        for number, (name, (kept, dense)) in enumerate(run.channels.items())
    ]
    columns = {"run": "Run", "layer": "Group", "group": "First layer", "kept": "Kept units", "dense": "Dense units"}
    columns["share"] = "Share"
    caption = (
        "The share of channels that each group keeps, in the order of the network. The layers of a group have the same "
        "channels; it has the name of the first. 0 is a residual branch that was removed."
    )
    title = "Channels kept by group"
    return _map_of_shares("kept-groups", title, caption, columns, rows, num_runs=len(runs), place="Group")


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
        for index, (layer, dense) in enumerate(zip(run.widths, run.result.dense.artifact.decoder.layers, strict=True))
    ]
    columns = {"run": "Run", "layer": "Layer", "kept": f"Kept {unit}", "dense": f"Dense {unit}", "share": "Share"}
    if name == "heads":
        columns["kv_heads"] = "Kept KV heads"
    caption = f"The share of {unit} that each decoder layer keeps; 0 is a sublayer that was removed."
    return _map_of_shares(f"kept-{name}", title, caption, columns, rows, num_runs=len(runs), place="Layer")


def _map_of_shares(
    name: str,
    title: str,
    caption: str,
    columns: Mapping[str, str],
    rows: Sequence[Mapping[str, Any]],
    *,
    num_runs: int,
    place: str,
) -> Figure:
    """Return a figure with a row for each run, and a cell for each layer or group (`place`), coloured by its share."""
    spec = {
        "height": 34 * num_runs,
        "mark": {"type": "rect", "cornerRadius": 2},
        "encoding": {
            "x": field("layer", place, "ordinal", axis={"labelAngle": 0, "labelOverlap": True}),
            "y": field("run", "", "nominal", axis={"labelLimit": 110}),
            "color": field(
                "share",
                "Share kept",
                scale={"domain": [0, 1], "scheme": "viridis"},
                legend={"format": ".0%", "orient": "top", "gradientLength": 180},
            ),
            "tooltip": tooltip(columns, rows),
        },
        "config": {"scale": {"bandPaddingInner": 0.08}},
    }
    return Figure(name=name, title=title, caption=caption, columns=columns, rows=rows, spec=spec)


def _recoveries(runs: Sequence[Run]) -> list[Figure]:
    rows: list[dict[str, Any]] = [
        {"run": run.name, "text": text, "step": step, "distance": distance}
        for run in runs
        for text, curve in (
            ("each step's own", enumerate(run.result.recovery_kls, start=1)),
            ("validation split", run.result.recovery_validation_kls),
        )
        for step, distance in curve
    ]
    recovered = [run.result.pruned.quality for run in runs if run.result.recovery_kls]
    measure = " or ".join(dict.fromkeys(one.DISTANCE for one in recovered))
    units = " or ".join(dict.fromkeys(one.DISTANCE_IN_UNITS for one in recovered))
    columns = {"run": "Run", "text": "Text", "step": "Step", "distance": units}
    spec = {
        "height": 260,
        "mark": {"type": "line", "point": {"filled": True, "size": 40}},
        "encoding": {
            "x": field("step", "Step of recovery", axis={"tickMinStep": 1}),
            "y": field("distance", f"{measure} to the dense model", scale={"zero": False}),
            "color": field("run", "Run", "nominal"),
            "strokeDash": field("text", "Text", "nominal"),
            "tooltip": tooltip(columns, rows),
        },
    }
    caption = (
        f"How far the pruned model is from the dense one ({measure}) while it learns from it, on each step's own "
        "examples and on the validation split, whose best state is kept."
    )
    return [Figure(name="recovery", title="Recovery", caption=caption, columns=columns, rows=rows, spec=spec)]
