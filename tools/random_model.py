"""Write a checkpoint of a well-known model's size with random weights: what fits here, and how long does it take?

    tools/random_model llama-3.2-1b models/llama-1b
    tools/random_model llama-3.1-8b models/two-layers --layers 2

The tokenizer is that of the built-in model, whose tokens are fewer than most of these models have.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config, PreTrainedConfig, Qwen2Config, Qwen3Config

from dilap.cli.console import run
from dilap.core.errors import InvalidInput
from dilap.models.builtin import builtin_model
from dilap.models.load import load_tokenizer, save_checkpoint

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_QWEN_ROPE = {"rope_type": "default", "rope_theta": 1_000_000.0}
_PHI4_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 0.75,
    "original_max_position_embeddings": 4096,
    "short_factor": [1.0] * 48,
    "long_factor": [
        *(1, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649, 2.446418898),
        *(2.735880826, 3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845, 5.351743533, 5.984965424),
        *(6.693110555, 7.485043894, 8.370679318, 9.36110372, 10.4687158, 11.70738129, 13.09260651, 14.64173252),
        *(16.37415215, 18.31155283, 20.47818807, 22.90118105, 25.61086418, 28.64115884, 32.03, 32.1, 32.13, 32.23),
        *(32.6, 32.61, 32.64, 32.66, 32.7, 32.71, 32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77),
    ],
}
# From the config.json of the published checkpoints.
CONFIGS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama-3.2-1b": (
        LlamaConfig,
        {
            "hidden_size": 2048,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 8192,
            "vocab_size": 128_256,
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-5,
            "rope_parameters": _LLAMA3_ROPE | {"factor": 32.0},
            "tie_word_embeddings": True,
        },
    ),
    "llama-3.1-8b": (
        LlamaConfig,
        {
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 14_336,
            "vocab_size": 128_256,
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-5,
            "rope_parameters": _LLAMA3_ROPE | {"factor": 8.0},
            "tie_word_embeddings": False,
        },
    ),
    "phi-4-mini": (
        Phi3Config,
        {
            "hidden_size": 3072,
            "num_hidden_layers": 32,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "intermediate_size": 8192,
            "vocab_size": 200_064,
            "max_position_embeddings": 131_072,
            "original_max_position_embeddings": 4096,
            "sliding_window": 262_144,
            "rms_norm_eps": 1e-5,
            "rope_parameters": _PHI4_ROPE,
            "tie_word_embeddings": True,
            "bos_token_id": 199_999,
            "eos_token_id": 199_999,
            "pad_token_id": 199_999,
        },
    ),
    "qwen3-0.6b": (
        Qwen3Config,
        {
            "hidden_size": 1024,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 3072,
            "vocab_size": 151_936,
            "max_position_embeddings": 40_960,
            "rms_norm_eps": 1e-6,
            "rope_parameters": _QWEN_ROPE,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2.5-1.5b": (
        Qwen2Config,
        {
            "hidden_size": 1536,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "intermediate_size": 8960,
            "vocab_size": 151_936,
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-6,
            "rope_parameters": _QWEN_ROPE,
            "tie_word_embeddings": True,
        },
    ),
}


def _main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=CONFIGS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, metavar="N", help="only so many of its layers")
    given = parser.parse_args()
    if given.out.exists():
        raise InvalidInput(f"{given.out} already exists; remove it or choose another folder")
    config_class, settings = CONFIGS[given.size]
    if given.layers is not None:
        settings = settings | {"num_hidden_layers": given.layers}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**settings), dtype=torch.bfloat16)
    file = builtin_model()
    save_checkpoint(model, load_tokenizer(file.parent, gguf_file=file.name), given.out)
    print(f"{sum(one.numel() for one in model.parameters()) / 1e6:.0f} M random parameters in {given.out}")
    return 0


if __name__ == "__main__":
    run(_main)
