"""Low-rank adapters that are put on a model for a while, and leave it as it was."""

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from dilap.models.anatomy import decoder_layers
from dilap.models.compute_device import HOST
from dilap.models.families import family_of
from dilap.search.method import PruneTask

_STEPS = 100  # on a CPU, where the published numbers take days


def num_steps(asked: int, model: PreTrainedModel, *, published: int) -> int:
    """Return how many batches to train on: those asked for, or, for 0, the published number where a GPU trains."""
    return asked or (_STEPS if model.device == HOST else published)


class Adapters:
    """A context in which a task's model has adapters on the matrices of its layers; they are taken off at the end."""

    def __init__(
        self, task: PruneTask, *, rank: int, alpha: int, dropout: float, paths: Sequence[str] | None = None
    ) -> None:
        """Prepare adapters; `paths` are the matrices of a layer that get them, by default all."""
        self.model: PreTrainedModel = task.model
        self.paths = paths or family_of(task.model.config).matrices
        torch.manual_seed(task.seed)
        names = [path.rpartition(".")[2] for path in self.paths]
        config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=names)
        self.scale, self.config = alpha / rank, config

    def __enter__(self) -> "Adapters":
        self.wrapped: Any = get_peft_model(self.model, self.config)
        return self

    def __exit__(self, *_: object) -> None:
        self.wrapped.unload()
        self.model.eval().requires_grad_(False)

    def matrix(self, tensor: str) -> Any:
        """Return the adapted matrix whose weights are called `tensor` in the model without adapters."""
        return self.model.get_submodule(tensor.removesuffix(".weight"))

    def update(self, tensor: str) -> torch.Tensor:
        """Return what the adapter adds to a matrix (outputs x inputs)."""
        matrix = self.matrix(tensor)
        product: torch.Tensor = matrix.lora_B["default"].weight @ matrix.lora_A["default"].weight
        return self.scale * product.detach()

    def merged(self) -> dict[str, torch.Tensor]:
        """Return every adapted matrix with its adapter folded in, by parameter name."""
        found, layers = {}, family_of(self.model.config).layers
        for index in range(len(decoder_layers(self.model))):
            for path in self.paths:
                name = f"{layers}.{index}.{path}.weight"
                weight = self.matrix(name).base_layer.weight.detach()
                found[name] = weight + self.update(name).to(weight.dtype)
        return found
