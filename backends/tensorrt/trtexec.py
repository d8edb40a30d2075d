"""TensorRT's command-line program, for devices that have no Python module of it.

The options below are the same in TensorRT 10.3, 10.16 and 11.1 (11 warns that some are its defaults by now), and so are
the fields that `--exportTimes` writes.
"""

import shutil
import subprocess
import tempfile
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dilap.backends.tensorrt.recipe import InputRange, Profile, Recipe
from dilap.core.codec import checked, written_aside
from dilap.core.documents import parse_json, read_text
from dilap.core.errors import InvalidInput, Unsupported
from dilap.core.workload import Workload

_PATH = "/usr/src/tensorrt/bin/trtexec"  # where JetPack's package libnvinfer-bin puts it, outside PATH
BUILD_SECONDS = 3600.0  # a large model on the smallest Jetson
_RUN_SECONDS = 300.0
_BLOCK = 8  # samples of one start: a start takes seconds, but models that are measured in turns need short blocks


def find() -> str | None:
    """Return the program's path; None where it is not installed."""
    return shutil.which("trtexec") or shutil.which(_PATH)


def build_argv(program: str, onnx: Path, profiles: Sequence[Profile], *, engine: Path, timing_cache: Path) -> list[str]:
    """Return the command that builds and saves an engine; a profile's three shapes must directly follow its number."""
    argv = [
        program,
        f"--onnx={onnx}",
        f"--saveEngine={engine}",
        "--stronglyTyped",
        "--skipInference",
        f"--timingCacheFile={timing_cache}",
    ]
    for index, profile in enumerate(profiles):
        argv += [
            f"--profile={index}",
            f"--minShapes={_spec(profile, 'minimum')}",
            f"--optShapes={_spec(profile, 'optimum')}",
            f"--maxShapes={_spec(profile, 'maximum')}",
        ]
    return argv


def time_argv(
    program: str, *, engine: Path, profile: int, step: Profile, inputs: Sequence[tuple[str, Path]], times: Path
) -> list[str]:
    """Return the command that runs an engine `_BLOCK` times and exports the times; `inputs` are (name, its file)."""
    return [
        program,
        f"--loadEngine={engine}",
        f"--useProfile={profile}",
        f"--shapes={_spec(step, 'optimum')}",
        "--loadInputs=" + ",".join(f"{name}:{path}" for name, path in inputs),
        f"--iterations={_BLOCK}",
        "--duration=0",
        "--warmUp=200",
        "--useCudaGraph",
        "--useSpinWait",
        "--noDataTransfers",
        f"--exportTimes={times}",
    ]


def _spec(profile: Profile, end: str) -> str:
    """Return one `end` of a profile's ranges as trtexec reads them: `input_ids:1x1,past_key_values.0.key:1x3x256x64`.

    For the shape input, its values stand where the others have shapes.
    """
    ranges: dict[str, InputRange] = profile.inputs
    return ",".join(f"{name}:{'x'.join(map(str, getattr(one, end)))}" for name, one in ranges.items())


def read_times(path: Path) -> list[tuple[int, int]]:
    """Return the (GPU, host) nanoseconds of every run in a file of `--exportTimes`. Raises InvalidInput.

    The GPU's time is `computeMs`, between CUDA events; the host's lasts from the launch's start to the work's end.
    """
    source = f"{path}: not the times that trtexec exports"
    runs = checked(tuple[dict[str, Any], ...], parse_json(read_text(path), source=str(path)), source=source)

    def milliseconds(run: dict[str, Any], name: str) -> float:
        return checked(float, run.get(name), source=f"{source} ({name})")

    found = [
        (
            round(milliseconds(run, "computeMs") * 1e6),
            round((milliseconds(run, "endComputeMs") - milliseconds(run, "startEnqMs")) * 1e6),
        )
        for run in runs
    ]
    if not found:
        raise InvalidInput(f"{path}: trtexec exported no times")
    if min(min(pair) for pair in found) <= 0:
        raise InvalidInput(f"{source}: one of them is not positive")
    return found


def build(onnx: Path, profiles: Sequence[Profile], *, engine: Path, timing_cache: Path) -> None:
    """Build the engine file, whole or not at all. Raises Unsupported with trtexec's own words."""
    program = find()
    assert program is not None, "called where trtexec is"
    with written_aside(engine) as temporary:
        _run(build_argv(program, onnx, profiles, engine=temporary, timing_cache=timing_cache), seconds=BUILD_SECONDS)


class TrtexecSession:
    """Times an engine; every start of trtexec gives a block of samples. It cannot give logits."""

    def __init__(self, engine: Path, recipe: Recipe, profiles: Sequence[Profile], workload: Workload) -> None:
        program = find()
        assert program is not None, "called where trtexec is"
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        phases = [profile.phase for profile in profiles]
        self._times = folder / "times.json"
        self._argv = time_argv(
            program,
            engine=engine,
            profile=phases.index(workload.phase),
            step=profiles[phases.index(workload.phase)],  # its most frequent shapes are the workload's
            inputs=_write_inputs(folder, recipe, workload),
            times=self._times,
        )
        self._samples: deque[tuple[int, int]] = deque()
        self.host_ns: list[int] = []

    def sample(self) -> int:
        """Return the GPU's nanoseconds for one run of the workload."""
        if not self._samples:
            _run(self._argv, seconds=_RUN_SECONDS)
            self._samples.extend(read_times(self._times))
        gpu, host = self._samples.popleft()
        self.host_ns.append(host)
        return gpu

    def logits(self, token_ids: Sequence[int], *, incremental: bool) -> NDArray[np.float32]:  # noqa: ARG002
        raise Unsupported(
            "trtexec gives no logits; install TensorRT's Python module: apt-get install python3-libnvinfer"
        )

    def close(self) -> None:
        self._folder.cleanup()


def _write_inputs(folder: Path, recipe: Recipe, workload: Workload) -> list[tuple[str, Path]]:
    """Write files of tokens and positions, because the random numbers that trtexec would make are no tokens."""
    decode = workload.phase == "decode"
    count, past = (1, workload.context) if decode else (workload.prompt_tokens, 0)
    tokens = np.random.default_rng(0).integers(0, recipe.vocab_size, count)
    written = []
    for name, values in (("input_ids", tokens), ("position_ids", np.arange(past, past + count))):
        path = folder / f"{name}.bin"
        values.astype(np.int64).tofile(path)
        written.append((name, path))
    return written


def _run(argv: Sequence[str], *, seconds: float) -> None:
    try:
        done = subprocess.run(
            argv, capture_output=True, encoding="utf-8", errors="replace", timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        raise Unsupported(f"trtexec did not end in {seconds:.0f} s") from None
    if done.returncode != 0:
        errors = [line for line in (done.stdout + done.stderr).splitlines() if "[E]" in line]
        raise Unsupported(f"trtexec ended with status {done.returncode}: {next(iter(errors), 'it gave no reason')}")
