"""Errors of libraries as one line that says what was wrong."""

import json
from pathlib import Path
from typing import Any

import pytest

from dilap.core.errors import DilapError, InvalidInput, Unsupported, reason_of
from dilap.models.load import load


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (KeyError("su"), "KeyError: there is no 'su'"),
        (KeyError("keys are missing: {'factor'}"), "KeyError: keys are missing: {'factor'}"),
        (ValueError("a heading:\n  the cause"), "ValueError: a heading: the cause"),
        (ValueError("\n\nthe cause\n"), "ValueError: the cause"),
        (RuntimeError(), "RuntimeError"),
        (FileNotFoundError(2, "No such file", "a.txt"), "FileNotFoundError: [Errno 2] No such file: 'a.txt'"),
        (InvalidInput("what was wrong"), "what was wrong"),
    ],
)
def test_reason_is_one_line_with_the_cause(error: Exception, reason: str) -> None:
    assert reason_of(error) == reason


def test_reason_of_a_long_text_is_cut() -> None:
    assert len(reason_of(ValueError("x" * 10_000))) < 500


def changed(checkpoint: Path, **values: Any) -> str:
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return str(checkpoint)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        (
            "vocab_size",
            600,
            "tensor lm_head.weight is 300 x 64 in its files, and 600 x 64 by its config (vocab_size 600)",
        ),
        ("intermediate_size", 7, "is 64 x 96 in its files, and 64 x 7 by its config (intermediate_size 7)"),
        ("num_key_value_heads", 4, "self_attn.k_proj.weight is 32 x 64 in its files, and 64 x 64 by its config"),
        ("num_hidden_layers", 9, "tensor model.layers.3.input_layernorm.weight is missing from its files"),
        ("num_attention_heads", 3, "The hidden size (64) is not a multiple of the number of attention heads (3)"),
        ("num_attention_heads", "4", "num_attention_heads is no whole number but '4'"),
        ("dtype", "float99", "module 'torch' has no attribute 'float99'"),
        ("rope_parameters", {"rope_type": "yarn"}, "Missing required keys in `rope_parameters` for 'rope_type'='yarn'"),
    ],
)
def test_wrong_config_is_told_with_its_numbers(checkpoint: Path, key: str, value: Any, words: str) -> None:
    name = changed(checkpoint, **{key: value})
    with pytest.raises(InvalidInput) as caught:
        load(name)
    assert str(caught.value).startswith(f"model {name!r}")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        (
            "rope_parameters",
            {"rope_type": "su", "rope_theta": 1e4},
            "rotary embedding 'su'; transformers knows default",
        ),
        ("rope_scaling", {"type": "su", "factor": 2.0}, "rotary embedding 'su'; transformers knows default"),
        ("hidden_act", "sillu", "activation 'sillu'; transformers knows gelu"),
    ],
)
def test_unknown_function_of_a_config_is_told_with_the_known_ones(
    checkpoint: Path, key: str, value: Any, words: str
) -> None:
    with pytest.raises(Unsupported) as caught:
        load(changed(checkpoint, **{key: value}))
    assert words in str(caught.value)


def test_damaged_weights_are_told_in_one_line(checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(DilapError) as caught:
        load(str(checkpoint))
    assert "\n" not in str(caught.value)
    assert "SafetensorError" in str(caught.value)
