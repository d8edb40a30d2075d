"""A model is loaded as its files have it, or refused: nothing of them is left out, and nothing invented, in silence.

transformers loads what its classes have a place for, and passes over the rest with a warning.
"""

import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors import safe_open
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from dilap.backends.llamacpp.gguf_header import GgufHeader, read_header
from dilap.core.codec import read_json
from dilap.core.errors import InvalidInput
from dilap.models.adapter import CONFIG
from dilap.models.anatomy import exported_tensors
from dilap.models.compute_device import HOST
from dilap.models.families import family_of
from dilap.models.families.family import has_tied_head, head_dim_of
from dilap.models.gguf_reader import QuickReader
from dilap.models.pretrained import errors_of_damaged_files

_HEAD = "lm_head.weight"
# A buffer that older versions of transformers saved and that is computed from the config.
_COMPUTED = ".rotary_emb.inv_freq"
_ROPE_FACTORS, _EMBEDDINGS = "rope_freqs.weight", "token_embd.weight"
# Keys of a GGUF file after its architecture's name: those that transformers reads, those that only repeat another one,
# and those that change nothing at the values given.
_READ = (
    *("context_length", "block_count", "embedding_length", "feed_forward_length", "attention.head_count"),
    *("attention.head_count_kv", "attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base"),
    *("vocab_size", "attention.key_length", "attention.value_length", "rope.scaling.attn_factor"),
)
# Of these, what transformers makes up where it is missing, and llama.cpp refuses to.
_NEEDED = ("context_length", "attention.head_count", "attention.layer_norm_rms_epsilon")
_NEUTRAL: Mapping[str, Collection[Any]] = {
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (1.0, 0.0),
    "rope.scale_linear": (1.0,),
    "rope.scaling.finetuned": (False, True),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "pooling_type": (0,),
    "tensor_data_layout": ("Meta AI original pth",),
}
# The types in which tensors of files are kept, by safetensors' names; nothing here computes in more than f32.
_TYPES = {"F64": torch.float32, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES_OF_TYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
# How Llama 3.1 and 3.2 scale their rotary frequencies.
_LLAMA3_FACTORS = (8.0, 32.0)
_LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def require_no_adapter(path: Path) -> None:
    """Raise InvalidInput for the folder of a LoRA adapter, and for one beside a whole model."""
    described = path / CONFIG
    if not described.is_file():
        return
    if not (path / "config.json").is_file():
        base = str(read_json(described).get("base_model_name_or_path"))
        raise InvalidInput(
            f"{path} holds an adapter of {base!r:.80} and no model: give that model, and --merge-adapter {path}"
        )
    raise InvalidInput(
        f"{path} holds a model and an adapter: move {CONFIG} and adapter_model.safetensors into a folder of their own, "
        "and give that folder with --merge-adapter to merge them"
    )


def tie_as_files_do_(model: PreTrainedModel, *, missing: Collection[str]) -> None:
    """Tie the head to the embedding where the files have no head, and let the config say whether it is tied."""
    if _HEAD in missing:
        model.config.tie_word_embeddings = True
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    model.config.tie_word_embeddings = has_tied_head(model)


def take_special_tokens_(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the configs of a model that was read from a GGUF file the special tokens of the file's tokenizer.

    transformers gives them those of its config class instead, whatever these are in the file's vocabulary.
    """
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        for config in (model.config, model.generation_config):
            setattr(config, name, getattr(tokenizer, name))


def require_every_tensor(report: Mapping[str, Any], *, is_tied: bool, source: str) -> None:
    """Raise InvalidInput, naming a tensor, where the model lacks one of the files or the files lack one of the model.

    `report` is transformers' loading report.
    """
    tied = {_HEAD} if is_tied else set()
    if missing := sorted(set(report["missing_keys"]) - tied):
        raise InvalidInput(f"{source}: tensor {missing[0]} is missing from its files, and its config asks for it")
    unread = sorted(one for one in report["unexpected_keys"] if not one.endswith(_COMPUTED))
    if unread:
        raise InvalidInput(
            f"{source}: its files have {_counted(unread)} that its config has no place for; mend the config (does it "
            "say that there is no bias?), or remove the tensor if it is not part of the model"
        )


def stored_tensors(folder: Path) -> dict[str, str]:
    """Return the types of all tensors in the files of a folder by their names; of a hub id, nothing is known."""
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with errors_of_damaged_files(), safe_open(path, framework="pt") as file:
            found |= {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (no mapping)
    for path in () if found else sorted(folder.glob("pytorch_model*.bin")):
        with errors_of_damaged_files():
            tensors = torch.load(path, map_location=HOST, weights_only=True, mmap=zipfile.is_zipfile(path))
            found |= {name: _NAMES_OF_TYPES.get(one.dtype, "") for name, one in tensors.items()}
    return found


def exact_type(folder: Path) -> torch.dtype | str:
    """Return the type in which all tensors of a folder's files are exact, or "auto" where there are no files.

    Otherwise transformers rounds all tensors to the type that the config names, or to that of the first tensor. 8-bit
    floats are exact in every other type.
    """
    types = set(stored_tensors(folder).values())
    wide = {_TYPES[one] for one in types if one in _TYPES}
    if not types:
        return "auto"
    return wide.pop() if len(wide) == 1 else torch.float32 if wide else torch.bfloat16


def require_generation_config(folder: Path, *, vocab_size: int) -> None:
    """Raise InvalidInput for a damaged generation_config.json, and for one that ends a text with what is no token.

    transformers passes over the first, and never looks at the second.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return
    said = read_json(path).get("eos_token_id")
    for one in said if isinstance(said, list) else [] if said is None else [said]:
        if type(one) is not int or not 0 <= one < vocab_size:
            raise InvalidInput(f"{path}: its eos_token_id {one!r:.40} is none of the model's {vocab_size} tokens")


def read_rest_of_config_(config: PreTrainedConfig, path: Path) -> None:
    """Give the config of a GGUF file what transformers passes over. Raises InvalidInput."""
    header, family = read_header(path), family_of(config)
    if _EMBEDDINGS not in header.shapes:
        raise InvalidInput(f"{path}: tensor {_EMBEDDINGS} is missing")
    for name in _NEEDED:
        if f"{header.metadata['general.architecture']}.{name}" not in header.metadata:
            raise InvalidInput(f"{path}: its key {name} is missing, without which the model is not known")
    config.vocab_size = header.shapes[_EMBEDDINGS][-1]  # few files say it in a key
    config.pad_token_id = None  # a class's own may be beyond the vocabulary (Phi-3); the tokenizer's is taken later
    prefix = f"{header.metadata['general.architecture']}."
    entries = {key.removeprefix(prefix): one for key, one in header.metadata.items() if key.startswith(prefix)}
    if own := set(family.gguf_tensors) & set(header.shapes):
        with errors_of_damaged_files():
            entries |= {one.name: one.data.tolist() for one in QuickReader(path).tensors if one.name in own}
    family.read_gguf_(config, entries)


def read_rest_of_gguf_(model: PreTrainedModel, path: Path) -> None:
    """Read what transformers passes over in a GGUF file. Raises InvalidInput, by name, for what cannot be read."""
    header = read_header(path)
    family = family_of(model.config)
    _require_keys_read(header, path, read={*_READ, *family.gguf_keys})
    if unread := sorted(set(header.shapes) - _gguf_names(model) - {_ROPE_FACTORS, *family.gguf_tensors}):
        raise InvalidInput(f"{path}: {_counted(unread)} of this file has no place in a {model.config.model_type} model")
    if _ROPE_FACTORS in header.shapes:
        with errors_of_damaged_files():
            _scale_rotary_(model, path, header)


def _require_keys_read(header: GgufHeader, path: Path, *, read: Collection[str]) -> None:
    architecture = header.metadata.get("general.architecture")
    for key, value in header.metadata.items():
        prefix, _, name = key.partition(".")
        if prefix != architecture or name in read:
            continue
        if value not in _NEUTRAL.get(name, ()):
            raise InvalidInput(
                f"{path}: its key {key} ({value!r:.40}) is not read, and the model would compute something else without"
            )


def _gguf_names(model: PreTrainedModel) -> set[str]:
    """Return the names that a model's tensors, and the parts of them that exporters write, have in a GGUF file."""
    own = model.config.model_type
    kind = {"mistral": "llama", "gemma3_text": "gemma3", "qwen3_moe": "qwen3moe"}.get(own, own)
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    names = gguf.get_tensor_name_map(number, model.config.num_hidden_layers)
    own_names = {*model.state_dict(), *exported_tensors(model)}
    found = (names.get_name(name, try_suffixes=(".weight", ".bias")) for name in own_names)
    return {one if one.endswith((".weight", ".bias")) else f"{one}.weight" for one in found if one is not None}


def _scale_rotary_(model: PreTrainedModel, path: Path, header: GgufHeader) -> None:
    """Give a model the rotary frequencies that the file's divisors make.

    They are those of Llama 3, or a table, which transformers has as longrope with equal tables for all lengths.
    """
    config, family = model.config, family_of(model.config)
    tensors = {one.name: one.data for one in QuickReader(path).tensors}
    factors = torch.tensor(tensors[_ROPE_FACTORS].astype("float32"))
    magnitude = float(header.metadata.get(f"{header.metadata['general.architecture']}.rope.scaling.attn_factor", 1.0))
    base = config.rope_parameters["rope_theta"]
    head_dim = head_dim_of(config)
    plain = torch.tensor([base ** (-2 * i / head_dim) for i in range(head_dim // 2)])
    table = {
        "rope_type": "longrope",
        "short_factor": factors.tolist(),
        "long_factor": factors.tolist(),
        "attention_factor": magnitude,
        "original_max_position_embeddings": config.max_position_embeddings,
    }
    named = [{**_LLAMA3, "factor": factor} for factor in _LLAMA3_FACTORS] if magnitude == 1.0 else []
    for parameters in (*named, table):
        config.rope_parameters = {"rope_theta": base, **parameters}
        rotary: Any = type(model.get_submodule(family.rotary))(config)
        if parameters is table or torch.allclose(rotary.inv_freq, plain / factors, rtol=1e-4):
            model.set_submodule(family.rotary, rotary.to(model.device))
            return


def _counted(names: list[str]) -> str:
    return f"tensor {names[0]}" + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")
