"""Estimate how fast a device would be, from its published bandwidth and compute. No device is asked.

A roofline says how long reading and multiplying take at best. Runtimes reach a part of that, and every operator takes
a while beside it, so an estimate lies between the best and the worst of what published speeds show of such processors.
It says which parts of a model weigh most, but not whether a budget is kept.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from dilap.core.errors import InvalidInput
from dilap.core.measurement import Fingerprint, Measurement
from dilap.core.shape import PRECISION_BITS, UNMIXED, Architecture, LayerWidths
from dilap.core.workload import Workload
from dilap.profilers.devices.device import Device, Reach
from dilap.profilers.tables.model import Curve, LatencyModel, PrecisionCosts, attention_work

METHOD = "estimated"  # stands wherever a measurement would say how it was made
# A norm, projections (three for attention), positions or an activation, attention, one more projection, an addition.
_OPERATORS = 8


def reaches(device: Device) -> tuple[Reach, Reach, Reach]:
    """Return the best, the likely and the worst reach: the likely one is the geometric mean of the others."""
    best, worst = device.reach
    likely = Reach(
        share=math.sqrt(best.share * worst.share),
        operator_seconds=math.sqrt(best.operator_seconds * worst.operator_seconds),
    )
    return best, likely, worst


def roofline(
    architecture: Architecture,
    workload: Workload,
    device: Device,
    *,
    cache_bits: float,
    precisions: Sequence[str] = (),
    reach: Reach | None = None,
) -> LatencyModel:
    """Return a latency model that is linear in every width, from as many experts on as a token is sent to.

    Every part takes as long as its reads or its operations, whichever is slower, at the share of the device's peaks
    that `reach` says (by default the likely one), and the start of its operators; those in one of `precisions` read as
    many bytes as it takes. A prompt is taken to read all experts. Raises InvalidInput for a device without published
    numbers.
    """
    part = _Part(device=device, reach=reach or reaches(device)[1])
    names = {"": workload.precision} | {name: name for name in precisions if name != workload.precision}
    weights = architecture.vocab_size * architecture.hidden_size
    heads = {
        key: part.seconds(name, num_bytes=weights * PRECISION_BITS[name] / 8, flops=2 * weights)
        for key, name in [*names.items(), (workload.precision, workload.precision)]
    }
    cheapest = min(heads.values())
    return LatencyModel(
        architecture=architecture,
        workload=workload,
        cache_bits=cache_bits,
        method=METHOD,
        fixed_seconds=cheapest,
        by_precision={
            key: _costs_in(name, architecture, workload, part, cache_bits=cache_bits) for key, name in names.items()
        },
        heads={key: seconds - cheapest for key, seconds in heads.items()},
        cross_validation={},
        noise_seconds=0.0,
        holdout=(),
    )


def _costs_in(
    precision: str,
    architecture: Architecture,
    workload: Workload,
    part: "_Part",
    *,
    cache_bits: float,
) -> PrecisionCosts:
    """Return what sublayers cost in one precision."""
    layer = architecture.layers[0]
    tokens = 1 if workload.phase == "decode" else workload.prompt_tokens
    byte = PRECISION_BITS[precision] / 8
    attention = architecture.attention_parameters(layer)
    work = attention_work(architecture, workload, cache_bits=cache_bits, precision=precision)
    narrowest = work(LayerWidths(num_heads=1, num_kv_heads=1, num_channels=0)) / work(layer)
    pairs = workload.context if workload.phase == "decode" else tokens * (tokens + 1) // 2
    # a network costs what its operators take to start however narrow it is, but not without experts to send a token to
    narrowest_network = 1 if architecture.experts is None else architecture.active_channels(layer)
    widths = sorted({0, narrowest_network, layer.num_channels})

    def ffn_seconds(num_channels: int) -> float:
        network = replace(layer, num_channels=num_channels)
        active = architecture.active_ffn_parameters(network)
        read = active if workload.phase == "decode" else architecture.ffn_parameters(network)
        return part.seconds(precision, num_bytes=read * byte, flops=2 * active * tokens)

    attention_bytes = work(layer) if workload.phase == "decode" else attention * byte
    attention_flops = 2 * attention * tokens + 4 * layer.num_heads * architecture.head_dim * pairs
    narrow_seconds, attention_seconds = (
        part.seconds(precision, num_bytes=share * attention_bytes, flops=share * attention_flops)
        for share in (narrowest, 1.0)
    )
    return PrecisionCosts(
        attention=Curve(
            work=(0.0, narrowest * work(layer), work(layer)),
            seconds=(0.0, narrow_seconds, attention_seconds),
        ),
        ffn=Curve(
            work=tuple(float(channels) for channels in widths),
            seconds=(0.0, *map(ffn_seconds, widths[1:])),
        ),
    )


def estimated_fingerprint(device: Device, *, backend: str) -> Fingerprint:
    """Return a fingerprint of no machine, which differs from every measured one."""
    return Fingerprint(
        device=device.name,
        machine=METHOD,
        processor=METHOD,
        num_cores=device.default_threads(),
        memory_bytes=0,
        last_level_cache_bytes=device.last_level_cache_bytes,
        power_mode=METHOD,
        runtime=backend,
        runtime_version=METHOD,
        runtime_build=describe(device),
    )


def describe(device: Device) -> str:
    """Return in words what an estimate rests on. Raises InvalidInput for a device without published numbers."""
    bytes_per_second, flops_per_second = published(device)
    best, worst = device.reach
    return (
        f"{worst.share:.0%} to {best.share:.0%} of {bytes_per_second / 1e9:.0f} GB/s and "
        f"{flops_per_second / 1e9:.0f} GFLOP/s (the share that published speeds show of such processors)"
    )


def published(device: Device, precision: str = "f32") -> tuple[float, float]:
    """Return the peaks of bytes and of operations a second. Raises InvalidInput where they are not published."""
    if device.bytes_per_second is None or device.flops_per_second is None:
        raise InvalidInput(f"no bandwidth and compute are published for {device.name}: it cannot be estimated")
    gain = 1.0 if PRECISION_BITS[precision] >= 16 else device.quantised_gain
    return device.bytes_per_second, gain * device.flops_per_second


class Predicting(Protocol):
    """The costs of a decoder or of any other network under a workload."""

    @property
    def workload(self) -> Workload: ...

    def predict(self, widths: Any, precisions: Mapping[str, str] = UNMIXED) -> float: ...


def estimated(
    models: Sequence[Predicting],
    widths: Any,
    *,
    precisions: Mapping[str, str] = UNMIXED,
    device: Device,
    backend: str,
    artifact_sha256: str,
) -> Measurement:
    """Return a prediction for `widths`, in the form of a measurement, from the best, the likely and the worst model."""
    best, likely, worst = (max(1, round(1e9 * one.predict(widths, precisions))) for one in models)
    return Measurement(
        artifact_sha256=artifact_sha256,
        workload=models[1].workload,
        fingerprint=estimated_fingerprint(device, backend=backend),
        samples_ns=(likely,),
        rounds=(0,),
        peak_memory_bytes=None,
        load_seconds=0.0,
        started="",
        status="estimated",
        note=f"{describe(device)}, not measured",
        range_ns=(best, worst),
    )


@dataclass(frozen=True, kw_only=True)
class _Part:
    """How long the head or a sublayer takes on a device."""

    device: Device
    reach: Reach

    def seconds(self, precision: str, *, num_bytes: float, flops: float) -> float:
        bytes_per_second, flops_per_second = published(self.device, precision)
        slower = max(num_bytes / bytes_per_second, flops / flops_per_second)
        return slower / self.reach.share + _OPERATORS * self.reach.operator_seconds
