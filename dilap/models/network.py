"""A network in torch that is no decoder: what it gives for images or texts, however they and its outputs are packed."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from dilap.core.errors import Unsupported, reason_of
from dilap.core.network_input import TOKEN_INPUTS
from dilap.models.compute_device import HOST

Examples = NDArray[np.float32] | NDArray[np.int64]  # preprocessed images, or texts as tokens
Pooling = Literal["mean", "first"]  # of the vectors of a text's tokens: their mean, or that of the first token
_AT_ONCE = 16  # the activations of ResNet-50 at 224x224 take about 100 MB an image


class Logits(nn.Module):
    """A network with its logits, or the embeddings of texts, as the only output (examples x numbers).

    It takes images, or the arrays TOKEN_INPUTS as arguments of their own.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        found = outputs_of(self.model, *inputs)
        if not found or found[0].dim() != 2:
            raise Unsupported("the model gives no logits (images x classes): it is no network that classifies images")
        return found[0]


def classes_of(model: nn.Module) -> Mapping[str, int]:
    """Return the numbers of the classes that have names, which transformers' configs say."""
    return getattr(getattr(model, "config", None), "label2id", None) or {}


def takes_tokens(model: nn.Module) -> TypeGuard[PreTrainedModel]:
    """Return whether a network is an encoder of texts."""
    return isinstance(model, PreTrainedModel) and model.main_input_name == TOKEN_INPUTS[0]


def gives_embeddings(model: nn.Module) -> TypeGuard[PreTrainedModel]:
    """Return whether a network is an encoder of texts without a head, whose outputs are the texts' embeddings."""
    return takes_tokens(model) and bool(model.base_model is model)


def outputs_of(model: nn.Module, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """Return all tensors that a network gives, in whatever containers they are.

    The first are logits or, of an encoder of texts without a head, the texts' embeddings, which are vectors of the
    length 1. `inputs` are images, or the arrays TOKEN_INPUTS, one by one or in one tensor (texts x 3 x tokens).
    """
    if not takes_tokens(model):
        return list(_tensors_in(model(*inputs)))
    arrays = dict(zip(TOKEN_INPUTS, inputs if len(inputs) > 1 else inputs[0].unbind(1), strict=True))
    found = list(_tensors_in(model(**arrays)))
    if gives_embeddings(model):
        found[0] = _pooled(found[0], arrays["attention_mask"], getattr(model.config, "sentence_pooling", "mean"))
    return found


def _pooled(hidden: torch.Tensor, mask: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """Return a vector for every text, given those of its tokens (texts x tokens x numbers), without the padding's."""
    if pooling == "first":
        return functional.normalize(hidden[:, 0], dim=1)
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return functional.normalize((hidden * weights).sum(1) / weights.sum(1).clamp(min=1), dim=1)


def _tensors_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in _tensors_in(part)]


def differences(model: nn.Module, found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return how far the outputs for every example are from the dense network's (examples).

    It is KL(dense || model) of the class probabilities, in nats; of embeddings, which have the length 1, half their
    squared distance, which is 1 less the cosine similarity.
    """
    if gives_embeddings(model):
        return (found - wanted).square().sum(1) / 2
    kl = functional.kl_div(found.log_softmax(1), wanted.log_softmax(1), reduction="none", log_target=True)
    return kl.flatten(1).sum(1)


def difference(model: nn.Module, found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return the mean of the `differences` of all examples: the loss of a distillation."""
    return differences(model, found, wanted).mean()


def batches_of(examples: Examples, size: int, *, model: nn.Module) -> Iterator[torch.Tensor]:
    """Yield images, `size` at a time, where the weights of `model` are and in their type; or tokens, as they are."""
    weight = next(model.parameters())
    for few in torch.from_numpy(np.ascontiguousarray(examples)).split(size):
        yield few.to(weight.device, weight.dtype if few.is_floating_point() else None)


def random_examples(model: nn.Module, size: Sequence[int], count: int, *, seed: int = 0) -> torch.Tensor:
    """Return images of noise, or random tokens of texts of ever fewer tokens and padding (examples x `size`)."""
    generator = torch.Generator().manual_seed(seed)
    if takes_tokens(model):
        return _random_tokens(model, size[-1], count, generator)
    return torch.randn(count, *size, generator=generator)


def _random_tokens(model: PreTrainedModel, length: int, count: int, generator: torch.Generator) -> torch.Tensor:
    ids = torch.randint(model.get_input_embeddings().num_embeddings, (count, length), generator=generator)
    mask = torch.arange(length).expand(count, length) < torch.linspace(length, 1, count + 1)[:-1, None].ceil()
    padding = getattr(model.config, "pad_token_id", None) or 0
    return torch.stack([ids.where(mask, padding), mask.long(), torch.zeros_like(ids)], 1)


class TorchNetwork:
    """The `dilap.backends.Network` of a torch model; it computes in the type that the weights have."""

    def __init__(self, model: nn.Module) -> None:
        self._logits = Logits(model)

    def outputs(self, images: Examples) -> NDArray[np.float32]:
        """Return the logits (images x classes), or the texts' embeddings, in f32.

        Raises Unsupported for images or texts that the model does not take.
        """
        rows: list[NDArray[np.float32]] = []
        with evaluating(self._logits), torch.inference_mode():
            for few in batches_of(images, _AT_ONCE, model=self._logits):
                try:
                    found = self._logits(few)
                except (RuntimeError, ValueError, TypeError, IndexError) as error:
                    size = "x".join(map(str, images.shape[1:]))
                    kind = "images" if few.is_floating_point() else "tokens"
                    raise Unsupported(f"the model does not take {kind} of {size}: {reason_of(error)}") from error
                rows.append(found.float().to(HOST).numpy())
        return np.concatenate(rows)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Let a model and all its parts evaluate; in the end everything that trained before trains again."""
    trained = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in trained:
            module.training = True


def in_f32(model: nn.Module) -> nn.Module:
    """Return the model on the CPU in f32: itself, or a copy where it is anything else."""
    tensors = [*model.parameters(), *model.buffers()]
    if all(one.device == HOST and (one.dtype == torch.float32 or not one.is_floating_point()) for one in tensors):
        return model
    return copy.deepcopy(model).to(HOST, torch.float32)
