"""Granite 3: Llama with four factors, of the embeddings, attention scores, sublayers' outputs and logits."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from dilap.models.families.family import Family, Rewritten, has_tied_head, head_dim_of


@dataclass(frozen=True, kw_only=True)
class _Granite(Family):
    def residual_scale(self, config: PreTrainedConfig) -> float:
        return float(config.residual_multiplier)

    def logits_scale(self, config: PreTrainedConfig) -> float:
        return 1 / float(config.logits_scaling)

    def exported(self, model: PreTrainedModel) -> Mapping[str, torch.Tensor]:
        """Return the tensors of a Llama that computes the same: the factors are in them."""
        factors = self._factors(model)

        def scaled(name: str, own: torch.Tensor) -> torch.Tensor:
            factor = factors.get(name.rpartition(".")[0])
            return own if factor is None else own.float() * factor

        return Rewritten(tensors=model.state_dict(), rewrite=scaled)

    def _factors(self, model: PreTrainedModel) -> dict[str, float]:
        """Return the factors of tensors, biases included, by the paths of their modules."""
        config = model.config
        factors = {self.embeddings: float(config.embedding_multiplier), self.final_norm: self.logits_scale(config)}
        if has_tied_head(model):  # the head grows with the embedding, so the norm before it shrinks
            factors["lm_head"] = factors[self.embeddings]
            factors[self.final_norm] /= factors["lm_head"]
        for index in range(len(model.get_submodule(self.layers))):
            # Llama multiplies the scores by head_dim**-0.5, and rotation keeps a factor of the queries.
            factors[f"{self.layers}.{index}.{self.query}"] = config.attention_multiplier * head_dim_of(config) ** 0.5
            for path in (self.attention_out, self.ffn_out):
                factors[f"{self.layers}.{index}.{path}"] = self.residual_scale(config)
        return factors


FAMILY = _Granite(name="granite")
