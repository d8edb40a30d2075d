"""What a model costs to run: counted from its shape, and measured on a device where the model has a runtime."""

from dataclasses import replace

from dilap import backends
from dilap.core.errors import InvalidInput
from dilap.core.shape import PRECISION_BITS, Architecture
from dilap.core.workload import Workload
from dilap.evaluation.document import Costs, PhaseCosts
from dilap.evaluation.subject import Subject
from dilap.profilers.devices.device import Device
from dilap.profilers.profiler import Case, Profiler, Progress
from dilap.profilers.protocol import FINAL


def count(subject: Subject, workload: Workload) -> Costs:
    """Return the costs that can be counted: parameters, bytes, and the operations and bytes moved of both phases.

    Raises InvalidInput for a GGUF file that DiLAP did not write, whose shape is not known.
    """
    if subject.architecture is None:
        raise InvalidInput(f"{subject.name} has no artifact.json: costs are known of what dilap-export wrote")
    return Costs(
        parameters=subject.architecture.num_parameters,
        file_bytes=subject.num_bytes,
        decode=_counted(subject.architecture, subject, replace(workload, phase="decode")),
        prefill=_counted(subject.architecture, subject, replace(workload, phase="prefill")),
    )


def _counted(architecture: Architecture, subject: Subject, workload: Workload) -> PhaseCosts:
    precision = workload.precision
    if subject.backend in backends.BACKENDS:
        cache_bits = backends.get(subject.backend).cache_bits(workload)
    else:  # torch keeps keys and values in the weights' precision
        cache_bits = PRECISION_BITS[precision]
    if workload.phase == "decode":
        flops = architecture.decode_flops(context=workload.context)
        moved = architecture.decode_bytes(
            context=workload.context, precision=precision, precisions=subject.precisions, cache_bits=cache_bits
        )
    else:
        tokens = workload.prompt_tokens
        flops = architecture.prefill_flops(prompt_tokens=tokens)
        moved = architecture.prefill_bytes(
            prompt_tokens=tokens, precision=precision, precisions=subject.precisions, cache_bits=cache_bits
        )
    return PhaseCosts(workload=workload, flops=flops, bytes_moved=moved)


def measure(
    costs: Costs, subject: Subject, device: Device, *, force: bool = False, progress: Progress | None = None
) -> Costs:
    """Return `costs` with the latency (from fresh starts) and the memory of both phases, measured on `device`.

    The costs of a checkpoint, which has no runtime, are returned as they are.
    """
    if subject.path is None:
        return costs
    profiler = Profiler(device, backend=subject.backend, force=force)
    cases = [Case(path=subject.path, workload=phase.workload) for phase in (costs.decode, costs.prefill)]
    measurements = profiler.measure(cases, FINAL, progress=progress)
    decode, prefill = (
        replace(
            phase,
            measurement=measurement,
            average_memory_bytes=memory.average_bytes,
            peak_memory_bytes=memory.peak_bytes,
        )
        for phase, measurement, memory in zip(
            (costs.decode, costs.prefill), measurements, map(profiler.memory, cases), strict=True
        )
    )
    return replace(costs, decode=decode, prefill=prefill)
