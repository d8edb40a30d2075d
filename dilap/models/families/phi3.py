"""Phi-3, Phi-3.5 and Phi-4-mini: Llama with fused matrices, whose rotary embedding may turn only a part of each head.

Exporters are given separate matrices. Where a head is turned in part, they are also given its channels in another
order, so that all pairs of a head's channels are turned, some of them by nothing. Queries and keys are reordered alike,
which leaves their products what they are.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isclose
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from dilap.core.errors import InvalidInput
from dilap.core.numerics import LayerNumerics, Rotary
from dilap.core.shape import Architecture
from dilap.models.families.family import Family, head_dim_of


@dataclass(frozen=True, kw_only=True)
class _Phi3(Family):
    @property
    def exported_paths(self) -> Family:
        return Family(name=self.name)

    def short_context(self, config: PreTrainedConfig) -> int | None:
        rope = config.rope_parameters
        if rope["rope_type"] != "longrope" or rope["short_factor"] == rope["long_factor"]:
            return None
        return int(rope["original_max_position_embeddings"])

    def layer_numerics(self, model: PreTrainedModel) -> tuple[LayerNumerics, ...]:
        layer, num_layers = LayerNumerics(rotary=self._turn_of(model).rotary), int(model.config.num_hidden_layers)
        return (layer,) * num_layers

    def read_gguf_(self, config: PreTrainedConfig, entries: Mapping[str, Any]) -> None:
        config.sliding_window = entries.get("attention.sliding_window") or None
        head_dim = head_dim_of(config)
        turned = entries.get("rope.dimension_count", head_dim)
        if int(head_dim * (turned / head_dim)) != turned:  # as transformers computes it
            raise InvalidInput(f"the file turns {turned} of {head_dim} channels of a head, a share that cannot be read")
        rope = {"rope_type": "default", "rope_theta": config.rope_parameters["rope_theta"]}
        rope["partial_rotary_factor"] = turned / head_dim
        if set(self.gguf_tensors) <= set(entries):
            short, long = (entries[name] for name in self.gguf_tensors)
            config.original_max_position_embeddings = entries["rope.scaling.original_context_length"]
            rope |= {"rope_type": "longrope", "short_factor": short, "long_factor": long}
            rope["original_max_position_embeddings"] = config.original_max_position_embeddings
        config.rope_parameters, magnitude = rope, entries.get("rope.scaling.attn_factor", 1.0)
        if not isclose(Phi3RotaryEmbedding(config).attention_scaling, magnitude, rel_tol=1e-6):
            config.rope_parameters = {**rope, "attention_factor": magnitude}

    def exported(self, model: PreTrainedModel) -> Mapping[str, torch.Tensor]:
        """Return the tensors of a Llama that computes the same, with the rotary embedding of `numerics`."""
        parts = dict(self._parts(self.architecture(model)))
        return _Unfused(tensors=model.state_dict(), parts=parts, turn=self._turn_of(model))

    def _parts(self, architecture: Architecture) -> Iterator[tuple[str, "_Part"]]:
        """Yield the names of the separate matrices, with the rows of fused ones that they are."""
        paths, head_dim = self.exported_paths, architecture.head_dim
        for index, widths in enumerate(architecture.layers):
            query, key, channels = widths.num_heads * head_dim, widths.num_kv_heads * head_dim, widths.num_channels
            places = (
                (paths.query, self.query, 0, query),
                (paths.key, self.key, query, key),
                (paths.value, self.value, query + key, key),
                (paths.ffn_in[0], self.ffn_in[0], 0, channels),
                (paths.ffn_in[1], self.ffn_in[1], channels, channels),
            )
            layer = f"{self.layers}.{index}"
            for path, fused, start, count in places:
                if count:
                    part = _Part(f"{layer}.{fused}.weight", start, count, path in (paths.query, paths.key))
                    yield f"{layer}.{path}.weight", part

    def _turn_of(self, model: PreTrainedModel) -> "_Turn":
        rope = model.config.rope_parameters
        # Made afresh, because the frequencies of a model may be rounded, or those for a longer text.
        made = type(model.get_submodule(self.rotary))(model.config)
        return _Turn(
            head_dim=head_dim_of(model.config),
            frequencies=tuple(made.inv_freq.tolist()),
            magnitude=float(made.attention_scaling),
            kind=rope["rope_type"],
            base=float(rope["rope_theta"]),
        )


@dataclass(frozen=True, kw_only=True)
class _Turn:
    """The rotary embedding of the first 2 len(frequencies) channels of a head: channels i and i + len(frequencies)."""

    head_dim: int
    frequencies: tuple[float, ...]
    magnitude: float
    kind: str
    base: float

    @property
    def rotary(self) -> Rotary:
        """The same on whole heads, as their channels are ordered in the exported tensors."""
        unturned = self.head_dim // 2 - len(self.frequencies)
        return Rotary(
            frequencies=self.frequencies + (0.0,) * unturned,
            magnitude=1.0 if unturned else self.magnitude,
            kind="partial" if unturned else self.kind,
            base=self.base,
        )

    def ordered(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the rows (heads * head_dim x hidden) with all channels that are not turned in pairs of their own.

        A magnitude is of the turned channels alone, so their rows take it on, in f32.
        """
        turned, half = len(self.frequencies), self.head_dim // 2
        if turned == half:
            return rows
        heads = rows.reshape(-1, self.head_dim, rows.shape[-1])
        first, second, rest = heads.split([turned, turned, self.head_dim - 2 * turned], dim=1)
        if self.magnitude != 1.0:
            first, second, rest = self.magnitude * first.float(), self.magnitude * second.float(), rest.float()
        pairs = [first, rest[:, : half - turned], second, rest[:, half - turned :]]
        return torch.cat(pairs, dim=1).reshape(rows.shape)


@dataclass(frozen=True)
class _Part:
    """Some rows of a fused matrix: queries or keys, which are turned, or values, or a matrix of the feed-forward."""

    fused: str
    start: int
    count: int
    is_turned: bool


@dataclass(frozen=True, kw_only=True)
class _Unfused(Mapping[str, torch.Tensor]):
    """The `tensors` by name, but `parts` in place of the fused ones, not copied unless channels are reordered."""

    tensors: Mapping[str, torch.Tensor]
    parts: Mapping[str, _Part]
    turn: _Turn

    def __getitem__(self, name: str) -> torch.Tensor:
        if (part := self.parts.get(name)) is None:
            return self.tensors[name]
        rows = self.tensors[part.fused].narrow(0, part.start, part.count)
        return self.turn.ordered(rows) if part.is_turned else rows

    def __iter__(self) -> Iterator[str]:
        fused = {part.fused for part in self.parts.values()}
        yield from (name for name in self.tensors if name not in fused)
        yield from self.parts

    def __len__(self) -> int:
        return len(list(iter(self)))


_QKV, _GATE_UP = "self_attn.qkv_proj", "mlp.gate_up_proj"
FAMILY = _Phi3(
    name="phi3",
    query=_QKV,
    key=_QKV,
    value=_QKV,
    ffn_in=(_GATE_UP, _GATE_UP),
    slides=True,
    gguf_keys=("attention.sliding_window", "rope.scaling.original_context_length"),
    gguf_tensors=("rope_factors_short.weight", "rope_factors_long.weight"),
)
