"""Distillation of image networks."""

import copy

import numpy as np
import pytest
import torch
from standins.networks import network, random_pixels, shape

from dilap.core.plan import full_plan
from dilap.core.sqnr import kl_divergence
from dilap.models.distil_network import NetworkRecovery, cropped, distil_network
from dilap.models.inner_states import inputs_seen, states_apart, states_of
from dilap.models.network import TorchNetwork


@torch.no_grad()
def disturbed(model: torch.nn.Module) -> torch.nn.Module:
    """A copy whose weights are a little off."""
    generator, made = torch.Generator().manual_seed(0), copy.deepcopy(model)
    for parameter in made.parameters():
        parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
    return made


def test_a_network_learns_what_the_dense_one_says() -> None:
    dense, images = network("lite"), random_pixels(16)
    answers = TorchNetwork(dense).outputs(images)
    student = disturbed(dense)
    before = kl_divergence(answers, TorchNetwork(student).outputs(images))
    whole = NetworkRecovery(mode="full", steps=20, batch_images=16, least_area=1.0)
    losses = distil_network(student, dense, images, whole)
    assert losses[0] == pytest.approx(before, rel=0.2)  # half of the images are mirrored
    assert kl_divergence(answers, TorchNetwork(student).outputs(images)) < 0.7 * before


def test_a_crop_has_the_size_and_the_range_of_its_image() -> None:
    images = random_pixels(4)
    found = cropped(images, np.random.default_rng(0), 0.3)
    assert found.shape == images.shape
    assert images.min() <= float(found.min()) < float(found.max()) <= images.max()


def test_a_crop_of_the_whole_image_is_itself_or_its_mirror_image() -> None:
    images = random_pixels(4)
    found = cropped(images, np.random.default_rng(0), 1.0).numpy()
    same = [np.allclose(one, image, atol=1e-5) for one, image in zip(found, images, strict=True)]
    mirrored = [np.allclose(one[:, :, ::-1], image, atol=1e-5) for one, image in zip(found, images, strict=True)]
    assert {True, False} == set(same)
    assert [not one for one in same] == mirrored


def test_states_within_are_learned_beside_the_outputs() -> None:
    dense, images = network("lite"), random_pixels(16)
    student, states = disturbed(dense), states_of(full_plan(shape("lite"), base=""))

    def apart() -> float:
        with inputs_seen(student, states) as found, inputs_seen(dense, states) as wanted:
            TorchNetwork(student).outputs(images)
            TorchNetwork(dense).outputs(images)
            return float(torch.stack(states_apart(states, found, wanted)).mean())

    before = apart()
    options = NetworkRecovery(mode="full", steps=20, batch_images=16, least_area=1.0)
    distil_network(student, dense, images, options, states=states)
    assert apart() < 0.7 * before


def test_statistics_of_batch_norms_and_the_caller_s_settings_stay() -> None:
    model, images = network("plain").half(), random_pixels(4)
    model.requires_grad_(False)
    before = {name: value.clone() for name, value in model.named_buffers()}
    distil_network(model, network("plain"), images, NetworkRecovery(mode="full", steps=2))
    assert {one.dtype for one in model.parameters()} == {torch.float16}
    assert not any(one.requires_grad for one in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
