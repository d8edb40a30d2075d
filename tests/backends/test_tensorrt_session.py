"""The code that runs engines, on a simulated device: its logits are torch's, its cache is never copied."""

import ctypes
import shutil
from pathlib import Path

import numpy as np
import pytest
from standins import simulated_tensorrt as device
from standins.fabricated import TINY_LAYER, tiny_llama
from standins.models import byte_level_tokenizer, pruned_model
from transformers import PreTrainedModel

from dilap.backends.tensorrt import builder as tensorrt_build
from dilap.core.codec import decode, file_sha256, read_json
from dilap.core.errors import InvalidInput, Mismatch, Unsupported, VerificationFailed
from dilap.core.shape import LayerWidths
from dilap.core.workload import Workload

pytest.importorskip("onnx_ir", reason="onnx_ir is not installed: nothing can be exported to ONNX")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: it executes simulated engines")

from dilap.backends.tensorrt import cuda
from dilap.backends.tensorrt import runtime as tensorrt
from dilap.backends.tensorrt import session as tensorrt_session
from dilap.backends.tensorrt.builder import Api, Built
from dilap.backends.tensorrt.recipe import read_recipe
from dilap.core.sqnr import sqnr_db
from dilap.export.onnx import tensorrt as exporter
from dilap.export.verify import torch_logits

MIXED = {  # other heads, KV heads and channels in every layer, and a layer without attention
    "layers.0.kv_groups": (1,),
    "layers.1.kv_groups": (),
    "layers.2.query_slots": (0,),
    "layers.1.channels": tuple(range(0, 80, 2)),
}
DECODE = Workload(context=16, prompt_tokens=8)
TOKENS = [5, 17, 80, 3, 3, 41, 0, 95]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return pruned_model("llama", MIXED)


@pytest.fixture(scope="module")
def exported(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporter._Check, "compile", lambda self: "not compiled")
        exporter.TensorRTExporter().export(
            model,
            tokenizer=byte_level_tokenizer(folder / "tokenizer"),
            precision="f16",
            plan_digest="plan",
            out=folder / "out",
        )
    return folder / "out" / "model.onnx"


@pytest.fixture
def pushed(exported: Path, tmp_path: Path) -> Path:
    """The model in a folder of its own, as a device has it before it built anything."""
    shutil.copytree(exported.parent, tmp_path / "pushed")
    return tmp_path / "pushed" / exported.name


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """TensorRT 10.3 on an Orin; the models that were built are listed."""
    built: list[Path] = []

    def build(onnx: Path, profiles: object, **_: object) -> Built:
        built.append(onnx)
        return Built(plan=str(onnx).encode(), num_bytes=1, seconds=1.0)

    monkeypatch.setattr(tensorrt_build, "find_api", lambda: Api(device.module()))
    monkeypatch.setattr(tensorrt_build, "build", build)
    monkeypatch.setattr(cuda, "load", device.HostCuda)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    return built


def session_of(exported: Path, workload: Workload = DECODE) -> tensorrt_session.EngineSession:
    recipe = read_recipe(exported.parent)
    engine = device.open_engine(exported)
    cuda = device.HostCuda()
    profiles = recipe.profiles(workload)
    return tensorrt_session.EngineSession(engine, cuda, recipe, profiles, workload, engine_bytes=1000)  # type: ignore[arg-type]


@pytest.mark.parametrize("incremental", [False, True])
def test_logits_are_those_of_torch(incremental: bool, model: PreTrainedModel, exported: Path) -> None:
    session = session_of(exported)
    sqnr = sqnr_db(torch_logits(model, TOKENS), session.logits(TOKENS, incremental=incremental))
    assert sqnr > 45, f"{sqnr:.1f} dB"


def test_a_second_sequence_knows_nothing_of_the_first(exported: Path) -> None:
    session = session_of(exported)
    first = session.logits(TOKENS, incremental=True)
    np.testing.assert_array_equal(session.logits(TOKENS, incremental=True), first)


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_a_sample_is_the_time_between_two_events(phase: str, exported: Path) -> None:
    session = session_of(exported, Workload(phase="decode" if phase == "decode" else "prefill", context=16))
    assert [session.sample() for _ in range(3)] == [5000] * 3


def test_every_sample_has_its_host_time(exported: Path) -> None:
    session = session_of(exported)
    session.sample()
    session.sample()
    assert len(session.host_ns) == 2
    assert min(session.host_ns) > 0


def test_what_is_taken_of_the_gpu_is_the_engine_and_the_buffers(exported: Path) -> None:
    session = session_of(exported)
    session.sample()
    assert session.device_bytes == 1000 + sum(num_bytes for _, num_bytes in session._memory.values()) > 1000


def test_samples_run_as_a_graph(exported: Path) -> None:
    session = session_of(exported)
    session.sample()
    assert session._launch is not None
    assert session._launch._graph is not None


def test_asking_for_logits_leaves_the_timed_shapes_alone(exported: Path) -> None:
    session = session_of(exported)
    session.sample()
    session.logits(TOKENS, incremental=True)
    session.sample()
    assert session._context.shapes["past_key_values.0.key"][2] == DECODE.context


def test_closing_frees_the_device_and_twice_is_harmless(exported: Path) -> None:
    session = session_of(exported)
    session.sample()
    session.close()
    session.close()
    assert session._cuda.buffers == {}  # type: ignore[attr-defined]


def test_bf16_numbers_are_widened_exactly() -> None:
    stored = np.array([0x3F80, 0xC000, 0x0000], np.uint16)
    assert tensorrt_session.widened(stored, precision="bf16").tolist() == [1.0, -2.0, 0.0]


def test_the_first_load_builds_and_compares_with_torch(pushed: Path, on_device: list[Path]) -> None:
    tensorrt.TensorRT().load(pushed, DECODE)
    sidecar = next((pushed.parent / "engines").glob("*.json"))
    found = decode(tensorrt.EngineSidecar, read_json(sidecar), source=str(sidecar))
    assert on_device == [pushed]
    assert found.sqnr_db is not None
    assert found.sqnr_db > 45, f"{found.sqnr_db:.1f} dB"
    assert [phase.kinds for phase in found.phases] == [{"gemm": 1}, {"kgen": 1}]


def test_an_engine_is_bound_to_model_runtime_and_gpu(pushed: Path, on_device: list[Path]) -> None:
    tensorrt.TensorRT().load(pushed, DECODE)
    sidecar = next((pushed.parent / "engines").glob("*.json"))
    found = decode(tensorrt.EngineSidecar, read_json(sidecar), source=str(sidecar))
    assert (found.files["model.onnx"], found.runtime, found.gpu) == (file_sha256(pushed), "TensorRT 10.3.0", device.GPU)


def test_the_second_load_takes_the_engine_that_is_there(pushed: Path, on_device: list[Path]) -> None:
    for _ in range(2):
        assert tensorrt.TensorRT().load(pushed, DECODE).sample() > 0
    assert len(on_device) == 1


def test_another_workload_gets_an_engine_of_its_own(pushed: Path, on_device: list[Path]) -> None:
    for context in (17, 18):
        tensorrt.TensorRT().load(pushed, Workload(context=context))
    assert len(on_device) == 2


def test_another_tensorrt_builds_anew(pushed: Path, on_device: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("10.16.2", "11.1.0"):
        monkeypatch.setattr(tensorrt_build, "find_api", lambda version=version: Api(device.module(version)))
        tensorrt.TensorRT().load(pushed, DECODE)
    assert len(on_device) == 2


def test_an_engine_that_computes_something_else_is_refused_and_not_kept(
    pushed: Path, on_device: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    execute = device.Context.execute_async_v3

    def lose_values(self: device.Context, stream: int) -> bool:
        done = execute(self, stream)
        ctypes.memset(self.addresses["present.0.value"], 0, 64)  # as if q, k and v were joined wrongly
        return done

    monkeypatch.setattr(device.Context, "execute_async_v3", lose_values)
    with pytest.raises(VerificationFailed, match=r"differs from the torch model: SQNR .* 20 dB expected"):
        tensorrt.TensorRT().load(pushed, DECODE)
    assert list((pushed.parent / "engines").iterdir()) == []


def test_other_weights_than_the_recipes_are_refused(pushed: Path, on_device: list[Path]) -> None:
    (pushed.parent / "model.onnx.data").write_bytes(b"other")
    with pytest.raises(Mismatch, match=r"model\.onnx\.data"):
        tensorrt.TensorRT().load(pushed, DECODE)


def test_a_context_beyond_the_engine_is_unsupported(exported: Path, on_device: list[Path]) -> None:
    with pytest.raises(Unsupported, match="at most 127 tokens, got 4096"):
        tensorrt.TensorRT().load(exported, Workload(context=4096))


def test_an_absent_file_is_refused(on_device: list[Path], tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no such file"):
        tensorrt.TensorRT().load(tmp_path / "absent.onnx", DECODE)


def test_a_probe_is_built_for_its_phase_alone(on_device: list[Path], tmp_path: Path) -> None:
    layers = (TINY_LAYER, LayerWidths(num_heads=2, num_kv_heads=1, num_channels=32))
    probe = exporter.TensorRTExporter().export_probe(tiny_llama(*layers), precision="f16", seed=0, out=tmp_path / "p")
    session = tensorrt.TensorRT().load(tmp_path / "p" / probe.path, DECODE)
    assert session.sample() == 5000
    with pytest.raises(Unsupported, match="built for decode only"):
        session.logits(TOKENS, incremental=False)
