"""Every command takes the folder of a run, of whatever kind, or says in one line what to do."""

import json
from pathlib import Path

import pytest
from standins.fake_job import call, last_line
from standins.models import needs_llamacpp

from dilap.cli import eval as evaluation
from dilap.cli import export, prune, report
from dilap.core.codec import read_json
from dilap.models.load import load


@pytest.fixture
def sparse_run(checkpoint: Path, corpus: Path, tmp_path: Path) -> Path:
    out = tmp_path / "sparse"
    text = ["--calib", corpus, "--eval-text", corpus, "--calib-length", "32"]
    assert (
        call(prune.main, "--pattern", "2:4", "--method", "magnitude", "--model", checkpoint, *text, "--out", out) == 0
    )
    return out


def test_a_run_with_zeros_is_scored_in_torch_which_is_said(
    sparse_run: Path, checkpoint: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(evaluation.main, sparse_run, "--reference", checkpoint, "--eval-text", corpus, "--json") == 0
    written = capsys.readouterr()
    assert "no artifact: its checkpoint is scored in torch" in written.err
    assert json.loads(written.out)["backend"] == "torch"
    assert read_json(sparse_run / "evaluation-torch.json")["text"]["kl"] > 0


def test_a_run_with_zeros_has_no_artifact_for_a_runtime(sparse_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(evaluation.main, sparse_run, "--backend", "llamacpp", "--costs") == 2
    assert "saved as a checkpoint: score that with --backend torch" in last_line(capsys)


@pytest.mark.parametrize("arguments", [[], ["--diff"]])
def test_a_run_with_zeros_has_nothing_to_report(
    arguments: list[str], sparse_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(report.main, *arguments, *[sparse_run] * (1 + len(arguments))) == 2
    assert (
        f"no latency was measured, so there is nothing to report; score it with dilap-eval {sparse_run}"
        in last_line(capsys)
    )


def test_a_run_whose_artifact_was_dropped_says_so(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "artifact").rename(run.with_name("elsewhere"))
    assert call(evaluation.main, run, "--costs") == 2
    assert "has no artifact, dilap-compare drops it unless --keep-models" in last_line(capsys)


def test_no_adapter_is_merged_into_an_artifact(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(evaluation.main, run, "--costs", "--merge-adapter", "adapter") == 2
    assert "which no adapter can be merged into: score it with --backend torch" in last_line(capsys)


@pytest.mark.parametrize("kind", ["run", "sparse_run"])
def test_a_run_is_loaded_and_exported_by_its_checkpoint(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    needs_llamacpp()
    folder: Path = request.getfixturevalue(kind)
    assert load(str(folder)).digest == load(str(folder / "checkpoint")).digest
    capsys.readouterr()
    to = ["--backend", "llamacpp", "--precision", "f32", "--out", tmp_path / "out", "--json"]
    assert call(export.main, folder, *to) == 0
    plan = read_json(folder / "checkpoint" / "config.json").get("dilap_plan", "")
    assert json.loads(capsys.readouterr().out)["plan_digest"] == plan
