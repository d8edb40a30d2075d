"""Closed-form recovery brings the pruned model nearer to the dense one."""

import pytest
import torch
from standins.models import (
    FAMILIES,
    NORMS_BEHIND,
    exported_llama,
    logits,
    plan_at,
    random_tokens,
    tiny_model,
    tiny_net,
)
from torch.testing import assert_close

from dilap.core.errors import Unsupported
from dilap.models.cut import shrink_
from dilap.models.reference import Teacher
from dilap.search.options import LibraryOptions, RefitOptions
from dilap.search.refit import best_refit, refit_refusal, refit_sequentially

TOKENS = random_tokens(32, 32)  # 1,024 positions for at most 96 unknowns a row
CONFIG = (1, 1, 1, 2, 0, 1)
REFITTED = [family for family in FAMILIES if family not in NORMS_BEHIND]


@pytest.mark.parametrize("family", REFITTED)
def test_refit_lowers_the_kl_on_its_own_text(family: str) -> None:
    model = tiny_model(family)
    teacher = Teacher.of(model, TOKENS)
    space, net = tiny_net(model, TOKENS)
    before = net.kl(teacher, CONFIG)
    parameters = refit_sequentially(net, CONFIG, TOKENS, correction=1.0)
    shrunk = shrink_(tiny_model(family), plan_at(space, net, CONFIG), parameters=parameters)
    assert teacher.kl(shrunk) < before


@pytest.mark.parametrize("family", REFITTED)
def test_refit_leaves_the_supernet_dense(family: str) -> None:
    model = tiny_model(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    _, net = tiny_net(model, TOKENS)
    net.set(CONFIG)
    refit_sequentially(net, CONFIG, TOKENS, correction=1.0)
    assert net.config == (0,) * 6
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_what_cannot_be_refitted_is_known_before(family: str) -> None:
    assert (refit_refusal(tiny_model(family)) is None) == (family in REFITTED)


def test_a_refit_through_norms_behind_the_sublayers_is_refused() -> None:
    _, net = tiny_net(tiny_model("olmo2"), TOKENS)
    with pytest.raises(Unsupported, match="the norms of OLMo 2 stand behind its sublayers"):
        refit_sequentially(net, (0,) * 6, TOKENS, correction=1.0)


@pytest.mark.parametrize("family", ["opt", "granite"])
def test_refit_of_the_dense_config_is_the_dense_model(family: str) -> None:
    model = tiny_model(family)
    dense = logits(model, TOKENS[:2])
    space, net = tiny_net(model, TOKENS)
    parameters = refit_sequentially(net, space.dense, TOKENS, correction=1.0)
    shrunk = shrink_(tiny_model(family), plan_at(space, net, space.dense), parameters=parameters)
    # Least squares in f32 on inputs whose covariance has a condition number of about 100.
    assert_close(logits(shrunk, TOKENS[:2]), dense, rtol=1e-3, atol=1e-3)


def test_refit_asks_for_corrections_in_the_scale_of_the_residual_stream() -> None:
    """Granite halves its sublayers' outputs; the Llama that computes the same has halved projections instead."""
    models = tiny_model("granite"), exported_llama(tiny_model("granite"))
    granite, llama = (refit_sequentially(tiny_net(one, TOKENS)[1], CONFIG, TOKENS, correction=1.0) for one in models)
    for name, weight in llama.items():
        assert_close(0.5 * granite[name], weight, rtol=1e-3, atol=1e-3)  # f32 sums of other numbers, then solved


def test_refit_names_the_sublayers_that_are_kept() -> None:
    model = tiny_model("llama")
    _, net = tiny_net(model, TOKENS)
    weights = refit_sequentially(net, (4, 1, 0, 3, 1, 2), TOKENS, correction=1.0)
    kept = ["0.mlp.down_proj", "1.self_attn.o_proj", "2.self_attn.o_proj", "2.mlp.down_proj"]
    assert list(weights) == [f"model.layers.{one}.weight" for one in kept]
    assert weights["model.layers.0.mlp.down_proj.weight"].shape == (64, 48)


def test_refit_does_not_depend_on_the_batch_size() -> None:
    model = tiny_model("llama")
    _, net = tiny_net(model, TOKENS)
    whole, parts = (
        refit_sequentially(net, CONFIG, TOKENS, correction=1.0, options=RefitOptions(batch_tokens=size))
        for size in (10_000, 96)
    )
    for name, weight in whole.items():
        assert_close(parts[name], weight, rtol=1e-3, atol=1e-4)  # f32 sums in another order, then solved


def test_strong_ridge_keeps_the_projections_of_the_library() -> None:
    model = tiny_model("llama")
    _, net = tiny_net(model, TOKENS, options=LibraryOptions(ridge=0.05))
    weights = refit_sequentially(net, CONFIG, TOKENS, correction=1.0, options=RefitOptions(ridge=1e6))
    for index, sublayer in enumerate(net.sublayers):
        assert_close(weights[f"{sublayer.path}.weight"], net.library[index][CONFIG[index]].weight, rtol=1e-3, atol=1e-4)


def test_first_refit_is_the_ridge_solution() -> None:
    """Nothing is lost before the first sublayer, so it solves |W x - y|^2 + ridge |W - W_library|^2 on dense inputs."""
    model = tiny_model("llama")
    out = model.model.layers[0].self_attn.o_proj
    found: list[torch.Tensor] = []
    hook = out.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].detach()))
    logits(model, TOKENS)
    hook.remove()
    _, net = tiny_net(model, TOKENS)
    dense, fit = out.weight.detach().double().clone(), net.library[0][1]
    x = found[0].reshape(-1, 64).double()
    kept = x[:, fit.columns]
    H = kept.T @ kept
    damping = 0.1 * H.diagonal().mean()
    expected = ((x @ dense.T).T @ kept + damping * fit.weight) @ torch.linalg.inv(H + damping * torch.eye(len(H)))
    weights = refit_sequentially(net, (1, 0, 0, 0, 0, 0), TOKENS, correction=1.0, options=RefitOptions(ridge=0.1))
    assert_close(weights["model.layers.0.self_attn.o_proj.weight"].double(), expected, rtol=1e-3, atol=1e-4)


def test_best_refit_keeps_the_library_where_no_refit_is_nearer() -> None:
    model = tiny_model("llama")
    _, net = tiny_net(model, TOKENS)
    teacher = Teacher.of(model, TOKENS)
    before = net.kl(teacher, CONFIG)
    found = best_refit(net, CONFIG, TOKENS, teacher=teacher, options=RefitOptions(corrections=(-20.0,)))
    assert found.correction is None
    assert found.kl == before


def test_best_refit_takes_the_first_correction_that_helps() -> None:
    model = tiny_model("llama")
    _, net = tiny_net(model, TOKENS)
    teacher = Teacher.of(model, TOKENS)
    found = best_refit(net, CONFIG, TOKENS, teacher=teacher, options=RefitOptions(corrections=(-20.0, 1.0, 0.5)))
    assert found.correction == 1.0
    assert found.kl == net.kl(teacher, CONFIG, parameters=found.parameters)
