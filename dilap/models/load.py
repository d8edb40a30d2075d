"""Load models from a name, a local folder, a GGUF file or a hub id, and write checkpoints."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import cached_file

from dilap.core.codec import read_json, written_aside
from dilap.core.errors import InvalidInput, Unavailable, Unsupported
from dilap.core.shape import Architecture
from dilap.models.adapter import merge_adapter_
from dilap.models.anatomy import architecture_of, model_digest, require_finite
from dilap.models.builtin import BUILTIN_MODELS, builtin_model
from dilap.models.compute_device import AUTO, HOST, compute_device
from dilap.models.faithful import (
    exact_type,
    read_rest_of_config_,
    read_rest_of_gguf_,
    require_every_tensor,
    require_generation_config,
    require_no_adapter,
    stored_tensors,
    take_special_tokens_,
    tie_as_files_do_,
)
from dilap.models.families import family_of, require_class
from dilap.models.families.family import has_tied_head
from dilap.models.gguf_tokenizer import read_gguf_tokenizer
from dilap.models.modeling_dilap import pruned_class
from dilap.models.older_names import add_older_names
from dilap.models.origin import note_origin_
from dilap.models.pretrained import errors_of_damaged_files, from_pretrained
from dilap.models.text_samples import SAMPLES
from dilap.models.unembedded import Embedded, embedded
from dilap.models.vocabulary import Vocabulary, cut_vocabulary_, require_cuttable


@dataclass(frozen=True, kw_only=True)
class Source:
    """A loaded model. `tokenizer_path` is the folder or GGUF file from which exporters take the tokenizer.

    `merge_adapter` is the folder of the adapter that is part of the model, None for most; `vocabulary` what is left of
    its tokens, None where all are; `embedded` is the tokenizer where some of its own tokens have no embedding.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    tokenizer_path: Path
    digest: str
    merge_adapter: str | None = None
    vocabulary: Vocabulary | None = None
    embedded: Embedded | None = None

    @property
    def notes(self) -> Sequence[str]:
        """What a reader must know of the model."""
        of_tokens = () if self.embedded is None else (self.embedded.note,)
        return (*of_tokens, *(() if self.vocabulary is None else self.vocabulary.facts.notes))


def load(
    name: str,
    *,
    tokenizer: Path | None = None,
    merge_adapter: str | Path | None = None,
    vocabulary: str | Path | None = None,
    compute: str = AUTO,
) -> Source:
    """Load a model and its tokenizer, in the precision that its files have (a GGUF file is dequantised to f32).

    `compute` is the device on which it is put, as `dilap.models.compute_device` takes it, and so computed with.

    `tokenizer` is the folder or GGUF file of the tokenizer, by default the model's own. `merge_adapter` is the folder
    of a LoRA adapter that is added to the weights: the model, and so its digest, is then the merged one. `vocabulary`
    is a text, as `dilap.models.text_files.read_text` takes it: the model, and so its digest, then has only the tokens
    that this text needs. Raises InvalidInput where the files are damaged or there is no such model or device,
    Unavailable where the model cannot be fetched, Unsupported where the architecture is not known.
    """
    device = compute_device(compute)
    _quiet_transformers()
    folder, tokenizer_path, arguments = _place(name)
    if device != HOST:
        arguments["device_map"] = device  # one tensor after another is put there
    config = _config(name, str(folder), arguments)
    words = _tokenizer(name, tokenizer or tokenizer_path)  # before gigabytes are read
    if vocabulary is not None:
        require_cuttable(words, str(vocabulary))
    model = _model(name, str(folder), config, arguments)
    if merge_adapter is not None:
        merge_adapter_(model, Path(merge_adapter).expanduser())
    require_finite(model)
    if "gguf_file" in arguments:
        take_special_tokens_(model, words)
    if tokenizer is not None:
        tokenizer_path = tokenizer
    elif not tokenizer_path.exists():  # a hub id: its files are in the hub's local cache by now
        tokenizer_path = Path(cached_file(name, "tokenizer_config.json")).parent
    with _errors_of(name, str(folder)):
        fitted = embedded(words, rows=model.get_input_embeddings().weight.shape[0])
    if fitted is not None:
        words, tokenizer_path = fitted.tokenizer, fitted.folder.path
    cut = None if vocabulary is None else cut_vocabulary_(model, words, str(vocabulary))
    note_origin_(model.config, name, folder / arguments.get("gguf_file", ""))
    return Source(
        name=name,
        model=model,
        tokenizer=words if cut is None else cut.tokenizer,
        tokenizer_path=tokenizer_path if cut is None else cut.folder.path,
        digest=model_digest(model),
        merge_adapter=None if merge_adapter is None else str(merge_adapter),
        vocabulary=cut,
        embedded=fitted,
    )


def shape_of(name: str) -> tuple[Architecture, int]:
    """Return the shape of a model, and the bytes of one weight as `load` would load it, without reading any weights.

    Raises what `load` raises for a name or a config.
    """
    _quiet_transformers()
    folder, _, arguments = _place(name)
    config = _config(name, str(folder), arguments)
    found = arguments.get("dtype") or exact_type(folder)
    dtype = found if isinstance(found, torch.dtype) else getattr(config, "dtype", None) or torch.float32
    with torch.device("meta"), _errors_of(name, str(folder)), errors_of_damaged_files():
        is_pruned = getattr(config, "layer_widths", None)
        model = _pruned_class_of(config)(config) if is_pruned else AutoModelForCausalLM.from_config(config)
    return architecture_of(model), dtype.itemsize


def require_model(name: str) -> None:
    """Raise InvalidInput where no model can be of that name, before another one is worked on for hours."""
    _place(name)


def is_mapped(name: str) -> bool:
    """Return whether the weights of a model stay in its files, where the host computes.

    The system then reads them as they are needed, and forgets them where memory is short. Those of a GGUF file are
    dequantised, and need memory of their own.
    """
    return "gguf_file" not in _place(name)[2]


def _place(name: str) -> tuple[Path, Path, dict[str, Any]]:
    """Return the folder of a model, the path of its tokenizer, and how its files are read. Raises InvalidInput."""
    path = builtin_model(name) if name in BUILTIN_MODELS else checkpoint_of(Path(name))
    require_no_adapter(path)
    if path.is_file():
        return path.parent, path, {"gguf_file": path.name, "dtype": torch.float32}
    if path.is_dir() or _looks_like_hub_id(name):
        return path, path, {}
    raise InvalidInput(
        f"no model {name!r}: give {', '.join(BUILTIN_MODELS)}, a folder with config.json, a .gguf file or a hub id "
        "(user/model)"
    )


def checkpoint_of(path: Path) -> Path:
    """Return the checkpoint inside `path` if `path` is the folder of a run, else `path` itself."""
    inside = path / "checkpoint"
    is_run = not (path / "config.json").exists() and (inside / "config.json").is_file()
    return inside if is_run else path


def _tokenizer(name: str, place: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder, a hub id or a GGUF file. Raises InvalidInput, Unavailable for a hub id."""
    folder, gguf_file = (place.parent, place.name) if place.is_file() else (place, None)
    with _errors_of(name, str(folder)):
        return load_tokenizer(folder, gguf_file=gguf_file)


@contextmanager
def _errors_of(name: str, folder: str) -> Iterator[None]:
    """Let errors say which model it is; those of a hub id are Unavailable, because it may only be out of reach."""
    try:
        yield
    except InvalidInput as error:
        if Path(folder).is_dir():
            raise InvalidInput(f"model {name!r} cannot be loaded: {error}") from error
        raise Unavailable(f"there is no folder {name!r} here, and as a hub id it cannot be loaded: {error}") from error


def _config(name: str, folder: str, arguments: Mapping[str, Any]) -> PreTrainedConfig:
    """Load the config. Raises Unsupported, before gigabytes are read, for a family or function that is not known."""
    with _errors_of(name, folder):
        described = Path(folder) / "config.json"
        if "gguf_file" not in arguments and described.is_file():
            require_class(read_json(described), stored_tensors(Path(folder)))
        config = from_pretrained(AutoConfig, folder, gguf_file=arguments.get("gguf_file"))
        family_of(config)
        if "gguf_file" in arguments:
            read_rest_of_config_(config, Path(folder) / arguments["gguf_file"])
        _require_known_functions(config, name=name)
    return config


def _model(name: str, folder: str, config: PreTrainedConfig, arguments: dict[str, Any]) -> PreTrainedModel:
    # A checkpoint's own code is never run: pruned checkpoints load with the classes that their code is a copy of.
    loader = _pruned_class_of(config) if getattr(config, "layer_widths", None) else AutoModelForCausalLM
    with _errors_of(name, folder):
        arguments.setdefault("dtype", exact_type(Path(folder)))
        if "gguf_file" in arguments:
            arguments["config"] = config
        # Tensors of wrong sizes are reported below: the loader's own error does not name them.
        arguments |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, report = from_pretrained(loader, folder, **arguments)
    for tensor, found, wanted in sorted(report["mismatched_keys"]):
        raise InvalidInput(f"model {name!r}: {_words_of_sizes(tensor, found, wanted, config)}")
    tie_as_files_do_(model, missing=report["missing_keys"])
    if "gguf_file" not in arguments:
        require_generation_config(Path(folder), vocab_size=model.get_input_embeddings().weight.shape[0])
    require_every_tensor(report, is_tied=has_tied_head(model), source=f"model {name!r}")
    if "gguf_file" in arguments:
        read_rest_of_gguf_(model, Path(folder) / arguments["gguf_file"])
    # The GGUF reader leaves the first three; a dequantised model that has them refuses to be saved. The last names
    # files of code, which are never run and not saved.
    stale = ((model.config, "quantization_config"), (model, "hf_quantizer"), (model, "is_quantized"))
    for owner, attribute in (*stale, (model.config, "auto_map")):
        if hasattr(owner, attribute):
            delattr(owner, attribute)
    return model.eval()


def _pruned_class_of(config: PreTrainedConfig) -> Any:
    """Return the class that builds a model with the config's widths."""
    config.module_paths = family_of(config).module_paths()  # checkpoints of earlier versions lack them
    return pruned_class(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])


def load_tokenizer(folder: str | Path, *, gguf_file: str | None = None, **arguments: Any) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder, a hub id or a GGUF file in `folder`. Raises InvalidInput."""
    if gguf_file is not None:
        return read_gguf_tokenizer(Path(folder) / gguf_file)
    tokenizer: PreTrainedTokenizerBase = from_pretrained(AutoTokenizer, folder, **arguments)
    tokenizer.init_kwargs.pop("auto_map", None)  # names files of code, which are never run and not saved
    described = Path(folder) / "tokenizer.json"
    if described.is_file() and _first_differing(tokenizer, described):
        # Some classes of transformers 5 make the split of their family again and drop the file's own.
        tokenizer = from_pretrained(PreTrainedTokenizerFast, folder, **arguments)
        if text := _first_differing(tokenizer, described):
            raise InvalidInput(f"{described}: transformers splits {text!r} in another way than the file says")
    return tokenizer


def _first_differing(tokenizer: PreTrainedTokenizerBase, described: Path) -> str:
    """Return the first sample that a tokenizer splits in another way than its file says; empty for none."""
    with errors_of_damaged_files():
        file = Tokenizer.from_file(str(described))
        file.no_padding()  # which some files ask for, up to a length
        file.no_truncation()
    for text in SAMPLES:
        if tokenizer(text, add_special_tokens=False)["input_ids"] != file.encode(text, add_special_tokens=False).ids:
            return text
    return ""


def _looks_like_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def _require_known_functions(config: PreTrainedConfig, *, name: str) -> None:
    """Raise Unsupported for a rotary embedding or an activation whose name transformers does not know."""
    rope = getattr(config, "rope_parameters", None) or {}
    ropes = [one for one in rope.values() if isinstance(one, Mapping)] or [rope]  # one for every kind of layer, or one
    for kind, asked, known in (
        *(("rotary embedding", one.get("rope_type", "default"), ["default", *ROPE_INIT_FUNCTIONS]) for one in ropes),
        ("activation", getattr(config, family_of(config).activation), list(ACT2FN)),
    ):
        if asked not in known:
            raise Unsupported(
                f"model {name!r}: its config names the {kind} {asked!r}; transformers knows {', '.join(sorted(known))}"
            )


def _words_of_sizes(tensor: str, found: Sequence[int], wanted: Sequence[int], config: PreTrainedConfig) -> str:
    """Return a sentence that a tensor's size is not the config's, with the config's entries that give that size."""
    numbers = [size for size, other in zip(wanted, found, strict=False) if size != other]
    names = [f"{key} {value}" for key, value in config.to_dict().items() if type(value) is int and value in numbers]
    says = f" ({', '.join(names)})" if names else ""
    return f"tensor {tensor} is {_times(found)} in its files, and {_times(wanted)} by its config{says}"


def _times(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _quiet_transformers() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("transformers.modeling_gguf_pytorch_utils").setLevel(logging.ERROR)


def save_checkpoint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Write the Hugging Face folder `out`, whole or not at all; large models in shards of 2 GB."""
    with written_aside(out) as folder:
        model.save_pretrained(folder, max_shard_size="2GB")
        tokenizer.save_pretrained(folder)
        add_older_names(folder)
