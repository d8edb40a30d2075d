"""optimum's ORTModelForCausalLM for decoders whose layers differ in their number of key-value heads.

The class of optimum-onnx makes the empty cache of the first call with one number of heads for all layers, that of
config.json. Here every part of the cache has the shape that the ONNX file itself asks for. This file lies beside
model.onnx and needs optimum-onnx and transformers, but nothing else; from the folder of the artifact:

    from modeling_ort import PrunedModelForCausalLM
    from transformers import AutoTokenizer

    model, tokenizer = PrunedModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")
    tokens = model.generate(**tokenizer("The lobster is", return_tensors="pt"), max_new_tokens=20)
"""

from typing import Any

import torch
from optimum.onnxruntime import ORTModelForCausalLM


class PrunedModelForCausalLM(ORTModelForCausalLM):  # type: ignore[misc]
    """A decoder in ONNX Runtime that generates; see the top of this file. Arguments are those of its base."""

    def __init__(self, **arguments: Any) -> None:
        # Bound outputs would be of one shape for all layers, that of config.json.
        super().__init__(**{**arguments, "use_io_binding": False})

    def forward(  # `generate` asks for these names
        self, input_ids: torch.Tensor, attention_mask: Any = None, past_key_values: Any = None, **others: Any
    ) -> Any:
        """Return logits (sequences x tokens x vocabulary) and the cache, a pair of keys and values for every layer."""
        if past_key_values is None:
            past_key_values = self._empty_cache(len(input_ids))
        return super().forward(input_ids, attention_mask, past_key_values, **others)

    def _empty_cache(self, num_sequences: int) -> tuple[tuple[torch.Tensor, ...], ...]:
        shapes = {one.name: one.shape for one in self.session.get_inputs()}
        made = []
        for name in self.key_value_input_names:
            _, num_heads, _, head_dim = shapes[name]
            made.append(torch.zeros(num_sequences, num_heads, 0, head_dim, dtype=self.dtype, device=self.device))
        return tuple(zip(made[::2], made[1::2], strict=True))
