"""Depth methods: the golden checks of ShortGPT, SLEB and LLM-Streamline."""

from itertools import islice, pairwise
from typing import Literal

import pytest
import torch
from standins.models import logits, logits_with_cache, random_tokens, tiny_model, tiny_task
from torch.nn import functional
from torch.testing import assert_close
from transformers import PreTrainedModel

from dilap.core.plan import Plan
from dilap.methods.llm_streamline import Streamline, best_window
from dilap.methods.shortgpt import ShortGpt, block_influences, mean_cosine
from dilap.methods.sleb import Sleb
from dilap.models.anatomy import decoder_layers
from dilap.models.cut import shrink_
from dilap.models.families import family_of
from dilap.models.reference import negative_log_likelihood
from dilap.models.skipping import Stack, sublayer_skipped

TOKENS = random_tokens(4, 24)


def deep_model(family: str = "llama", *, identity: int | None = None) -> PreTrainedModel:
    """Six layers; the residual branches of one may give nothing."""
    model = tiny_model(family, num_hidden_layers=6)
    if identity is not None:
        layer, names = decoder_layers(model)[identity], family_of(model.config)
        with torch.no_grad():
            for path in (names.attention_out, names.ffn_out):
                for parameter in layer.get_submodule(path).parameters():
                    parameter.zero_()
    return model


def removed(plan: Plan) -> list[int]:
    return [index for index, widths in enumerate(plan.all_widths()) if widths.is_empty]


@pytest.mark.parametrize("family", ["llama", "opt", "gemma3_text"])
def test_shortgpt_a_layer_that_adds_nothing_has_no_influence_and_goes_first(family: str) -> None:
    task = tiny_task(deep_model(family, identity=2), share=0.9)
    assert float(block_influences(task)["influences"][2]) == pytest.approx(0, abs=1e-6)
    assert removed(ShortGpt()(task).plan)[0] == 2


def test_shortgpt_b_influence_does_not_depend_on_scale() -> None:
    x, y = torch.randn(5, 8), torch.randn(5, 8)
    assert mean_cosine(7 * x, y) == pytest.approx(mean_cosine(x, y), abs=1e-6)


def test_shortgpt_influence_is_one_minus_the_mean_cosine() -> None:
    task = tiny_task(deep_model())
    states = [task.model.get_input_embeddings()(task.text.train).detach()]
    hooks = [
        layer.register_forward_hook(lambda _m, _i, out: states.append(out[0] if isinstance(out, tuple) else out))
        for layer in decoder_layers(task.model)
    ]
    with torch.no_grad():
        task.model(task.text.train)
    for hook in hooks:
        hook.remove()
    expected = [1 - float(((x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))).mean()) for x, y in pairwise(states)]
    assert block_influences(task)["influences"].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("method", [ShortGpt(), ShortGpt(score="angular"), Sleb(), Streamline(steps=2)])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_shortgpt_c_fewer_layers_generate_alike_with_and_without_cache(
    family: str, method: ShortGpt | Sleb | Streamline
) -> None:
    found = method(tiny_task(deep_model(family), share=0.6))
    model = shrink_(deep_model(family), found.plan, parameters=found.parameters)
    assert model.config.num_hidden_layers == 6 - len(removed(found.plan)) < 6
    assert_close(logits_with_cache(model, TOKENS), logits(model, TOKENS), rtol=1e-4, atol=1e-4)


def test_angular_windows_are_contiguous() -> None:
    gone = removed(ShortGpt(score="angular")(tiny_task(deep_model(), share=0.5)).plan)
    assert gone == list(range(gone[0], gone[0] + len(gone)))


@pytest.mark.parametrize("family", ["llama", "opt", "gemma3_text"])
def test_sleb_l1_skipping_a_layer_that_adds_nothing_leaves_the_loss(family: str) -> None:
    model = deep_model(family, identity=3)
    assert Stack(model, TOKENS).loss_without(3) == pytest.approx(negative_log_likelihood(model, TOKENS), rel=1e-6)


@pytest.mark.parametrize("family", ["llama", "opt", "gemma3_text"])
def test_sleb_l2_skipping_and_deleting_agree(family: str) -> None:
    model, stack = deep_model(family), Stack(deep_model(family), TOKENS)
    stack.remove(4)
    stack.remove(1)
    loss = stack.loss_without(2)
    shrink_(model, tiny_task(model).without_layers([1, 2, 4]))
    assert loss == pytest.approx(negative_log_likelihood(model, TOKENS), rel=1e-3)


def test_sleb_l3_barriers_stay() -> None:
    *_, last = Sleb().plans(tiny_task(deep_model()))
    assert removed(last) == [1, 2, 3, 4]
    *_, last = Sleb(early_barrier=2, latter_barrier=2).plans(tiny_task(deep_model()))
    assert removed(last) == [2, 3]


def test_sleb_l4_removals_are_nested() -> None:
    plans = [set(removed(plan)) for plan in islice(Sleb().plans(tiny_task(deep_model())), 4)]
    assert all(fewer < more for fewer, more in pairwise(plans))


def test_sleb_removes_what_raises_the_loss_least_each_time() -> None:
    task = tiny_task(deep_model())
    gone: list[int] = []
    for plan in islice(Sleb().plans(task), 1, 3):
        losses = {}
        for layer in set(range(1, 5)) - set(gone):
            model = deep_model()
            losses[layer] = negative_log_likelihood(
                shrink_(model, task.without_layers([*gone, layer])), task.text.train
            )
        (new,) = set(removed(plan)) - set(gone)
        assert losses[new] == pytest.approx(min(losses.values()), rel=1e-3)
        gone.append(new)


def test_streamline_a_one_layer_for_one_is_exact_before_training() -> None:
    task = tiny_task(deep_model())
    layer = Streamline(steps=0)._train(task, first=2, last=2)
    own = decoder_layers(task.model)[2].state_dict()
    assert all(torch.equal(value, own[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("objective", ["mse", "llm"])
def test_streamline_b_training_lowers_the_loss_on_validation_text(objective: Literal["mse", "llm"]) -> None:
    lines: list[str] = []
    task = tiny_task(deep_model(), report=lines.append)
    Streamline(objective=objective, steps=60, learning_rate=3e-3)._train(task, first=1, last=3)
    before, after = lines[-1].rpartition("split ")[2].split(" -> ")
    assert float(after) < float(before)


@pytest.mark.parametrize("length", [1, 2, 4])
def test_streamline_c_window_is_the_best_by_brute_force(length: int) -> None:
    states = [torch.randn(30, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(7)]
    scores = {
        start: float((0.5 + 0.5 * functional.cosine_similarity(states[start], states[start + length])).mean())
        for start in range(7 - length)
    }
    assert best_window(states, length=length) == max(scores, key=lambda start: scores[start])


def test_streamline_replaces_the_first_layer_of_its_window() -> None:
    found = Streamline(steps=2)(tiny_task(deep_model(), share=0.7))
    first, *gone = found.facts["replaced_layers"]
    assert removed(found.plan) == gone == list(range(first + 1, first + 1 + len(gone)))
    assert {name.split(".")[2] for name in found.parameters} == {str(first)}


@pytest.mark.parametrize("kind", ["attention", "ffn"])
@pytest.mark.parametrize("family", ["llama", "opt", "qwen3", "gemma3_text"])
def test_skipped_sublayer_equals_the_removed_one(family: str, kind: str) -> None:
    model = deep_model(family)
    with sublayer_skipped(decoder_layers(model)[2], model, kind):
        skipped = logits(model, TOKENS)
    task = tiny_task(model)
    assert_close(
        skipped,
        logits(
            shrink_(model, task.without(block for block in task.blocks if (block.layer, block.kind) == (2, kind))),
            TOKENS,
        ),
        rtol=1e-4,
        atol=1e-4,
    )
