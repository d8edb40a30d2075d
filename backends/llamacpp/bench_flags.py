"""How llama-bench is told to run a model in a configuration."""

from collections.abc import Mapping

from dilap.core.errors import Unsupported
from dilap.core.workload import Workload

# By switch and value, as `dilap.backends.llamacpp.runtime` names them; llama.cpp's defaults need no flag.
_FLAGS: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("flash_attention", "off"): ("-fa", "0"),
    ("repack", "off"): ("--repack", "0"),
    ("kv_cache", "q8_0"): ("-ctk", "q8_0", "-ctv", "q8_0"),
}


def llama_bench_flags(workload: Workload) -> list[str]:
    """Return the threads and the switches of a workload as arguments of llama-bench.

    Raises Unsupported for a KV cache in f32, which llama.cpp has and llama-bench cannot be asked for.
    """
    if workload.switches.get("kv_cache") == "f32":
        raise Unsupported("llama-bench knows no KV cache in f32: choose --configuration plain")
    switches = (word for switch in workload.switches.items() for word in _FLAGS.get(switch, ()))
    return ["-t", str(workload.threads), *switches]
