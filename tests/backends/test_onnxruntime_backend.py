"""The real ONNX Runtime on tiny models with random weights."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from standins.fabricated import TINY_LAYER, tiny_llama
from standins.models import FAMILIES, tiny_model

from dilap import backends
from dilap.core import codec
from dilap.core.errors import InvalidInput, Mismatch, Unsupported
from dilap.core.shape import LayerWidths
from dilap.core.workload import Phase, Workload
from dilap.models.anatomy import architecture_of

if reason := backends.get("onnxruntime").unavailable():
    pytest.skip(reason, allow_module_level=True)
pytest.importorskip("onnx_ir", reason="onnx_ir is not installed")

from dilap import export
from dilap.backends.onnxruntime.file import OnnxFile
from dilap.profilers.devices import device as devices
from dilap.profilers.instruments.agent import AgentClient
from dilap.profilers.profiler import Case, Profiler
from dilap.profilers.protocol import Protocol

TINY = tiny_llama(
    TINY_LAYER,
    LayerWidths(num_heads=2, num_kv_heads=1, num_channels=32),
    LayerWidths(num_heads=0, num_kv_heads=0, num_channels=64),
    LayerWidths(num_heads=4, num_kv_heads=2, num_channels=0),
)
OPT = replace(TINY, family="opt", ffn_matrices=2, norm_vectors=2, num_positions=130, qkv_bias=True)
DECODE = Workload(precision="f32", context=16, prompt_tokens=8)
QUICK = Protocol(
    lead_in_seconds=0.0, warm_up_seconds=0.0, warm_up_cap_seconds=0.0, max_seconds=0.0, back_off_seconds=0.0
)
TOKENS = [5, 17, 80, 3, 3, 41, 0, 95]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny") / "model"
    return out / export.get("onnxruntime").export_probe(TINY, precision="f32", seed=1, out=out).path


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    """One that may be damaged."""
    shutil.copytree(model.parent, tmp_path / "copy")
    return tmp_path / "copy" / model.name


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_a_sample_is_a_positive_number_of_nanoseconds(model: Path, phase: Phase) -> None:
    session = backends.get("onnxruntime").load(model, replace(DECODE, phase=phase))
    samples = [session.sample() for _ in range(20)]  # more than the cache has room for, did it grow
    session.close()
    assert min(samples) > 0


@pytest.mark.parametrize(("switches", "disabled"), [({}, "0"), ({"flash_attention": "off"}, "1")])
def test_flash_attention_is_as_the_workload_says(
    model: Path, monkeypatch: pytest.MonkeyPatch, switches: dict[str, str], disabled: str
) -> None:
    monkeypatch.setenv("ORT_GQA_DISABLE_FLASH_ATTENTION", "")
    backends.get("onnxruntime").load(model, replace(DECODE, switches=switches)).close()
    assert os.environ["ORT_GQA_DISABLE_FLASH_ATTENTION"] == disabled


@pytest.mark.parametrize("switches", [{"flash_attention": "off"}, {"spinning": "off"}])
def test_switches_change_no_number(model: Path, switches: dict[str, str]) -> None:
    plain, switched = (backends.get("onnxruntime").load(model, replace(DECODE, switches=s)) for s in ({}, switches))
    expected, got = (session.logits(TOKENS, incremental=True) for session in (plain, switched))
    np.testing.assert_allclose(got, expected, atol=1e-5 * float(np.abs(expected).max()))  # another order of summation


@pytest.mark.parametrize("incremental", [False, True])
def test_logits_in_shared_buffers_are_those_of_separate_ones(model: Path, incremental: bool) -> None:
    session = backends.get("onnxruntime").load(model, DECODE)
    got = session.logits(TOKENS, incremental=incremental)
    session.close()
    expected = OnnxFile(model).logits(TOKENS, incremental=False)
    np.testing.assert_allclose(got, expected, atol=1e-5 * float(np.abs(expected).max()))  # another order of summation


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantised_logits_token_by_token_equal_those_of_one_pass(precision: str, tmp_path: Path) -> None:
    out = tmp_path / "model"
    artifact = export.get("onnxruntime").export_probe(TINY, precision=precision, seed=1, out=out)
    session = backends.get("onnxruntime").load(out / artifact.path, DECODE)
    together, one_by_one = (session.logits(TOKENS, incremental=flag) for flag in (False, True))
    session.close()
    # activations are rounded to 8 bits, so that a last bit may move a whole step
    np.testing.assert_allclose(one_by_one, together, atol=0.02 * float(np.abs(together).max()))


def test_learned_positions_are_fed(tmp_path: Path) -> None:
    artifact = export.get("onnxruntime").export_probe(OPT, precision="f32", seed=1, out=tmp_path / "opt")
    session = backends.get("onnxruntime").load(tmp_path / "opt" / artifact.path, DECODE)
    together, one_by_one = (session.logits(TOKENS, incremental=flag) for flag in (False, True))
    session.close()
    np.testing.assert_allclose(one_by_one, together, atol=1e-5 * float(np.abs(together).max()))


def test_the_cache_is_written_in_place(model: Path) -> None:
    session = backends.get("onnxruntime").load(model, DECODE)
    decoder = session._model  # type: ignore[attr-defined]
    cache = decoder.new_cache(4)
    binding, _ = decoder.bind(cache, [7], start=2, num_rows=1)
    decoder.run(binding)
    keys = cache["past_key_values.0.key"].numpy()
    session.close()
    assert [bool(np.any(keys[0, 0, position])) for position in range(4)] == [False, False, True, False]


def test_asking_for_logits_leaves_the_timed_cache_alone(model: Path) -> None:
    session = backends.get("onnxruntime").load(model, DECODE)
    session.logits(TOKENS * 8, incremental=False)  # longer than the timed context
    assert session.sample() > 0
    session.close()


def test_closing_twice_is_harmless(model: Path) -> None:
    session = backends.get("onnxruntime").load(model, DECODE)
    session.close()
    session.close()


def test_a_truncated_graph_is_refused_in_one_line(copy: Path) -> None:
    copy.write_bytes(copy.read_bytes()[:-2000])
    with pytest.raises(InvalidInput, match=r"model\.onnx: ONNX Runtime cannot load it: .+") as caught:
        backends.get("onnxruntime").load(copy, DECODE)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_onnx_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.onnx"
    other.write_bytes(b"not a model")
    with pytest.raises(InvalidInput, match=r"other\.onnx: ONNX Runtime cannot load it"):
        backends.get("onnxruntime").load(other, DECODE)


def test_an_onnx_file_that_is_no_decoder_is_refused(tmp_path: Path) -> None:
    import onnx  # noqa: PLC0415

    number = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Abs", ["x"], ["y"])], "abs", [number], [output])
    opset = onnx.helper.make_opsetid("", 20)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10), tmp_path / "abs.onnx")
    with pytest.raises(InvalidInput, match="not a decoder that DiLAP exported: it has no attention_mask"):
        backends.get("onnxruntime").load(tmp_path / "abs.onnx", DECODE)


def test_an_absent_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no such file"):
        backends.get("onnxruntime").load(tmp_path / "absent.onnx", DECODE)


def test_absent_data_is_refused(copy: Path) -> None:
    copy.with_name("model.onnx.data").unlink()
    with pytest.raises(InvalidInput, match=r"model\.onnx\.data"):
        backends.get("onnxruntime").load(copy, DECODE)


def test_truncated_data_is_refused(copy: Path) -> None:
    data = copy.with_name("model.onnx.data")
    data.write_bytes(data.read_bytes()[:-100])
    with pytest.raises(InvalidInput, match="ONNX Runtime cannot load it"):
        backends.get("onnxruntime").load(copy, DECODE)


def test_batches_are_unsupported(model: Path) -> None:
    with pytest.raises(Unsupported, match="batch 2"):
        backends.get("onnxruntime").load(model, Workload(batch=2))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_may_have_widths_of_its_own_in_every_layer(family: str) -> None:
    found = backends.get("onnxruntime").capabilities(architecture_of(tiny_model(family)), precision="int4")
    assert (found.unsupported, found.per_layer_widths, found.ffn_multiple) == (None, True, 32)


def test_an_unknown_precision_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidInput, match="int4"):
        backends.get("onnxruntime").capabilities(tiny_llama(), precision="q4_0")


def test_the_build_names_its_providers() -> None:
    assert "CPUExecutionProvider" in backends.get("onnxruntime").build()


@pytest.fixture
def running() -> Iterator[AgentClient]:
    with AgentClient(devices.get("host_cpu").connect(), backend="onnxruntime", device="host_cpu") as client:
        yield client


def test_the_agent_notices_damaged_data(running: AgentClient, copy: Path) -> None:
    digests = {name: codec.file_sha256(copy.with_name(name)) for name in ("model.onnx", "model.onnx.data")}
    data = copy.with_name("model.onnx.data")
    content = bytearray(data.read_bytes())
    content[100] ^= 1
    data.write_bytes(content)
    with pytest.raises(Mismatch, match=r"model\.onnx\.data: .*sha256 differs"):
        running.load(
            copy,
            sha256=digests["model.onnx"],
            companions={"model.onnx.data": digests["model.onnx.data"]},
            workload=DECODE,
        )


def test_the_agent_notices_absent_data(running: AgentClient, copy: Path) -> None:
    copy.with_name("model.onnx.data").unlink()
    with pytest.raises(InvalidInput, match=r"model\.onnx\.data: no such file"):
        running.load(copy, sha256=codec.file_sha256(copy), companions={"model.onnx.data": "0" * 64}, workload=DECODE)


def test_the_profiler_measures_a_folder_through_the_agent(model: Path) -> None:
    profiler = Profiler(devices.get("host_cpu"), backend="onnxruntime")
    one = profiler.measure([Case(path=model, workload=DECODE)], QUICK)[0]
    assert one.artifact_sha256 == codec.file_sha256(model)
    assert one.fingerprint.runtime == "onnxruntime"


def test_the_profiler_refuses_swapped_data(copy: Path, tmp_path: Path) -> None:
    other = export.get("onnxruntime").export_probe(TINY, precision="f32", seed=2, out=tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.onnx.data", copy.with_name("model.onnx.data"))
    assert other.companions != {}
    profiler = Profiler(devices.get("host_cpu"), backend="onnxruntime")
    with pytest.raises(Mismatch, match=r"model\.onnx\.data"):
        profiler.measure([Case(path=copy, workload=DECODE)], QUICK)
