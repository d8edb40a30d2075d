"""Load networks that are no decoders, and write checkpoints of them."""

import functools
import importlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from dilap.core import registry
from dilap.core.bounds import MAX_WIDTH
from dilap.core.codec import read_json, write_json, written_aside
from dilap.core.errors import InvalidInput, Unavailable, Unsupported, reason_of
from dilap.core.images import ImageInput, Preprocessing
from dilap.core.network_input import NetworkInput, TokenInput, of_images
from dilap.models import convolutional
from dilap.models.anatomy import model_digest, require_finite
from dilap.models.builtin import BUILTIN_NETWORKS, LITE
from dilap.models.compute_device import HOST
from dilap.models.convolutional.encoders import LAYERS
from dilap.models.convolutional.narrowing import PREFIX, RECORD, TENSORS, load_narrowed_, narrowed_class, record_of
from dilap.models.convolutional.network import Traced, traced
from dilap.models.faithful import exact_type, require_every_tensor
from dilap.models.image_processor import CONFIG, read_preprocessing
from dilap.models.load import checkpoint_of
from dilap.models.network import Pooling, gives_embeddings, takes_tokens
from dilap.models.origin import Origin, note_origin_, origin_of
from dilap.models.pretrained import errors_of_damaged_files, from_pretrained

MODELLING_FILE = "modeling_narrowed.py"
_USUAL_SIDE = 224  # of images, where a config does not say it (ResNet, RegNet)
_USUAL_LENGTH = 128  # tokens of a text
_POOLING = "1_Pooling/config.json"  # sentence-transformers' file, and its names of what is known here
_POOLINGS: Mapping[str, Pooling] = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "first"}
_HEADS = ("pooler.", "cls.", "lm_head.")  # parts of encoders that make no embeddings of texts
# Files of an encoder of texts that say how texts become tokens and, to sentence-transformers, tokens an embedding.
_TEXT_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "merges.txt", "sentencepiece.bpe.model"),
    *("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", _POOLING),
)
# With it, 87 % of 500 photographs of ImageNet's classes are named rightly; with ImageNet's mean and deviation, 76 %.
_LITE_INPUT = ImageInput(
    channels=3,
    height=224,
    width=224,
    preprocessing=Preprocessing(resize=(256,), mean=(127.0,) * 3, std=(128.0,) * 3),
)


@dataclass(frozen=True, kw_only=True)
class NetworkSource:
    """A loaded network and what it takes; `notes` are what a reader must know of them.

    `folder` is where its files are, None for one that a function builds.
    """

    name: str
    model: nn.Module
    input: NetworkInput
    digest: str
    folder: Path | None = None
    notes: tuple[str, ...] = ()

    @property
    def image_input(self) -> ImageInput:
        """What it takes, as an image network. Raises InvalidInput for an encoder of texts."""
        return of_images(self.input, name=self.name)

    @property
    def tokenizer(self) -> Path | None:
        """The folder of the tokenizer of an encoder of texts."""
        return self.folder if isinstance(self.input, TokenInput) else None

    @property
    def origin(self) -> Origin:
        """Where it comes from: what its files say, or only its name."""
        return origin_of(self.model.config) if isinstance(self.model, PreTrainedModel) else Origin(name=self.name)

    @functools.cached_property
    def traced(self) -> Traced:
        """Its shape, found out when it is first asked for; see `dilap.models.convolutional.network.traced`."""
        return traced(self.model, input_size=self.input.size, name=self.name)


def load_network(
    name: str,
    *,
    input_: NetworkInput | None = None,
    processor: Path | None = None,
    weights: str | Path | None = None,
) -> NetworkSource:
    """Load a network.

    `name` is a built-in name, a Hugging Face folder of an image classifier or an encoder of texts, the folder of a run,
    or the `module:function` of a user that returns a module; this one is imported because it was named, and no other
    code is. What it takes is said by the folder `processor`, which has a preprocessor_config.json, or else by the model
    itself; `input_` is another size, and for a user's own, one of the two is needed. `weights` is the folder of a
    checkpoint that `save_network` wrote of a network that is no transformers class, and has the values and shapes that
    replace those of the named one. Raises InvalidInput, Unavailable, Unsupported.
    """
    folder = BUILTIN_NETWORKS[name]() if name in BUILTIN_NETWORKS else checkpoint_of(Path(name).expanduser())
    model, own, notes = _model(name, folder)
    if processor is not None:
        own, notes = _processed(processor), ()
    found = own if input_ is None else _asked_input(input_, own)
    if found is None:
        raise InvalidInput(f"network {name!r} does not say how large its input is; give it, as --input 3x224x224")
    if isinstance(found, TokenInput) != takes_tokens(model):
        raise InvalidInput(f"network {name!r} takes {'texts' if takes_tokens(model) else 'images'}, and not {found}")
    if weights is not None:
        _read_weights_(model, Path(weights).expanduser())
    require_finite(model)
    if isinstance(model, PreTrainedModel):
        _note_origin_(model, name, folder)
    return NetworkSource(
        name=name,
        model=model,
        input=found,
        digest=model_digest(model),
        folder=folder if folder.is_dir() else None,
        notes=notes,
    )


def _note_origin_(model: PreTrainedModel, name: str, folder: Path) -> None:
    """Let a model's config say where it comes from; a built-in one has its own name, and not that of its folder."""
    note_origin_(model.config, name, folder)
    if name in BUILTIN_NETWORKS:
        model.config.dilap_origin["name"] = name


def _model(name: str, folder: Path) -> tuple[nn.Module, NetworkInput | None, tuple[str, ...]]:
    """Return a model, what it takes, None where it does not say that, and notes."""
    if folder.is_dir():
        model = _transformer(name, folder)
        if takes_tokens(model):
            model.config.sentence_pooling = _pooling(folder)
            return model, TokenInput(length=min(_USUAL_LENGTH, model.config.max_position_embeddings)), ()
        return model, *_own_input(folder, model.config)
    if name in BUILTIN_NETWORKS:
        return _builtin(name, folder), _LITE_INPUT, ()
    if ":" in name:
        return _built(name, registry.own(name, kind="model")), None, ()
    raise InvalidInput(
        f"no network {name!r}: give {', '.join(BUILTIN_NETWORKS)}, the folder of an image classifier or an encoder of"
        " texts of transformers, or my_module:build, a function that returns a module"
    )


def _builtin(name: str, weights: Path) -> nn.Module:
    """Return the network that one package builds, with the weights for ImageNet that another one has."""
    model: nn.Module = importlib.import_module(LITE).EfficientNet.from_name(name)
    model.load_state_dict(torch.load(weights, map_location=HOST, weights_only=True))
    return model.eval()


def _asked_input(asked: NetworkInput, own: NetworkInput | None) -> NetworkInput:
    """Return the input that is asked for, with the preprocessing of the model's own one, in proportion."""
    if not isinstance(asked, ImageInput) or not isinstance(own, ImageInput):
        return asked
    if own.preprocessing is None or asked.preprocessing is not None or asked.channels != own.channels:
        return asked
    resize = tuple(round(side * asked.height / own.height) for side in own.preprocessing.resize)
    return replace(asked, preprocessing=replace(own.preprocessing, resize=resize))


def _processed(folder: Path) -> ImageInput:
    found = read_preprocessing(folder)
    if found is None:
        raise InvalidInput(f"{folder} has no {CONFIG}, which says how photographs become inputs")
    return found


def _own_input(folder: Path, config: PreTrainedConfig) -> tuple[ImageInput, tuple[str, ...]]:
    """Return what a classifier takes, by its image processor or else by its config, and notes of what is not known."""
    channels = getattr(config, "num_channels", 3)
    note = f"the model has no {CONFIG}: how photographs become its inputs is not known"
    try:
        found = read_preprocessing(folder, channels=channels)
    except (Unavailable, Unsupported) as error:
        found, note = None, f"how photographs become the model's inputs is not known: {error}"
    if found is not None:
        return found, ()
    side = getattr(config, "image_size", None) or _USUAL_SIDE
    height, width = side if isinstance(side, list | tuple) else (side, side)
    return ImageInput(channels=channels, height=height, width=width), (note,)


def _pooling(folder: Path) -> Pooling:
    """Return how an encoder makes one vector of those of a text's tokens: their mean where its folder does not say it.

    Raises Unsupported for another way.
    """
    if not (folder / _POOLING).is_file():
        return "mean"
    modes = sorted(name for name, used in read_json(folder / _POOLING).items() if used is True and "_mode_" in name)
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        found = " and ".join(modes) or "no mode"
        raise Unsupported(f"{folder / _POOLING} has {found}; what is known is {' or '.join(_POOLINGS)}")
    return _POOLINGS[modes[0]]


def _built(name: str, build: Callable[[], Any]) -> nn.Module:
    """Return the network that a user's function builds, ready to be evaluated."""
    try:
        model = build if isinstance(build, nn.Module) else build()
    except Exception as error:  # any of a user's own code
        raise InvalidInput(f"model {name!r} cannot be built: {reason_of(error)}") from error
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"model {name!r} is no torch.nn.Module and gives none, but {type(model).__name__}")
    return model.eval()


def _transformer(name: str, folder: Path) -> PreTrainedModel:
    """Load an image classifier or an encoder of texts of transformers, a narrowed one by our own class."""
    if not (folder / "config.json").is_file():
        hint = (
            f"; give my_module:build, which builds the network, with --weights {folder}"
            if (folder / RECORD).is_file()
            else ""
        )
        raise InvalidInput(f"model {name!r} cannot be loaded: there is no config.json{hint}")
    try:
        config = from_pretrained(AutoConfig, folder)
        kind = _class_of(config)
        arguments: dict[str, Any] = {"dtype": exact_type(folder), "output_loading_info": True}
        model, report = from_pretrained(kind, folder, **arguments)
    except InvalidInput as error:
        raise InvalidInput(f"model {name!r} cannot be loaded: {error}") from error
    if gives_embeddings(model):  # made without these
        report = {key: [one for one in names if not str(one).startswith(_HEADS)] for key, names in report.items()}
    require_every_tensor(report, is_tied=False, source=f"model {name!r}")
    if hasattr(model.config, "auto_map"):  # names files of code, which are never run and not saved
        del model.config.auto_map
    return model.eval()


def _class_of(config: PreTrainedConfig) -> Any:
    stock = _stock_class_of(config)
    record = getattr(config, "narrowed", None)
    if record is None:
        return stock
    _require_plausible(record)
    return narrowed_class(stock)


def _stock_class_of(config: PreTrainedConfig) -> Any:
    """Return the class of transformers that a config names, or of its type the one that the other tasks start from."""
    named = str(next(iter(config.architectures or ()), "")).removeprefix(PREFIX)
    kinds = [*_classes(MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, config)]
    plain = _classes(MODEL_MAPPING, config)
    if any(f"{one.__name__.removesuffix('Model')}Layer" in LAYERS for one in plain) and not kinds:
        kinds = [*plain, *_classes(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, config)]
    if not kinds:
        raise Unsupported(
            f"transformers has no image classifier of the type {config.model_type!r}, and it is no encoder of texts"
            " that can be cut"
        )
    return next((one for one in kinds if one.__name__ == named), kinds[0])


def _classes(known: Any, config: PreTrainedConfig) -> tuple[Any, ...]:
    """Return the classes that a mapping of transformers has for the type of a config."""
    if type(config) not in known:
        return ()
    found = known[type(config)]
    return found if isinstance(found, tuple) else (found,)


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
        for name in (CONFIG, *_TEXT_FILES):
            if source is not None and (source / name).is_file():
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(source / name, folder / name)
