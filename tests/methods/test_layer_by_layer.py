"""A model larger than the memory beside it: its weights stay in their files, and one layer is worked on at a time."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from standins.models import random_tokens, tiny_model, tiny_space, tiny_task
from torch import nn
from transformers import PreTrainedModel

from dilap import methods
from dilap.methods import wanda_sp
from dilap.methods.units import zero_columns_
from dilap.models.anatomy import sublayers
from dilap.models.load import load
from dilap.search.library import fit_choices

in_proc = pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what lies in a process's memory")
METHODS = ("flap", "wanda_sp", "sleb")


def mappings(file: Path) -> Iterator[tuple[range, int]]:
    """Where a file is mapped into this process's memory, and of how many bytes it has a copy of its own."""
    addresses = None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            start, end = (int(one, 16) for one in first.split("-"))
            addresses = range(start, end) if rest[-1] == str(file) else None
        elif first == "Anonymous:" and addresses is not None:
            yield addresses, 1024 * int(rest[0])


def copied_bytes(checkpoint: Path) -> int:
    return sum(copied for _, copied in mappings(checkpoint / "model.safetensors"))


def loaded(checkpoint: Path) -> PreTrainedModel:
    return load(str(checkpoint), compute="cpu").model


@in_proc
def test_weights_are_mapped_from_their_file(checkpoint: Path) -> None:
    model = loaded(checkpoint)
    places = [addresses for addresses, _ in mappings(checkpoint / "model.safetensors")]
    assert all(any(one.data_ptr() in place for place in places) for one in model.parameters())
    assert copied_bytes(checkpoint) == 0
    with torch.no_grad():
        model.lm_head.weight[0] = 0
    assert copied_bytes(checkpoint) > 0  # so that this is noticed


@in_proc
@pytest.mark.parametrize("name", METHODS)
def test_methods_copy_no_weights(name: str, checkpoint: Path) -> None:
    model = loaded(checkpoint)
    methods.get(name)(tiny_task(model))
    assert copied_bytes(checkpoint) == 0


@in_proc
def test_a_level_library_copies_no_weights(checkpoint: Path) -> None:
    model = loaded(checkpoint)
    assert len(list(fit_choices(model, tiny_space(model).choices, random_tokens(4, 12)))) == 6
    assert copied_bytes(checkpoint) == 0


@pytest.mark.parametrize("name", METHODS)
def test_mapped_weights_give_the_plan_of_those_in_memory(name: str, checkpoint: Path) -> None:
    method = methods.get(name)
    assert method(tiny_task(loaded(checkpoint))).plan == method(tiny_task(tiny_model("llama"))).plan


def test_wanda_sp_prunes_one_layer_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    outs = list(sublayers(model))
    dense = {one.name: one.out.weight.data_ptr() for one in outs}
    pruned: list[list[int]] = []

    def counting(out: nn.Linear, columns: torch.Tensor) -> None:
        zero_columns_(out, columns)
        pruned.append([one.layer for one in outs if one.out.weight.data_ptr() != dense[one.name]])

    monkeypatch.setattr("dilap.methods.wanda_sp.zero_columns_", counting)
    wanda_sp.prune(tiny_task(model))
    assert pruned == [[0], [0, 0], [1], [1, 1], [2], [2, 2]]
    assert all(one.out.weight.data_ptr() == dense[one.name] for one in outs)
