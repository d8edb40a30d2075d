"""Which weights of a pruned model are trained, and how fast."""

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import nn
from transformers import PreTrainedModel

from dilap.models.anatomy import decoder_layers
from dilap.models.recovery.options import RecoveryOptions


class Trainable:
    """A model in which only what recovery may change is trainable, until it is finished; that is seeded.

    Matrices that adapters stand beside stay in the type that they have; everything else is trained in f32, because
    bf16's 8 bits are too few for the small steps of training, and f16 cannot hold the small numbers of gradients and of
    Adam (a tiny model was NaN after one step).
    """

    def __init__(self, model: PreTrainedModel, options: RecoveryOptions) -> None:
        self.model, self.options = model, options
        self._types = {name: parameter.dtype for name, parameter in model.named_parameters()}
        if options.mode == "full" or options.lora_vectors or model.dtype != torch.bfloat16:
            model.float()
        model.requires_grad_(False)
        self._adapted: Any = self._with_adapters() if options.mode == "lora" else None
        for parameter in decoder_layers(model).parameters():
            if options.mode == "full" or (options.lora_vectors and parameter.dim() == 1):
                parameter.requires_grad_(True)

    def _with_adapters(self) -> nn.Module:
        torch.manual_seed(self.options.seed)
        rank = self.options.lora_rank
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft warns of its own names for the fused tensors of experts
            adapted: nn.Module = get_peft_model(self.model, config)
        return adapted

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by name."""
        return {name: one for name, one in self.model.named_parameters() if one.requires_grad}

    def groups(self) -> list[dict[str, Any]]:
        """Return all that is trained in groups for AdamW, each with its learning rate."""
        groups = []
        for rate, trained, weight in self._parts():
            if parameters := [one for one in trained if one.requires_grad]:
                groups.append({"params": parameters, "lr": rate * size_of(weight)})
        return groups

    def _parts(self) -> Iterator[tuple[float, list[nn.Parameter], torch.Tensor]]:
        """Yield relative rates, parameters, and the tensor to whose size their rate is relative."""
        in_adapters: set[int] = set()
        for one in self.model.modules():
            if isinstance(one, LoraLayer):
                trained = [*one.lora_A.parameters(), *one.lora_B.parameters()]
                in_adapters.update(map(id, trained))
                yield self.options.lora_rate, trained, _adapted(one)
        for parameter in self.model.parameters():
            if id(parameter) not in in_adapters:
                yield self.options.full_rate, [parameter], parameter

    @torch.no_grad()
    def finish(self) -> None:
        """Leave a plain model in the types that it had: adapters are folded into the matrices."""
        if self._adapted is not None:
            self._adapted.merge_and_unload()  # puts plain matrices back into the model
        for name, parameter in self.model.named_parameters():
            parameter.data = parameter.data.to(self._types[name])
        self.model.eval().requires_grad_(False)


def _adapted(adapter: LoraLayer) -> torch.Tensor:
    """Return the matrix that an adapter changes: of a layer, or one of several of the same module (experts)."""
    name = adapter.parameter_name if isinstance(adapter, ParamWrapper) else "weight"
    return adapter.get_base_layer().get_parameter(name)


def size_of(weight: torch.Tensor) -> float:
    """Return the root mean square of a tensor; that of a tensor of zeros, such as a new bias, is taken to be 0.001."""
    return max(float(weight.detach().float().square().mean().sqrt()), 1e-3)
