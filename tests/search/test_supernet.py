"""The supernet computes what shrunk models compute, and its curvature is that of the real KL."""

from pathlib import Path

import pytest
import torch
from standins.models import (
    FAMILIES,
    NORMS_BEHIND,
    levels_of,
    logits,
    plan_at,
    projections,
    random_tokens,
    tiny_model,
    tiny_net,
)
from torch.nn import functional
from torch.testing import assert_close
from transformers import PreTrainedModel

from dilap.models.cut import shrink_
from dilap.models.reference import Teacher, final_hidden, head_of, next_token_loss, perplexity
from dilap.search import tap
from dilap.search.curvature import linearise
from dilap.search.supernet import Supernet

TOKENS = random_tokens(4, 12)
OTHERS = random_tokens(3, 12, seed=1)
MIXED = (1, 2, 3, 1, 2, 0)


def kl_from_logits(dense: torch.Tensor, pruned: torch.Tensor) -> float:
    p, q = dense.log_softmax(-1), pruned.log_softmax(-1)
    return float(functional.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean())


@pytest.mark.parametrize("config", [(1, 2, 3, 1, 2, 0), (0, 3, 4, 0, 1, 3), (4, 1, 0, 0, 0, 1)])
@pytest.mark.parametrize("family", FAMILIES)
def test_config_computes_what_the_shrunk_model_computes(family: str, config: tuple[int, ...]) -> None:
    model = tiny_model(family)
    space, net = tiny_net(model, TOKENS)
    config = levels_of(net, config)
    net.set(config)
    weights = {s.name: net.library[i][config[i]].weight for i, s in enumerate(net.sublayers)}
    shrunk = shrink_(tiny_model(family), plan_at(space, net, config), parameters=projections(model, weights))
    # The same sums but for zeros, in another order.
    assert_close(logits(shrunk, OTHERS), logits(model, OTHERS), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_close_restores_the_dense_model_exactly(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family).to(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    _, net = tiny_net(model, TOKENS)
    net.set(levels_of(net, MIXED))
    net.set(levels_of(net, (2, 1, 0, 3, 4, 0)))
    net.close()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_teacher_kl_is_that_of_the_full_logits(family: str) -> None:
    model = tiny_model(family)
    dense = logits(model, OTHERS)
    teacher = Teacher.of(model, OTHERS)
    _, net = tiny_net(model, TOKENS)
    config = levels_of(net, MIXED)
    found = net.kl(teacher, config)
    net.set(config)
    assert found == pytest.approx(kl_from_logits(dense, logits(model, OTHERS)), rel=1e-4)
    assert found > 0.01


def test_dense_model_has_no_kl_to_itself() -> None:
    model = tiny_model("llama")
    assert Teacher.of(model, TOKENS).kl(model) == pytest.approx(0, abs=1e-5)


def test_teacher_does_not_depend_on_the_batch_size() -> None:
    model = tiny_model("llama")
    one, all_at_once = Teacher.of(model, TOKENS, batch_tokens=1), Teacher.of(model, TOKENS)
    assert_close(one.mean_embedding, all_at_once.mean_embedding)
    assert_close(one.constant, all_at_once.constant)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_slope_at_the_head_is_that_of_autograd(family: str) -> None:
    model = tiny_model(family)
    teacher, dense = Teacher.of(model, TOKENS), logits(model, TOKENS).flatten(0, 1).log_softmax(-1)
    tiny_net(model, TOKENS)[1].set(MIXED)
    hidden = final_hidden(model, TOKENS).detach().requires_grad_(True)
    made = hidden.float() @ model.get_output_embeddings().weight.detach().T
    if cap := getattr(model.config, "final_logit_softcapping", None):
        made = cap * (made / cap).tanh()
    kls = (dense.exp() * (dense - made.log_softmax(-1))).sum(-1)
    kls.sum().backward()
    found = teacher.at_head(hidden.detach(), head_of(model), rows=slice(None))
    assert hidden.grad is not None
    assert_close(found.slope, hidden.grad.float(), rtol=0, atol=0.03 * float(hidden.grad.abs().max()))
    assert_close(found.kls, kls.detach(), rtol=0, atol=0.03 * float(kls.detach().max()))


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "granite", "gemma2"])
def test_perplexity_is_that_of_the_loss_of_transformers(family: str) -> None:
    model = tiny_model(family)
    loss = model(input_ids=TOKENS, labels=TOKENS).loss
    assert perplexity(model, TOKENS) == pytest.approx(float(loss.exp()), rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "granite", "gemma2"])
def test_next_token_loss_and_its_gradient_are_those_of_transformers(family: str) -> None:
    found, expected = tiny_model(family), tiny_model(family)
    loss = next_token_loss(found, TOKENS)
    loss.backward()
    other = expected(input_ids=TOKENS, labels=TOKENS).loss
    other.backward()
    assert_close(loss, other, rtol=1e-4, atol=0)
    for name in ("layers.0.self_attn.q_proj", "layers.2.mlp.down_proj"):
        mine, theirs = (model.model.get_submodule(name).weight.grad for model in (found, expected))
        assert_close(mine, theirs, rtol=1e-3, atol=1e-6)


@torch.no_grad()
def test_scores_are_kl_and_perplexity_in_one_pass() -> None:
    model = tiny_model("llama")
    teacher = Teacher.of(model, TOKENS)
    assert teacher.perplexity == pytest.approx(perplexity(model, TOKENS), rel=1e-5)
    tiny_net(model, OTHERS)[1].set(MIXED)
    scores = teacher.scores(model)
    assert scores.kl == teacher.kl(model)
    assert scores.perplexity == pytest.approx(perplexity(model, TOKENS), rel=1e-5)


def test_teacher_is_asked_once(tmp_path: Path) -> None:
    path, model = tmp_path / "teacher.safetensors", tiny_model("llama")
    first = Teacher.once(path, model, TOKENS)
    again = Teacher.once(path, None, TOKENS)
    assert torch.equal(first.mean_embedding, again.mean_embedding)
    assert again.kl(model) == first.kl(model)


def toy(*, length: int) -> tuple[Supernet, Teacher, PreTrainedModel]:
    """Two layers, 24 tokens; inputs are `length` tokens long."""
    model = tiny_model("llama", num_hidden_layers=2, hidden_size=32, intermediate_size=24, vocab_size=24)
    tokens = random_tokens(24, length, vocab_size=24)
    _, net = tiny_net(model, random_tokens(8, 16, vocab_size=24))
    return net, Teacher.of(model, tokens), model


@torch.no_grad()
def perturbed_kl(net: Supernet, teacher: Teacher, config: tuple[int, ...], change: torch.Tensor) -> float:
    """The real KL where every projection moves by `change` (levels) times the difference of a level to `config`'s."""
    net.set(config)
    current = [out.weight.clone() for out in net.outs]
    parts = change.split([len(levels) for levels in net.library])
    for index, (levels, part) in enumerate(zip(net.library, parts, strict=True)):
        moved = current[index] * (1 - part.sum())
        for fit, share in zip(levels, part, strict=True):
            moved[:, fit.columns] += share * fit.weight
        net.outs[index].weight.copy_(moved)
    value = teacher.kl(net.model)
    for out, weight in zip(net.outs, current, strict=True):
        out.weight.copy_(weight)
    return value


@pytest.mark.parametrize("length", [1, 6])
def test_curvature_is_that_of_the_real_kl(length: int) -> None:
    """At any length: rows of A are sequences, so how positions add up is in them."""
    net, teacher, _ = toy(length=length)
    Q = linearise(net, teacher, samples=400, seed=0).Q
    generator = torch.Generator().manual_seed(1)
    dense, step = (0,) * len(net.library), 0.03
    for _ in range(6):
        change = torch.randn(len(Q), generator=generator)
        both = sum(perturbed_kl(net, teacher, dense, sign * step * change) for sign in (-1, 1))
        curvature = both / step**2  # central difference; value and slope are zero at the dense model
        assert float(change @ Q @ change) == pytest.approx(curvature, rel=0.1)


def test_changes_that_are_not_kept_are_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    net, teacher, _ = toy(length=6)
    kept = linearise(net, teacher, samples=2, seed=0)
    monkeypatch.setattr(tap, "_CHANGES_BYTES", 0)
    made = linearise(net, teacher, samples=2, seed=0)
    assert torch.equal(made.Q, kept.Q)
    assert torch.equal(made.b, kept.b)


def test_diagonal_of_the_curvature_is_that_of_single_levels() -> None:
    net, teacher, _ = toy(length=1)
    Q = linearise(net, teacher, samples=400, seed=0).Q
    dense, step = (0,) * len(net.library), 0.03
    for level in range(len(Q)):
        change = step * torch.eye(len(Q))[level]
        curvature = sum(perturbed_kl(net, teacher, dense, sign * change) for sign in (-1, 1)) / step**2
        assert float(Q[level, level]) == pytest.approx(curvature, rel=0.1, abs=1e-3 * float(Q.diagonal().max()))


@pytest.mark.parametrize("length", [1, 6])
def test_slope_away_from_the_dense_model_is_that_of_the_real_kl(length: int) -> None:
    """The slope needs no sampling and drops nothing, so it is exact at any length."""
    net, teacher, _ = toy(length=length)
    config, step = (1, 1, 2, 0), 0.01
    net.set(config)
    b = linearise(net, teacher, samples=1, seed=0).b
    for level in range(len(b)):
        change = step * torch.eye(len(b))[level]
        ahead, behind = (perturbed_kl(net, teacher, config, sign * change) for sign in (1, -1))
        # f32 differences of a KL near 1 carry 1e-5 of noise; the curve adds a hundredth.
        assert float(b[level]) == pytest.approx((ahead - behind) / (2 * step), rel=0.02, abs=1e-3)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in NORMS_BEHIND])
def test_slope_holds_where_sublayers_are_only_added(family: str) -> None:
    model = tiny_model(family)
    teacher = Teacher.of(model, OTHERS)
    _, net = tiny_net(model, TOKENS)
    config = (1, 1, 1, 1, 1, 1)
    net.set(config)
    curvature = linearise(net, teacher, samples=1, seed=0)
    change, step = torch.randn(len(curvature.b), generator=torch.Generator().manual_seed(0)), 0.01
    present = [float(len(fit.columns) > 0) for levels in net.library for fit in levels]
    change *= torch.tensor(present)  # removal moves the bias too, which `perturbed_kl` leaves alone
    ahead, behind = (perturbed_kl(net, teacher, config, sign * step * change) for sign in (1, -1))
    expected = (ahead - behind) / (2 * step)
    assert float(curvature.b @ change) == pytest.approx(expected, rel=0.03, abs=3e-3)


@torch.no_grad()
def kl_on_the_way(net: Supernet, teacher: Teacher, index: int, level: int, share: float) -> float:
    """The real KL where the norm behind a sublayer gives `share` of a level's output in place of its own."""
    fit, norm, inputs = net.library[index][level], net.norms_behind[index], list[torch.Tensor]()
    assert norm is not None

    def move(_: torch.nn.Module, __: object, output: torch.Tensor) -> torch.Tensor:
        wanted = norm.forward(inputs.pop()[..., fit.columns] @ fit.weight.T)
        moved: torch.Tensor = output + share * (wanted - output)
        return moved

    hooks = [
        net.outs[index].register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0])),
        norm.register_forward_hook(move),
    ]
    value = teacher.kl(net.model)
    for hook in hooks:
        hook.remove()
    return value


@pytest.mark.parametrize("config", [(1, 1, 0, 1, 0, 2), (0, 3, 1, 0, 0, 1)])
@pytest.mark.parametrize("family", NORMS_BEHIND)
def test_slope_behind_a_norm_is_that_towards_the_outputs_of_the_levels(family: str, config: tuple[int, ...]) -> None:
    """Removal is among them, which no slope before a norm shows, because a norm does not see how long its input is."""
    model, step = tiny_model(family), 0.001
    teacher = Teacher.of(model, OTHERS)
    _, net = tiny_net(model, TOKENS)
    net.set(config)
    b = linearise(net, teacher, samples=1, seed=0).b.split([len(levels) for levels in net.library])
    for index, slopes in enumerate(b):
        for level, slope in enumerate(slopes.tolist()):
            ahead, behind = (kl_on_the_way(net, teacher, index, level, share) for share in (step, -step))
            assert slope == pytest.approx((ahead - behind) / (2 * step), rel=0.03, abs=5e-3)


def test_value_is_the_real_kl() -> None:
    net, teacher, _ = toy(length=6)
    net.set((1, 1, 2, 0))
    found = linearise(net, teacher, samples=1, seed=0).value
    assert found == pytest.approx(net.kl(teacher, (1, 1, 2, 0)), rel=1e-4)


def test_curvature_is_zero_at_the_current_levels() -> None:
    net, teacher, _ = toy(length=6)
    config = (1, 1, 2, 0)
    net.set(config)
    curvature = linearise(net, teacher, samples=2, seed=0)
    start = 0
    for levels, level in zip(net.library, config, strict=True):
        assert float(curvature.b[start + level]) == 0
        assert float(curvature.Q[start + level].abs().max()) == 0
        start += len(levels)


def test_curvature_is_symmetric_and_positive() -> None:
    net, teacher, _ = toy(length=6)
    Q = linearise(net, teacher, samples=2, seed=0).Q
    assert_close(Q, Q.T)
    assert float(torch.linalg.eigvalsh(Q.double()).min()) > -1e-6 * float(Q.diagonal().max())


def test_curvature_is_deterministic_for_a_seed() -> None:
    net, teacher, _ = toy(length=6)
    first, second, other = (linearise(net, teacher, samples=2, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.Q, second.Q)
    assert not torch.equal(first.Q, other.Q)


def test_curvature_of_opt_counts_the_bias_of_a_removed_sublayer() -> None:
    """The slope towards removal is that towards a projection and a bias of zero."""
    model = tiny_model("opt")
    teacher = Teacher.of(model, OTHERS)
    _, net = tiny_net(model, TOKENS)
    net.set((0, 1, 0, 0, 0, 1))
    b = linearise(net, teacher, samples=1, seed=0).b
    removed = len(net.library[0]) + len(net.library[1]) - 1
    fit, out, step = net.library[1][1], net.outs[1], 0.01
    assert net.biases[1] is not None
    values = []
    for scale in (1 - step, 1 + step):
        net.write(1, fit.columns, scale * fit.weight)
        with torch.no_grad():
            out.bias.mul_(scale)
        values.append(teacher.kl(model))
    assert float(b[removed]) == pytest.approx((values[0] - values[1]) / (2 * step), rel=0.02, abs=1e-3)
