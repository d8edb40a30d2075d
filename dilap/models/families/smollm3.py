"""SmolLM3: Llama whose every fourth layer has no rotary embedding, and so sees no positions but by the causal mask."""

from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from dilap.core.numerics import Numerics
from dilap.core.shape import Architecture
from dilap.models.families.family import Family


@dataclass(frozen=True, kw_only=True)
class _SmolLm3(Family):
    def numerics(self, model: PreTrainedModel) -> Numerics:
        turned = model.config.no_rope_layers[: model.config.num_hidden_layers]  # 1 for a layer that turns its heads
        unturned = (index for index, is_turned in enumerate(turned) if not is_turned)
        return _with_unturned(super().numerics(model), tuple(unturned))

    def stand_in_numerics(self, architecture: Architecture) -> Numerics:
        unturned = range(3, len(architecture.layers), 4)
        return _with_unturned(super().stand_in_numerics(architecture), tuple(unturned))


def _with_unturned(numerics: Numerics, layers: tuple[int, ...]) -> Numerics:
    assert numerics.rotary is not None
    return replace(numerics, rotary=replace(numerics.rotary, unturned_layers=layers))


FAMILY = _SmolLm3(name="smollm3")
