"""How many tokens a model holds: exports are checked within it, and longer work is refused before anything runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from standins.fake_job import call
from standins.models import needs_llamacpp, tiny_model, tiny_tokenizer
from transformers import PreTrainedConfig

from dilap import backends, export
from dilap.backends import readers
from dilap.cli import compare, profile, prune
from dilap.core.errors import InvalidInput, Unsupported
from dilap.core.workload import Workload
from dilap.models.anatomy import architecture_of, stand_in_numerics
from dilap.models.context import max_tokens_of, require_context
from dilap.models.load import save_checkpoint

FACTORS = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
LONGROPE: dict[str, Any] = {
    "rope_parameters": {"rope_type": "longrope", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0, **FACTORS},
    "original_max_position_embeddings": 96,
}
ALL_SLIDE = {"use_sliding_window": True, "max_window_layers": 0}


def config(family: str, **changes: Any) -> PreTrainedConfig:
    return tiny_model(family, **changes).config


@pytest.mark.parametrize(
    ("family", "changes", "holds"),
    [
        ("mistral", {"sliding_window": 16}, 16),
        ("mistral", {"sliding_window": None}, 128),
        ("mistral", {"sliding_window": 4096}, 128),
        ("ministral", {"sliding_window": 16}, 16),
        ("qwen2", {"sliding_window": 16, **ALL_SLIDE}, 16),
        ("qwen3", {"sliding_window": 16, **ALL_SLIDE}, 16),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 3}, 128),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": False}, 128),
        ("llama", {"sliding_window": 16}, 128),
        ("opt", {}, 128),
        ("phi3", {"sliding_window": 16}, 16),
        ("phi3", LONGROPE, 96),
        ("phi3", {**LONGROPE, "sliding_window": 16}, 16),
        ("gemma2", {"sliding_window": 16}, 128),  # its exporters are told which layers slide
        ("gemma3_text", {"sliding_window": 16, "layer_types": ["sliding_attention"] * 3}, 128),
    ],
)
def test_model_holds_its_positions_or_its_window_or_its_short_texts(
    family: str, changes: dict[str, Any], holds: int
) -> None:
    assert max_tokens_of(config(family, **changes)) == holds


def test_model_that_holds_hardly_a_token_is_refused() -> None:
    with pytest.raises(Unsupported, match="the model sees 2 tokens at once"):
        max_tokens_of(config("mistral", sliding_window=2))


@pytest.mark.parametrize("window", [8, 31])
@pytest.mark.parametrize("backend", ["llamacpp", "onnxruntime"])
def test_model_with_a_window_shorter_than_the_samples_is_exported_and_the_artifact_says_so(
    backend: str, window: int, tmp_path: Path
) -> None:
    if reason := backends.get(backend).unavailable():
        pytest.skip(reason)
    save_checkpoint(tiny_model("mistral"), tiny_tokenizer(tmp_path / "words"), tmp_path / "model")
    model = tiny_model("mistral", sliding_window=window)
    out = tmp_path / "out"
    artifact = export.get(backend).export(model, tokenizer=tmp_path / "model", precision="f32", plan_digest="", out=out)
    assert artifact.sqnr_db is not None
    assert artifact.sqnr_db > 60
    assert f"slides over {window} tokens" in artifact.details["notes"][0]
    reader = readers.open_reader(backend, out / artifact.path, threads=1)
    assert reader.max_tokens == window
    reader.close()


DECODE, PREFILL = Workload(context=127), Workload(phase="prefill", prompt_tokens=128)


@pytest.mark.parametrize("workload", [DECODE, PREFILL])
def test_work_that_fills_the_model_is_accepted(workload: Workload) -> None:
    require_context(config("llama"), workload, runtime="llamacpp", runtime_tokens=None)


@pytest.mark.parametrize(
    ("family", "changes", "workload", "runtime_tokens", "words"),
    [
        ("llama", {}, Workload(context=128), None, "the model holds, 128 tokens; take --context 127 or less"),
        ("opt", {}, Workload(phase="prefill", prompt_tokens=129), None, "holds, 128; take --prompt-tokens 128 or less"),
        (
            "mistral",
            {"sliding_window": 16},
            DECODE,
            None,
            "the sliding window of the model holds, 16 tokens",
        ),
        ("phi3", LONGROPE, DECODE, None, "the model with its rotary frequencies of short texts holds, 96 tokens"),
        ("llama", {}, DECODE, 64, "what is made for executorch holds, 64 tokens; take --context 63 or less"),
    ],
)
def test_work_that_is_too_long_is_refused_with_the_number_that_would_do(
    family: str, changes: dict[str, Any], workload: Workload, runtime_tokens: int | None, words: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        require_context(config(family, **changes), workload, runtime="executorch", runtime_tokens=runtime_tokens)
    assert words in str(caught.value)


def test_timed_contexts_are_those_that_probe_models_hold() -> None:
    """A longer one would fail on the first probe of a table."""
    architecture = architecture_of(tiny_model("llama"))
    capabilities = backends.get("onnxruntime").capabilities(architecture, precision="int4")
    assert capabilities.max_tokens == stand_in_numerics(architecture).context_length


BUDGET = ("--target", "host_cpu", "--budget", "70%", "--context", "64", "--calib-length", "8")
TOO_LONG: dict[str, tuple[Callable[[], None], list[Any], str]] = {
    "prune": (prune.main, [*BUDGET, "--context", 1000], "take --context 127 or less"),
    "prompt": (prune.main, [*BUDGET, "--phase", "prefill", "--prompt-tokens", 129], "take --prompt-tokens 128 or less"),
    "ratio": (prune.main, ["--target", "host_cpu", "--ratio", "0.3"], "take --context 127 or less"),
    "estimate": (prune.main, [*BUDGET, "--estimate", "--context", 1000], "take --context 127 or less"),
    "compare": (compare.main, [*BUDGET, "--methods", "magnitude", "--context", 1000], "take --context 127 or less"),
    "profile": (profile.main, ["--device", "host_cpu", "--context", 1000], "take --context 127 or less"),
    "calibration": (prune.main, [*BUDGET, "--calib-length", 129], "take --calib-length 128 or less"),
    "pattern": (prune.main, ["--pattern", "2:4", "--calib-length", 129], "take --calib-length 128 or less"),
    "few words": (prune.main, [*BUDGET, "--calib", "short.txt"], "give more text, or take a smaller --calib-length"),
    "no text": (prune.main, [*BUDGET, "--eval-text", "none.txt"], "does not exist"),
    "pattern's text": (prune.main, ["--pattern", "2:4", "--calib-length", 8, "--eval-text", "none.txt"], "not exist"),
}


@pytest.mark.parametrize("case", TOO_LONG)
def test_commands_refuse_before_anything_runs(
    case: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needs_llamacpp()
    monkeypatch.chdir(checkpoint.parent)
    Path("short.txt").write_text("a few words")
    main, arguments, words = TOO_LONG[case]
    assert call(main, *arguments, "--model", checkpoint) == 2
    written = capsys.readouterr().err
    assert words in written
    assert "] calibration text" not in written  # the stages
    assert "] export" not in written
