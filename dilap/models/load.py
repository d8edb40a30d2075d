"""Load models from a name, a local folder, a GGUF file or a hub id, and write checkpoints."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import cached_file

from dilap.backends.llamacpp.gguf_header import read_header
from dilap.core.codec import written_aside
from dilap.core.errors import InvalidInput, Unavailable, Unsupported
from dilap.models.anatomy import model_digest, require_finite
from dilap.models.builtin import DEFAULT_MODEL, builtin_model
from dilap.models.families import family_of
from dilap.models.modeling_dilap import pruned_class
from dilap.models.pretrained import from_pretrained


@dataclass(frozen=True, kw_only=True)
class Source:
    """A loaded model. `tokenizer_path` is the folder or GGUF file from which exporters take the tokenizer."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    tokenizer_path: Path
    digest: str


def load(name: str) -> Source:
    """Load a model and its tokenizer, in the precision that its files have (a GGUF file is dequantised to f32).

    Raises InvalidInput where the files are damaged or there is no such model, Unavailable where the model cannot be
    fetched, Unsupported where the architecture is not known.
    """
    _quiet_transformers()
    path = builtin_model() if name == DEFAULT_MODEL else checkpoint_of(Path(name))
    if path.is_file():
        arguments: dict[str, Any] = {"gguf_file": path.name, "dtype": torch.float32}
        folder, tokenizer_path = path.parent, path
    elif path.is_dir() or _looks_like_hub_id(name):
        arguments = {"dtype": "auto"}
        folder, tokenizer_path = path, path
    else:
        raise InvalidInput(
            f"no model {name!r}: give {DEFAULT_MODEL}, a folder with config.json, a .gguf file or a hub id (user/model)"
        )
    model, tokenizer = _read(name, str(folder), arguments)
    require_finite(model)
    if not tokenizer_path.exists():  # a hub id: its files are in the hub's local cache by now
        tokenizer_path = Path(cached_file(name, "tokenizer_config.json")).parent
    return Source(
        name=name, model=model, tokenizer=tokenizer, tokenizer_path=tokenizer_path, digest=model_digest(model)
    )


def checkpoint_of(path: Path) -> Path:
    """Return the checkpoint inside `path` if `path` is the folder of a run, else `path` itself."""
    inside = path / "checkpoint"
    is_run = not (path / "config.json").exists() and (inside / "config.json").is_file()
    return inside if is_run else path


def _read(name: str, folder: str, arguments: dict[str, Any]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    # A checkpoint's own code is never run: pruned checkpoints load with the classes that their code is a copy of.
    keep = {key: value for key, value in arguments.items() if key != "dtype"}
    try:
        config = from_pretrained(AutoConfig, folder, **keep)
        family_of(config)  # raises clear errors, before gigabytes are read
        _require_known_functions(config, name=name)
        tokenizer = load_tokenizer(folder, **keep)
        pruned = getattr(config, "layer_widths", None)
        loader = _pruned_class_of(config) if pruned else AutoModelForCausalLM
        # Tensors of wrong sizes are reported below: the loader's own error does not name them.
        arguments |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, report = from_pretrained(loader, folder, **arguments)
    except InvalidInput as error:
        kind = InvalidInput if Path(folder).is_dir() else Unavailable
        raise kind(f"model {name!r} cannot be loaded: {error}") from error
    for tensor, found, wanted in sorted(report["mismatched_keys"]):
        raise InvalidInput(f"model {name!r}: {_words_of_sizes(tensor, found, wanted, config)}")
    if missing := sorted(report["missing_keys"]):
        raise InvalidInput(f"model {name!r}: tensor {missing[0]} is missing from its files, and its config asks for it")
    # The GGUF reader leaves these attributes; a dequantised model that has them refuses to be saved.
    for owner, attribute in ((model.config, "quantization_config"), (model, "hf_quantizer"), (model, "is_quantized")):
        if hasattr(owner, attribute):
            delattr(owner, attribute)
    return model.eval(), tokenizer


def _pruned_class_of(config: PreTrainedConfig) -> Any:
    """Return the class that builds a model with the config's widths."""
    config.module_paths = family_of(config).module_paths()  # checkpoints of earlier versions lack them
    return pruned_class(AutoModelForCausalLM._model_mapping[type(config)])


def load_tokenizer(folder: str | Path, *, gguf_file: str | None = None, **arguments: Any) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder, a hub id or a GGUF file in `folder`. Raises InvalidInput.

    The pre-tokenizer of SmolLM's GGUF files is repaired: transformers reads it without the rule that every digit is a
    token of its own.
    """
    tokenizer: PreTrainedTokenizerBase = from_pretrained(AutoTokenizer, folder, gguf_file=gguf_file, **arguments)
    metadata = {} if gguf_file is None else read_header(Path(folder) / gguf_file).metadata
    if metadata.get("tokenizer.ggml.pre") == "smollm":
        parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    return tokenizer


def _looks_like_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def _require_known_functions(config: PreTrainedConfig, *, name: str) -> None:
    """Raise Unsupported for a rotary embedding or an activation whose name transformers does not know."""
    rope = getattr(config, "rope_parameters", None) or {}
    activation = getattr(config, "hidden_act", None) or getattr(config, "activation_function", None)
    for kind, asked, known in (
        ("rotary embedding", rope.get("rope_type", "default"), ["default", *ROPE_INIT_FUNCTIONS]),
        ("activation", activation, list(ACT2FN)),
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
