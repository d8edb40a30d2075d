"""trtexec's command lines and files, and a stand-in program that writes what trtexec documents."""

import json
import stat
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from standins import simulated_tensorrt as device
from standins.simulated_tensorrt import RECIPE

from dilap.backends.tensorrt import cuda, trtexec
from dilap.backends.tensorrt import runtime as tensorrt
from dilap.core.errors import InvalidInput, Unsupported
from dilap.core.workload import Workload

DECODE = Workload(context=256)
# as samples/common/sampleReporting.cpp of TensorRT 10.3 to 11.1 prints it
TIMES = """[
  { "startEnqMs" : 0.0124512, "endEnqMs" : 0.0859375, "startH2dMs" : 0.03125, "endH2dMs" : 0.03125, "startComputeMs" : 0.03125, "endComputeMs" : 1.28125, "startD2hMs" : 1.28125, "endD2hMs" : 1.28125, "h2dMs" : 0, "computeMs" : 1.25, "d2hMs" : 0, "latencyMs" : 1.25 }
, { "startEnqMs" : 0.1, "endEnqMs" : 0.12, "startH2dMs" : 1.3, "endH2dMs" : 1.3, "startComputeMs" : 1.3, "endComputeMs" : 2.6, "startD2hMs" : 2.6, "endD2hMs" : 2.6, "h2dMs" : 0, "computeMs" : 1.3, "d2hMs" : 0, "latencyMs" : 1.3 }
]
"""  # noqa: E501
STAND_IN = """#!{python}
import json, sys
options = dict(word[2:].partition("=")[::2] for word in sys.argv[1:])
if "exportTimes" in options:
    one = {{"startEnqMs": 0.0, "endComputeMs": 2.5, "computeMs": 2.0}}
    open(options["exportTimes"], "w").write(json.dumps([one] * int(options["iterations"])))
    open(options["loadEngine"] + ".starts", "a").write("x")
elif "broken" in options["onnx"]:
    print("[11/22/2026-05:26:38] [E] no kernel for this node")
    sys.exit(1)
else:
    open(options["saveEngine"], "w").write(" ".join(sys.argv[1:]))
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "trtexec"
    path.write_text(STAND_IN.format(python=sys.executable))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(trtexec, "find", lambda: str(path))
    return path


def build_argv() -> list[str]:
    profiles = RECIPE.profiles(DECODE)
    return trtexec.build_argv(
        "trtexec", Path("model.onnx"), profiles, engine=Path("e.engine"), timing_cache=Path("t.timings")
    )


def test_times_are_of_the_gpu_and_of_the_host(tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    path.write_text(TIMES)
    assert trtexec.read_times(path) == [(1_250_000, 1_268_799), (1_300_000, 2_500_000)]


@pytest.mark.parametrize("text", ["", "{}", '[{"computeMs": 1}]', "[]", "nonsense"])
def test_other_files_than_times_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    path.write_text(text)
    with pytest.raises(InvalidInput, match=r"times\.json"):
        trtexec.read_times(path)


def test_a_build_is_strongly_typed_and_keeps_its_timings() -> None:
    assert {"--stronglyTyped", "--skipInference", "--timingCacheFile=t.timings"} <= set(build_argv())


def test_the_shapes_of_a_profile_follow_its_number() -> None:
    names = [word.partition("=")[0] for word in build_argv()]
    assert names[6:10] == ["--profile", "--minShapes", "--optShapes", "--maxShapes"]
    assert names[10:14] == names[6:10]


def test_shapes_are_written_as_trtexec_reads_them() -> None:
    expected = (
        "--optShapes=input_ids:1x1,position_ids:1x1,logits_to_keep:1,"
        "past_key_values.0.key:1x2x256x16,past_key_values.1.key:1x1x256x16"
    )
    assert build_argv()[8] == expected


def test_a_failed_build_is_told_in_trtexecs_own_words(program: Path, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="no kernel for this node"):
        trtexec.build(tmp_path / "broken.onnx", RECIPE.profiles(), engine=tmp_path / "e", timing_cache=tmp_path / "t")
    assert not (tmp_path / "e").exists()


def session(tmp_path: Path) -> trtexec.TrtexecSession:
    return trtexec.TrtexecSession(tmp_path / "e.engine", RECIPE, RECIPE.profiles(DECODE), DECODE)


def test_samples_come_in_blocks_of_one_start(program: Path, tmp_path: Path) -> None:
    one = session(tmp_path)
    assert [one.sample() for _ in range(9)] == [2_000_000] * 9
    assert (tmp_path / "e.engine.starts").read_text() == "xx"
    assert one.host_ns == [2_500_000] * 9
    one.close()


def test_the_timed_tokens_are_tokens(program: Path, tmp_path: Path) -> None:
    one = session(tmp_path)
    written = dict(word.split(":") for word in one._argv[4].removeprefix("--loadInputs=").split(","))
    tokens, positions = (np.fromfile(written[name], np.int64) for name in ("input_ids", "position_ids"))
    one.close()
    assert 0 <= tokens.min() <= tokens.max() < RECIPE.vocab_size
    assert positions.tolist() == [256]


def test_logits_need_the_python_module(program: Path, tmp_path: Path) -> None:
    one = session(tmp_path)
    with pytest.raises(Unsupported, match="python3-libnvinfer"):
        one.logits([1], incremental=False)
    one.close()


def test_an_engine_that_trtexec_built_says_that_it_was_not_compared(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "load", device.HostCuda)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"model")
    job = tensorrt._Job(
        path=tmp_path / "model.onnx",
        recipe=replace(RECIPE, reference=None),
        profiles=RECIPE.profiles(DECODE),
        workload=DECODE,
        runtime="TensorRT through trtexec 10.3.0.30-1+cuda12.5",
    )
    one = job.through_trtexec()
    assert one.sample() == 2_000_000
    one.close()
    sidecar = json.loads(next((tmp_path / "engines").glob("*.json")).read_text())
    assert (sidecar["sqnr_db"], sidecar["runtime"]) == (None, job.runtime)


def test_the_version_of_trtexec_is_that_of_its_package() -> None:
    status = "Package: zlib\nVersion: 1\n\nPackage: libnvinfer-bin\nStatus: ok\nVersion: 10.3.0.30-1+cuda12.5\n"
    assert tensorrt.package_version(status, "libnvinfer-bin") == "10.3.0.30-1+cuda12.5"


def test_a_package_that_is_not_there_has_no_version() -> None:
    assert tensorrt.package_version("Package: zlib\nVersion: 1\n", "libnvinfer-bin") == "unknown"
