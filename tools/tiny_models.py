"""Tiny models with random weights and a tokenizer for them, on which the tools try things out."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MinistralConfig,
    MinistralForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SeedOssConfig,
    SeedOssForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from dilap.core.plan import Plan, full_plan
from dilap.models.anatomy import architecture_of, blocks_of
from dilap.models.cut import shrink_

CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM),
    "smollm3": (SmolLM3Config, SmolLM3ForCausalLM),
    "opt": (OPTConfig, OPTForCausalLM),
    "granite": (GraniteConfig, GraniteForCausalLM),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM),
    "gemma3_text": (Gemma3TextConfig, Gemma3ForCausalLM),
    "ministral": (MinistralConfig, MinistralForCausalLM),
    "seed_oss": (SeedOssConfig, SeedOssForCausalLM),
}
VOCAB_SIZE = 300
_END = "<|end|>"


@torch.no_grad()
def tiny_model(family: str, **changes: Any) -> PreTrainedModel:
    """3 layers, 4 heads on 2 KV heads of 16; weights large enough for attention to matter in the logits."""
    config_class, model_class = CLASSES[family]
    sizes: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes |= {"max_position_embeddings": 128, "vocab_size": VOCAB_SIZE}
    if family == "opt":
        sizes |= {"ffn_dim": 96, "word_embed_proj_dim": 64}
    else:
        sizes |= {"intermediate_size": 96, "num_key_value_heads": 2, "tie_word_embeddings": False}
    if family in ("qwen3", "ministral", "seed_oss"):
        sizes |= {"head_dim": 16}  # theirs is 128 or missing, whatever the hidden size
    if family == "granite":  # no factor at the value at which it would change nothing
        sizes |= {"embedding_multiplier": 3.0, "residual_multiplier": 0.5}
        sizes |= {"attention_multiplier": 0.4, "logits_scaling": 2.0}
    if family.startswith("gemma"):  # layers of both kinds, a window shorter than most texts, caps that matter
        sizes |= {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 8, "tie_word_embeddings": True}
        num_layers = changes.get("num_hidden_layers", sizes["num_hidden_layers"])
        sizes |= {"layer_types": [("sliding_attention", "full_attention")[index % 2] for index in range(num_layers)]}
        sizes |= {"pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0}
    if family == "gemma2":
        sizes |= {"attn_logit_softcapping": 4.0, "final_logit_softcapping": 5.0}
    if family == "olmo2":
        sizes |= {"pad_token_id": None, "eos_token_id": 0}
    if family == "smollm3":  # its default, every fourth layer, would leave none of three without rotary embedding
        sizes |= {"no_rope_layer_interval": 2, "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0}
    generator = torch.Generator().manual_seed(0)
    model = model_class(config_class(**sizes | changes)).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.15, generator=generator)
        else:
            parameter.uniform_(0.5, 1.5, generator=generator)
            parameter.sub_(0 if "norm" in name and not family.startswith("gemma") else 1)
    return model


def pruned_model(family: str, kept: Mapping[str, tuple[int, ...]], **changes: Any) -> PreTrainedModel:
    """Return `tiny_model` with some groups cut to the units given."""
    model = tiny_model(family, **changes)
    return shrink_(model, plan_for(model, kept))


def plan_for(model: PreTrainedModel, kept: Mapping[str, tuple[int, ...]]) -> Plan:
    """Return the plan that keeps everything but in the groups given; a group whose units go only together stays."""
    full = full_plan(architecture_of(model), base="base")
    whole = {group.name for block in blocks_of(model) for group in block.groups if group.whole}
    wanted = {name: units for name, units in kept.items() if not units or name not in whole}
    return replace(full, kept=full.kept | wanted)


def byte_level_tokenizer(folder: Path) -> Path:
    """Write a Hugging Face folder with a byte-level BPE tokenizer of VOCAB_SIZE tokens, split as GPT-2 splits."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[_END],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the other lazy dog, there and then"] * 3, trainer)
    ends = {"bos_token": _END, "eos_token": _END}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends).save_pretrained(folder)
    return folder
