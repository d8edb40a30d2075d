"""A checkpoint's entries by the names that transformers 4 gave them, beside those of transformers 5.

transformers 4.57 passes over `rope_parameters` without a word and computes with a rotary base of 10000 and no scaling.
transformers 5 reads the older names as well, and writes neither them nor a tokenizer class that version 4 knows.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


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
    """Return the type of the weights and the rotary embedding by their older names."""
    older = {"torch_dtype": config["dtype"]}
    rope = dict(config.get("rope_parameters") or {})
    if "full_attention" in rope:  # one for each of two kinds of layers (Gemma 3)
        older["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = dict(rope["full_attention"])
    if rope:
        older["rope_theta"] = rope.pop("rope_theta")
        older["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    return older


def _older_tokenizer(config: dict[str, Any]) -> dict[str, Any]:
    """Return the older name of the class that is what tokenizer.json says; transformers 5 knows both."""
    is_plain = config.get("tokenizer_class") == "TokenizersBackend"
    return {"tokenizer_class": "PreTrainedTokenizerFast"} if is_plain else {}
