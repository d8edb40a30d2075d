"""What a device is told about building an engine."""

from dataclasses import replace
from pathlib import Path

import pytest
from standins.simulated_tensorrt import RECIPE

from dilap.backends.tensorrt.recipe import RECIPE_FILE, InputRange, Recipe, read_recipe
from dilap.core.codec import encode, file_sha256, write_json
from dilap.core.errors import Mismatch, Unsupported
from dilap.core.workload import Workload


def span(recipe: Recipe, phase: str, name: str, workload: Workload | None = None) -> InputRange:
    return next(one for one in recipe.profiles(workload) if one.phase == phase).inputs[name]


def test_a_recipe_survives_a_round_trip(tmp_path: Path) -> None:
    write_json(tmp_path / RECIPE_FILE, encode(RECIPE))
    assert read_recipe(tmp_path) == RECIPE


def test_decoding_takes_one_token_after_any_number() -> None:
    assert span(RECIPE, "decode", "input_ids").maximum == (1, 1)
    assert span(RECIPE, "decode", "past_key_values.0.key").minimum == (1, 2, 0, 16)
    assert span(RECIPE, "decode", "past_key_values.0.key").maximum == (1, 2, 1023, 16)


def test_a_prefill_takes_any_number_after_none() -> None:
    assert span(RECIPE, "prefill", "position_ids").maximum == (1, 1024)
    assert span(RECIPE, "prefill", "past_key_values.1.key").maximum == (1, 1, 0, 16)


def test_a_prefill_may_keep_every_row_of_logits() -> None:
    assert span(RECIPE, "prefill", "logits_to_keep") == InputRange(minimum=(1,), optimum=(1,), maximum=(1024,))


def test_kernels_are_tuned_for_the_workload() -> None:
    workload = Workload(context=700, prompt_tokens=33)
    assert span(RECIPE, "decode", "past_key_values.0.key", workload).optimum == (1, 2, 700, 16)
    assert span(RECIPE, "prefill", "input_ids", workload).optimum == (1, 33)


def test_without_a_reference_only_the_timed_phase_is_built() -> None:
    probe = replace(RECIPE, reference=None)
    assert [one.phase for one in probe.profiles(Workload(phase="prefill"))] == ["prefill"]


def test_short_contexts_bound_the_tuned_shapes() -> None:
    short = replace(RECIPE, max_past=15, max_prompt=16)
    assert span(short, "decode", "past_key_values.0.key").optimum == (1, 2, 15, 16)


@pytest.mark.parametrize(
    ("workload", "words"),
    [
        (Workload(context=1024), "at most 1023 tokens, got 1024"),
        (Workload(phase="prefill", prompt_tokens=1025), "at most 1024 tokens, got 1025"),
        (Workload(batch=2), "batch 1, got batch 2"),
    ],
)
def test_a_workload_beyond_the_limits_is_unsupported(workload: Workload, words: str) -> None:
    with pytest.raises(Unsupported, match=words):
        RECIPE.profiles(workload)


def test_a_range_must_ascend() -> None:
    with pytest.raises(ValueError, match="ascend"):
        InputRange(minimum=(1, 5), optimum=(1, 4), maximum=(1, 8))


@pytest.mark.parametrize("change", [{"runtime": "TensorRT 11"}, {"gpu": "Thor sm_101"}])
def test_an_engine_is_for_one_runtime_and_one_gpu(change: dict[str, str]) -> None:
    bound = {"runtime": "TensorRT 10.3.0", "gpu": "Orin sm_87"}
    profiles = RECIPE.profiles()
    assert RECIPE.engine_key(profiles, **bound) != RECIPE.engine_key(profiles, **bound | change)


def test_an_engine_is_for_one_content() -> None:
    other = replace(RECIPE, files={"model.onnx": "1" * 64})
    keys = {one.engine_key(one.profiles(), runtime="TensorRT 10.3.0", gpu="Orin") for one in (RECIPE, other)}
    assert len(keys) == 2


def test_the_files_of_the_recipe_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"model")
    replace(RECIPE, files={path.name: file_sha256(path)}).require_files(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(Mismatch, match=r"model\.onnx: missing"):
        RECIPE.require_files(tmp_path)
