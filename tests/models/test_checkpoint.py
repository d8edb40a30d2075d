"""Checkpoints load where DiLAP is not installed, and damaged ones say what is wrong."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from standins.models import (
    FAMILIES,
    Kept,
    compensated_model,
    logits,
    plan_for,
    random_tokens,
    tiny_model,
    tiny_tokenizer,
)
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from dilap.core.errors import DilapError, InvalidInput, Unsupported
from dilap.models.cut import shrink_
from dilap.models.load import load, save_checkpoint

MIXED: Kept = {
    "layers.0.kv_groups": (),
    "layers.1.kv_groups": (1,),
    "layers.1.channels": tuple(range(1, 96, 2)),
    "layers.2.channels": (),
}
EQUAL: Kept = {f"layers.{layer}.channels": tuple(range(48)) for layer in range(3)}
TOKENS = random_tokens(2, 8)
ALONE = """
import sys
sys.modules["dilap"] = None  # importing it raises, wherever it is installed
from pathlib import Path
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
root = Path(sys.argv[1])
reference = load_file(root / "reference.safetensors")
for folder in sorted(path for path in root.iterdir() if path.is_dir() and path.name != "home"):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    again = root / "home" / folder.name
    model.save_pretrained(again)
    again_model = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True).eval()
    for one in (model, again_model):
        with torch.no_grad():
            found = one(reference["tokens"]).logits
        torch.testing.assert_close(found, reference[folder.name], rtol=1e-5, atol=1e-5)
        generated = {
            cache: one.generate(reference["tokens"], max_new_tokens=8, do_sample=False, use_cache=cache).tolist()
            for cache in (True, False)
        }
        assert generated[True] == generated[False], folder.name
    assert AutoTokenizer.from_pretrained(folder)("fox").input_ids
    print(folder.name, type(model).__name__)
"""


def pruned(family: str, kept: Kept) -> PreTrainedModel:
    model = tiny_model(family)
    return shrink_(model, plan_for(model, kept))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def checkpoint(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A pruned Llama on disk."""
    save_checkpoint(pruned("llama", MIXED), tokenizer, tmp_path / "llama")
    return tmp_path / "llama"


def test_pruned_checkpoints_work_where_dilap_is_not_installed(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Every family in one process, because importing transformers takes most of the time."""
    reference = {"tokens": TOKENS}
    for family in FAMILIES:
        model = pruned(family, MIXED)
        reference[family] = logits(model, TOKENS)
        save_checkpoint(model, tokenizer, tmp_path / family)
    reference["biased"] = logits(biased := compensated_model("qwen2", EQUAL), TOKENS)
    save_checkpoint(biased, tokenizer, tmp_path / "biased")
    save_file(reference, tmp_path / "reference.safetensors")
    environment = {"PATH": os.environ["PATH"], "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-c", ALONE, str(tmp_path)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == sorted([*FAMILIES, "biased"])
    assert "llama PrunedLlamaForCausalLM" in done.stdout


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_widths_load_as_a_stock_model_without_remote_code(
    family: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = pruned(family, EQUAL)
    save_checkpoint(model, tokenizer, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(loaded) is type(tiny_model(family))
    assert_close(logits(loaded, TOKENS), logits(model, TOKENS))
    assert not list((tmp_path / "out").glob("*.py"))


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_checkpoint_loads_again(family: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model = pruned(family, MIXED)
    save_checkpoint(model, tokenizer, tmp_path / "out")
    loaded = load(str(tmp_path / "out"))
    assert_close(logits(loaded.model, TOKENS), logits(model, TOKENS))
    assert loaded.tokenizer_path == tmp_path / "out"


def test_checkpoint_that_was_loaded_saves_again(checkpoint: Path, tmp_path: Path) -> None:
    source = load(str(checkpoint))
    save_checkpoint(source.model, source.tokenizer, tmp_path / "again")
    assert load(str(tmp_path / "again")).digest == source.digest
    assert (tmp_path / "again" / "modeling_dilap.py").read_bytes() == (checkpoint / "modeling_dilap.py").read_bytes()


def test_checkpoint_keeps_its_precision(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    save_checkpoint(pruned("llama", MIXED).to(torch.bfloat16), tokenizer, tmp_path / "out")
    assert load(str(tmp_path / "out")).model.dtype == torch.bfloat16


def test_sharded_checkpoint_loads_and_saves_whole(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    dense = tiny_model("llama")
    dense.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    tokenizer.save_pretrained(tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    source = load(str(tmp_path / "sharded"))
    assert torch.equal(logits(source.model, TOKENS), logits(dense, TOKENS))
    model = shrink_(source.model, plan_for(source.model, MIXED))
    save_checkpoint(model, source.tokenizer, tmp_path / "out")
    assert_close(logits(load(str(tmp_path / "out")).model, TOKENS), logits(pruned("llama", MIXED), TOKENS))


def test_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def save_pretrained(self, folder: Path) -> None:
            raise OSError(28, "No space left on device")

    with pytest.raises(InvalidInput, match="no space left"):
        save_checkpoint(pruned("llama", MIXED), Full(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


ROPE = {"rope_theta": 5000.0, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPE |= {"original_max_position_embeddings": 32}


def saved_config(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> dict[str, Any]:
    save_checkpoint(model, tokenizer, folder)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


def test_the_rotary_embedding_is_written_by_its_older_names_too(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """transformers 4.57 passes over rope_parameters in silence, and computes with a base of 10000."""
    config = saved_config(tiny_model("llama", rope_parameters=ROPE), tokenizer, tmp_path / "out")
    assert config["rope_parameters"] == ROPE
    assert {"rope_theta": config["rope_theta"], **config["rope_scaling"]} == ROPE


def test_a_rotary_embedding_that_is_not_scaled_has_no_scaling_by_its_older_name(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rope = {"rope_theta": 5000.0, "rope_type": "default"}
    config = saved_config(tiny_model("llama", rope_parameters=rope), tokenizer, tmp_path / "out")
    assert (config["rope_theta"], config["rope_scaling"]) == (5000.0, None)


def test_both_rotary_embeddings_of_gemma_3_are_written_by_their_older_names(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rope: dict[str, dict[str, Any]] = {
        "full_attention": {"rope_theta": 5000.0, "rope_type": "linear", "factor": 4.0},
        "sliding_attention": {"rope_theta": 700.0, "rope_type": "default"},
    }
    config = saved_config(tiny_model("gemma3_text", rope_parameters=rope), tokenizer, tmp_path / "out")
    assert (config["rope_theta"], config["rope_local_base_freq"]) == (5000.0, 700.0)
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    assert load(str(tmp_path / "out")).model.config.rope_parameters == rope


def test_the_weights_type_is_written_by_its_older_name_too(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    config = saved_config(tiny_model("opt").to(torch.bfloat16), tokenizer, tmp_path / "out")
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"


def test_the_tokenizer_has_a_class_that_older_versions_know(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_older_names_change_no_digest(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny_model("llama", rope_parameters=ROPE)
    model.save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    save_checkpoint(model, tokenizer, tmp_path / "out")
    assert load(str(tmp_path / "out")).digest == load(str(tmp_path / "plain")).digest


def test_own_widths_need_a_version_that_has_their_modules(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda _: "4.53.3")
    with pytest.raises(ImportError, match=r"transformers>=4\.57 is required .* but found transformers==4\.53\.3"):
        runpy.run_path(str(checkpoint / "modeling_dilap.py"))


def assert_one_line(error: DilapError, *words: str) -> None:
    assert "\n" not in str(error)
    for word in words:
        assert word in str(error)


def test_truncated_weights_are_invalid_input(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(InvalidInput) as caught:
        load(str(checkpoint))
    assert_one_line(caught.value, str(checkpoint), "cannot be loaded")


def rewrite(checkpoint: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})


def test_missing_tensor_is_invalid_input_that_names_it(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    rewrite(checkpoint, tensors)
    with pytest.raises(InvalidInput) as caught:
        load(str(checkpoint))
    assert_one_line(caught.value, "model.layers.1.mlp.up_proj.weight", "is missing")


def test_tensor_of_a_wrong_shape_is_invalid_input(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(47, 64)
    rewrite(checkpoint, tensors)
    with pytest.raises(InvalidInput) as caught:
        load(str(checkpoint))
    assert_one_line(caught.value, str(checkpoint))


def test_nan_is_invalid_input_that_names_the_tensor(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    rewrite(checkpoint, tensors)
    with pytest.raises(InvalidInput) as caught:
        load(str(checkpoint))
    assert_one_line(caught.value, "model.norm.weight", "NaN")


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": "llama", "layer_widths": [[4, 2, 8]]}'])
def test_damaged_config_is_invalid_input(checkpoint: Path, content: str) -> None:
    (checkpoint / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(InvalidInput) as caught:
        load(str(checkpoint))
    assert_one_line(caught.value, str(checkpoint))


def test_folder_without_a_model_is_invalid_input(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput) as caught:
        load(str(tmp_path))
    assert_one_line(caught.value, str(tmp_path))


def test_unknown_model_is_invalid_input_that_says_what_would_do() -> None:
    with pytest.raises(InvalidInput, match=r"no model 'nonsense': give smollm2-135m, gemma3-270m, a folder"):
        load("nonsense")


def test_unknown_architecture_is_unsupported(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    with pytest.raises(Unsupported, match="'gpt2' is not known"):
        load(str(checkpoint))


def test_code_of_a_checkpoint_is_never_run(checkpoint: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (checkpoint / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\n", encoding="utf-8")
    changes = {
        "config.json": {"auto_map": {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}},
        "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}},
    }
    for name, change in changes.items():
        document = json.loads((checkpoint / name).read_text(encoding="utf-8"))
        (checkpoint / name).write_text(json.dumps(document | change), encoding="utf-8")
    load(str(checkpoint))
    assert not marker.exists()


def test_changed_modelling_file_is_never_run(checkpoint: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    with (checkpoint / "modeling_dilap.py").open("a", encoding="utf-8") as file:
        file.write(f"open({str(marker)!r}, 'w').close()\n")
    load(str(checkpoint))
    assert not marker.exists()


def test_digest_is_that_of_the_weights(checkpoint: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    save_checkpoint(pruned("llama", MIXED), tokenizer, tmp_path / "same")
    assert load(str(checkpoint)).digest == load(str(tmp_path / "same")).digest


def test_a_stock_class_says_what_a_pruned_checkpoint_needs(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="pass trust_remote_code=True, because the layers of this model have widths"):
        AutoModelForCausalLM.from_pretrained(checkpoint)


def test_others_can_read_every_file_of_a_checkpoint(checkpoint: Path) -> None:
    allowed = checkpoint.stat().st_mode & 0o666
    assert {path.name: oct(path.stat().st_mode & 0o666) for path in checkpoint.iterdir()} == {
        path.name: oct(allowed) for path in checkpoint.iterdir()
    }
