"""Where models come from: a name, a local folder, a GGUF file or a hub id; and how checkpoints are written."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from gguf import GGUFReader
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from dilap.anatomy import family_of, model_digest, require_finite
from dilap.builtin import DEFAULT_MODEL, builtin_model
from dilap.codec import written_aside
from dilap.errors import DilapError, InvalidInput, Unavailable
from dilap.modeling_dilap import PRUNED_CLASSES


@dataclass(frozen=True, kw_only=True)
class Source:
    """A loaded model. `tokenizer_path` is the folder or GGUF file that exporters take the tokenizer from."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    tokenizer_path: Path
    digest: str


def load(name: str) -> Source:
    """Load a model and its tokenizer, in the precision that its files have (a GGUF file is dequantised to f32).

    Raises InvalidInput where the files are damaged or there is no such model, Unavailable where the model cannot be
    fetched, Unsupported where no adapter knows the architecture.
    """
    _quiet_transformers()
    path = builtin_model() if name == DEFAULT_MODEL else Path(name)
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


def _read(name: str, folder: str, arguments: dict[str, Any]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    # A checkpoint's own code is never run: pruned checkpoints load with the classes that their code is a copy of.
    arguments = {**arguments, "trust_remote_code": False}
    keep = {key: value for key, value in arguments.items() if key != "dtype"}
    try:
        config = AutoConfig.from_pretrained(folder, **keep)
        family_of(config)  # the clear error, before gigabytes are read
        tokenizer = load_tokenizer(folder, **keep)
        pruned = getattr(config, "layer_widths", None)
        loader = PRUNED_CLASSES[config.model_type] if pruned else AutoModelForCausalLM
        model, report = loader.from_pretrained(folder, output_loading_info=True, **arguments)
    except DilapError:
        raise
    except Exception as error:  # the loaders raise dozens of types for damaged files
        kind = InvalidInput if Path(folder).is_dir() else Unavailable
        raise kind(f"model {name!r} cannot be loaded: {_first_line(error)}") from error
    wrong = [*report["missing_keys"], *(key[0] for key in report["mismatched_keys"])]
    if wrong:
        raise InvalidInput(f"model {name!r}: tensor {sorted(wrong)[0]} is missing or has a wrong shape")
    # Left by the GGUF reader; with them a dequantised model refuses to be saved.
    for owner, attribute in ((model.config, "quantization_config"), (model, "hf_quantizer"), (model, "is_quantized")):
        if hasattr(owner, attribute):
            delattr(owner, attribute)
    return model.eval(), tokenizer


def load_tokenizer(folder: str | Path, *, gguf_file: str | None = None, **arguments: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, a hub id or a GGUF file in `folder`, which is split as its pre-tokenizer says:
    transformers reads SmolLM's without the rule that digits stand alone. Raises what transformers raises."""
    arguments = arguments if gguf_file is None else {**arguments, "gguf_file": gguf_file}
    tokenizer = AutoTokenizer.from_pretrained(folder, **arguments)
    if gguf_file is not None:
        field = GGUFReader(Path(folder) / gguf_file).fields.get("tokenizer.ggml.pre")
        if field is not None and field.contents() == "smollm":
            parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    return tokenizer


def _looks_like_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


def _quiet_transformers() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("transformers.modeling_gguf_pytorch_utils").setLevel(logging.ERROR)


def save_checkpoint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Write the Hugging Face folder `out`, whole or not at all; large models in shards of 2 GB."""
    with written_aside(out) as folder:
        model.save_pretrained(folder, max_shard_size="2GB")
        tokenizer.save_pretrained(folder)
