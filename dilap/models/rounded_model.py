"""Round a whole model in place, part by part, so that an exporter then loses nothing more."""

from collections.abc import Callable, Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from dilap.core.errors import InvalidInput
from dilap.models.anatomy import decoder_layers
from dilap.models.compute import batches
from dilap.models.families import family_of
from dilap.models.families.family import Family, has_tied_head
from dilap.models.modeling_dilap import linear_at
from dilap.models.reference import final_hidden
from dilap.models.rounding import compensated, rounded
from dilap.models.statistics import InputStatistics, Role, layer_statistics, paths_of

# KL to the dense model of SmolLM2-135M (turned, its layers rounded) on 2,048 tokens of WikiText-2, rounded plainly and
# with 32 sequences of 256 tokens of C4: q4_0 0.586 and 0.135, int4 0.585 and 0.134; 8 layers in q4_0 0.155 and 0.050.
ROLES: tuple[Role, ...] = ("attention_in", "attention_out", "ffn_in", "ffn_out")


@torch.no_grad()
def round_model_(
    model: PreTrainedModel,
    precisions: Mapping[str, str],
    *,
    tokens: torch.Tensor | None = None,
    batch_tokens: int = 2048,
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Round the matrices of the parts that `precisions` names: blocks, `head`, `embedding`.

    Blocks are `layers.N.attention` and `layers.N.ffn`. With `tokens` (sequences x length), the columns of a matrix make
    up for the rounding of others, on the inputs that these tokens give in a model whose earlier layers are rounded. Not
    so in the embedding, of which single rows are read, nor in a head that is tied to it, nor in experts, each of which
    sees a few tokens only. `progress` gets the number of tokens that went through a layer. Raises InvalidInput where a
    tied head is to have another precision than the embedding, and for a model whose own type holds too few values.
    """
    _require_roundable(model, precisions)
    family = family_of(model.config)
    if tokens is None:
        for index, layer in enumerate(decoder_layers(model)):
            _round_layer_(layer, index, family, precisions, {})
    else:
        steps = layer_statistics(
            model,
            tokens,
            roles=ROLES,
            covariance=True,
            propagate="pruned",
            batch_tokens=batch_tokens,
            progress=progress,
        )
        for step in steps:
            _round_layer_(step.layer, step.index, family, precisions, step.statistics)
    if "embedding" in precisions:
        _round_(model.get_input_embeddings().weight, precisions["embedding"], None)
    if "head" in precisions and not has_tied_head(model):
        gram = None if tokens is None else _final_gram(model, tokens, batch_tokens=batch_tokens)
        _round_(model.get_output_embeddings().weight, precisions["head"], gram)


def _require_roundable(model: PreTrainedModel, precisions: Mapping[str, str]) -> None:
    if model.dtype != torch.float32:
        raise InvalidInput(
            f"a rounded model is kept in torch.float32, got one in {model.dtype}; convert it with float()"
        )
    head, embedding = precisions.get("head"), precisions.get("embedding")
    if has_tied_head(model) and head != embedding:
        raise InvalidInput(f"this head is the embedding, so give both one precision, got {head} and {embedding}")


def _round_layer_(
    layer: nn.Module,
    index: int,
    family: Family,
    precisions: Mapping[str, str],
    statistics: Mapping[Role, InputStatistics],
) -> None:
    for role in ROLES:
        if (precision := precisions.get(f"layers.{index}.{role.partition('_')[0]}")) is None:
            continue
        gram = statistics[role].covariance_sum if role in statistics else None
        for path in paths_of(family, role):
            if (matrix := linear_at(layer, path)) is not None:
                _round_(matrix.weight, precision, gram)
    precision = precisions.get(f"layers.{index}.ffn")
    if family.experts is not None and precision is not None:
        for tensor in layer.get_submodule(family.experts).parameters():
            _round_(tensor, precision, None)


def _round_(weight: torch.Tensor, precision: str, gram: torch.Tensor | None) -> None:
    weight.copy_(rounded(weight, precision) if gram is None else compensated(weight, gram, precision))


def _final_gram(model: PreTrainedModel, tokens: torch.Tensor, *, batch_tokens: int) -> torch.Tensor | None:
    """Return the Gram matrix of what the head reads."""
    statistics = InputStatistics()
    for batch in batches(tokens, batch_tokens=batch_tokens, device=model.device):
        statistics.add(final_hidden(model, batch), covariance=True)
    return statistics.covariance_sum
