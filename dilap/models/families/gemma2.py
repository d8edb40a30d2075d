"""Gemma 2: norms on both sides of every sublayer, soft caps, and a window of tokens in every other layer."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from dilap.core.errors import InvalidInput, Unsupported
from dilap.core.numerics import LayerNumerics, Numerics, Rotary
from dilap.core.shape import Architecture
from dilap.models.families.family import Family, Rewritten, plain_rotary, rotary_of


@dataclass(frozen=True, kw_only=True)
class Gemma(Family):
    """What Gemma 2 and Gemma 3 have in common.

    A norm multiplies by 1 + w, embeddings are multiplied by the root of the hidden size, and every layer is of one of
    two kinds: its heads see only a window, or all earlier tokens. Where nothing else is said, the last of every
    `period` layers sees all. llama.cpp takes a model of `largest_layers` layers for the largest one, whose attention
    scale comes from another size.
    """

    period: int
    largest_layers: int

    attention_norm_behind: str | None = "post_attention_layernorm"
    ffn_norm: str | None = "pre_feedforward_layernorm"
    ffn_norm_behind: str | None = "post_feedforward_layernorm"
    activation: str = "hidden_activation"
    mixes_attention: bool = True
    gguf_keys: tuple[str, ...] = (
        *("attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa"),
        "final_logit_softcapping",
    )

    def residual_scale(self, config: PreTrainedConfig) -> float:  # noqa: ARG002
        raise Unsupported("norms of Gemma stand behind its sublayers")

    def logits_softcap(self, config: PreTrainedConfig) -> float | None:
        cap: float | None = config.final_logit_softcapping
        return cap

    def attention_softcap(self, config: PreTrainedConfig) -> float | None:  # noqa: ARG002
        """Return the soft cap of the attention scores; Gemma 3 has none, whatever its config says."""
        return None

    def usually_slide(self, num_layers: int, *, period: int | None = None) -> list[bool]:
        """Return which layers see only a window where nothing else than a period is said, or nothing at all."""
        return [(index + 1) % (period or self.period) != 0 for index in range(num_layers)]

    def scaled_size(self, *, num_layers: int, hidden_size: int, num_heads: int, head_dim: int) -> int:
        """Return the size whose inverse root is llama.cpp's attention scale."""
        return hidden_size // num_heads if num_layers == self.largest_layers else head_dim

    def read_gguf_(self, config: PreTrainedConfig, entries: Mapping[str, Any]) -> None:
        num_layers = config.num_hidden_layers
        said = entries.get("attention.sliding_window_pattern")
        slides = said if isinstance(said, tuple) else self.usually_slide(num_layers, period=said)
        if len(slides) != num_layers:
            raise InvalidInput(f"the file says of {len(slides)} layers whether they slide, and has {num_layers}")
        config.layer_types = ["sliding_attention" if one else "full_attention" for one in slides]
        config.query_pre_attn_scalar = self.scaled_size(
            num_layers=num_layers,
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            head_dim=config.head_dim,
        )
        config.final_logit_softcapping = entries.get("final_logit_softcapping", config.final_logit_softcapping)

    def exported(self, model: PreTrainedModel) -> Mapping[str, torch.Tensor]:
        """Return the tensors with the gains of the norms, 1 + w, in place of w."""

        def with_gains(name: str, own: torch.Tensor) -> torch.Tensor:
            return 1 + own.float() if name.endswith("norm.weight") else own

        return Rewritten(tensors=model.state_dict(), rewrite=with_gains)

    def numerics(self, model: PreTrainedModel) -> Numerics:
        config, embeddings = model.config, model.get_input_embeddings()
        if getattr(config, "use_bidirectional_attention", False):
            raise Unsupported("Gemma whose tokens see later ones (use_bidirectional_attention) cannot be exported yet")
        return replace(
            super().numerics(model),
            attention_scale=config.query_pre_attn_scalar**-0.5,
            attention_softcap=self.attention_softcap(config),
            logits_softcap=self.logits_softcap(config),
            embedding_scale=float(embeddings.embed_scale.to(embeddings.weight.dtype)),  # rounded as the weights are
        )

    def layer_numerics(self, model: PreTrainedModel) -> tuple[LayerNumerics, ...]:
        kinds, windows = model.config.layer_types, {"sliding_attention": model.config.sliding_window}
        by_kind = {kind: LayerNumerics(rotary=self._rotary(model, kind), window=windows.get(kind)) for kind in kinds}
        return tuple(by_kind[kind] for kind in kinds)

    def _rotary(self, model: PreTrainedModel, kind: str) -> Rotary:
        """Return the rotary embedding of layers whose attention is of that kind."""
        raise NotImplementedError

    def stand_in_numerics(self, architecture: Architecture) -> Numerics:
        return replace(
            super().stand_in_numerics(architecture),
            norm_eps=1e-6,
            activation="gelu_pytorch_tanh",
            embedding_scale=architecture.hidden_size**0.5,
        )


@dataclass(frozen=True, kw_only=True)
class _Gemma2(Gemma):
    gguf_keys: tuple[str, ...] = (*Gemma.gguf_keys, "attn_logit_softcapping")

    def read_gguf_(self, config: PreTrainedConfig, entries: Mapping[str, Any]) -> None:
        super().read_gguf_(config, entries)
        config.attn_logit_softcapping = entries.get("attn_logit_softcapping", config.attn_logit_softcapping)
        if (
            entries.get("rope.freq_base_swa", config.rope_parameters["rope_theta"])
            != config.rope_parameters["rope_theta"]
        ):
            raise InvalidInput("the file has another rotary base for layers that slide, and Gemma 2 has only one")

    def attention_softcap(self, config: PreTrainedConfig) -> float | None:
        cap: float | None = config.attn_logit_softcapping
        return cap

    def _rotary(self, model: PreTrainedModel, kind: str) -> Rotary:  # noqa: ARG002
        return rotary_of(model, self.rotary)

    def stand_in_numerics(self, architecture: Architecture) -> Numerics:
        rotary = plain_rotary(architecture.head_dim)
        slides = self.usually_slide(len(architecture.layers))
        return replace(
            super().stand_in_numerics(architecture),
            attention_softcap=50.0,
            logits_softcap=30.0,
            layers=tuple(LayerNumerics(rotary=rotary, window=4096 if one else None) for one in slides),
        )


FAMILY = _Gemma2(name="gemma2", period=2, largest_layers=46)
