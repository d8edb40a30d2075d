"""The emitted ONNX graph against torch, for every family, in both forms."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from numpy.typing import NDArray
from standins.models import FAMILIES, Kept, compensated_model, pruned_model, tiny_model
from transformers import PreTrainedModel

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
ir = pytest.importorskip("onnx_ir", reason="onnx_ir is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")

from dilap.backends.onnxruntime.file import OnnxFile  # noqa: E402
from dilap.core.errors import Unsupported  # noqa: E402
from dilap.core.sqnr import sqnr_db  # noqa: E402
from dilap.export.onnx.graph import Form, build_model  # noqa: E402
from dilap.export.onnx.weights import ModelWeights, quantise  # noqa: E402
from dilap.export.verify import verify_logits  # noqa: E402
from dilap.models.anatomy import architecture_of, exported_tensors, numerics_of  # noqa: E402

TOKENS = [5, 17, 80, 3, 3, 41, 0, 95, 250, 7, 7, 12]
FORMS: tuple[Form, ...] = ("onnxruntime", "plain")
PLANS: dict[str, Kept] = {
    "dense": {},
    "mixed widths": {
        "layers.0.kv_groups": (1,),
        "layers.1.channels": tuple(range(0, 80, 2)),
        "layers.2.channels": tuple(range(33)),
    },
    "no attention in layer 0": {"layers.0.kv_groups": ()},
    "no attention in layer 1": {"layers.1.kv_groups": ()},
    "no ffn in layer 0": {"layers.0.channels": ()},
    "no ffn in layer 2": {"layers.2.channels": ()},
    "no layer 1": {"layers.1.kv_groups": (), "layers.1.channels": ()},
}


def save(model: PreTrainedModel, path: Path, form: Form) -> Path:
    architecture, weights = architecture_of(model), ModelWeights(exported_tensors(model))
    graph = build_model(architecture, numerics_of(model), weights.values, form=form)
    ir.save(graph, path, external_data=f"{path.name}.data")
    return path


def assert_exact(model: PreTrainedModel, path: Path) -> None:
    """In one pass and through the cache."""
    verify_logits(model, OnnxFile(path), TOKENS, bound_db=110, name="the graph")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kept", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("family", FAMILIES)
def test_graph_computes_what_torch_computes(family: str, kept: Kept, form: Form, tmp_path: Path) -> None:
    model = pruned_model(family, kept)
    path = save(model, tmp_path / "m.onnx", form)
    onnx.checker.check_model(path, full_check=form == "plain")  # it infers no shapes through contrib operators
    assert_exact(model, path)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["llama", "opt", "granite"])
def test_tied_head_is_exact_and_stored_once(family: str, form: Form, tmp_path: Path) -> None:
    model = tiny_model(family, tie_word_embeddings=True)
    path = save(model, tmp_path / "m.onnx", form)
    assert "lm_head.weight" not in ir.load(path).graph.initializers
    assert_exact(model, path)


@pytest.mark.parametrize("tied", [False, True])
def test_matrices_in_panels_are_exact(tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dilap.export.onnx.matrices._PANELS_FROM", 0)
    model = pruned_model("llama", PLANS["mixed widths"], tie_word_embeddings=tied)
    path = save(model, tmp_path / "m.onnx", "onnxruntime")
    shapes = {name: list(value.shape) for name, value in ir.load(path).graph.initializers.items()}
    assert shapes["model.layers.0.mlp.gate_up_proj.weight"] == [6, 64, 32]
    assert shapes["model.layers.2.mlp.gate_up_proj.weight"] == [64, 66]  # no whole number of panels
    assert_exact(model, path)


def test_sequences_of_a_batch_are_read_as_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dilap.export.onnx.matrices._PANELS_FROM", 0)
    path = save(tiny_model("llama"), tmp_path / "m.onnx", "onnxruntime")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def logits(token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        cache = np.zeros((len(token_ids), 2, 0, 16), np.float32)
        feed = {"input_ids": token_ids, "attention_mask": np.ones_like(token_ids)}
        feed |= {value.name: cache for value in session.get_inputs() if value.name.startswith("past_key_values.")}
        found: NDArray[np.float32] = session.run(["logits"], feed)[0]
        return found

    batch = np.array([TOKENS, TOKENS[::-1]])
    assert_allclose(logits(batch), np.concatenate([logits(row[None]) for row in batch]), atol=1e-4)


def test_untied_head_of_opt_is_exact(tmp_path: Path) -> None:
    model = tiny_model("opt", tie_word_embeddings=False)
    assert_exact(model, save(model, tmp_path / "m.onnx", "onnxruntime"))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["llama", "granite"])
def test_biases_of_output_projections_alone_are_exact(family: str, form: Form, tmp_path: Path) -> None:
    model = compensated_model(family, PLANS["mixed widths"])
    assert_exact(model, save(model, tmp_path / "m.onnx", form))


@pytest.mark.parametrize("form", FORMS)
def test_biases_of_every_projection_are_exact(form: Form, tmp_path: Path) -> None:
    model = pruned_model("llama", PLANS["mixed widths"], attention_bias=True, mlp_bias=True)
    assert_exact(model, save(model, tmp_path / "m.onnx", form))


@pytest.mark.parametrize("form", FORMS)
def test_heads_need_not_fill_the_hidden_size(form: Form, tmp_path: Path) -> None:
    model = tiny_model("llama", head_dim=32)
    assert_exact(model, save(model, tmp_path / "m.onnx", form))


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0},
    ],
    ids=lambda scaling: scaling["rope_type"],
)
@pytest.mark.parametrize("form", FORMS)
def test_rotary_scaling_is_exact(scaling: dict[str, float], form: Form, tmp_path: Path) -> None:
    rope = {"rope_theta": 5000.0, "original_max_position_embeddings": 32, **scaling}
    model = tiny_model("llama", rope_parameters=rope)
    assert_exact(model, save(model, tmp_path / "m.onnx", form))


def test_rotary_scaling_that_depends_on_the_length_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama", rope_parameters={"rope_theta": 5000.0, "rope_type": "dynamic", "factor": 2.0})
    with pytest.raises(Unsupported, match="dynamic"):
        save(model, tmp_path / "m.onnx", "onnxruntime")


def test_norms_behind_the_sublayers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="OPT-350m"):
        save(tiny_model("opt", do_layer_norm_before=False), tmp_path / "m.onnx", "onnxruntime")


@pytest.mark.parametrize("form", FORMS)
def test_cache_inputs_have_concrete_heads_and_no_gaps(form: Form, tmp_path: Path) -> None:
    model = pruned_model("llama", {"layers.0.kv_groups": (), "layers.2.kv_groups": (1,)})
    graph = ir.load(save(model, tmp_path / "m.onnx", form)).graph
    shapes = {value.name: list(value.shape) for value in graph.inputs if value.name.endswith(".key")}
    assert [(name, shape[1], shape[3]) for name, shape in shapes.items()] == [
        ("past_key_values.0.key", 2, 16),
        ("past_key_values.1.key", 1, 16),
    ]


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_plain_graph_in_half_precision_holds_no_f32_but_in_norms(dtype: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    architecture, weights = architecture_of(model), ModelWeights(model.state_dict())
    ir.save(
        build_model(architecture, numerics_of(model), weights.values, form="plain", dtype=dtype), tmp_path / "m.onnx"
    )
    graph = ir.load(tmp_path / "m.onnx").graph
    wide = {name for name, value in graph.initializers.items() if value.dtype == ir.DataType.FLOAT}
    assert wide == {"two", "norm_eps"}
    onnx.checker.check_model(tmp_path / "m.onnx", full_check=True)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("columns", [64, 33])
def test_blocks_are_those_of_onnx_runtimes_quantiser(bits: int, columns: int) -> None:
    from onnxruntime.quantization.matmul_nbits_quantizer import (  # noqa: PLC0415
        DefaultWeightOnlyQuantConfig,
        DefaultWeightOnlyQuantizer,
    )

    matrix = np.random.default_rng(0).normal(0, 1, (48, columns)).astype(np.float32)
    config = DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=True, bits=bits)
    expected = DefaultWeightOnlyQuantizer(config).qbits_block_quant(np.ascontiguousarray(matrix.T))
    values, scales = quantise(matrix, bits=bits)
    np.testing.assert_array_equal(values, expected[0])
    np.testing.assert_array_equal(scales, expected[1])


def test_a_bfloat16_model_rotates_with_unrounded_frequencies() -> None:
    model = tiny_model("llama")
    expected = numerics_of(model).layers
    assert numerics_of(model.to(torch.bfloat16)).layers == expected


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_logits_are_the_last_ones_asked_for(form: Form, tmp_path: Path) -> None:
    import onnxruntime  # noqa: PLC0415

    model = tiny_model("llama")
    path = save(model, tmp_path / "m.onnx", form)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [f"past_key_values.{layer}.{part}" for layer in range(3) for part in ("key", "value")]
    feed: dict[str, NDArray[np.generic]] = {name: np.zeros((1, 2, 0, 16), np.float32) for name in names}
    if form == "plain":
        feed["position_ids"] = np.arange(len(TOKENS))[None]
    else:
        feed["attention_mask"] = np.ones((1, len(TOKENS)), np.int64)
    feed |= {"input_ids": np.array([TOKENS]), "logits_to_keep": np.array([2])}
    with torch.no_grad():
        expected = model(torch.tensor([TOKENS])).logits[0, -2:].numpy()
    got = session.run(["logits"], feed)[0]
    assert got.shape == (1, 2, 300)
    assert sqnr_db(expected, got[0]) > 110
