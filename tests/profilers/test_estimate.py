"""Estimates: a roofline of published numbers, marked as one wherever it shows."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from standins.fabricated import FINGERPRINT, TINY_LAYER, tiny_llama
from standins.models import tiny_model, tiny_tokenizer

from dilap.cli import profile, prune
from dilap.core.codec import read_json
from dilap.core.errors import InvalidInput
from dilap.core.shape import Experts, LayerWidths
from dilap.core.workload import Workload
from dilap.models.load import save_checkpoint
from dilap.profilers.devices import device as devices
from dilap.profilers.devices.device import Reach
from dilap.profilers.tables.roofline import estimated_fingerprint, roofline

ARCHITECTURE = tiny_llama(TINY_LAYER, TINY_LAYER)
PEAK = Reach(share=1.0, operator_seconds=0.0)
DEVICE = replace(devices.get("s23"), bytes_per_second=1e9, flops_per_second=1e9, reach=(PEAK, PEAK))
SHORT = ("--context", "64")  # the model has 128 positions
DECODE = Workload(precision="f32", context=16)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_checkpoint(tiny_model("llama"), tiny_tokenizer(folder / "words"), folder / "tiny")
    return folder / "tiny"


def call(main: Callable[[], None], *arguments: object) -> int:
    sys.argv = ["dilap", *map(str, arguments)]
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


def test_a_decode_is_bound_by_what_it_reads() -> None:
    model = roofline(ARCHITECTURE, DECODE, replace(DEVICE, flops_per_second=1e15), cache_bits=16.0)
    assert model.ffn_seconds(TINY_LAYER.num_channels) == pytest.approx(
        4 * ARCHITECTURE.ffn_parameters(TINY_LAYER) / 1e9
    )


def test_a_slow_processor_is_bound_by_what_it_computes() -> None:
    model = roofline(ARCHITECTURE, DECODE, replace(DEVICE, bytes_per_second=1e15), cache_bits=16.0)
    assert model.ffn_seconds(TINY_LAYER.num_channels) == pytest.approx(
        2 * ARCHITECTURE.ffn_parameters(TINY_LAYER) / 1e9
    )


EXPERTS = replace(
    ARCHITECTURE,
    experts=Experts(num_channels=16, num_active=2, normed=True),
    layers=(replace(TINY_LAYER, num_channels=96),) * 2,
)


def test_a_token_takes_as_long_with_fewer_experts_but_for_the_router() -> None:
    model = roofline(EXPERTS, DECODE, replace(DEVICE, flops_per_second=1e15), cache_bits=16.0)
    row = 4 * EXPERTS.hidden_size / 1e9  # of the router, for one expert
    whole = 4 * EXPERTS.active_ffn_parameters(EXPERTS.layers[0]) / 1e9
    assert [model.ffn_seconds(channels) for channels in (96, 2 * 16, 0)] == pytest.approx([whole, whole - 4 * row, 0])


def test_fewer_experts_are_not_offered_where_a_token_takes_as_long() -> None:
    layers = (replace(TINY_LAYER, num_channels=6 * 2048),) * 2
    wide = replace(EXPERTS, experts=Experts(num_channels=2048, num_active=2, normed=True), layers=layers)
    device = replace(DEVICE, flops_per_second=1e15)
    levels = [((0,), ""), ((2,), ""), ((4,), ""), ((6,), "")]
    prompt = Workload(precision="f32", phase="prefill", prompt_tokens=16)
    of_token, of_prompt = (roofline(wide, one, device, cache_bits=16.0) for one in (DECODE, prompt))
    assert of_token.cheaper(wide.blocks[1], levels) == [levels[3], levels[0]]
    assert of_prompt.cheaper(wide.blocks[1], levels) == levels[::-1]


def test_a_prompt_reads_all_experts_and_computes_with_few() -> None:
    prompt = Workload(precision="f32", phase="prefill", prompt_tokens=16)
    reading, computing = (
        roofline(EXPERTS, prompt, one, cache_bits=16.0).ffn_seconds(96)
        for one in (replace(DEVICE, flops_per_second=1e15), replace(DEVICE, bytes_per_second=1e15))
    )
    assert reading == pytest.approx(4 * EXPERTS.ffn_parameters(EXPERTS.layers[0]) / 1e9)
    assert computing == pytest.approx(2 * 16 * EXPERTS.active_ffn_parameters(EXPERTS.layers[0]) / 1e9)


def test_a_narrower_layer_costs_less() -> None:
    model = roofline(ARCHITECTURE, DECODE, DEVICE, cache_bits=16.0)
    narrow = LayerWidths(num_heads=2, num_kv_heads=1, num_channels=32)
    assert model.predict([narrow, narrow]) < model.predict([TINY_LAYER, narrow]) < model.predict([TINY_LAYER] * 2)


def test_an_estimate_is_of_no_machine() -> None:
    fingerprint = estimated_fingerprint(DEVICE, backend="llamacpp")
    assert "runtime_version: estimated / 1" in fingerprint.differences(FINGERPRINT)


def test_operators_take_a_while_however_narrow_a_layer_is() -> None:
    device = replace(DEVICE, bytes_per_second=1e15, flops_per_second=1e15)
    model = roofline(ARCHITECTURE, DECODE, device, cache_bits=16.0, reach=Reach(share=0.5, operator_seconds=1e-6))
    narrow = LayerWidths(num_heads=2, num_kv_heads=1, num_channels=1)
    assert model.predict([narrow, narrow]) == pytest.approx(5 * 8e-6, rel=0.01)  # two layers and the head
    assert model.predict([replace(narrow, num_channels=0)] * 2) == pytest.approx(3 * 8e-6, rel=0.01)


def test_half_the_share_takes_twice_as_long() -> None:
    models = [
        roofline(ARCHITECTURE, DECODE, DEVICE, cache_bits=16.0, reach=Reach(share=share, operator_seconds=0.0))
        for share in (1.0, 0.5)
    ]
    full, half = (one.predict(ARCHITECTURE.layers) for one in models)
    assert half == pytest.approx(2 * full)


def test_a_device_without_published_numbers_cannot_be_estimated() -> None:
    with pytest.raises(InvalidInput, match="no bandwidth and compute"):
        roofline(ARCHITECTURE, DECODE, replace(DEVICE, bytes_per_second=None), cache_bits=16.0)


def test_estimated_costs_say_so(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(profile.main, "--device", "s23", "--estimate", *SHORT, "--model", checkpoint) == 0
    first = capsys.readouterr().out.splitlines()[0]
    found = re.fullmatch(r"ESTIMATED, measured on no device: dense (\S+) ms, and between (\S+) and (\S+)", first)
    assert found is not None
    assert float(found[2]) < float(found[1]) < float(found[3])


def test_estimated_costs_say_so_in_json(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(profile.main, "--device", "jetson_gpu", "--estimate", *SHORT, "--model", checkpoint, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["estimated"], found["method"], found["table"]) == (True, "estimated", None)
    assert found["range_seconds"][0] < found["range_seconds"][1]


def test_parts_are_estimated_in_several_precisions(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--device", "jetson_cpu", "--backend", "llamacpp", "--estimate", *SHORT, "--model", checkpoint]
    assert call(profile.main, *asked, "--precision", "f16,f32", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    narrow, own = (one["seconds"] for one in found["ffn"][1:])  # a network of one channel has little but its operators
    assert found["precisions"]["f32"]["ffn"][-1]["seconds"] - narrow == pytest.approx(2 * (own - narrow), rel=0.05)
    assert call(profile.main, *asked, "--precision", "f16,q3") == 2
    assert "unknown precision 'q3'" in capsys.readouterr().err


def test_an_estimate_writes_no_table(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", tmp_path / "table.jsonl"]
    assert call(profile.main, "--device", "s23", "--estimate", *SHORT, "--model", checkpoint, *out) == 2
    assert "measures nothing" in capsys.readouterr().err


def test_a_prune_job_without_the_device_is_marked_throughout(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(" ".join(f"the {word} of line {word * 7}" for word in range(4000)))
    text = [
        "--calib",
        corpus,
        "--eval-text",
        corpus,
        "--calib-length",
        "32",
        "--evaluations",
        "2",
        "--step",
        "0.3",
        *SHORT,
    ]
    target = ["--target", "jetson_cpu", "--backend", "llamacpp", "--precision", "f32", "--estimate"]
    out = tmp_path / "run"
    assert call(prune.main, *target, "--budget", "80%", "--model", checkpoint, "--out", out, *text) == 0
    printed = capsys.readouterr().out
    assert "ESTIMATED latency" in printed
    assert "measured on no device" in printed
    shown, low, high = re.search(r"an estimate .*: (\S+) ms \((\S+) to (\S+)\) a token", printed).groups()  # type: ignore[union-attr]
    assert float(low) < float(shown) < float(high)
    assert re.search(r"^range +\S+-\S+ +\S+-\S+$", printed, re.MULTILINE)
    result = read_json(out / "result.json")
    assert (result["status"], result["speedup_shown"]) == ("estimated", False)
    assert {result[side]["measurement"]["status"] for side in ("dense", "pruned")} == {"estimated"}
    assert not (out / "table.jsonl").exists()


def test_without_a_link_the_error_names_the_commands(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(prune.main, "--target", "jetson_cpu", "--budget", "70%", "--model", checkpoint) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(words in last for words in ("devices.toml", "dilap-profile --check jetson_cpu", "--estimate"))
