"""How llama.cpp is compiled for this processor: its instruction sets by name, without AMX.

GCC 12 miscompiles llama.cpp's AMX code (it optimises a tile configuration on the stack away), so that a native build
crashes on quantised models wherever the processor has `amx_int8`: https://github.com/ggml-org/llama.cpp/issues/20824.

`python backends/llamacpp/build.py` prints the value of CMAKE_ARGS. It needs the standard library alone, because it runs
before anything is installed.
"""

import platform
from collections.abc import Collection
from pathlib import Path

# llama.cpp's CMake options, with the processor's flags (as Linux names them) that each needs.
_OPTIONS = {
    "GGML_SSE42": ("sse4_2",),
    "GGML_AVX": ("avx",),
    "GGML_AVX2": ("avx2",),
    "GGML_FMA": ("fma",),
    "GGML_F16C": ("f16c",),
    "GGML_BMI2": ("bmi2",),
    "GGML_AVX_VNNI": ("avx_vnni",),
    "GGML_AVX512": ("avx512f", "avx512cd", "avx512vl", "avx512dq", "avx512bw"),
    "GGML_AVX512_VBMI": ("avx512vbmi",),
    "GGML_AVX512_VNNI": ("avx512_vnni",),
    "GGML_AVX512_BF16": ("avx512_bf16",),
}

# Instructions are scheduled for this processor, which makes the named build as fast as a native one. Time beside the
# named build without it (SmolLM2-135M in q4_0, q8_0, f16; an AMD processor with AVX2, GCC 12, two threads, three starts
# of each build in interleaved rounds):
#   prompt of 128 tokens  native 0.961 [0.913, 0.982], 1.007 [0.931, 1.038], 0.883 [0.824, 0.934]
#                         tuned  0.961 [0.907, 0.992], 0.998 [0.887, 1.063], 0.890 [0.858, 0.970]
#   one decoded token     native 0.975 [0.935, 1.014], 1.006 [0.977, 1.040], 1.020 [0.985, 1.048]
#                         tuned  0.983 [0.952, 1.014], 1.024 [0.998, 1.062], 0.988 [0.960, 1.040]
_TUNED = ("-DCMAKE_C_FLAGS=-mtune=native", "-DCMAKE_CXX_FLAGS=-mtune=native")


def cmake_args(machine: str, flags: Collection[str]) -> str:
    """Return the value of CMAKE_ARGS for a processor with these flags (as Linux names them).

    It is empty, which leaves the choice to llama.cpp, elsewhere than on x86-64 Linux: only there flags are known.
    """
    if machine not in ("x86_64", "AMD64") or not flags:
        return ""
    chosen = (f"-D{name}={'ON' if set(needed) <= set(flags) else 'OFF'}" for name, needed in _OPTIONS.items())
    return " ".join(["-DGGML_NATIVE=OFF", *chosen, *_TUNED])


def cmake_args_here() -> str:
    """Return the value of CMAKE_ARGS for the processor that this runs on."""
    return cmake_args(platform.machine(), _flags())


def _flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())


if __name__ == "__main__":
    print(cmake_args_here())
