"""OLMo 2: norms behind the sublayers instead of before them, and one norm over all queries, one over all keys.

Heads stay or go together: the norms divide every query by the root mean square over all heads of its token. Without
some heads it would be another number on every token, which no change of weights makes up for. So a masked model with
fewer heads has no cut model that computes the same, and a plan keeps all heads of a layer or removes its attention. A
removed sublayer is exact, because the norm of zeros is zero.
"""

from dataclasses import dataclass, replace

from transformers import PreTrainedConfig, PreTrainedModel

from dilap.core.errors import Unsupported
from dilap.core.shape import Architecture
from dilap.models.families.family import Family


@dataclass(frozen=True, kw_only=True)
class _Olmo2(Family):
    def residual_scale(self, config: PreTrainedConfig) -> float:  # noqa: ARG002
        raise Unsupported("the norms of OLMo 2 stand behind its sublayers")

    def architecture(self, model: PreTrainedModel) -> Architecture:
        return replace(super().architecture(model), qk_norm="joint")


FAMILY = _Olmo2(
    name="olmo2",
    attention_norm=None,
    attention_norm_behind="post_attention_layernorm",
    ffn_norm=None,
    ffn_norm_behind="post_feedforward_layernorm",
)
