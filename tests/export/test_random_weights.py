"""What models that are only timed are made of."""

import numpy as np
import pytest

from dilap.export.random_weights import RandomWeights

SHAPE = (512, 300)  # more numbers than are drawn


def test_tensors_of_one_shape_differ() -> None:
    random = RandomWeights(0)
    names = [f"layers.{layer}.up.weight" for layer in range(30)]
    assert len({random.weights(name, SHAPE).tobytes() for name in names}) == 30
    assert len({random.bytes(name, SHAPE).tobytes() for name in names}) == 30


def test_a_tensor_is_the_same_whenever_it_is_asked_for() -> None:
    first, second = RandomWeights(0), RandomWeights(0)
    first.weights("other", SHAPE)
    np.testing.assert_array_equal(first.weights("up", SHAPE), second.weights("up", SHAPE))


def test_weights_are_as_large_as_a_trained_models() -> None:
    assert RandomWeights(0).weights("up", SHAPE).std() == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize(("name", "value"), [("input_norm.weight", 1), ("input_norm.bias", 0)])
def test_norms_keep_the_size_of_what_they_get(name: str, value: float) -> None:
    np.testing.assert_array_equal(RandomWeights(0).weights(name, (8,)), value)
