"""dilap-export of encoders of texts, told from decoders and image networks by their folders alone."""

from pathlib import Path

import pytest
from standins import encoders
from standins.fake_job import call, last_line
from standins.networks import network
from transformers import AutoTokenizer

from dilap import backends
from dilap.cli import export
from dilap.core.artifact import Artifact
from dilap.core.codec import decode, read_json
from dilap.core.network_input import TokenInput
from dilap.job.networks import is_network, reads_texts
from dilap.models.convolutional.load import save_network

if reason := backends.get("onnxruntime").unavailable():
    pytest.skip(reason, allow_module_level=True)
pytest.importorskip("onnxscript", reason="onnxscript is not installed")


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """The folder of a tiny BERT with its tokenizer."""
    folder = tmp_path / "bert"
    save_network(encoders.encoder(), folder)
    encoders.write_tokenizer(folder)
    return folder


def test_an_encoder_of_texts_is_exported_with_its_tokenizer(encoder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(encoders.SENTENCES))
    given = ["--input", "12", "--precision", "int8", "--calib", tmp_path / "text.txt", "--out", tmp_path / "out"]
    assert call(export.main, "--backend", "onnxruntime", *given, encoder) == 0
    artifact = decode(Artifact, read_json(tmp_path / "out" / "artifact.json"), source="test")
    assert artifact.input == TokenInput(length=12)
    assert (artifact.sqnr_db or 0) > 15
    words = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert words("the cat")["input_ids"] == AutoTokenizer.from_pretrained(encoder)("the cat")["input_ids"]


def test_an_encoder_of_texts_is_told_from_others(encoder: Path, checkpoint: Path, tmp_path: Path) -> None:
    save_network(network("vit"), tmp_path / "vit")
    assert (is_network(str(encoder)), reads_texts(str(encoder))) == (True, True)
    assert (is_network(str(tmp_path / "vit")), reads_texts(str(tmp_path / "vit"))) == (True, False)
    assert (is_network(str(checkpoint)), reads_texts(str(checkpoint))) == (False, False)


def test_tensorrt_says_who_runs_encoders_of_texts(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(export.main, "--backend", "tensorrt", "--out", tmp_path / "out", encoder) == 2
    assert "writes no encoders of texts for TensorRT yet; use onnxruntime or executorch" in last_line(capsys)
