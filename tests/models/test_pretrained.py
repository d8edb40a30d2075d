"""Loading what others made: no code of theirs runs, and counts beyond reason are refused before they cost anything."""

import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from standins import ROOT
from standins.models import byte_level_tokenizer, tiny_model
from transformers import AutoConfig

from dilap import backends, export
from dilap.backends.llamacpp.gguf_header import read_header
from dilap.core.errors import DilapError, InvalidInput, Unsupported
from dilap.models.load import load
from dilap.models.pretrained import from_pretrained, require_sound_gguf


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        source = byte_level_tokenizer(tmp_path_factory.mktemp("words")) / name
        (path / name).write_bytes(source.read_bytes())
    return path


def changed(folder: Path, target: Path, name: str, changes: Mapping[str, Any]) -> Path:
    """A copy of a model's folder with other values in one of its JSON files."""
    for one in folder.iterdir():
        (target / one.name).write_bytes(one.read_bytes())
    document = json.loads((target / name).read_text(encoding="utf-8"))
    (target / name).write_text(json.dumps(document | changes), encoding="utf-8")
    return target


def test_every_load_goes_through_the_one_door() -> None:
    """Any other call could forget trust_remote_code=False, and ask a question or run a model's code."""
    calls = {
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for folder in ("dilap", "backends", "export", "profilers", "tools")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"\.from_pretrained\(", line)
    }
    door = "dilap/models/pretrained.py"
    told = {f"dilap/models/{name}.py" for name in ("modeling_dilap", "convolutional/narrowing")}  # how they are loaded
    told |= {"dilap/job/card.py", "dilap/job/loading.py"}  # and what lies beside a card
    told |= {"export/onnx/modeling_ort.py", "tools/check_optimum.py"}  # for an environment without DiLAP
    adapter = "dilap/models/adapter.py"  # peft's own, which takes a model that is in memory, and no code
    assert {call.partition(":")[0] for call in calls} == {door, adapter, *told}
    assert "trust_remote_code=False" in next(call for call in calls if call.startswith(door))


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_of_a_model_is_never_run(name: str, folder: Path, tmp_path: Path) -> None:
    own = {
        "config.json": {"model_type": "unheard-of", "auto_map": {"AutoConfig": "own.Own"}},
        "tokenizer_config.json": {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}},
    }
    path = changed(folder, tmp_path, name, own[name])
    (path / "own.py").write_text("raise SystemExit('run')", encoding="utf-8")
    with pytest.raises(DilapError, match="Python code of its own"):
        load(str(path))


def test_an_architecture_that_transformers_does_not_know_is_compared_by_its_tensors(
    folder: Path, tmp_path: Path
) -> None:
    path = changed(folder, tmp_path, "config.json", {"model_type": "unheard-of"})
    tensors = load_file(path / "model.safetensors")
    moved = {
        name.replace("mlp.up_proj", "mlp.w3").replace("model.", "transformer."): one for name, one in tensors.items()
    }
    save_file(moved, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        Unsupported, match=r"'unheard-of' is not known.*nearest is llama.* mlp\.w3 in place of mlp\.up_proj"
    ):
        load(str(path))


COUNTS: dict[str, tuple[Mapping[str, Any], str]] = {
    "layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1,000,000,000; models have at most 4,096"),
    "heads": ({"num_attention_heads": 10**9}, "num_attention_heads is 1,000,000,000"),
    "negative": ({"hidden_size": -1}, "hidden_size is -1"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads is 0; models have at least 1"),
    "a text": ({"hidden_size": "64"}, "hidden_size is no whole number but '64'"),
    "yes": ({"num_hidden_layers": True}, "num_hidden_layers is no whole number but True"),
    "an integer of 100 digits": ({"vocab_size": 10**100}, "more than 64 bits"),
    "more experts than the memory": (
        {"num_local_experts": 1 << 20, "moe_intermediate_size": 1 << 20},
        "this machine's memory has",
    ),
    "no number of experts": ({"num_local_experts": "many"}, "num_local_experts is no whole number but 'many'"),
    "more than the memory": ({"hidden_size": 1 << 22, "intermediate_size": 1 << 22}, "this machine's memory has"),
    "widths": ({"layer_widths": [[4, 2, 10**9]] * 3}, "layer_widths has"),
    "no widths": ({"layer_widths": 3}, "layer_widths is no list"),
}


@pytest.mark.parametrize("name", COUNTS)
def test_a_config_with_counts_beyond_reason_is_refused(name: str, folder: Path, tmp_path: Path) -> None:
    changes, words = COUNTS[name]
    with pytest.raises(InvalidInput, match=re.escape(words)):
        load(str(changed(folder, tmp_path, "config.json", changes)))


def test_whatever_a_loader_raises_is_one_line() -> None:
    class PanicException(BaseException):
        """What a library in Rust raises."""

    class Loader:
        @staticmethod
        def from_pretrained(folder: str, **_: object) -> None:
            raise PanicException(f"called `unwrap()`\non {folder}")

    with pytest.raises(InvalidInput, match=r"PanicException: called `unwrap\(\)` on nowhere"):
        from_pretrained(Loader, "nowhere")


def test_an_interruption_passes() -> None:
    class Loader:
        @staticmethod
        def from_pretrained(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        from_pretrained(Loader, "nowhere")


def test_a_sound_folder_loads(folder: Path) -> None:
    assert from_pretrained(AutoConfig, folder).hidden_size == 64


def gguf_file(path: Path, architecture: str = "llama", /, **numbers: int) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in {"block_count": 1, "embedding_length": 8, **numbers}.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_array("llama.feed_forward_length", [16])
    writer.add_tensor("output.weight", np.zeros((4, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_header_is_read_as_gguf_py_wrote_it(tmp_path: Path) -> None:
    header = read_header(gguf_file(tmp_path / "x.gguf"))
    assert header.metadata["llama.block_count"] == 1
    assert header.metadata["llama.feed_forward_length"] == (16,)
    assert header.shapes == {"output.weight": (8, 4)}


@pytest.mark.parametrize("key", ["block_count", "embedding_length"])
def test_a_gguf_file_with_counts_beyond_reason_is_refused(key: str, tmp_path: Path) -> None:
    path = gguf_file(tmp_path / "x.gguf", **{key: 2**31})
    with pytest.raises(InvalidInput, match=f"{key} is 2,147,483,648"):
        require_sound_gguf(path)
    with pytest.raises(InvalidInput, match=f"{key} is 2,147,483,648"):
        load(str(path))


def test_a_gguf_file_of_an_architecture_that_cannot_be_read_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"give the folder that its maker published .*granite is not supported"):
        load(str(gguf_file(tmp_path / "x.gguf", "granite")))


def test_a_gguf_file_is_refused_wherever_it_is_cut_off(tmp_path: Path) -> None:
    whole = gguf_file(tmp_path / "x.gguf").read_bytes()
    header = whole.index(b"output.weight") + len(b"output.weight") + 4 + 16 + 4 + 8
    for length in range(0, header, 7):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(InvalidInput, match="not a whole GGUF file"):
            read_header(tmp_path / "cut.gguf")


def test_a_gguf_file_is_refused_where_its_tensors_are_cut_off(tmp_path: Path) -> None:
    path = gguf_file(tmp_path / "x.gguf")
    require_sound_gguf(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(
        InvalidInput, match=r"not a whole GGUF file: it ends before the end of its tensor output\.weight"
    ):
        require_sound_gguf(path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_what_git_has_not_fetched_is_told(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    with pytest.raises(InvalidInput, match=f"{name} is only Git's pointer to the file: run `git lfs pull`"):
        from_pretrained(AutoConfig, tmp_path)


@pytest.mark.parametrize("count", [2**62, 2**63, 2**32])
def test_a_count_of_more_than_the_file_holds_is_refused_at_once(count: int, tmp_path: Path) -> None:
    path = gguf_file(tmp_path / "x.gguf")
    data = path.read_bytes()
    at = data.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 4 + 4  # behind two types
    path.write_bytes(data[:at] + struct.pack("<Q", count) + data[at + 8 :])
    with pytest.raises(InvalidInput, match=f"it ends before the {count:,} texts"):
        read_header(path)


def test_a_tensor_that_the_file_cannot_hold_is_refused(tmp_path: Path) -> None:
    path = gguf_file(tmp_path / "x.gguf")
    data = path.read_bytes()
    at = data.index(b"output.weight") + len(b"output.weight") + 4
    path.write_bytes(data[:at] + struct.pack("<Q", 2**40) + data[at + 8 :])
    with pytest.raises(InvalidInput, match=r"more than .* bytes hold"):
        read_header(path)


@pytest.mark.skipif(backends.get("llamacpp").unavailable() is not None, reason="llama.cpp is needed to export")
def test_a_gguf_file_is_read_without_a_progress_bar_where_there_is_no_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = byte_level_tokenizer(tmp_path / "words")
    exporter, out = export.get("llamacpp"), tmp_path / "m"
    exporter.export(tiny_model("llama"), tokenizer=words, precision="f32", plan_digest="", out=out)
    capfd.readouterr()
    load(str(out / "model.gguf"))
    assert capfd.readouterr().err == ""
