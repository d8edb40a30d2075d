"""SmolLM3: Llama whose every fourth layer has no rotary embedding, and so sees no positions but by the causal mask."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from dilap.core.numerics import Numerics
from dilap.core.shape import Architecture
from dilap.models.families.family import Family


@dataclass(frozen=True, kw_only=True)
class _SmolLm3(Family):
    def numerics(self, model: PreTrainedModel) -> Numerics:
        turned = model.config.no_rope_layers[: model.config.num_hidden_layers]  # 1 for a layer that turns its heads
        return _unturned(super().numerics(model), [index for index, is_turned in enumerate(turned) if not is_turned])

    def stand_in_numerics(self, architecture: Architecture) -> Numerics:
        return _unturned(super().stand_in_numerics(architecture), range(3, len(architecture.layers), 4))


def _unturned(numerics: Numerics, unturned: Sequence[int]) -> Numerics:
    """Return the numerics with no rotary embedding in the layers `unturned`."""
    layers = (replace(one, rotary=None) if i in unturned else one for i, one in enumerate(numerics.layers))
    return replace(numerics, layers=tuple(layers))


FAMILY = _SmolLm3(name="smollm3")
