"""What torch computes on is chosen in one place."""

import re
from pathlib import Path

import pytest
import torch
from standins import ROOT
from standins.fake_gpu import fake_gpu
from standins.models import random_tokens, tiny_model

from dilap.core.errors import InvalidInput
from dilap.models.compute_device import HOST, compute_device, has_fast_bf16, widest_float
from dilap.models.load import load
from dilap.models.statistics import layer_statistics

_NAMES = re.compile(r"""["'](cpu|cuda|xpu|mps)(:\d+)?["']|\.(cpu|cuda)\(|torch\.(cpu|cuda|xpu|mps)\b""")
_USES_TORCH = re.compile(r"^\s*(import|from) torch\b", re.MULTILINE)


def test_no_other_source_names_a_device_of_torch() -> None:
    rooms = (ROOT / room for room in ("dilap", "backends", "export", "profilers"))
    sources = [path for room in rooms for path in room.rglob("*.py") if path.name != "compute_device.py"]
    texts = {path: path.read_text(encoding="utf-8") for path in sources}
    naming = [path.name for path, text in texts.items() if _USES_TORCH.search(text) and _NAMES.search(text)]
    assert len(texts) > 200
    assert not naming


def test_auto_is_the_accelerator_where_there_is_one() -> None:
    assert compute_device() == HOST
    with fake_gpu() as gpu:
        assert compute_device() == gpu
        assert compute_device("cpu") == HOST


@pytest.mark.parametrize("name", ["fakegpu", "fakegpu:0"])
def test_an_accelerator_is_found_with_and_without_its_number(name: str) -> None:
    with fake_gpu() as gpu:
        assert compute_device(name) == gpu


@pytest.mark.parametrize("name", ["cuda:7", "fakegpu:1", "gpu", ""])
def test_device_that_is_not_there_is_refused_with_those_that_are(name: str) -> None:
    with fake_gpu(), pytest.raises(InvalidInput, match=f"no device '{name}' to compute on here; it has fakegpu:0, cpu"):
        compute_device(name)


def test_accelerator_without_f64_and_bf16_computes_in_f32() -> None:
    with fake_gpu(has_f64=False) as gpu:
        assert widest_float(gpu) == torch.float32
        assert not has_fast_bf16(gpu)
        steps = layer_statistics(tiny_model("llama").to(gpu), random_tokens(2, 8))
        assert next(steps).statistics["ffn_out"].variance.device == gpu


def test_model_is_loaded_onto_the_device(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # the made-up device is known in this thread alone
    here = load(str(checkpoint), compute="cpu")
    with fake_gpu() as gpu:
        there = load(str(checkpoint))
        assert {one.device for one in there.model.parameters()} == {gpu}
        assert there.digest == here.digest
