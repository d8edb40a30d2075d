"""A turned model computes what the model computes, with other weights."""

from pathlib import Path

import pytest
import torch
from standins.models import random_tokens, tiny_model
from torch.testing import assert_close

from dilap.core.errors import Unsupported
from dilap.models.anatomy import decoder_layers
from tools.turned_model import turn_

TOKENS = random_tokens(2, 20)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}])
def test_a_turned_llama_gives_the_same_logits(changes: dict[str, bool]) -> None:
    model = tiny_model("llama", **changes)
    with torch.no_grad():
        expected = model(TOKENS).logits
        turn_(model)
        found = model(TOKENS).logits
    assert_close(found, expected, rtol=1e-4, atol=1e-4)  # sums in f32 of other numbers


def test_every_matrix_is_another_one() -> None:
    plain, turned = tiny_model("llama"), tiny_model("llama")
    turn_(turned)
    pairs = zip(plain.named_parameters(), turned.parameters(), strict=True)
    assert not [name for (name, old), new in pairs if old.dim() > 1 and torch.equal(old, new)]


def test_a_turned_model_is_the_same_after_it_was_saved(tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    turn_(model)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_norms_have_no_gains_left() -> None:
    model = tiny_model("llama")
    turn_(model)
    norms = [one for name, one in decoder_layers(model).named_parameters() if "layernorm" in name]
    assert norms
    assert all(bool((one == 1).all()) for one in norms)


def test_another_family_is_refused() -> None:
    with pytest.raises(Unsupported, match="qwen2"):
        turn_(tiny_model("qwen2"))
