"""What a job will take is told from the shape of its model, and its parts are what the stages really hold."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from standins.fake_job import FAST, call
from standins.models import library_of, random_tokens, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from dilap import backends
from dilap.cli import compare, prune
from dilap.core.space import Choice, Level, Space
from dilap.core.workload import Budget
from dilap.job import forecast
from dilap.job.forecast import Machine, Need
from dilap.job.options import JobOptions
from dilap.job.shortages import lacking, shortages
from dilap.models.anatomy import architecture_of
from dilap.models.compute_device import HOST
from dilap.models.load import load, shape_of
from dilap.models.recovery.options import RecoveryOptions

OPTIONS = JobOptions(budget=Budget(fraction=0.7))
SMALL = Machine(device=HOST, flops_per_second=1e12, device_bytes=10**9, host_bytes=10**9)


def needs(options: JobOptions = OPTIONS) -> dict[str, Need]:
    found = forecast.needs_of(architecture_of(tiny_model("llama")), options, weight_bytes=4, is_host=True)
    return {one.stage: one for one in found}


def test_shape_is_that_of_the_loaded_model(checkpoint: Path) -> None:
    model = load(str(checkpoint)).model
    assert shape_of(str(checkpoint)) == (architecture_of(model), 4)


def test_shape_needs_no_weights(checkpoint: Path) -> None:
    wanted = shape_of(str(checkpoint))
    (checkpoint / "model.safetensors").unlink()
    assert shape_of(str(checkpoint)) == wanted


def test_library_has_the_bytes_that_are_told() -> None:
    model = tiny_model("llama")
    architecture = architecture_of(model)
    capabilities = backends.get("llamacpp").capabilities(architecture, precision=OPTIONS.workload.precision)
    choices = [
        Choice(block=block, levels=tuple(Level(counts=one, cost=0.0) for one in capabilities.levels(block)[::-1]))
        for block in architecture.blocks
    ]
    space = Space(architecture=architecture, choices=tuple(choices), fixed_cost=0.0)
    library = library_of(model, space, random_tokens(2, 16))
    assert needs()["level library"].file_bytes == sum(one.weight.nbytes for levels in library for one in levels)


def test_forward_has_the_flops_that_torch_counts() -> None:
    model, tokens = tiny_model("llama"), random_tokens(4, 8)  # in longer ones attention counts, which torch leaves out
    options = replace(OPTIONS, calibration=replace(OPTIONS.calibration, sequence_length=8))
    shape = forecast._Shape(architecture=architecture_of(model), weight_bytes=4, options=options)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.model(input_ids=tokens, use_cache=False)
    assert shape.forward(tokens.numel()) == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_recovery_needs_more_where_more_is_trained() -> None:
    full, lora = (needs(replace(OPTIONS, recovery=RecoveryOptions(mode=mode)))["recover"] for mode in ("full", "lora"))
    assert full.device_bytes > lora.device_bytes
    assert full.flops > lora.flops


def test_stages_of_a_method_without_levels_are_fewer() -> None:
    assert list(needs(replace(OPTIONS, method="flap"))) == [
        "load the model", "calibration text", "prune", "score both models",
    ]  # fmt: skip


def test_what_does_not_fit_is_said() -> None:
    large = [Need(stage="search", device_bytes=3 * 10**9), Need(stage="refit", device_bytes=2 * 10**9)]
    assert lacking(large, SMALL) == ["the stage 'search' needs 3.0 GB of memory, and there are 1.0 GB"]
    assert lacking([Need(stage="search", device_bytes=10**6)], SMALL) == []


def test_weights_that_stay_in_their_files_need_no_memory(checkpoint: Path) -> None:
    options = replace(
        OPTIONS, model=str(checkpoint), method="flap", calibration=replace(OPTIONS.calibration, source="a")
    )
    needs_in, _ = forecast.of_job(replace(options, compute="cpu"))
    loading = needs_in(options)[0]
    assert 0 < loading.mapped_bytes < loading.device_bytes
    room = loading.device_bytes - loading.mapped_bytes
    assert lacking([loading], replace(SMALL, device_bytes=room, host_bytes=room)) == []
    assert lacking([replace(loading, mapped_bytes=0)], replace(SMALL, device_bytes=room, host_bytes=room))


def test_what_would_fit_is_said() -> None:
    options = replace(OPTIONS, method="flap", recovery=RecoveryOptions(mode="full"))
    needs_in = partial(forecast.needs_on, HOST, architecture_of(tiny_model("llama")), weight_bytes=4)
    found = needs(options)
    enough = max(one.device_bytes + one.host_bytes for one in found.values())
    lora = needs(replace(options, recovery=RecoveryOptions(mode="lora", checkpoint_activations=True)))["recover"]
    for room, words in (
        (enough, []),
        (lora.device_bytes + lora.host_bytes, ["it would fit with --recover lora --recover-checkpoint-activations"]),
        (1, ["no option helps: take a smaller model, or more memory"]),
    ):
        machine = replace(SMALL, device_bytes=room, host_bytes=room)
        assert shortages(options, needs_in, machine)[1:] == words


def test_dry_run_prints_all_stages_and_does_nothing(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--target", "host_cpu", "--budget", "70%", "--model", checkpoint, "--out", tmp_path / "out"]
    assert call(prune.main, *asked, *FAST, "--recover", "full", "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:16].strip() for line in lines[1:-2]] == [
        "load the model", "calibration text", "level library", "search", "refit", "score both model", "recover",
    ]  # fmt: skip
    assert list(tmp_path.glob("*out*")) == []


def test_dry_run_of_a_comparison_tells_every_method_and_does_nothing(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--target", "host_cpu", "--budget", "70%", "60%", "--model", checkpoint, "--out", tmp_path / "out"]
    asked += ["--methods", "dilap", "flap", "--context", "64", "--calib-length", "32", "--dry-run"]
    assert call(compare.main, *asked) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:4]] == [["dilap", "2"], ["flap", "2"], ["all", "4"]]
    assert call(compare.main, *asked, "--shard", "2/3") == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:3]] == [["flap", "1"], ["all", "1"]]
    assert call(compare.main, *asked, "--shard", "5/9") == 0
    assert "none for this one" in capsys.readouterr().out
    assert list(tmp_path.glob("*out*")) == []
