"""The tables and the chart of what was measured, from tools/results.json, where every figure is kept once.

    tools/results           prints the tables of README.md and dilap/README.md, and draws tools/results.svg anew

A test compares all three with the file. To show newer numbers, change the file, run this and paste the tables. A row
is a method at a budget (`budget_percent`), or a plain format of the dense model where its latency is
(`latency_percent`), both in % of the dense model's; what was not measured is left out.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dilap.cli.console import run, show
from dilap.core.codec import read_json, written_aside

HERE = Path(__file__).parent
RESULTS, CHART = HERE / "results.json", HERE / "results.svg"
Row = Mapping[str, Any]


def budgets(found: Mapping[str, Any]) -> str:
    """Return the table of DiLAP's own runs."""
    lines = [
        "| budget | latency | of the budget | KL before recovery | KL | perplexity | parameters |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        if row["name"] == "dilap":
            over = " (reported as missed)" if row["used_percent"] > 100 else ""
            lines.append(
                f"| {row['budget_percent']} % | {row['latency_percent']} % | {row['used_percent']} %{over} | "
                f"{row['kl_before_recovery']:.3f} | {row['kl']:.3f} | {row['perplexity']:.1f} | "
                f"{row['million_parameters']} M |"
            )
    return "\n".join(lines)


def methods(found: Mapping[str, Any]) -> str:
    """Return the table of all methods at all budgets: KL before recovery, after it, and perplexity."""
    shares = sorted({row["budget_percent"] for row in found["rows"] if "budget_percent" in row}, reverse=True)
    cells: dict[str, dict[int, str]] = {}
    for row in found["rows"]:
        if "budget_percent" in row:
            perplexity = f"{row['perplexity']:.1f}" if row["perplexity"] < 5000 else f"{row['perplexity']:.0f}"
            cell = f"{row['kl_before_recovery']:.3f} → {row['kl']:.3f} ({perplexity})"
            cells.setdefault(row["name"], {})[row["budget_percent"]] = cell
    head = f"| method | {' | '.join(f'{share} %' for share in shares)} |"
    rows = [f"| `{name}` | {' | '.join(one.get(share, '') for share in shares)} |" for name, one in cells.items()]
    return "\n".join([head, f"|{'---|' * (1 + len(shares))}", *rows])


def chart(found: Mapping[str, Any]) -> str:
    """Return an SVG of KL against latency; lower and further left is better."""
    import vl_convert  # noqa: PLC0415 - carries a JavaScript engine, which the tables do not need

    points = [_point(row) for row in found["rows"] if row["name"] in found["shown"]]
    labelled = {one["name"]: one for one in sorted(points, key=lambda one: one["latency"], reverse=True)}
    shared = {
        "x": {
            "field": "latency",
            "type": "quantitative",
            "title": f"latency (of methods: the budget), % of the dense model; {found['what']}",
            "scale": {"zero": False, "padding": 60},
        },
        "y": {
            "field": "kl",
            "type": "quantitative",
            "title": "KL to the dense model, nats a token",
            "scale": {"type": "log", "nice": False, "padding": 25},
            "axis": {"values": [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5]},
        },
        "color": _by_kind("#0b6e4f", "#8a8f98", "#b35900"),
    }
    lines = {"detail": {"field": "name", "type": "nominal"}, "strokeWidth": _by_kind(3, 1.2, 1.2)}
    spec = {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "background": "white",
        "width": 620,
        "height": 320,
        "layer": [
            {
                "data": {"values": points},
                "mark": {"type": "line", "point": True},
                "encoding": {**shared, **lines},
            },
            {
                "data": {"values": list(labelled.values())},
                "mark": {"type": "text", "align": "right", "dx": -8},
                "encoding": {**shared, "text": {"field": "name"}},
            },
        ],
    }
    return str(vl_convert.vegalite_to_svg(spec))


def _point(row: Row) -> dict[str, Any]:
    is_method = "budget_percent" in row
    return {
        "name": row["name"],
        "latency": row["budget_percent"] if is_method else row["latency_percent"],
        "kl": row["kl"],
        "kind": "dilap" if row["name"] == "dilap" else "method" if is_method else "format",
    }


def _by_kind(*values: object) -> dict[str, Any]:
    """Return the encoding that gives DiLAP, other methods and plain formats a value each."""
    scale = {"domain": ["dilap", "method", "format"], "range": list(values)}
    return {"field": "kind", "type": "nominal", "legend": None, "scale": scale}


def main(words: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(words)
    found = read_json(RESULTS)
    show("\n\n".join([budgets(found), methods(found)]))
    with written_aside(CHART) as path:
        path.write_text(chart(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    run(main)
