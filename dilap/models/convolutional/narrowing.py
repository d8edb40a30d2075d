"""Networks whose tensors are smaller than those of the class that builds them; needs torch and transformers alone.

This file is also copied beside every checkpoint that stock classes cannot hold, so that it can be loaded where DiLAP is
not installed. A checkpoint of a transformers class loads by

    AutoModelForImageClassification.from_pretrained(FOLDER, trust_remote_code=True)

(an encoder of texts by AutoModel), because its config has `narrowed`, the record of what is smaller. A network of
another class is built by its own code, and gets its tensors from the folder:

    from modeling_narrowed import load_narrowed_
    model = load_narrowed_(my_module.build(), FOLDER)

The record has under `tensors` the shapes of all tensors that may differ from those of the class. Of residual branches
that are gone it has under `removed` the paths of all modules, each with the rows and columns that it took off, and
under `constants` those of the last modules, in whose places the constants stand that the branches add.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig as PreTrainedConfig  # its name in transformers 4; 5 has both
from transformers import PreTrainedModel

TENSORS = "model.safetensors"
RECORD = "narrowed.json"  # beside the tensors of a network that is no transformers class
PREFIX = "Narrowed"  # stands before the stock class's name
_AUTO_CLASSES = ("AutoModelForImageClassification", "AutoModelForSequenceClassification")  # or else AutoModel


class Removed(nn.Module):
    """Takes the place of a layer of a removed branch: passes its input on, which nothing uses.

    It has the attributes of the layer, which the code around it may read, and takes off the rows and columns (`crop`)
    that the layer took off.
    """

    def __init__(self, layer: nn.Module, crop: Sequence[int]) -> None:
        super().__init__()
        self.__dict__.update({name: value for name, value in vars(layer).items() if not name.startswith("_")})
        self.crop = tuple(crop)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        for axis, size in enumerate(self.crop, start=2):
            if size:
                inputs = inputs.narrow(axis, 0, inputs.shape[axis] - size)
        return inputs


class Constant(Removed):
    """Takes the place of the last layer of a removed branch: gives the same vector at every position."""

    def __init__(self, layer: nn.Module, crop: Sequence[int], bias: torch.Tensor) -> None:
        super().__init__(layer, crop)
        self.axis = -1 if isinstance(layer, nn.Linear) else 1
        self.bias = nn.Parameter(bias, requires_grad=bias.requires_grad)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        inputs = super().forward(inputs)
        shape = [1] * inputs.ndim
        shape[self.axis] = -1
        # of the size of its input alone, so that an exported file does not compute what led to that
        return torch.zeros(inputs.shape, dtype=inputs.dtype, device=inputs.device) + self.bias.view(shape)


def set_tensor_(model: nn.Module, name: str, value: torch.Tensor, *, requires_grad: bool = True) -> None:
    """Put a parameter or a buffer of another shape in the place of one, and tell its module the new sizes."""
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path) if path else model
    is_parameter = attribute in module._parameters
    setattr(module, attribute, nn.Parameter(value, requires_grad=requires_grad) if is_parameter else value)
    if value.ndim:
        _follow_(module, attribute, value)


def _follow_(module: Any, attribute: str, value: torch.Tensor) -> None:
    """Let the numbers of channels that a module knows be those of its new tensor; groups of channels go whole."""
    size = value.shape[0]
    if isinstance(module, nn.Linear) and attribute == "weight":
        module.out_features, module.in_features = value.shape
    elif isinstance(module, nn.modules.conv._ConvNd) and attribute == "weight":
        names = ("in_channels", "out_channels") if module.transposed else ("out_channels", "in_channels")
        if module.groups > 1:
            module.groups = module.groups * size // getattr(module, names[0])
        setattr(module, names[0], size)
        setattr(module, names[1], value.shape[1] * module.groups)
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        module.num_features = size
    elif isinstance(module, nn.GroupNorm) and size != module.num_channels:
        module.num_groups = module.num_groups * size // module.num_channels
        module.num_channels = size
    elif isinstance(module, nn.PReLU):
        module.num_parameters = size


def remove_modules_(
    model: nn.Module, removed: Mapping[str, Sequence[int]], constants: Mapping[str, torch.Tensor]
) -> None:
    """Put constants in the places of modules at their paths, and nothing in those of others.

    `removed` has for the path of every module, also of one that a constant replaces, the rows and columns that it takes
    off.
    """
    for path, crop in removed.items():
        layer = model.get_submodule(path)
        made = Constant(layer, crop, constants[path]) if path in constants else Removed(layer, crop)
        model.set_submodule(path, made)


def record_of(model: nn.Module, stock: nn.Module | None = None) -> dict[str, Any]:
    """Return the record of a network: what its class, as which `stock` is built, would have to change.

    Without `stock` the shapes of all tensors are in the record.
    """
    removed = {path: module for path, module in model.named_modules() if isinstance(module, Removed)}
    constants = [path for path, module in removed.items() if isinstance(module, Constant)]
    known = {} if stock is None else {name: one.shape for name, one in stock.state_dict().items()}
    own = {f"{path}.bias" for path in constants}  # needed also where the class has as many biases in these places
    tensors = {
        name: list(one.shape) for name, one in model.state_dict().items() if name in own or known.get(name) != one.shape
    }
    return {
        "tensors": tensors,
        "removed": {path: list(module.crop) for path, module in removed.items()},
        "constants": constants,
    }


def narrow_(model: nn.Module, record: Mapping[str, Any]) -> nn.Module:
    """Give a network the shapes of a record; its new tensors do not have their values yet."""
    shapes, like = record["tensors"], next(model.parameters())
    constants = {path: like.new_empty(shapes[f"{path}.bias"]) for path in record["constants"]}
    remove_modules_(model, record["removed"], constants)
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, shape in shapes.items():
        if list(own[name].shape) != list(shape):
            set_tensor_(model, name, own[name].new_empty(shape), requires_grad=own[name].requires_grad)
    return model


def load_narrowed_(model: nn.Module, folder: str | Path) -> nn.Module:
    """Give a network, as its own code builds it, the shapes and the values that are kept in a folder."""
    from safetensors.torch import load_file  # noqa: PLC0415 (transformers brings it)

    narrow_(model, json.loads((Path(folder) / RECORD).read_text(encoding="utf-8")))
    model.load_state_dict(load_file(Path(folder) / TENSORS))
    return model.eval()


class _Narrowed(PreTrainedModel):  # type: ignore[misc]
    """Builds the stock model, then narrows it as the config says."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        narrow_(self, config.narrowed)


@functools.cache
def narrowed_class(stock: Any) -> Any:
    """Return the class that builds the models of the class `stock` with the shapes that their config has."""
    made: Any = type(f"{PREFIX}{stock.__name__}", (_Narrowed, stock), {"__module__": __name__})
    kinds = (one for one in _AUTO_CLASSES if one.removeprefix("AutoModel") in stock.__name__)
    made.register_for_auto_class(next(kinds, "AutoModel"))
    return made


def __getattr__(name: str) -> Any:
    """Make the narrowed class that a checkpoint's config asks for by its name."""
    stock = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if stock is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return narrowed_class(stock)
