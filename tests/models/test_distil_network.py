"""Distillation of image networks."""

import copy

import numpy as np
import pytest
import torch
from standins.networks import network, random_pixels
from torch import nn

from dilap.core.sqnr import kl_divergence
from dilap.models.convolutional.recalibration import recalibrate_
from dilap.models.distil_network import NetworkRecovery, cropped, distil_network
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


def test_types_and_the_caller_s_settings_stay() -> None:
    model, images = network("plain").half(), random_pixels(4)
    model.requires_grad_(False)
    before = {name: value.dtype for name, value in model.state_dict().items()}
    distil_network(model, network("plain"), images, NetworkRecovery(mode="full", steps=2))
    assert {name: value.dtype for name, value in model.state_dict().items()} == before
    assert not any(one.requires_grad or one.grad is not None for one in model.parameters())
    assert not any(module.training for module in model.modules())


def test_statistics_of_batch_norms_are_those_of_the_trained_network() -> None:
    model, images = network("plain"), random_pixels(8)
    distil_network(model, network("plain"), images, NetworkRecovery(mode="full", steps=2))
    found = {name: value.clone() for name, value in model.named_buffers()}
    recalibrate_(model, images)
    assert all(torch.equal(value, found[name]) for name, value in model.named_buffers())


def test_batch_norms_see_the_statistics_of_their_batch() -> None:
    """However far the statistics are that they have at first."""
    losses = []
    for shift in (0.0, 100.0):
        model = network("plain")
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.get_buffer("running_mean").add_(shift)
        losses += distil_network(model, network("plain"), random_pixels(8), NetworkRecovery(mode="full", steps=1))
    assert losses[0] == losses[1]


def test_no_example_is_alone_in_a_batch_norm() -> None:
    """Nine at once are two times eight or fewer; the network's last norm sees one position of each."""
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(3), nn.Linear(3, 2))
    options = NetworkRecovery(mode="full", steps=1, batch_images=9)
    assert len(distil_network(model, copy.deepcopy(model), random_pixels(9), options)) == 1
