"""The matrices of a model's parts, which have a precision, and other values in their place."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from dilap.models.anatomy import ExpertSublayer, Sublayer
from dilap.models.families import family_of


def matrices_of(model: PreTrainedModel, sublayer: Sublayer | ExpertSublayer) -> tuple[str, ...]:
    """Return the names of the parameters that have a sublayer's precision: its matrices, the output projection last.

    A router is none of them.
    """
    if isinstance(sublayer, ExpertSublayer):
        names = (member.tensor for member in sublayer.block.main.members)
        return tuple(name for name in names if name != f"{sublayer.path}.weight")
    family = family_of(model.config)
    paths = (*family.inputs_of(sublayer.kind), family.output_of(sublayer.kind))
    return tuple(f"{family.layers}.{sublayer.layer}.{path}.weight" for path in paths)


def embedding_name(model: PreTrainedModel) -> str:
    """Return the name of the embedding among the parameters; a tied head is the same parameter."""
    return _name_of(model, model.get_input_embeddings())


def head_name(model: PreTrainedModel) -> str:
    """Return the name of the head's matrix, by which a tied one can be replaced by another than the embedding."""
    return _name_of(model, model.get_output_embeddings())


def _name_of(model: PreTrainedModel, module: nn.Module) -> str:
    return next(f"{name}.weight" for name, one in model.named_modules() if one is module)


def put_(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """Give the parameter of that name another value, a parameter or a tensor; the old one keeps its own.

    The value is moved to where the old one is.
    """
    path, _, attribute = name.rpartition(".")
    value = value.to(model.get_parameter(name).device)
    parameter = value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
    setattr(model.get_submodule(path), attribute, parameter)


@contextmanager
def replaced(model: nn.Module, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Give parameters other values, by their names, while the context is entered."""
    own = {name: model.get_parameter(name) for name in values}
    try:
        for name, value in values.items():
            put_(model, name, value)
        yield
    finally:
        for name, parameter in own.items():
            put_(model, name, parameter)
