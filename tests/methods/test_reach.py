"""Four fifths of the weights: every method removes as many as that, also of grouped heads with few KV heads."""

from dataclasses import replace

import pytest
from standins.models import tiny_model, tiny_task
from standins.quick_methods import NAMES, method

from dilap.search.weights import WeightCosts

# peft asks transformers by the old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
# These choose among levels, and every sublayer has the one of its removal.
BY_LEVELS = ("dilap", "prune_then_quantise", "uniform", "layer_error", "ziplm", "puzzle")


@pytest.mark.parametrize("name", [name for name in NAMES if name not in BY_LEVELS])
def test_four_fifths_of_the_weights_can_be_removed(name: str) -> None:
    model = tiny_model("llama", num_hidden_layers=10, hidden_size=32, intermediate_size=32, head_dim=8)
    task = tiny_task(model)
    weights = WeightCosts(architecture=task.architecture).predict
    dense, fixed = weights(task.architecture.layers), task.space.fixed_cost  # a microsecond a weight
    limit = replace(task.cost_limit, limit=fixed + 0.2e-6 * dense)
    found = method(name)(replace(task, cost_limit=limit))
    assert 0.05 * dense < weights(found.plan.all_widths()) <= 0.2 * dense * (1 + 1e-9)
