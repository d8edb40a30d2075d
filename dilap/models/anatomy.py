"""Find the prunable parts of a loaded model."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from dilap.core.codec import digest
from dilap.core.errors import InvalidInput, Unsupported
from dilap.core.groups import Block, Kept, indices_kept
from dilap.core.numerics import Numerics
from dilap.core.shape import Architecture
from dilap.models.compute_device import HOST
from dilap.models.families import families, family_of
from dilap.models.modeling_dilap import linear_at

# Entries of a config that say how a model was read, and change nothing of what it computes.
_OF_THE_READING = ("_name_or_path", "transformers_version", "architectures", "dilap_origin")


@dataclass(frozen=True, kw_only=True)
class _Placed:
    """A block of a loaded model; `path` is that of the module whose weights say which of its units are left."""

    block: Block
    path: str

    @property
    def name(self) -> str:
        return self.block.name

    @property
    def layer(self) -> int:
        return self.block.layer

    @property
    def kind(self) -> str:
        return self.block.kind


@dataclass(frozen=True, kw_only=True)
class Sublayer(_Placed):
    """A block with an output projection `out` (hidden x inputs), which is at `path` in the model."""

    out: nn.Linear

    @property
    def weight(self) -> torch.Tensor:
        return self.out.weight

    def columns(self, kept: Kept) -> torch.Tensor:
        """Return the inputs of the output projection that stay when the units `kept` stay, ascending."""
        return torch.from_numpy(indices_kept(self.block.groups, kept)[f"{self.path}.weight", 1])


@dataclass(frozen=True, kw_only=True)
class ExpertSublayer(_Placed):
    """A block whose units are experts: `router`, at `path` in the model, sends tokens to those of the network `out`."""

    out: nn.Module
    router: nn.Module

    @property
    def weight(self) -> torch.Tensor:
        """The router's weights (experts x hidden)."""
        return self.router.get_parameter("weight")

    def columns(self, kept: Kept) -> torch.Tensor:
        """Return the experts that stay when the units `kept` stay, ascending."""
        return torch.tensor(kept[self.block.main.name], dtype=torch.int64)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    layers = model.get_submodule(family_of(model.config).layers)
    assert isinstance(layers, nn.ModuleList)
    return layers


def architecture_of(model: PreTrainedModel) -> Architecture:
    """Return the shape of a loaded model, its widths read from the tensors themselves."""
    return family_of(model.config).architecture(model)


def numerics_of(model: PreTrainedModel) -> Numerics:
    """Return what a loaded model computes beside its shapes. Raises Unsupported for what no exporter computes."""
    return family_of(model.config).numerics(model)


def exported_tensors(model: PreTrainedModel) -> Mapping[str, torch.Tensor]:
    """Return the tensors of a loaded model as exporters write them, by their names in the model."""
    return family_of(model.config).exported(model)


def stand_in_numerics(architecture: Architecture) -> Numerics:
    """Return usual values of the family, for a model with random weights that is only timed."""
    return families()[architecture.family].stand_in_numerics(architecture)


def blocks_of(model: PreTrainedModel) -> tuple[Block, ...]:
    """Return the sublayers of a model, layer by layer, attention first, with the tensors in which their units lie."""
    return family_of(model.config).blocks(model)


def sublayers(model: PreTrainedModel) -> Iterator[Sublayer]:
    """Yield the sublayers of a model with their output projections, layer by layer, attention first.

    Raises Unsupported for a model with experts.
    """
    require_projections(model)
    for one in all_sublayers(model):
        assert isinstance(one, Sublayer)
        yield one


def all_sublayers(model: PreTrainedModel) -> Iterator[Sublayer | ExpertSublayer]:
    """Yield the sublayers of a model, those with experts included, layer by layer, attention first."""
    family, layers = family_of(model.config), decoder_layers(model)
    for block in blocks_of(model):
        layer, start = layers[block.layer], f"{family.layers}.{block.layer}"
        if block.has_experts:
            network, router = (layer.get_submodule(path or "") for path in (family.ffn, family.router))
            yield ExpertSublayer(block=block, path=f"{start}.{family.router}", out=network, router=router)
            continue
        path = family.output_of(block.kind)
        out = linear_at(layer, path)
        assert out is not None
        yield Sublayer(block=block, path=f"{start}.{path}", out=out)


def require_projections(model: PreTrainedModel) -> None:
    """Raise Unsupported for a model with experts, which have no output projection whose inputs are their units."""
    if architecture_of(model).experts is not None:
        raise Unsupported(
            "this method weighs single channels of matrices, and this model's units are whole experts: use one that"
            " chooses measured levels (dilap, uniform, layer_error, ziplm) or removes layers (shortgpt, sleb)"
        )


def norm_behind(model: PreTrainedModel, sublayer: Sublayer | ExpertSublayer) -> nn.Module | None:
    """Return the norm between a sublayer's output and the residual stream, None where the two are only added."""
    path = family_of(model.config).norm_behind(sublayer.kind)
    return None if path is None else decoder_layers(model)[sublayer.layer].get_submodule(path)


def model_digest(model: nn.Module) -> str:
    """Return the SHA-256 of the configuration and of the name, shape, type and every byte of every tensor.

    A network without a configuration has the words in which torch describes it in its place. Tensors are hashed in
    parallel, because one core reads only 1 to 2 GB/s.
    """
    tensors = sorted(model.state_dict().items())
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        contents = list(pool.map(lambda one: _content_sha256(one[1]), tensors))
    described = [
        [name, list(tensor.shape), str(tensor.dtype), content]
        for (name, tensor), content in zip(tensors, contents, strict=True)
    ]
    config = getattr(model, "config", None)
    settings = _configuration(config) if isinstance(config, PreTrainedConfig) else [type(model).__name__, repr(model)]
    return digest([settings, described])


def _configuration(config: PreTrainedConfig) -> dict[str, Any]:
    """Return what the results depend on beside the weights (the rotary base, epsilons), and not how it was read."""
    settings: dict[str, Any] = json.loads(config.to_json_string())
    return {name: value for name, value in settings.items() if name not in _OF_THE_READING}


def _content_sha256(tensor: torch.Tensor) -> str:
    flat = tensor.detach().to(HOST).contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()


def require_finite(model: PreTrainedModel) -> None:
    """Raise InvalidInput, naming the first tensor that holds NaN or infinity."""
    for name, tensor in model.named_parameters():
        if not torch.isfinite(tensor).all():
            raise InvalidInput(f"tensor {name} of the model holds NaN or infinite values; the checkpoint is damaged")
