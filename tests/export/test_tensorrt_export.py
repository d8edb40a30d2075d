"""What is written for TensorRT; ONNX Runtime computes torch's logits from it, TensorRT for RTX compiles it."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from standins.fabricated import tiny_llama
from standins.models import FAMILIES, byte_level_tokenizer, pruned_model, tiny_model
from transformers import AutoTokenizer, PreTrainedModel

from dilap import backends
from dilap import export as exporters
from dilap.backends.tensorrt import builder as tensorrt_build
from dilap.backends.tensorrt.builder import Api, Built
from dilap.backends.tensorrt.recipe import read_recipe
from dilap.core.artifact import Artifact
from dilap.core.codec import decode, encode, file_sha256, read_json
from dilap.core.errors import InvalidInput, Unavailable, Unsupported
from dilap.core.shape import Architecture, LayerWidths
from dilap.models.anatomy import architecture_of, numerics_of, stand_in_numerics

pytest.importorskip("onnx_ir", reason="onnx_ir is not installed: nothing can be exported to ONNX")

from dilap.export.onnx import tensorrt as exporter
from dilap.export.onnx import tensorrt_report

MIXED = {"layers.0.kv_groups": (1,), "layers.1.query_slots": (0,), "layers.1.channels": tuple(range(0, 80, 2))}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_level_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports skip the compilation, which takes seconds a target."""

    def none(*_: object, **__: object) -> Any:
        raise Unavailable("no TensorRT in this test")

    monkeypatch.setattr(exporter, "called", none)


def rtx() -> Api:
    try:
        return tensorrt_build.find_api(("tensorrt_rtx_bindings",))
    except Unavailable:
        pytest.skip("TensorRT for RTX is not installed: pip install 'dilap[tensorrt]'")


def export(model: PreTrainedModel, tokenizer: Path, out: Path, precision: str = "f16") -> Artifact:
    return exporter.TensorRTExporter().export(
        model, tokenizer=tokenizer, precision=precision, plan_digest="plan", out=out
    )


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_widths_compute_torchs_logits(family: str, tokenizer: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: exports are not verified")
    artifact = export(pruned_model(family, MIXED), tokenizer, tmp_path / "out")
    assert artifact.sqnr_db is not None
    assert artifact.sqnr_db > 45, f"{artifact.sqnr_db:.1f} dB"  # measured: 53 to 66


@pytest.mark.usefixtures("uncompiled")
def test_bf16_costs_what_it_should(tokenizer: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: exports are not verified")
    artifact = export(pruned_model("llama", MIXED), tokenizer, tmp_path / "out", "bf16")
    assert artifact.sqnr_db is not None
    assert 30 < artifact.sqnr_db < 45, f"{artifact.sqnr_db:.1f} dB"  # measured: 38


@pytest.fixture(scope="module")
def folder(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporter._Check, "compile", lambda self: "not compiled: a test")
        export(pruned_model("llama", MIXED), tokenizer, out)
    return out


def test_sidecar_describes_the_files(folder: Path) -> None:
    artifact = decode(Artifact, read_json(folder / "artifact.json"), source="artifact")
    assert artifact.sha256 == file_sha256(folder / "model.onnx")
    assert artifact.num_bytes == sum((folder / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    assert (artifact.format, artifact.plan_digest) == ("onnx", "plan")


def test_the_graphs_digest_tells_weights_apart(folder: Path) -> None:
    import onnx_ir as ir  # noqa: PLC0415

    stored = ir.load(folder / "model.onnx").metadata_props["weights_sha256"]
    assert stored == file_sha256(folder / "model.onnx.data")


def test_the_recipe_is_for_these_files(folder: Path) -> None:
    read_recipe(folder).require_files(folder)


def test_the_reference_is_torchs_logits_without_pickle(folder: Path) -> None:
    with np.load(folder / "reference.npz", allow_pickle=False) as stored:
        assert stored["logits"].shape == (len(stored["token_ids"]), 300)
        assert stored["logits"].dtype == np.float32


def test_the_tokenizer_is_beside_the_model(folder: Path, tokenizer: Path) -> None:
    mine, original = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(tokenizer)
    assert mine("the quick dog")["input_ids"] == original("the quick dog")["input_ids"]


def test_nothing_of_the_checks_is_left(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()} - {"tokenizer.json", "tokenizer_config.json"}
    assert names == {"artifact.json", "model.onnx", "model.onnx.data", "recipe.json", "reference.npz"}


def test_inputs_are_strongly_typed_and_of_batch_one(folder: Path) -> None:
    import onnx_ir as ir  # noqa: PLC0415

    inputs = {one.name: one for one in ir.load(folder / "model.onnx").graph.inputs}
    key = inputs["past_key_values.0.key"]
    assert key.dtype == ir.DataType.FLOAT16
    assert key.shape is not None
    assert [size for size in key.shape if isinstance(size, int)] == [1, 1, 16]


@pytest.mark.usefixtures("uncompiled")
def test_without_tensorrt_the_export_says_in_one_line_that_it_was_not_compiled(tokenizer: Path, tmp_path: Path) -> None:
    notes = export(tiny_model("llama"), tokenizer, tmp_path / "out").details["notes"]
    assert [note for note in notes if note.startswith("not compiled: no TensorRT")] != []


@pytest.mark.usefixtures("uncompiled")
def test_without_onnxruntime_the_export_says_that_it_was_not_verified(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object, **__: object) -> Any:
        raise Unavailable("ONNX Runtime is needed to check a file")

    monkeypatch.setattr(exporter, "opened", missing)
    artifact = export(tiny_model("llama"), tokenizer, tmp_path / "out")
    assert artifact.sqnr_db is None
    assert artifact.details["notes"][0].startswith("not verified against torch")


def test_a_weight_too_large_for_f16_is_named_and_nothing_is_left(tokenizer: Path, tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = 1e6
    with pytest.raises(InvalidInput, match=r"up_proj\.weight .* too large for f16; try --precision bf16"):
        export(model, tokenizer, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_weight_of_nan_is_named(tokenizer: Path, tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(InvalidInput, match=r"layers\.0\.mlp\.up_proj\.weight holds NaN"):
        export(model, tokenizer, tmp_path / "out", "bf16")


def test_an_unknown_precision_of_a_probe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="f16, bf16"):
        exporter.TensorRTExporter().export_probe(tiny_llama(WIDE), precision="q4_0", seed=0, out=tmp_path / "out")


WIDE = LayerWidths(num_heads=4, num_kv_heads=2, num_channels=64)
NARROW = LayerWidths(num_heads=2, num_kv_heads=1, num_channels=24)
NO_ATTENTION = LayerWidths(num_heads=0, num_kv_heads=0, num_channels=32)
NO_FFN = LayerWidths(num_heads=2, num_kv_heads=2, num_channels=0)


def shallow(architecture: Architecture) -> Architecture:
    return tensorrt_report.one_layer_a_width(architecture, stand_in_numerics(architecture))[0]


@pytest.mark.parametrize(
    "layers", [(WIDE,) * 3, (WIDE, NARROW, WIDE, NO_ATTENTION), (NO_ATTENTION, WIDE), (NO_FFN, WIDE, NO_ATTENTION)]
)
def test_every_width_is_compiled_once(layers: tuple[LayerWidths, ...]) -> None:
    found = shallow(tiny_llama(*layers)).layers
    assert {(one.num_heads, one.num_kv_heads) for one in found} == {(one.num_heads, one.num_kv_heads) for one in layers}
    assert {one.num_channels for one in found} == {one.num_channels for one in layers}
    assert len(found) <= len(layers)


def test_layers_with_and_without_a_window_are_both_compiled() -> None:
    model = tiny_model("gemma3_text", num_hidden_layers=6)
    _, numerics = tensorrt_report.one_layer_a_width(architecture_of(model), numerics_of(model))
    assert [layer.window for layer in numerics.layers] == [8, None]


def compiled(architecture: Architecture, folder: Path, *, precision: str = "f16", target: str = "SM86") -> Built:
    api = rtx()
    probe = exporter.TensorRTExporter().export_probe(architecture, precision=precision, seed=0, out=folder)
    profiles = read_recipe(folder).profiles()
    return tensorrt_build.build(folder / probe.path, profiles, api=api, target=target)


@pytest.mark.parametrize("target", tensorrt_build.CHECKED_TARGETS)
def test_mixed_widths_compile_for_every_target_with_all_attention_fused(target: str, tmp_path: Path) -> None:
    built = compiled(tiny_llama(WIDE, NARROW), tmp_path / "out", target=target)
    decode_phase, prefill = tensorrt_build.summarise(built.layers, ("decode", "prefill"))
    assert built.num_bytes > 0
    assert (decode_phase.fused_attention, prefill.fused_attention) == (2, 2)
    assert decode_phase.unfused_attention == prefill.unfused_attention == ()


@pytest.mark.parametrize("layers", [(WIDE, NO_ATTENTION), (NO_FFN, WIDE), (WIDE,)], ids=["attention", "ffn", "layer"])
def test_removed_sublayers_and_layers_compile(layers: tuple[LayerWidths, ...], tmp_path: Path) -> None:
    built = compiled(tiny_llama(*layers), tmp_path / "out")
    found = tensorrt_build.summarise(built.layers, ("decode", "prefill"))
    assert found[0].fused_attention == sum(layer.num_heads > 0 for layer in layers)


def test_bf16_compiles(tmp_path: Path) -> None:
    assert compiled(tiny_llama(WIDE, NARROW), tmp_path / "out", precision="bf16").num_bytes > 0


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "olmo2", "smollm3", "opt", "gemma2", "gemma3_text"])
def test_biases_other_norms_other_positions_and_windows_compile(family: str, tmp_path: Path) -> None:
    assert compiled(architecture_of(pruned_model(family, MIXED)), tmp_path / "out").num_bytes > 0


def test_the_layers_of_both_phases_are_told_apart(tmp_path: Path) -> None:
    built = compiled(tiny_llama(WIDE), tmp_path / "out")
    assert {layer.profile for layer in built.layers} == {0, 1}
    assert len(built.activation_bytes) == 2


def test_a_file_that_is_no_onnx_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"nonsense")
    with pytest.raises(InvalidInput, match=r"model\.onnx: TensorRT for RTX .* cannot parse it"):
        tensorrt_build.parse(path, api=rtx())


def test_an_unknown_target_is_unsupported(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="SM87"):
        compiled(tiny_llama(WIDE), tmp_path / "out", target="SM87")


def test_an_input_that_the_recipe_does_not_know_is_named(tmp_path: Path) -> None:
    api = rtx()
    probe = exporter.TensorRTExporter().export_probe(tiny_llama(WIDE), precision="f16", seed=0, out=tmp_path / "out")
    profile = read_recipe(tmp_path / "out").profiles()[0]
    del profile.inputs["past_key_values.0.value"]
    with pytest.raises(InvalidInput, match=r"past_key_values\.0\.value"):
        tensorrt_build.build(tmp_path / "out" / probe.path, [profile], api=api, target="SM86")


def test_the_compile_report_holds_every_target(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rtx()
    monkeypatch.setattr(exporter, "CHECKED_TARGETS", ("SM86", "SM87"))
    artifact = export(tiny_model("llama"), tokenizer, tmp_path / "out")
    report = decode(tensorrt_report.CompileReport, read_json(tmp_path / "out" / "compile_report.json"), source="report")
    assert [one.built for one in report.targets] == [True, False]
    assert (report.num_layers, report.num_layers_built) == (3, 1)
    assert "failed for SM87" in artifact.details["notes"][1]


def test_the_report_survives_a_round_trip() -> None:
    target = tensorrt_report.CompiledTarget(target="SM86", built=False, reason="no kernel")
    report = tensorrt_report.CompileReport(
        runtime="TensorRT for RTX 1", files={}, parsed=True, num_layers=3, num_layers_built=1, targets=(target,)
    )
    assert decode(tensorrt_report.CompileReport, encode(report), source="report") == report


def test_without_its_libraries_the_exporter_is_unavailable_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "dilap.export.onnx.tensorrt")
    monkeypatch.delitem(sys.modules, "dilap.export.onnx.graph")
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    with pytest.raises(Unavailable, match=r"needs onnx_ir; pip install 'dilap\[tensorrt\]'"):
        exporters.get("tensorrt")


def test_any_plan_of_the_known_families_fits() -> None:
    found: Any = backends.get("tensorrt").capabilities(tiny_llama(), precision="f16")
    assert (found.per_layer_widths, found.attention_removal, found.ffn_removal, found.ffn_multiple) == (
        True,
        True,
        True,
        8,
    )


def test_an_unknown_precision_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidInput, match="f16, bf16"):
        backends.get("tensorrt").capabilities(tiny_llama(), precision="q4_0")
