"""What a job of another network will take is told without running it, and its parts are what the stages really hold."""

from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch
from standins.fake_job import call
from standins.networks import INPUT, network, shape
from transformers import ViTImageProcessorPil

from dilap.cli import prune
from dilap.core.workload import Budget
from dilap.job.forecast import Need
from dilap.job.network_forecast import activations, needs_of
from dilap.job.network_options import ExampleOptions, NetworkOptions
from dilap.methods import NETWORK_METHODS
from dilap.models.convolutional.load import save_network
from dilap.models.distil_network import NetworkRecovery
from dilap.models.network import outputs_of

OPTIONS = NetworkOptions(budget=Budget(fraction=0.7), examples=ExampleOptions(source="photos"))


def needs(**changes: object) -> dict[str, Need]:
    return {one.stage: one for one in needs_of(shape("resnet_basic"), replace(OPTIONS, **changes))}  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["resnet_bottleneck", "regnet", "mobilenet_v2", "convnext", "vit"])
def test_a_backward_pass_keeps_about_what_is_told(name: str) -> None:
    model, kept = network(name).eval().requires_grad_(True), dict[int, int]()

    def pack(one: torch.Tensor) -> torch.Tensor:
        kept[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
        return one

    weights = {one.untyped_storage().data_ptr() for one in (*model.parameters(), *model.buffers())}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one):
        outputs = outputs_of(model, torch.zeros(8, *INPUT.size))
    assert outputs[0].requires_grad
    held = sum(size for place, size in kept.items() if place not in weights)
    assert 0.6 < activations(shape(name), 8) / held < 1.3


@pytest.mark.parametrize("method", NETWORK_METHODS)
def test_every_method_needs_the_network_and_its_examples(method: str) -> None:
    found, resnet = needs(method=method), shape("resnet_basic")
    assert list(found) == ["load the model", "prune", "score both models"]
    assert OPTIONS.examples is not None
    examples = 4 * prod(INPUT.size) * (OPTIONS.examples.most_train + OPTIONS.examples.most_validation)
    assert found["prune"].device_bytes >= 4 * resnet.num_parameters + examples


def test_a_search_and_recovery_take_more_than_a_ranking() -> None:
    assert needs(method="dilap")["prune"].flops > needs(method="taylor")["prune"].flops > 0
    recovered = needs(recovery=NetworkRecovery(mode="full"))["recover"]
    assert recovered.flops == 4 * 60 * 32 * shape("resnet_basic").flops()


def test_dry_run_prints_all_stages_and_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "resnet"
    save_network(network("resnet_basic"), folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    asked = [
        "--target",
        "host_cpu",
        "--budget",
        "70%",
        "--calib",
        tmp_path / "photos",
        "--recover",
        "full",
        "--dry-run",
    ]
    assert call(prune.main, folder, *asked) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:20].strip() for line in lines[1:-1]] == ["load the model", "prune", "score both models", "recover"]
    assert [one.name for one in tmp_path.iterdir()] == ["resnet"]
