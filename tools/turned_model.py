"""Write a Llama that computes what another one computes, with other weights: for all that is said about precision.

    tools/turned_model smollm2-135m models/turned

The weights of the built-in SmolLM2 lie on a grid of 16 values a block, which flatters formats of four bits. Here its
hidden states are turned by a random rotation, and the matrices before and after them turn it back.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from dilap.cli.console import run
from dilap.core.errors import InvalidInput, Unsupported
from dilap.models.anatomy import decoder_layers
from dilap.models.families import family_of
from dilap.models.load import load, save_checkpoint


@torch.no_grad()
def turn_(model: PreTrainedModel, *, seed: int = 0) -> None:
    """Turn the hidden states of a Llama in place, which leaves its logits as they are but for rounding.

    RMSNorms do not see the rotation once their gains are folded into the matrices that read what they give. Head and
    embedding are two tensors afterwards, because only the head has the gain of the last norm. Raises Unsupported for
    another family, whose norms or biases may see the rotation.
    """
    if (family := family_of(model.config)).name != "llama":
        raise Unsupported(f"only a Llama's hidden states can be turned, got a {family.name}")
    size, generator = model.config.hidden_size, torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    embedding, head, last_norm = model.get_input_embeddings(), model.get_output_embeddings(), model.model.norm
    head.weight = nn.Parameter(_turned(head.weight * last_norm.weight, rotation))
    embedding.weight = nn.Parameter(_turned(embedding.weight, rotation))
    model.config.tie_word_embeddings = False
    last_norm.weight.fill_(1)
    layers: Any = decoder_layers(model)
    for layer in layers:
        for kind, norm in (("attention", layer.input_layernorm), ("ffn", layer.post_attention_layernorm)):
            for path in family.inputs_of(kind):
                reading = layer.get_submodule(path)
                reading.weight.copy_(_turned(reading.weight * norm.weight, rotation))
            writing = layer.get_submodule(family.output_of(kind))
            writing.weight.copy_(_turned(writing.weight.T, rotation).T)
            if writing.bias is not None:
                writing.bias.copy_(_turned(writing.bias, rotation))
            norm.weight.fill_(1)


def _turned(rows: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    return (rows.double() @ rotation).to(rows.dtype)


def _main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint of a Llama, or the name of a built-in one")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="of the rotation")
    given = parser.parse_args()
    if given.out.exists():
        raise InvalidInput(f"{given.out} already exists; remove it or choose another folder")
    source = load(given.model)
    turn_(source.model, seed=given.seed)
    save_checkpoint(source.model, source.tokenizer, given.out)
    return 0


if __name__ == "__main__":
    run(_main)
