"""Methods for networks prune encoders of texts, and Taylor scores are what the embeddings really change by."""

from dataclasses import replace

import pytest
import torch
from standins.encoders import encoder, shape, texts

from dilap import methods
from dilap.core.groups import Kept
from dilap.core.shape import UNMIXED
from dilap.methods.networks.taylor import Taylor
from dilap.models.network import difference, outputs_of
from dilap.search.limit import CostLimit
from dilap.search.network_task import NetworkTask

HEADS = "encoder.layer.0.heads"


def task(name: str = "bert", *, share: float = 0.7, multiple: int = 1) -> NetworkTask:
    limit = CostLimit(limit=share * shape(name).flops(), predict=lambda widths, _=UNMIXED, /: shape(name).flops(widths))
    model = encoder(name)
    return NetworkTask(
        model=model, base="", network=shape(name), images=texts(8).numpy(), cost_limit=limit, multiple=multiple
    )


@pytest.mark.parametrize("method", ["uniform", "magnitude", "taylor"])
@pytest.mark.parametrize("name", ["bert", "classifier"])
def test_a_method_keeps_its_limit_and_leaves_the_encoder_as_it_was(method: str, name: str) -> None:
    given = task(name)
    before = {key: value.clone() for key, value in given.model.state_dict().items()}
    plan = methods.get(method, table=methods.NETWORK_METHODS)(given)
    used = shape(name).flops(plan.counts) / given.cost_limit.limit
    assert 0.75 <= used <= 1, f"{used:.2f}"  # four heads are few to choose from
    assert all(torch.equal(value, before[key]) for key, value in given.model.state_dict().items())


def test_channels_fill_kernels_and_heads_are_whole() -> None:
    plan = methods.get("uniform", table=methods.NETWORK_METHODS)(task(multiple=8))
    channels = [count for name, count in plan.counts.items() if name.endswith("channels")]
    assert {count % 8 for count in channels} == {0}
    assert {plan.counts[name] for name in plan.counts if name.endswith("heads")} <= {2, 3}


@torch.no_grad()
def scaled(kept: Kept, factor: float) -> torch.Tensor:
    """The embeddings of the one text with the queries, keys and values of some heads times a factor."""
    model = encoder().double()
    for kind in ("query", "key", "value"):
        layer = model.encoder.layer[0].attention.self.get_submodule(kind)
        for head in kept[HEADS]:
            layer.weight[8 * head : 8 * head + 8] *= factor
            layer.bias[8 * head : 8 * head + 8] *= factor
    return outputs_of(model, texts(1))[0]


def test_taylor_scores_of_embeddings_are_their_squared_change() -> None:
    """In the mean over random vectors; 400 of them say it to about 10 %."""
    scores, step = Taylor(batch_size=1).scores(replace(task(), images=texts(1).repeat(400, 1, 1).numpy()))[HEADS], 1e-5
    for head in (0, 3):
        up, down = (scaled({HEADS: (head,)}, factor) for factor in (1 + step, 1 - step))
        change = ((up - down) / (2 * step)).square().sum().item()
        assert scores[head].item() == pytest.approx(change, rel=0.3)


def test_the_difference_of_embeddings_is_1_less_their_cosine() -> None:
    one, other = (torch.nn.functional.normalize(torch.randn(3, 32), dim=1) for _ in range(2))
    wanted = 1 - (one * other).sum(1).mean()
    torch.testing.assert_close(difference(encoder(), one, other), wanted)


def test_the_difference_of_logits_is_kl() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.5, 0.25]])
    found = difference(encoder("classifier"), q.log(), p.log())
    torch.testing.assert_close(found, 0.25 * torch.log(torch.tensor(2.0)))
