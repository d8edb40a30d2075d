"""What a latency table says, for people and for programs."""

from pathlib import Path
from typing import Any

from dilap.cli import console
from dilap.core.printable import joined
from dilap.profilers.tables.model import LatencyModel
from dilap.profilers.tables.roofline import METHOD as ESTIMATED


def show(model: LatencyModel, *, as_json: bool, table: Path | None) -> None:
    """Print the fitted costs, and the file of the table that they come from; an estimate has none."""
    is_estimate = model.method == ESTIMATED
    if as_json:
        found = document(model) | {"table": None if table is None else str(table), "estimated": is_estimate}
        console.show_json(found)
        return
    if is_estimate:
        console.show("ESTIMATED, measured on no device")
    console.show(text(model))
    if table is not None:
        console.show(f"\nthe table is in {table}")


def document(model: LatencyModel) -> dict[str, Any]:
    """Return the fitted costs, in seconds, and the errors on held-out plans, as a JSON object."""
    return {
        "method": model.method,
        "fixed_seconds": model.fixed_seconds,
        "attention": [
            {"work": w, "seconds": s} for w, s in zip(model.attention.work, model.attention.seconds, strict=True)
        ],
        "ffn": [{"channels": int(w), "seconds": s} for w, s in zip(model.ffn.work, model.ffn.seconds, strict=True)],
        "caveats": list(model.caveats),
        "holdout_errors": model.holdout_errors(),
        "holdout": [
            {"predicted_seconds": model.predict(one.widths), "measured_seconds": one.seconds} for one in model.holdout
        ],
    }


def text(model: LatencyModel) -> str:
    """Return the costs of a layer, and predicted against measured latency of the held-out plans, as text."""
    dense = model.architecture.layers[0]
    lines = [
        f"fixed part (embedding, head, launch) {model.fixed_seconds * 1e3:.3f} ms; a dense layer's attention "
        f"{model.attention_seconds(dense.num_heads, dense.num_kv_heads) * 1e3:.3f} ms",
        "",
        "channels  ms a layer",
        *(f"{int(w):8}  {s * 1e3:10.4f}" for w, s in zip(model.ffn.work, model.ffn.seconds, strict=True)),
        "",
    ]
    if model.holdout:
        lines.append("held-out plan  predicted ms  measured ms   error")
    elif model.method != ESTIMATED:
        lines.append("no held-out plan counts: no budget can be claimed on this table")
    for number, one in enumerate(model.holdout, start=1):
        predicted = model.predict(one.widths)
        lines.append(
            f"{number:13}  {predicted * 1e3:12.2f}  {one.seconds * 1e3:11.2f}  {predicted / one.seconds - 1:+6.1%}"
        )
    return joined([*lines, *model.caveats])
