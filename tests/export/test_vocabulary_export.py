"""Every exporter writes the cut tokenizer with the cut model, and the stock runtimes split texts by it."""

import importlib
from pathlib import Path

import pytest
from standins.models import needs_llamacpp, tiny_model
from standins.tokenizers import (
    LLAMA3_SPLIT,
    SENTENCEPIECE_SIZE,
    byte_level,
    sentencepiece_folder,
    sentencepiece_pieces,
    split_by,
)
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from dilap import backends, export
from dilap.backends.executorch.tokenizer import ExecuTorchTokenizer
from dilap.core.artifact import Artifact
from dilap.models.load import Source, load, save_checkpoint
from dilap.models.text_samples import SAMPLES

pytestmark = [  # lowering is ExecuTorch's and torch's own code
    pytest.mark.filterwarnings("ignore:::torch"),
    pytest.mark.filterwarnings("ignore:::executorch"),
    pytest.mark.filterwarnings("ignore:::torchao"),
    pytest.mark.filterwarnings("ignore:::copyreg"),
]
TEXT = "The quick brown fox jumps over the lazy dog.\n\nIt isn't the dog's fault; they paid $1,999.99 in 2024.\n\n" * 20
TEXTS = (TEXT, *SAMPLES)


def cut(folder: Path, words: Path, *, num_tokens: int) -> Source:
    """A Llama of one layer in `folder` with the tokens of TEXT alone."""
    tokenizer = AutoTokenizer.from_pretrained(words)
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    model = tiny_model("llama", vocab_size=num_tokens, num_hidden_layers=1, **ends)
    save_checkpoint(model, tokenizer, folder / "model")
    (folder / "needs.txt").write_text(TEXT, encoding="utf-8")
    return load(str(folder / "model"), vocabulary=folder / "needs.txt")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("source")
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return cut(folder, byte_level(folder / "words", gpt2, eos_token="<|end|>"), num_tokens=900)


def exported(source: Source, backend: str, out: Path) -> Artifact:
    artifact = export.get(backend).export(
        source.model,
        tokenizer=source.tokenizer_path,
        precision="f16" if backend == "tensorrt" else "f32",
        plan_digest="",
        out=out,
    )
    assert artifact.decoder.vocab_size == source.model.config.vocab_size == len(source.tokenizer) < 400
    assert artifact.sqnr_db is not None
    assert artifact.sqnr_db > (45 if backend == "tensorrt" else 100), f"{artifact.sqnr_db:.1f} dB"  # f16: 53 measured
    assert any("its vocabulary was cut to what needs.txt needs" in note for note in artifact.details["notes"])
    return artifact


@pytest.fixture(scope="module", params=["onnxruntime", "executorch", "tensorrt"])
def folder(request: pytest.FixtureRequest, source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an artifact with a tokenizer.json beside it."""
    backend = request.param
    if backend != "tensorrt" and (reason := backends.get(backend).unavailable()):
        pytest.skip(reason)
    out: Path = tmp_path_factory.mktemp(backend) / "out"
    exported(source, backend, out)
    return out


def test_stock_transformers_reads_the_tokenizer_beside_it(folder: Path, source: Source) -> None:
    stock = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert stock(text)["input_ids"] == source.tokenizer(text)["input_ids"]


def test_executorchs_own_reader_splits_alike(folder: Path, source: Source) -> None:
    if reason := backends.get("executorch").unavailable():
        pytest.skip(reason)
    stock = ExecuTorchTokenizer(folder / "tokenizer.json")
    for text in TEXTS:
        assert stock.tokens(text) == source.tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return sentencepiece_pieces(tmp_path_factory.mktemp("sentencepiece"))


@pytest.mark.parametrize("kind", ["gpt-2", "llama-3", "smollm", "llama", "gemma"])
def test_stock_llamacpp_splits_alike(kind: str, pieces: list[str], tmp_path: Path) -> None:
    needs_llamacpp()
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    splits = {"gpt-2": gpt2, "llama-3": split_by(LLAMA3_SPLIT), "smollm": digits}
    if kind in splits:
        words = byte_level(tmp_path / "w", splits[kind], ignores_merges=kind == "llama-3", eos_token="<|end|>")
    else:
        words = sentencepiece_folder(tmp_path / "w", pieces, style="bare" if kind == "gemma" else kind)
    source = cut(tmp_path, words, num_tokens=900 if kind in splits else SENTENCEPIECE_SIZE)
    exported(source, "llamacpp", tmp_path / "out")
    path = str(tmp_path / "out" / "model.gguf")
    stock = importlib.import_module("llama_cpp").Llama(path, vocab_only=True, verbose=False)
    for text in TEXTS:
        ids = source.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert stock.tokenize(text.encode(), add_bos=False, special=True) == ids, text
    assert stock.token_eos() == source.tokenizer.eos_token_id
    stock.close()
