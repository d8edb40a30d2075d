"""Load networks that are no decoders, and write checkpoints of them."""

import importlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel

from dilap.core import registry
from dilap.core.bounds import MAX_WIDTH
from dilap.core.codec import read_json, write_json, written_aside
from dilap.core.errors import InvalidInput, Unsupported, reason_of
from dilap.core.graph import Network
from dilap.models import convolutional
from dilap.models.anatomy import model_digest, require_finite
from dilap.models.builtin import BUILTIN_NETWORKS, LITE
from dilap.models.convolutional.narrowing import RECORD, TENSORS, load_narrowed_, narrowed_class, record_of
from dilap.models.convolutional.network import traced
from dilap.models.faithful import exact_type, require_every_tensor
from dilap.models.pretrained import errors_of_damaged_files, from_pretrained

MODELLING_FILE = "modeling_narrowed.py"
_PREPROCESSING = "preprocessor_config.json"
_USUAL_SIDE = 224  # of images, where a config does not say it (ResNet, RegNet)


@dataclass(frozen=True, kw_only=True)
class NetworkSource:
    """A loaded network and its shape; `refusals` say, for layers whose outputs all stay, why.

    `folder` is where its files are, None for one that a function builds.
    """

    name: str
    model: nn.Module
    network: Network
    refusals: Mapping[str, str]
    digest: str
    folder: Path | None = None


def load_network(
    name: str, *, input_size: Sequence[int] | None = None, weights: str | Path | None = None
) -> NetworkSource:
    """Load a network and find out its shape.

    `name` is a built-in name, a Hugging Face folder of an image classifier, or the `module:function` of a user that
    returns a module; this one is imported because it was named, and no other code is. `input_size`, (channels, height,
    width), is needed for a user's own. `weights` is the folder of a checkpoint that `save_network` wrote of a network
    that is no transformers class, and has the values and shapes that replace those of the named one. Raises
    InvalidInput, Unavailable, Unsupported.
    """
    folder = Path(name).expanduser()
    model: nn.Module
    size: tuple[int, ...] = ()
    if name in BUILTIN_NETWORKS:
        model, size = _builtin(name)
    elif folder.is_dir():
        model, size = _classifier(name, folder)
    elif ":" in name:
        model = _built(name, registry.own(name, kind="model"))
    else:
        raise InvalidInput(
            f"no network {name!r}: give {', '.join(BUILTIN_NETWORKS)}, the folder of an image classifier of"
            " transformers, or my_module:build, a function that returns a module"
        )
    size = tuple(input_size or size)
    if not size:
        raise InvalidInput(f"network {name!r} does not say how large its input is; give it, as --input 3x224x224")
    if weights is not None:
        _read_weights_(model, Path(weights).expanduser())
    require_finite(model)
    found = traced(model, input_size=size, name=name)
    return NetworkSource(
        name=name,
        model=model,
        network=found.network,
        refusals=found.refusals,
        digest=model_digest(model),
        folder=folder if folder.is_dir() else None,
    )


def _builtin(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """Return the network that one package builds, with the weights for ImageNet that another one has."""
    weights = BUILTIN_NETWORKS[name]()
    model: nn.Module = importlib.import_module(LITE).EfficientNet.from_name(name)
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return model.eval(), (3, _USUAL_SIDE, _USUAL_SIDE)


def _built(name: str, build: Callable[[], Any]) -> nn.Module:
    """Return the network that a user's function builds, ready to be evaluated."""
    try:
        model = build if isinstance(build, nn.Module) else build()
    except Exception as error:  # any of a user's own code
        raise InvalidInput(f"model {name!r} cannot be built: {reason_of(error)}") from error
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"model {name!r} is no torch.nn.Module and gives none, but {type(model).__name__}")
    return model.eval()


def _classifier(name: str, folder: Path) -> tuple[PreTrainedModel, tuple[int, ...]]:
    """Load an image classifier of transformers, a narrowed one by our own class, with the size of its input."""
    if not (folder / "config.json").is_file():
        hint = f"; give --model my_module:build --weights {name}" if (folder / RECORD).is_file() else ""
        raise InvalidInput(f"model {name!r} cannot be loaded: there is no config.json{hint}")
    try:
        config = from_pretrained(AutoConfig, folder)
        kind = _class_of(config)
        arguments: dict[str, Any] = {"dtype": exact_type(folder), "output_loading_info": True}
        model, report = from_pretrained(kind, folder, **arguments)
    except InvalidInput as error:
        raise InvalidInput(f"model {name!r} cannot be loaded: {error}") from error
    require_every_tensor(report, is_tied=False, source=f"model {name!r}")
    if hasattr(model.config, "auto_map"):  # names files of code, which are never run and not saved
        del model.config.auto_map
    side = getattr(config, "image_size", None) or _USUAL_SIDE
    sides = side if isinstance(side, list | tuple) else (side, side)
    return model.eval(), (getattr(config, "num_channels", 3), *sides)


def _class_of(config: PreTrainedConfig) -> Any:
    known = AutoModelForImageClassification._model_mapping
    if type(config) not in known:
        raise Unsupported(f"transformers has no image classifier of the type {config.model_type!r}")
    stock = known[type(config)]
    stock = stock[0] if isinstance(stock, tuple) else stock
    record = getattr(config, "narrowed", None)
    if record is None:
        return stock
    _require_plausible(record)
    return narrowed_class(stock)


def _read_weights_(model: nn.Module, folder: Path) -> None:
    _require_plausible(read_json(folder / RECORD))
    try:
        with errors_of_damaged_files():
            load_narrowed_(model, folder)
    except InvalidInput as error:
        raise InvalidInput(f"weights {str(folder)!r} are not of this network: {error}") from error


def _require_plausible(record: Any) -> None:
    """Raise InvalidInput for a record that is none, or has sizes that no network has."""
    shapes = record.get("tensors") if isinstance(record, Mapping) else None
    parts = (shapes, record.get("removed"), record.get("constants")) if isinstance(shapes, Mapping) else (None,)
    if any(part is None for part in parts):
        raise InvalidInput(f"the record of what is narrower is damaged: {record!r:.80}")
    for name, shape in (shapes or {}).items():
        if not isinstance(shape, list) or not all(type(one) is int and 0 < one <= MAX_WIDTH for one in shape):
            raise InvalidInput(f"the record of what is narrower is damaged: {name!r:.80} has the shape {shape!r:.80}")


def save_network(model: nn.Module, out: Path, *, source: Path | None = None) -> None:
    """Write the folder `out`, whole or not at all; `source` is the folder from which the dense network came.

    A model of transformers becomes a Hugging Face folder. Of any other network the tensors and the record are written,
    with the file whose `load_narrowed_` puts both into what the network's own code builds.
    """
    with written_aside(out) as folder:
        if isinstance(model, PreTrainedModel):
            model.save_pretrained(folder, max_shard_size="2GB")
        else:
            folder.mkdir()
            tensors = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
            save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
            write_json(folder / RECORD, record_of(model))
            narrowing = Path(convolutional.__file__).with_name("narrowing.py")
            shutil.copyfile(narrowing, folder / MODELLING_FILE)
        if source is not None and (source / _PREPROCESSING).is_file():
            shutil.copyfile(source / _PREPROCESSING, folder / _PREPROCESSING)
