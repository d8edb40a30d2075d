"""A LoRA adapter is merged into its model as peft computes with it, or refused."""

import copy
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from standins.fake_job import quick
from standins.models import FAMILIES, byte_level_tokenizer, logits, random_tokens, tiny_model
from torch.testing import assert_close
from transformers import PreTrainedModel

import dilap
from dilap.core.errors import InvalidInput
from dilap.job.command import command_line
from dilap.models.adapter import merge_adapter_
from dilap.models.load import load, save_checkpoint

TOKENS = random_tokens(2, 12)


def saved(model: PreTrainedModel, folder: Path) -> Path:
    """The folder `model` in `folder`, as transformers writes it, with a tokenizer."""
    byte_level_tokenizer(folder / "model")
    model.save_pretrained(folder / "model")
    return folder / "model"


def adapter(model: PreTrainedModel, folder: Path, *, targets: Sequence[str] = ("q_proj", "down_proj")) -> torch.Tensor:
    """Write an adapter of random weights for a model, and return the logits that peft computes with it, unmerged."""
    return written(model, LoraConfig(r=4, target_modules=list(targets), init_lora_weights=False), folder)


def written(model: PreTrainedModel, config: PeftConfig, folder: Path) -> torch.Tensor:
    """`adapter` with a config of one's own."""
    config.task_type = "CAUSAL_LM"
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's of tied heads, and of what transformers 5.23 renames
        adapted: Any = get_peft_model(copy.deepcopy(model), config).eval()
        adapted.save_pretrained(folder)
    return logits(adapted, TOKENS)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_adapter_computes_what_peft_does(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    targets = ("q_proj", "fc2") if family == "opt" else ("q_proj", "down_proj")
    expected = adapter(model, tmp_path / "adapter", targets=targets)
    source = load(str(saved(model, tmp_path)), merge_adapter=tmp_path / "adapter")
    assert not torch.allclose(expected, logits(model, TOKENS), atol=0.1)
    assert_close(logits(source.model, TOKENS), expected, rtol=1e-4, atol=1e-4)  # sums of f32 in another order


OTHERS: Mapping[str, PeftConfig] = {
    "LOHA": LoHaConfig(r=4, target_modules=["q_proj"], init_weights=False),
    "LOKR": LoKrConfig(r=4, target_modules=["q_proj"], init_weights=False),
    "IA3": IA3Config(target_modules=["q_proj"], feedforward_modules=[], init_ia3_weights=False),
    "DoRA": LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, use_dora=True),
    "biases": LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, bias="all"),
    "head": LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_adapters_compute_what_peft_does(kind: str, tmp_path: Path) -> None:
    model = tiny_model("qwen2", tie_word_embeddings=True)
    expected = written(model, OTHERS[kind], tmp_path / "adapter")
    source = load(str(saved(model, tmp_path)), merge_adapter=tmp_path / "adapter")
    assert_close(logits(source.model, TOKENS), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_of_one_side_of_a_tied_head_unties_it(target: str, tmp_path: Path) -> None:
    """peft merges it into both sides, and computed with it on one."""
    model = tiny_model("llama", tie_word_embeddings=True)
    expected = adapter(model, tmp_path / "adapter", targets=[target])
    source = load(str(saved(model, tmp_path)), merge_adapter=tmp_path / "adapter")
    assert not source.model.config.tie_word_embeddings
    assert_close(logits(source.model, TOKENS), expected, rtol=1e-4, atol=1e-4)


def test_a_merged_model_is_saved_as_a_plain_one(tmp_path: Path) -> None:
    model = tiny_model("llama")
    adapter(model, tmp_path / "adapter")
    folder = saved(model, tmp_path)
    source = load(str(folder), merge_adapter=tmp_path / "adapter")
    save_checkpoint(source.model, source.tokenizer, tmp_path / "merged")
    assert source.digest == load(str(tmp_path / "merged")).digest != load(str(folder)).digest
    plain, merged = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("model", "merged"))
    assert {name: merged[name] for name in plain} == plain


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    adapter(tiny_model("llama", num_hidden_layers=4), tmp_path / "adapter")
    folder = saved(tiny_model("llama"), tmp_path)
    with pytest.raises(InvalidInput, match=r"layers\.3\..* has no place in this model: it is an adapter of another"):
        load(str(folder), merge_adapter=tmp_path / "adapter")


def test_an_adapter_whose_modules_are_not_there_is_refused(tmp_path: Path) -> None:
    adapter(tiny_model("opt"), tmp_path / "adapter", targets=["fc1"])
    folder = saved(tiny_model("llama"), tmp_path)
    with pytest.raises(InvalidInput, match=r"cannot be merged: .*fc1.* not found in the base model"):
        load(str(folder), merge_adapter=tmp_path / "adapter")


def test_an_adapter_of_another_rank_than_its_config_says_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    adapter(model, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 8}))
    with pytest.raises(InvalidInput, match=r"lora_A\.weight is \[4, 96\], and \[8, 96\] by its config"):
        load(str(saved(model, tmp_path)), merge_adapter=tmp_path / "adapter")


def test_an_adapter_without_one_of_its_tensors_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    adapter(model, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    removed = tensors.pop(sorted(tensors)[-1])
    assert removed.numel()
    save_file(tensors, path)
    with pytest.raises(InvalidInput, match=r"its tensor .*layers\.2.* is missing from its file"):
        load(str(saved(model, tmp_path)), merge_adapter=tmp_path / "adapter")


def test_an_adapter_of_a_kind_that_changes_no_weights_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    written(model, PromptTuningConfig(num_virtual_tokens=2), tmp_path / "adapter")
    with pytest.raises(InvalidInput, match="it is of the kind 'PROMPT_TUNING'; LORA, LOHA, LOKR, IA3 can be merged"):
        load(str(saved(model, tmp_path)), merge_adapter=tmp_path / "adapter")


def test_an_adapter_in_a_pickle_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(InvalidInput, match=r"adapter_model\.bin is a pickle, which can run code and is never read"):
        merge_adapter_(tiny_model("llama"), tmp_path)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (
            {"megatron_config": {"a": 1}, "megatron_core": "evil"},
            "its megatron_config names modules of Megatron's code",
        ),
        ({"layer_replication": [[0, 2], [1, 3]]}, "its layer_replication repeats layers, which cannot be merged"),
        ({"alora_invocation_tokens": [1]}, "its alora_invocation_tokens adapts only what stands behind certain tokens"),
        ({"lora_of_tomorrow": True}, "peft does not know its lora_of_tomorrow; pip install -U peft"),
    ],
    ids=["code", "replication", "alora", "unknown"],
)
def test_what_is_more_than_a_change_of_matrices_is_refused(entries: dict[str, Any], words: str, tmp_path: Path) -> None:
    adapter(tiny_model("llama"), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    with pytest.raises(InvalidInput, match=words):
        merge_adapter_(tiny_model("llama"), tmp_path)


def test_a_folder_without_an_adapter_is_none(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"no adapter in .*: there is no adapter_config\.json"):
        merge_adapter_(tiny_model("llama"), tmp_path)


@pytest.mark.usefixtures("fake_device")
def test_a_merged_model_is_what_is_pruned(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    adapter(load(str(checkpoint)).model, tmp_path / "adapter")
    options = quick(corpus, tmp_path / "run", budget="70%", method="magnitude", merge_adapter=tmp_path / "adapter")
    result = dilap.prune(str(checkpoint), **options)
    assert result.model_digest == load(str(checkpoint), merge_adapter=tmp_path / "adapter").digest
    assert f"--merge-adapter {tmp_path / 'adapter'}" in command_line(result)
