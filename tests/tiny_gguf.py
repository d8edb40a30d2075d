"""Tiny models and tokenizers for the GGUF tests."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from dilap.core.plan import Plan, full_plan
from dilap.models.anatomy import architecture_of, sublayers
from dilap.models.cut import shrink_

CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "opt": (OPTConfig, OPTForCausalLM),
}
VOCAB_SIZE = 300


def needs_llamacpp() -> None:
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed")


@torch.no_grad()
def tiny_model(family: str, **changes: Any) -> PreTrainedModel:
    """3 layers, 4 heads on 2 KV heads of 16; weights large enough for attention to matter in the logits."""
    config_class, model_class = CLASSES[family]
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": VOCAB_SIZE}
    sizes |= {"max_position_embeddings": 128}
    if family == "opt":
        sizes |= {"ffn_dim": 96, "word_embed_proj_dim": 64}
    else:
        sizes |= {"intermediate_size": 96, "num_key_value_heads": 2, "tie_word_embeddings": False}
    if family == "qwen3":
        sizes |= {"head_dim": 16}  # its default is 128, whatever the hidden size
    generator = torch.Generator().manual_seed(0)
    model = model_class(config_class(**sizes | changes)).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.15, generator=generator)
        else:
            parameter.uniform_(0.5, 1.5, generator=generator)
            parameter.sub_(0 if "norm" in name else 1)
    return model


def pruned_model(family: str, kept: dict[str, tuple[int, ...]], **changes: Any) -> PreTrainedModel:
    """`tiny_model` with some groups cut to the units given."""
    model = tiny_model(family, **changes)
    plan = full_plan(architecture_of(model), base="base")
    return shrink_(model, Plan(base="base", architecture=plan.architecture, kept=plan.kept | kept))


def compensated_model(family: str, kept: dict[str, tuple[int, ...]]) -> PreTrainedModel:
    """`pruned_model` with random biases at the output projections, which most families lack."""
    model = tiny_model(family)
    plan, generator = full_plan(architecture_of(model), base="base"), torch.Generator().manual_seed(1)
    biases = {f"{one.path}.bias": torch.randn(64, generator=generator) for one in sublayers(model)}
    plan = Plan(base="base", architecture=plan.architecture, kept=plan.kept | kept)
    return shrink_(model, plan, parameters=biases)


def byte_level_tokenizer(folder: Path) -> Path:
    """A Hugging Face folder with a byte-level BPE tokenizer of VOCAB_SIZE tokens, split as GPT-2 splits."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the other lazy dog, there and then"] * 3, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>")
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    needs_llamacpp()
    return byte_level_tokenizer(tmp_path_factory.mktemp("tokenizer"))
