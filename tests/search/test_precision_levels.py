"""Levels with precisions: a score is that of the cut and rounded model, and the quadratic model knows of rounding."""

import copy
from typing import Any

import pytest
import torch
from standins.models import logits, mixed_net, random_tokens, tiny_model, tiny_task
from torch import nn
from torch.nn import functional
from torch.testing import assert_close
from transformers import PreTrainedModel

from dilap.core.space import Space
from dilap.models.anatomy import decoder_layers
from dilap.models.cut import shrink_
from dilap.models.families import family_of
from dilap.models.matrices import put_, replaced
from dilap.models.reference import Teacher
from dilap.models.rounding import rounded
from dilap.models.statistics import first_of
from dilap.search.curvature import linearise
from dilap.search.levels import plan_at
from dilap.search.rounded import RoundedMatrices
from dilap.search.supernet import Supernet
from dilap.search.tap import base_fit

TOKENS = random_tokens(8, 24)
OTHERS = random_tokens(3, 12, seed=1)
FAMILIES = ("llama", "opt", "phi3", "gemma2", "granite", "qwen3_moe")


def drawn_config(net: Supernet, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(int(torch.randint(size, (1,), generator=generator)) for size in net.sizes)


def mixed(family: str, **changes: Any) -> tuple[Space, Supernet, Teacher]:
    model = tiny_model(family, **changes)
    space, net = mixed_net(model, TOKENS)
    return space, net, Teacher.of(model, OTHERS, keep_states=True)


def kl_of(dense: torch.Tensor, model: PreTrainedModel) -> float:
    q, p = logits(model, OTHERS).log_softmax(-1), dense.log_softmax(-1)
    return float(functional.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_score_is_the_kl_of_the_cut_and_rounded_model(family: str, seed: int, tied: bool) -> None:
    space, net, teacher = mixed(family, tie_word_embeddings=tied)
    config = drawn_config(net, seed)
    dense, parameters = logits(net.model, OTHERS), net.parameters(config)
    found = net.kl(teacher, config)
    net.close()
    plan = plan_at(tiny_task(net.model, space=space), net, config)
    shrunk = shrink_(tiny_model(family, tie_word_embeddings=tied), plan, parameters=parameters)
    assert found == pytest.approx(kl_of(dense, shrunk), rel=1e-3, abs=1e-5)
    net.set(config)
    assert found == pytest.approx(kl_of(dense, net.model), rel=1e-3, abs=1e-5)


def parts_of(net: Supernet, values: torch.Tensor) -> list[torch.Tensor]:
    """Values of all levels by choice."""
    return list(values.split(list(net.sizes)))


@torch.no_grad()
def by_hand(net: Supernet, index: int, level: int) -> nn.Module:
    """A copy of a sublayer's layer with its matrices rounded and masked to one of its levels."""
    sublayer, fit = net.sublayers[index], net.library[index][level]
    family = family_of(net.model.config)
    prefix = f"{family.layers}.{sublayer.layer}."
    layer = copy.deepcopy(decoder_layers(net.model)[sublayer.layer])
    precision = fit.precision or "f32"
    for name in net.matrices[index]:
        dense = net.dense[name].float()
        put_(layer, name.removeprefix(prefix), rounded(dense.flatten(0, -2), precision).reshape(dense.shape))
    if index not in net.routings:
        masked = torch.zeros_like(net.outs[index].weight)
        masked[:, fit.columns] = rounded(fit.weight, precision)
        put_(layer, net.matrices[index][-1].removeprefix(prefix), masked)
    return layer


@torch.no_grad()
def kl_on_the_way(net: Supernet, teacher: Teacher, index: int, level: int, share: float) -> float:
    """The real KL where a sublayer, behind its norm if it has one there, gives `share` of a level's output."""
    sublayer, family = net.sublayers[index], family_of(net.model.config)
    other, layer, norm = by_hand(net, index, level), decoder_layers(net.model)[sublayer.layer], net.norms_behind[index]
    called: list[Any] = []

    def move(_: nn.Module, __: object, output: Any) -> Any:
        arguments, keywords = called[-1]
        wanted = first_of(family.computed(other, sublayer.kind, *arguments, **keywords))
        own = first_of(output)
        moved = own + share * ((wanted if norm is None else norm.forward(wanted)).reshape(own.shape) - own)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    first, last = map(layer.get_submodule, family.ends_of(sublayer.kind))
    hooks = [
        first.register_forward_pre_hook(lambda _, *called_with: called.append(called_with), with_kwargs=True),
        (norm or last).register_forward_hook(move),
    ]
    value = net.facing(teacher, net.config).kl(net.model)
    for hook in hooks:
        hook.remove()
    return value


def at_width(net: Supernet, index: int, level: int) -> list[int]:
    """The levels of a choice that are as wide as one of them."""
    return [k for k, fit in enumerate(net.library[index]) if fit.counts == net.library[index][level].counts]


@pytest.mark.parametrize("family", ["llama", "opt", "gemma2", "olmo2", "qwen3_moe"])
def test_slopes_towards_precisions_are_those_towards_the_rounded_sublayer(family: str) -> None:
    _, net, teacher = mixed(family)
    config = drawn_config(net, 3)
    net.set(config)
    slopes = parts_of(net, linearise(net, teacher, samples=1, seed=0).b)
    step, checked = 1e-3, 0
    for index, levels in enumerate(net.library):
        if len(levels[config[index]].columns) == 0:
            continue
        for level in at_width(net, index, config[index]):
            ahead, behind = (kl_on_the_way(net, teacher, index, level, share) for share in (step, -step))
            assert float(slopes[index][level]) == pytest.approx((ahead - behind) / (2 * step), rel=0.03, abs=5e-3)
            checked += level != config[index]
    assert checked >= 4


def test_slopes_of_a_removed_sublayer_s_precisions_are_those_at_its_full_width() -> None:
    _, net, teacher = mixed("llama")
    removed = len(net.library[2]) - 1
    assert len(net.library[2][removed].columns) == 0
    config = (0, 1, removed, *drawn_config(net, 3)[3:])
    net.set(config)
    slopes = parts_of(net, linearise(net, teacher, samples=1, seed=0).b)[2]
    full = at_width(net, 2, 0)
    assert len(full) == 3
    assert len(set(slopes[full].tolist())) == 3


def test_width_and_precision_of_a_level_add_up() -> None:
    _, net, teacher = mixed("llama")
    net.set(drawn_config(net, 4))
    found = linearise(net, teacher, samples=2, seed=0)
    own = net.library[1][net.config[1]]
    slopes = {
        (fit.counts, fit.precision): float(b) for fit, b in zip(net.library[1], parts_of(net, found.b)[1], strict=True)
    }
    assert len(own.columns) > 0
    for (counts, precision), slope in slopes.items():
        if counts != (0,):
            expected = slopes[counts, own.precision] + slopes[own.counts, precision]
            assert slope == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_slopes_towards_removal_take_the_rounded_sublayer_away() -> None:
    _, net, teacher = mixed("llama")
    config = (*(at_width(net, index, 0)[-1] for index in range(6)), 1)
    assert {fit.precision for fit in net.fits(config)} == {"q4_0"}
    net.set(config)
    slopes = parts_of(net, linearise(net, teacher, samples=1, seed=0).b)
    step = 1e-3
    for index in range(6):
        removed = len(net.library[index]) - 1
        ahead, behind = (kl_on_the_way(net, teacher, index, removed, share) for share in (step, -step))
        assert float(slopes[index][removed]) == pytest.approx((ahead - behind) / (2 * step), rel=0.03, abs=5e-3)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_slopes_of_the_head_are_those_of_its_rounding(family: str) -> None:
    _, net, teacher = mixed(family, tie_word_embeddings=False)
    config = (*drawn_config(net, 1)[:-1], 2)
    net.set(config)
    with torch.enable_grad():
        slopes = parts_of(net, linearise(net, teacher, samples=1, seed=0).b)[-1]
    current, dense = net.model.get_output_embeddings().weight, net.dense[net.head_name]
    step = 0.3  # the changes are small, so that f32 needs a long step, and the curve is straight
    for level, slope in enumerate(slopes.tolist()):
        wanted = rounded(dense, net.head_levels[level].head or "f32")
        values = []
        for share in (step, -step):
            head = current + share * (wanted - current)
            facing = teacher.facing(net.head_of(head), dense_head=net.head_of(dense))
            with replaced(net.model, {net.head_name: head}):
                values.append(facing.kl(net.model))
        assert slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=0.05, abs=2e-5)
    assert slopes[2] == 0
    assert slopes.abs().max() > 1e-3


def test_the_curvature_of_precisions_is_that_of_the_real_kl() -> None:
    """At the dense model, of single levels: their KL is half of the diagonal of Q to the second order."""
    model = tiny_model("llama", num_hidden_layers=2, hidden_size=64, intermediate_size=64, vocab_size=24)
    _, net = mixed_net(model, random_tokens(8, 16, vocab_size=24))
    teacher = Teacher.of(model, random_tokens(24, 6, vocab_size=24), keep_states=True)
    halves = parts_of(net, 0.5 * linearise(net, teacher, samples=200, seed=0).Q.diagonal())
    dense = (0,) * len(net.sizes)
    for index in range(len(net.library)):
        level = at_width(net, index, 0)[-1]
        assert net.library[index][level].precision == "q4_0"
        config = (*dense[:index], level, *dense[index + 1 :])
        assert float(halves[index][level]) == pytest.approx(net.kl(teacher, config), rel=0.15)
    head = {net.head_name: rounded(net.dense[net.head_name], "q4_0")}  # the embedding stays
    assert float(halves[-1][2]) == pytest.approx(net.kl(teacher, dense, parameters=head), rel=0.15)


def test_changes_of_precision_do_not_depend_on_the_batch_size() -> None:
    _, net, teacher = mixed("llama")
    net.set(drawn_config(net, 4))
    whole, parts = (linearise(net, teacher, samples=1, seed=0, batch_tokens=size) for size in (100, 1))
    assert_close(parts.b, whole.b, rtol=1e-3, atol=1e-5)
    assert torch.equal(parts.parts, whole.parts)


def test_levels_of_equal_width_share_a_fit() -> None:
    _, net, _ = mixed("llama")
    wide = [net.library[1][k] for k in at_width(net, 1, 0)]
    assert [fit.precision for fit in wide] == ["", "q8_0", "q4_0"]
    assert len({id(fit.weight) for fit in wide}) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_close_restores_what_was_rounded(family: str) -> None:
    _, net, teacher = mixed(family)
    before = {name: tensor.clone() for name, tensor in net.model.state_dict().items()}
    for seed in range(3):
        net.kl(teacher, drawn_config(net, seed))
        net.set(drawn_config(net, seed))
    linearise(net, teacher, samples=1, seed=0)
    net.close()
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.model.state_dict().items())
    assert all(parameter is net.dense[name] for name, parameter in net.model.named_parameters() if name in net.dense)
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in net.model.modules())


def test_known_layers_change_no_bit_of_a_rounded_score() -> None:
    """The embedding follows the head, and what enters the first layer follows the embedding."""
    _, net, teacher = mixed("llama")
    start = drawn_config(net, 5)
    configs = [(*start[:-1], head) for head in (0, 1, 2, 0)] + [(*start[:4], 0, *start[5:])]
    fresh = []
    for config in configs:
        net.forget()
        fresh.append(net.kls(teacher, config))
    net.forget()
    for config, expected in zip(configs, fresh, strict=True):
        assert torch.equal(net.kls(teacher, config), expected)
    assert len({float(one.sum()) for one in fresh}) == 4


def test_rounded_matrices_beyond_the_budget_are_made_again() -> None:
    _, net, teacher = mixed("llama")
    config = drawn_config(net, 5)
    kept = net.kls(teacher, config)
    net.forget()
    net._rounded = RoundedMatrices(0)
    assert torch.equal(net.kls(teacher, config), kept)
    assert len(net._rounded._kept) <= 1


def test_base_fit_is_the_current_level_or_the_full_one() -> None:
    _, net, _ = mixed("llama")
    removed = len(net.library[3]) - 1
    net.set((0, 2, 0, removed, 0, 0, 0))
    assert base_fit(net, 1) is net.library[1][2]
    assert base_fit(net, 3) is net.library[3][0]
