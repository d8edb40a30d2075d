"""A checkpoint's entries by the names that transformers 4 gave them, beside those of transformers 5.

transformers 4.57 passes over `rope_parameters` without a word and computes with a rotary base of 10000 and no scaling.
transformers 5 reads the older names as well, and writes neither them nor a tokenizer class that version 4 knows.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dilap.models.modeling_dilap import NEEDS_CODE


def add_older_names(folder: Path) -> None:
    """Add the older names to config.json and tokenizer_config.json of a checkpoint that transformers wrote."""
    _rewrite(folder / "config.json", _older_config)
    _rewrite(folder / "tokenizer_config.json", _older_tokenizer)


def _rewrite(path: Path, older: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Add what `older` returns to a JSON file, in the layout that transformers gives it; no file is no error."""
    if path.is_file():
        document = json.loads(path.read_text(encoding="utf-8"))
        text = json.dumps(document | older(document), indent=2, sort_keys=True, ensure_ascii=False)
        path.write_text(f"{text}\n", encoding="utf-8")


def _older_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the type of the weights, the rotary embedding and the number of experts by their older names.

    Beside them stands what makes a stock class say why it cannot build a model that comes with code of its own.
    """
    older = {"torch_dtype": config["dtype"]} if "dtype" in config else {}
    rope = dict(config.get("rope_parameters") or {})
    if "full_attention" in rope:  # one for each of two kinds of layers (Gemma 3)
        older["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = dict(rope["full_attention"])
    if rope:
        for name in ("rope_theta", "partial_rotary_factor"):
            if name in rope:
                older[name] = rope.pop(name)
        older["rope_scaling"] = None if rope["rope_type"] == "default" else rope
        if older["rope_scaling"] and config["model_type"] == "phi3":
            older["rope_scaling"] = _older_phi3_scaling(rope)
    if "num_local_experts" in config:
        older["num_experts"] = config["num_local_experts"]
    if "auto_map" in config:
        older["attn_implementation"] = NEEDS_CODE
    return older


def _older_phi3_scaling(rope: dict[str, Any]) -> dict[str, Any]:
    """Return Phi-3's scaling by the names that its older class asks for; others are beside it in the config."""
    beside = ("rope_type", "type", "original_max_position_embeddings")
    return {"type": rope["rope_type"], **{name: value for name, value in rope.items() if name not in beside}}


def _older_tokenizer(config: dict[str, Any]) -> dict[str, Any]:
    """Return the older name of the class that is what tokenizer.json says; transformers 5 knows both."""
    is_plain = config.get("tokenizer_class") == "TokenizersBackend"
    return {"tokenizer_class": "PreTrainedTokenizerFast"} if is_plain else {}
