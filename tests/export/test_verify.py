"""The comparison of an exported file with its torch model."""

import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from standins.models import tiny_model
from transformers import PreTrainedModel

from dilap.backends.llamacpp.file import validate
from dilap.backends.llamacpp.library import library
from dilap.core.errors import InvalidInput, Unavailable, VerificationFailed
from dilap.core.precisions import Mix
from dilap.core.sqnr import sqnr_db
from dilap.export.gguf.writer import SQNR_BOUNDS_DB, GgufExporter, verify_gguf
from dilap.models.anatomy import architecture_of


@pytest.fixture(scope="module")
def exported(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "out"
    GgufExporter().export(tiny_model("llama"), tokenizer=tokenizer, precision="f32", plan_digest="", out=out)
    return out / "model.gguf"


def test_sqnr_of_noise_at_a_tenth_of_the_signal_is_twenty() -> None:
    signal = np.array([[1.0, -1.0, 1.0, -1.0]])
    assert sqnr_db(signal, signal * 0.9) == pytest.approx(20)


def test_sqnr_ignores_a_constant_added_to_a_row() -> None:
    signal = np.array([[1.0, 2.0, 4.0]])
    assert sqnr_db(signal, signal + 8) > 300


def test_sqnr_of_nan_is_the_worst() -> None:
    assert sqnr_db(np.ones((1, 2)), np.array([[np.nan, 1.0]])) == -np.inf


def test_changed_weight_fails_with_the_numbers(exported: Path) -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.down_proj.weight.data[5] += 0.3
    with pytest.raises(VerificationFailed, match=r"SQNR \d+\.\d dB in one pass, \d+\.\d dB token by token"):
        verify_gguf(model, exported, mix=Mix(precision="f32"))


def test_wrong_order_of_query_rows_fails(exported: Path) -> None:
    model = tiny_model("llama")
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight.data = weight.data.flip(0)
    with pytest.raises(VerificationFailed):
        verify_gguf(model, exported, mix=Mix(precision="f16"))


@pytest.fixture
def amplifying() -> PreTrainedModel:
    """A model whose logits are small differences of large ones, so that f16 costs it more than the bound."""
    model = tiny_model("llama")
    model.lm_head.weight.data += 100
    return model


def test_model_that_amplifies_rounding_is_measured_by_what_torch_loses(
    amplifying: PreTrainedModel, tokenizer: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    artifact = GgufExporter().export(amplifying, tokenizer=tokenizer, precision="f16", plan_digest="", out=out)
    assert artifact.sqnr_db is not None
    assert 10 < artifact.sqnr_db < SQNR_BOUNDS_DB["f16"]


def test_wrong_order_fails_in_a_model_that_amplifies_rounding(
    amplifying: PreTrainedModel, tokenizer: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    GgufExporter().export(amplifying, tokenizer=tokenizer, precision="f16", plan_digest="", out=out)
    weight = amplifying.model.layers[-1].mlp.gate_proj.weight
    weight.data = weight.data.flip(0)
    with pytest.raises(VerificationFailed, match=r"1[0-9.]+ dB expected"):
        verify_gguf(amplifying, out / "model.gguf", mix=Mix(precision="f16"))


def test_model_that_gives_nan_fails(exported: Path) -> None:
    model = tiny_model("llama")
    model.model.norm.weight.data[0] = torch.nan
    with pytest.raises(VerificationFailed):
        verify_gguf(model, exported, mix=Mix(precision="q4_0"))


def test_training_mode_is_given_back(exported: Path) -> None:
    model = tiny_model("llama").train()
    verify_gguf(model, exported, mix=Mix(precision="f32"))
    assert model.training


def test_file_without_a_vocabulary_is_compared_on_random_tokens(tokenizer: Path, tmp_path: Path) -> None:
    model = tiny_model("llama")
    out = tmp_path / "probe"
    GgufExporter().export_probe(architecture_of(model), precision="f32", seed=0, out=out)
    with pytest.raises(VerificationFailed, match="over 64 tokens"):
        verify_gguf(model, out / "model.gguf", mix=Mix(precision="f32"))


def test_short_context_is_compared_on_fewer_tokens(tokenizer: Path, tmp_path: Path) -> None:
    model = tiny_model("llama", max_position_embeddings=16)
    out = tmp_path / "out"
    artifact = GgufExporter().export(model, tokenizer=tokenizer, precision="f32", plan_digest="", out=out)
    assert artifact.sqnr_db is not None


def test_valid_file_passes(exported: Path) -> None:
    validate(exported)


def test_missing_file_is_named(tmp_path: Path, tokenizer: Path) -> None:
    with pytest.raises(InvalidInput, match=r"nowhere\.gguf: no such file"):
        validate(tmp_path / "nowhere.gguf")


def test_other_file_is_named(tmp_path: Path, tokenizer: Path) -> None:
    path = tmp_path / "text.gguf"
    path.write_text("not a model at all")
    with pytest.raises(InvalidInput, match=r"text\.gguf: not a whole GGUF file"):
        validate(path)


def test_truncated_file_names_its_tensor(exported: Path, tmp_path: Path) -> None:
    path = tmp_path / "short.gguf"
    path.write_bytes(exported.read_bytes()[:-1000])
    with pytest.raises(InvalidInput, match=r"tensor '.*' data is not within the file bounds"):
        validate(path)


def test_wrong_shape_names_its_tensor(exported: Path, tmp_path: Path) -> None:
    path = tmp_path / "wrong.gguf"
    reader = gguf.GGUFReader(exported)
    at = int(reader.fields["llama.feed_forward_length"].parts[-1].ctypes.data - reader.data.ctypes.data)
    content = bytearray(exported.read_bytes())
    content[at : at + 4] = (64).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(InvalidInput, match=r"tensor 'blk\.0\.ffn_\w+\.weight' has wrong shape"):
        validate(path)


def test_missing_tensor_is_named(exported: Path, tmp_path: Path) -> None:
    path = tmp_path / "missing.gguf"
    path.write_bytes(exported.read_bytes().replace(b"blk.1.attn_k.weight", b"blk.1.attn_x.weight"))
    with pytest.raises(InvalidInput, match=r"tensor 'blk\.1\.attn_k\.weight' not found") as error:
        validate(path)
    assert "\n" not in str(error.value)


def test_missing_runtime_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp.llama_cpp", None)
    library.cache_clear()  # without what it loaded before
    try:
        with pytest.raises(Unavailable, match="pip install"):
            validate(tmp_path / "model.gguf")
    finally:
        library.cache_clear()
