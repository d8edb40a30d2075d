"""Estimate how fast a device would be at best: a roofline of its published bandwidth and compute. No device is asked.

Such an estimate says which parts of a model weigh most, but not whether a budget is kept.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from dilap.core.errors import InvalidInput
from dilap.core.measurement import Fingerprint, Measurement
from dilap.core.shape import PRECISION_BITS, UNMIXED, Architecture, LayerWidths
from dilap.core.workload import Workload
from dilap.profilers.devices.device import Device
from dilap.profilers.tables.model import Curve, LatencyModel, PrecisionCosts, attention_work

METHOD = "estimated"  # stands wherever a measurement would say how it was made


def roofline(
    architecture: Architecture, workload: Workload, device: Device, *, cache_bits: float, precisions: Sequence[str] = ()
) -> LatencyModel:
    """Return a latency model that is linear in every width, from as many experts on as a token is sent to.

    Every part takes as long as its reads or its operations, whichever is slower; those in one of `precisions` read as
    many bytes as it takes. A prompt is taken to read all experts. Raises InvalidInput for a device without published
    numbers.
    """
    names = {"": workload.precision} | {name: name for name in precisions if name != workload.precision}
    weights = architecture.vocab_size * architecture.hidden_size
    heads = {
        key: _seconds(device, num_bytes=weights * PRECISION_BITS[name] / 8, flops=2 * weights)
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
            key: _costs_in(name, architecture, workload, device, cache_bits=cache_bits) for key, name in names.items()
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
    device: Device,
    *,
    cache_bits: float,
) -> PrecisionCosts:
    """Return what sublayers cost in one precision at best."""
    layer = architecture.layers[0]
    tokens = 1 if workload.phase == "decode" else workload.prompt_tokens
    byte = PRECISION_BITS[precision] / 8
    attention = architecture.attention_parameters(layer)
    work = attention_work(architecture, workload, cache_bits=cache_bits, precision=precision)
    narrowest = work(LayerWidths(num_heads=1, num_kv_heads=1, num_channels=0)) / work(layer)
    pairs = workload.context if workload.phase == "decode" else tokens * (tokens + 1) // 2
    widths = sorted({0, architecture.active_channels(layer), layer.num_channels})

    def ffn_seconds(num_channels: int) -> float:
        network = replace(layer, num_channels=num_channels)
        active = architecture.active_ffn_parameters(network)
        read = active if workload.phase == "decode" else architecture.ffn_parameters(network)
        return _seconds(device, num_bytes=read * byte, flops=2 * active * tokens)

    attention_seconds = _seconds(
        device,
        num_bytes=work(layer) if workload.phase == "decode" else attention * byte,
        flops=2 * attention * tokens + 4 * layer.num_heads * architecture.head_dim * pairs,
    )
    return PrecisionCosts(
        attention=Curve(
            work=(0.0, narrowest * work(layer), work(layer)),
            seconds=(0.0, narrowest * attention_seconds, attention_seconds),
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
    """Return in words the two numbers that an estimate rests on. Raises InvalidInput for a device without them."""
    bytes_per_second, flops_per_second = published(device)
    return f"a roofline of {bytes_per_second / 1e9:.0f} GB/s and {flops_per_second / 1e9:.0f} GFLOP/s"


def published(device: Device) -> tuple[float, float]:
    """Return the bytes and the operations a second that are published. Raises InvalidInput where they are not."""
    if device.bytes_per_second is None or device.flops_per_second is None:
        raise InvalidInput(f"no bandwidth and compute are published for {device.name}: it cannot be estimated")
    return device.bytes_per_second, device.flops_per_second


class Predicting(Protocol):
    """The costs of a decoder or of any other network under a workload."""

    @property
    def workload(self) -> Workload: ...

    def predict(self, widths: Any, precisions: Mapping[str, str] = UNMIXED) -> float: ...


def estimated(
    model: Predicting,
    widths: Any,
    *,
    precisions: Mapping[str, str] = UNMIXED,
    device: Device,
    backend: str,
    artifact_sha256: str,
) -> Measurement:
    """Return a prediction for what `model` is given as widths, in the form of a measurement."""
    return Measurement(
        artifact_sha256=artifact_sha256,
        workload=model.workload,
        fingerprint=estimated_fingerprint(device, backend=backend),
        samples_ns=(max(1, round(1e9 * model.predict(widths, precisions))),),
        rounds=(0,),
        peak_memory_bytes=None,
        load_seconds=0.0,
        started="",
        status="estimated",
        note=f"{describe(device)}, not measured",
    )


def _seconds(device: Device, *, num_bytes: float, flops: float) -> float:
    bytes_per_second, flops_per_second = published(device)
    return max(num_bytes / bytes_per_second, flops / flops_per_second)
