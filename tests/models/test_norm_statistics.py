"""Statistics of batch norms are those of the dense network's training, changed as measured."""

import copy

import torch
from standins.networks import network, random_pixels, shape
from torch import nn

from dilap.core.groups import indices_kept
from dilap.models.convolutional.cut import cut_network_
from dilap.models.convolutional.norm_statistics import NormStatistics
from dilap.models.convolutional.proof import halves, masked_

IMAGES = random_pixels(8, seed=3)


def test_those_of_the_dense_network_stay() -> None:
    model = network("resnet_basic")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    NormStatistics.of(model, IMAGES)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    NormStatistics.of(model, IMAGES).put_(model)
    for name, value in model.state_dict().items():
        if "running" in name:
            torch.testing.assert_close(value, before[name])


def test_a_norm_follows_what_it_sees() -> None:
    """Half of the inputs make the standard deviation half as large, and the mean."""
    norm = nn.BatchNorm2d(3)
    norm.running_mean, norm.running_var = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0])
    model = nn.Sequential(nn.Conv2d(3, 3, 1, groups=3, bias=False), norm).eval()
    weight = model.get_parameter("0.weight")
    nn.init.ones_(weight)
    norms = NormStatistics.of(model, IMAGES)
    nn.init.constant_(weight, 0.5)
    norms.put_(model)
    torch.testing.assert_close(norm.running_var, torch.tensor([1.0, 1.25, 1.5]), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(norm.running_mean, torch.tensor([0.5, 1.0, 1.5]), rtol=1e-3, atol=1e-4)


def test_those_of_a_cut_network_are_those_of_the_masked_one() -> None:
    model, kept = network("lite"), halves(shape("lite"))
    norms = NormStatistics.of(model, IMAGES)
    masked = masked_(copy.deepcopy(model), shape("lite"), kept)
    cut = cut_network_(copy.deepcopy(model), shape("lite"), kept)
    indices = indices_kept(shape("lite").groups, kept)
    norms.put_(masked)
    norms.put_(cut, indices)
    for name, value in cut.named_buffers():
        if "running" in name:
            stays = torch.from_numpy(indices[name, 0])
            torch.testing.assert_close(value, masked.get_buffer(name)[stays], rtol=1e-4, atol=1e-5)
