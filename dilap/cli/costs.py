"""What a latency table says, for people and for programs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dilap.cli import console
from dilap.core.groups import HEAD
from dilap.core.printable import joined, milliseconds
from dilap.core.shape import by_quality
from dilap.profilers.tables.model import LatencyModel, PrecisionCosts
from dilap.profilers.tables.networks.model import NetworkLatency
from dilap.profilers.tables.roofline import METHOD as ESTIMATED

if TYPE_CHECKING:
    from dilap.job.profile import Profile

_MOST_SHOWN = 12  # layers of a network, the slowest ones


def show(done: "Profile[Any]", *, as_json: bool) -> None:
    """Print the fitted costs, and the file of the table that they come from; an estimate has a range in its place."""
    model, table, ends = done.model, done.table, done.range_seconds
    if as_json:
        costs = network_document(model) if isinstance(model, NetworkLatency) else document(model)
        found = costs | {"table": None if table is None else str(table), "estimated": ends is not None}
        console.show_json(found | ({} if ends is None else {"range_seconds": list(ends)}))
        return
    if ends is not None:
        likely, best, worst = map(milliseconds, (model.dense_seconds, *ends))
        console.show(f"ESTIMATED, measured on no device: dense {likely} ms, and between {best} and {worst}")
    console.show(network_text(model) if isinstance(model, NetworkLatency) else text(model))
    if table is not None:
        console.show(f"\nthe table is in {table}")


def document(model: LatencyModel) -> dict[str, Any]:
    """Return the fitted costs, in seconds, and the errors on held-out plans, as a JSON object.

    The costs are those in the workload's own precision; where others were measured, theirs are under `precisions`, and
    under `heads` what the head in each takes more than in the cheapest.
    """
    others = {name: _costs_in(costs) for name, costs in model.by_precision.items() if name}
    return {
        "method": model.method,
        "fixed_seconds": model.fixed_seconds,
        **_costs_in(model.by_precision[""]),
        **({"precisions": others, "heads": dict(model.heads)} if others else {}),
        "caveats": list(model.caveats),
        "holdout_errors": model.holdout_errors(),
        "holdout": [
            {"predicted_seconds": model.predict(one.widths, one.precisions), "measured_seconds": one.seconds}
            for one in model.holdout
        ],
    }


def network_document(model: NetworkLatency) -> dict[str, Any]:
    """Return what a network and each of its layers take, in seconds, and the errors on held-out plans.

    The costs are those of the network that keeps all widths.
    """
    layers = model.layer_seconds({})
    return {
        "method": model.method,
        "fixed_seconds": layers.pop("", 0.0),
        "dense_seconds": model.dense_seconds,
        "layers": layers,
        "caveats": list(model.caveats),
        "holdout_errors": model.holdout_errors(),
        "holdout": [
            {"predicted_seconds": model.predict(one.counts), "measured_seconds": one.seconds} for one in model.holdout
        ],
    }


def _costs_in(costs: PrecisionCosts) -> dict[str, Any]:
    attention, ffn = costs.attention, costs.ffn
    return {
        "attention": [{"work": w, "seconds": s} for w, s in zip(attention.work, attention.seconds, strict=True)],
        "ffn": [{"channels": int(w), "seconds": s} for w, s in zip(ffn.work, ffn.seconds, strict=True)],
    }


def text(model: LatencyModel) -> str:
    """Return the costs of a layer, and predicted against measured latency of the held-out plans, as text."""
    dense = model.architecture.layers[0]
    lines = [
        f"fixed part (embedding, head, launch) {model.fixed_seconds * 1e3:.3f} ms; a dense layer's attention "
        f"{model.attention_seconds(dense.num_heads, dense.num_kv_heads) * 1e3:.3f} ms",
        "",
        *_precisions(model),
        "channels  ms a layer",
        *(f"{int(w):8}  {s * 1e3:10.4f}" for w, s in zip(model.ffn.work, model.ffn.seconds, strict=True)),
        "",
    ]
    held_out = [(model.predict(one.widths, one.precisions), one.seconds) for one in model.holdout]
    return joined([*lines, *_held_out(held_out, method=model.method), *model.caveats])


def network_text(model: NetworkLatency) -> str:
    """Return what the slowest layers take, and predicted against measured latency of the held-out plans, as text."""
    layers = model.layer_seconds({})
    fixed, dense = layers.pop("", 0.0), model.dense_seconds
    slowest = sorted(layers.items(), key=lambda one: -one[1])[:_MOST_SHOWN]
    title = f"slowest of {len(layers)} layers"
    width = max(map(len, (title, *(name for name, _ in slowest))))
    lines = [
        f"dense {dense * 1e3:.3f} ms, of which no layer takes {fixed * 1e3:.3f} (launch, input, output)",
        "",
        f"{title:{width}}  ms, dense  of all",
        *(f"{name:{width}}  {seconds * 1e3:9.4f}  {seconds / dense:6.1%}" for name, seconds in slowest),
        "",
    ]
    held_out = [(model.predict(one.counts), one.seconds) for one in model.holdout]
    return joined([*lines, *_held_out(held_out, method=model.method), *model.caveats])


def _held_out(plans: Sequence[tuple[float, float]], *, method: str) -> list[str]:
    """Return a line for every held-out plan, given its predicted and its measured seconds, under a heading."""
    if not plans:
        claims = "no held-out plan counts: no budget can be claimed on this table"
        return [] if method == ESTIMATED else [claims]
    return [
        "held-out plan  predicted ms  measured ms   error",
        *(
            f"{number:13}  {predicted * 1e3:12.2f}  {measured * 1e3:11.2f}  {predicted / measured - 1:+6.1%}"
            for number, (predicted, measured) in enumerate(plans, start=1)
        ),
    ]


def _precisions(model: LatencyModel) -> list[str]:
    """Return what the parts of a dense model take in every precision, as lines; none where there is only one."""
    dense, own = model.architecture.layers[0], model.workload.precision
    names = by_quality(name or own for name in model.by_precision)
    if len(names) == 1:
        return []
    rows = (
        (
            name,
            model.block(HEAD, (), name),
            model.attention_seconds(dense.num_heads, dense.num_kv_heads, name),
            model.ffn_seconds(dense.num_channels, name),
        )
        for name in names
    )
    return [
        "precision  head, more than the cheapest (ms)  attention of a layer (ms)  feed-forward network of a layer (ms)",
        *(f"{name:9}  {head * 1e3:34.3f}  {one * 1e3:25.4f}  {two * 1e3:36.4f}" for name, head, one, two in rows),
        "",
    ]
