"""Encoders of texts: what can go in them, and that the shrunk one computes what the masked one does."""

from typing import Any

import pytest
import torch
from standins.encoders import ENCODERS, encoder, output, shape, shape_of, texts
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from dilap.core.graph import Network
from dilap.core.plan import Plan, full_plan
from dilap.models.convolutional.cut import shrink_network_
from dilap.models.convolutional.proof import halves, masked_, without
from dilap.models.network import outputs_of

# Another number of heads and channels in every layer.
UNEQUAL = {
    "encoder.layer.0.heads": (1, 3),
    "encoder.layer.0.channels": (0, 5, 40),
    "encoder.layer.1.heads": (0, 1, 2),
    "encoder.layer.1.channels": tuple(range(30)),
}


def plan(shape: Network, kept: dict[str, tuple[int, ...]]) -> Plan[Network]:
    return Plan(base="", architecture=shape, kept=full_plan(shape, base="").kept | kept)


def unequal(name: str) -> dict[str, tuple[int, ...]]:
    prefix = "bert." if name == "classifier" else ""
    return {f"{prefix}{group}": units for group, units in UNEQUAL.items()}


@pytest.mark.parametrize("name", ENCODERS)
def test_heads_and_channels_of_every_layer_are_groups(name: str) -> None:
    assert {group.name: group.num_units for group in shape(name).groups} == {
        group: 4 if group.endswith("heads") else 48 for group in unequal(name)
    }


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("cut", ["unequal", "branches"])
def test_a_shrunk_encoder_equals_the_masked_one(name: str, cut: str) -> None:
    kept = unequal(name) if cut == "unequal" else without(shape(name), shape(name).branches)
    expected = output(masked_(encoder(name), shape(name), kept))
    assert_close(output(shrink_network_(encoder(name), plan(shape(name), kept))), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(output(encoder(name)), expected, atol=1e-3)


def test_a_shrunk_encoder_has_the_shape_of_its_plan_and_is_shrunk_again() -> None:
    made = plan(shape(), unequal("bert"))
    shrunk = shrink_network_(encoder(), made)
    assert shape_of(shrunk) == made.pruned_architecture()
    again: Any = shrink_network_(shrunk, plan(shape_of(shrunk), halves(shape_of(shrunk))))
    assert again.encoder.layer[0].attention.self.query.out_features == 8


@pytest.mark.parametrize("name", ENCODERS)
def test_flops_are_those_torch_counts(name: str) -> None:
    model = encoder(name)
    model.set_attn_implementation("eager")  # of the others, torch counts nothing on a CPU
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        outputs_of(model, texts(1, model=model))
    assert shape(name).flops() == counter.get_total_flops()
    counts = {group: len(units) for group, units in unequal(name).items()}
    assert shape(name).flops(counts) == shape(name).pruned(counts).flops()


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_padding_changes_no_embedding(name: str) -> None:
    model, padded = encoder(name), texts(model=encoder(name))
    for row, length in enumerate(padded[:, 1].sum(1).tolist()):
        with torch.no_grad():
            alone = outputs_of(model, padded[row : row + 1, :, :length])[0]
            together = outputs_of(model, padded)[0][row : row + 1]
        assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_an_embedding_is_the_mean_of_a_texts_vectors_and_has_the_length_1() -> None:
    model, few = encoder(), texts(1)
    with torch.no_grad():
        hidden = model(*few.unbind(1)[:2], token_type_ids=few[:, 2]).last_hidden_state
    wanted = torch.nn.functional.normalize(hidden.mean(1), dim=1)
    assert_close(outputs_of(model, few)[0], wanted)


def test_an_encoder_may_be_pooled_by_its_first_token() -> None:
    model, few = encoder(), texts(1)
    model.config.sentence_pooling = "first"
    with torch.no_grad():
        hidden = model(*few.unbind(1)[:2], token_type_ids=few[:, 2]).last_hidden_state
    assert_close(outputs_of(model, few)[0], torch.nn.functional.normalize(hidden[:, 0], dim=1))
