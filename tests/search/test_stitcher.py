"""Cut layers and known prefixes give what masking and running everything gives."""

import weakref
from collections.abc import Sequence

import pytest
import torch
from standins.models import FAMILIES, levels_of, random_tokens, tiny_model, tiny_net
from torch import nn
from torch.testing import assert_close

from dilap.models.anatomy import decoder_layers
from dilap.models.reference import Teacher
from dilap.search.stitcher import Level, Stitcher
from dilap.search.supernet import Supernet

TOKENS = random_tokens(4, 12)
OTHERS = random_tokens(3, 12, seed=1)
CONFIGS = [(0, 0, 0, 0, 0, 0), (1, 2, 3, 1, 2, 0), (4, 3, 0, 1, 4, 3), (0, 0, 2, 0, 0, 1), (0, 0, 2, 0, 3, 1)]


def scored(family: str) -> tuple[Supernet, Teacher]:
    model = tiny_model(family)
    return tiny_net(model, TOKENS)[1], Teacher.of(model, OTHERS)


@pytest.mark.parametrize("family", FAMILIES)
def test_cut_layers_score_as_masked_ones(family: str) -> None:
    net, teacher = scored(family)
    for config in (levels_of(net, one) for one in CONFIGS):
        found = net.kls(teacher, config)
        net.set(config)
        assert_close(found, teacher.kls(net.model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_scoring_leaves_the_model_as_it_was(family: str) -> None:
    net, teacher = scored(family)
    before = {name: tensor.clone() for name, tensor in net.model.state_dict().items()}
    modules = [(name, type(module)) for name, module in net.model.named_modules()]
    for config in CONFIGS:
        net.kls(teacher, levels_of(net, config))
    assert [(name, type(module)) for name, module in net.model.named_modules()] == modules
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in net.model.modules())


def test_known_layers_change_no_bit_of_a_score() -> None:
    net, teacher = scored("llama")
    fresh = []
    for config in CONFIGS:
        net.forget()
        fresh.append(net.kls(teacher, config))
    net.forget()
    for config, expected in [*zip(CONFIGS, fresh, strict=True), *zip(reversed(CONFIGS), reversed(fresh), strict=True)]:
        assert torch.equal(net.kls(teacher, config), expected)


def test_other_text_and_other_projections_are_not_taken_for_known() -> None:
    net, teacher = scored("llama")
    other = Teacher.of(net.model, random_tokens(3, 12, seed=2))
    expected = [float(one.kls(net.model).mean()) for one in (teacher, other)]
    config = (1, 1, 1, 1, 1, 1)
    plain, elsewhere = net.kl(teacher, config), net.kl(other, config)
    zeros = {f"{one.path}.weight": torch.zeros_like(net.library[i][1].weight) for i, one in enumerate(net.sublayers)}
    assert expected == pytest.approx([0, 0], abs=1e-5)
    assert elsewhere != plain
    assert net.kl(teacher, config, parameters=zeros) == pytest.approx(net.kl(teacher, (4, 3) * 3), rel=1e-4)
    assert net.kl(teacher, config) == plain


def test_only_layers_from_the_first_difference_on_run() -> None:
    built: list[int] = []
    model = tiny_model("llama")

    def build(index: int, level: Sequence[int]) -> torch.nn.Module:
        built.append(index)
        return decoder_layers(model)[index]

    stitcher = Stitcher(model, build)
    for levels in ([(0,), (0,), (0,)], [(0,), (0,), (1,)], [(0,), (1,), (1,)], [(0,), (1,), (1,)]):
        with stitcher.stitched(levels, text=TOKENS), torch.no_grad():
            model(TOKENS)
    assert built == [0, 1, 2, 2, 1, 2, 2]


def test_large_models_are_cut_one_layer_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    net, teacher = scored("llama")
    config = CONFIGS[1]
    expected = net.kls(teacher, config)
    monkeypatch.setattr("dilap.search.stitcher._MOST_CUT_BYTES", 0)
    alive: set[int] = set()
    counts: list[int] = []

    def counted(index: int, level: Level) -> nn.Module:
        layer = net._layer(index, level)
        alive.add(index)
        weakref.finalize(layer, alive.discard, index)
        counts.append(len(alive))
        return layer

    stitcher = Stitcher(net.model, counted)
    levels = [(*config[2 * index : 2 * index + 2], 0)[: 3 if index == 0 else 2] for index in range(3)]
    with stitcher.stitched(levels, text=teacher):
        assert torch.equal(teacher.kls(net.model), expected)
    assert counts == [1, 1, 1]
