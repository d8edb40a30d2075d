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
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
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
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM),
    "smollm3": (SmolLM3Config, SmolLM3ForCausalLM),
    "opt": (OPTConfig, OPTForCausalLM),
    "phi3": (Phi3Config, Phi3ForCausalLM),
    "granite": (GraniteConfig, GraniteForCausalLM),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM),
    "gemma3_text": (Gemma3TextConfig, Gemma3ForCausalLM),
    "ministral": (MinistralConfig, MinistralForCausalLM),
    "seed_oss": (SeedOssConfig, SeedOssForCausalLM),
}
VOCAB_SIZE = 300
_END = "<|end|>"
_HEADS = {"head_dim": 16}  # where a config has 128 or none, whatever the hidden size
_TOKENS = {"pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0}  # the defaults are beyond this vocabulary
# Windows shorter than most texts, and an attention scale of its own.
_GEMMA = {**_HEADS, **_TOKENS, "query_pre_attn_scalar": 24, "sliding_window": 8, "tie_word_embeddings": True}
# What a family's config needs beside the sizes; nothing has a value at which it would change nothing.
_OWN_SIZES: Mapping[str, dict[str, Any]] = {
    "qwen3": _HEADS,
    "qwen3_moe": {
        **_HEADS,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,  # as published: the weights of a token's experts sum to 1
    },
    "ministral": _HEADS,
    "seed_oss": _HEADS,
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.4,
        "logits_scaling": 2.0,
    },
    "gemma2": {**_GEMMA, "attn_logit_softcapping": 4.0, "final_logit_softcapping": 5.0},
    "gemma3_text": _GEMMA,
    "olmo2": {"pad_token_id": None, "eos_token_id": 0},
    # Its default, every fourth layer, would leave none of three without rotary embedding.
    "smollm3": {**_TOKENS, "no_rope_layer_interval": 2},
    # 12 of 16 channels of a head are turned.
    "phi3": {
        **_TOKENS,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.75},
    },
}


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
    sizes |= _OWN_SIZES.get(family, {})
    if family.startswith("gemma"):  # layers of both kinds
        num_layers = changes.get("num_hidden_layers", sizes["num_hidden_layers"])
        sizes |= {"layer_types": [("sliding_attention", "full_attention")[index % 2] for index in range(num_layers)]}
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
    """Return the plan that keeps everything but in the groups given; a group that needs more units stays whole."""
    full = full_plan(architecture_of(model), base="base")
    least = {group.name: group.least for block in blocks_of(model) for group in block.groups}
    wanted = {name: units for name, units in kept.items() if not units or len(units) >= least[name]}
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
