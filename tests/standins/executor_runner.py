"""ExecuTorch's executor_runner, by ExecuTorch's own Python runtime: a phone's runner on this machine.

It takes the flags that DiLAP gives the real one, reads the same input files in the shape's upper bound, runs the
program's first method once for every line that it reads, and logs the same lines with times of its own clock. A test
writes it beside a line that names this Python.
"""

import argparse
import importlib
import sys
import time
import warnings
from pathlib import Path
from typing import Any

_STARTED = time.perf_counter_ns()


def log(words: str) -> None:
    micros = (time.perf_counter_ns() - _STARTED) // 1000
    hours, minutes, seconds = micros // 3_600_000_000, micros // 60_000_000 % 60, micros // 1_000_000 % 60
    where = "executorch:executor_runner.cpp:700"
    print(
        f"I {hours:02}:{minutes:02}:{seconds:02}.{micros % 1_000_000:06} {where}] {words}", file=sys.stderr, flush=True
    )


def parsed() -> argparse.Namespace:
    flags = argparse.ArgumentParser(add_help=False)
    for name in ("model_path", "inputs", "input_shapes", "output_file", "print_output"):
        flags.add_argument(f"--{name}", required=True)
    flags.add_argument("--cpu_threads", type=int, required=True)
    flags.add_argument("--server_mode", action="store_true", required=True)
    return flags.parse_args()


def main() -> int:
    if "--help" in sys.argv:
        print("  -server_mode (...)   -input_shapes (...)   -cpu_threads (...)")
        return 1  # as gflags does
    given = parsed()
    warnings.simplefilter("ignore")
    torch: Any = importlib.import_module("torch")
    for operators in ("extension.llm.custom_ops.custom_ops", "kernels.quantized"):  # the real one has them inside
        importlib.import_module(f"executorch.{operators}")
    numbers = {4: torch.int64, 6: torch.float32}  # ExecuTorch's ScalarType
    importlib.import_module("executorch.extension.pybindings.portable_lib")._unsafe_reset_threadpool(given.cpu_threads)
    program = importlib.import_module("executorch.runtime").Runtime.get().load_program(given.model_path)
    method = program.load_method(program._program.get_method_name(0))
    files, shapes = given.inputs.split(","), given.input_shapes.split(",")
    assert len(files) == len(shapes) == method.metadata.num_inputs()
    log("Running in server mode; waiting for stdin triggers.")
    for _ in sys.stdin:
        inputs = []
        for index, (file, shape) in enumerate(zip(files, shapes, strict=True)):
            meta = method.metadata.input_tensor_meta(index)
            raw = bytearray(Path(file).read_bytes())
            assert len(raw) == meta.nbytes(), f"{file} has {len(raw)} bytes where the input's bound has {meta.nbytes()}"
            sizes = [int(one) for one in shape.split("x")]
            count = torch.Size(sizes).numel()
            inputs.append(torch.frombuffer(raw, dtype=numbers[meta.dtype()])[:count].reshape(sizes))
        outputs = method.execute(inputs)
        for index, output in enumerate(outputs):
            log(f"Writing output to file: {given.output_file}-{index}.bin")
            Path(f"{given.output_file}-{index}.bin").write_bytes(output.numpy().tobytes())
        log("SERVER MODE DONE")
    return 0


if __name__ == "__main__":
    sys.exit(main())
