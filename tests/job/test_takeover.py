"""What a run takes over from an earlier start, and what it claims of, is what it should be."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from standins.fake_job import FAST, FakeBench, call, last_line

from dilap.cli import compare, export, prune
from dilap.core.codec import read_json, write_json
from dilap.core.measurement import Measurement
from dilap.export.gguf.writer import GgufExporter
from dilap.models.load import load, save_checkpoint
from dilap.profilers.profiler import Case

pytestmark = pytest.mark.usefixtures("fake_device")
Run = Callable[..., int]


@pytest.fixture
def prune_tiny(checkpoint: Path, corpus: Path, tmp_path: Path) -> Run:
    """A quick job into `tmp_path`/run; its exit code."""

    def run(*extra: str) -> int:
        texts = ["--calib", corpus, "--eval-text", corpus, "--method", "magnitude", "--budget", "70%"]
        where = ["--target", "host_cpu", "--model", checkpoint, "--out", tmp_path / "run"]
        return call(prune.main, *where, *texts, *FAST, *extra)

    return run


def stop(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.fixture
def stopped(prune_tiny: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run that was interrupted before its claim."""
    with monkeypatch.context() as patch:
        patch.setattr("dilap.job.proof._measured", stop)
        assert prune_tiny() == 130
    return tmp_path / ".run.unfinished"


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def test_another_plans_artifact_is_not_taken_over(
    prune_tiny: Run, stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sidecar = stopped / "artifact" / "artifact.json"
    write_json(sidecar, read_json(sidecar) | {"plan_digest": "f" * 64})
    assert prune_tiny() == 2
    assert "was exported from another plan or model (ffffffffffff)" in last_line(capsys)


@pytest.mark.parametrize("name", ["dense", "artifact"])
def test_a_file_that_changed_between_two_starts_is_refused(
    name: str, prune_tiny: Run, stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    append(stopped / name / "model.gguf")
    assert prune_tiny() == 2
    assert "model.gguf is of another model than" in last_line(capsys)


def test_a_text_that_changed_between_two_starts_is_named(
    prune_tiny: Run, stopped: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus.write_text(corpus.read_text().replace("line", "lane"))
    assert prune_tiny() == 2
    assert "the evaluation text and the calibration text changed since" in last_line(capsys)
    assert stopped.is_dir()


def test_weights_that_changed_between_two_starts_are_named(
    prune_tiny: Run, stopped: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = load(str(checkpoint))
    source.model.get_input_embeddings().weight.data.view(-1)[9000] += 1
    for file in checkpoint.iterdir():
        file.unlink()
    checkpoint.rmdir()
    save_checkpoint(source.model, source.tokenizer, checkpoint)
    assert prune_tiny() == 2
    assert "the model's weights changed since" in last_line(capsys)
    assert stopped.is_dir()


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_file_that_is_replaced_beside_its_measurement_is_not_claimed_of(
    moment: str,
    prune_tiny: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = FakeBench.measure_cases

    def replaced(self: FakeBench, cases: Sequence[Case], *, final: bool = False) -> list[Measurement]:
        found = real(self, cases, final=final)
        if cases[-1].path.parent.name != "artifact":
            return found
        if moment == "after":
            append(cases[-1].path)
            return found
        return [replace(one, artifact_sha256="e" * 64) for one in found]

    monkeypatch.setattr(FakeBench, "measure_cases", replaced)
    assert prune_tiny() == 2
    expected = {"before": "measured was a file of sha256 eeeeeeeeeeee", "after": "is of another model than"}
    assert expected[moment] in last_line(capsys)
    assert not (tmp_path / "run").exists()


def compare_tiny(checkpoint: Path, corpus: Path, out: Path, *names: str) -> int:
    texts = ["--calib", corpus, "--eval-text", corpus, "--ratio", "0.3", "--recover", "none", "--methods", *names]
    return call(compare.main, "--target", "host_cpu", "--model", checkpoint, "--out", out, *texts, *FAST)


def test_a_comparison_goes_on_from_the_result_of_a_run_that_has_no_row(
    checkpoint: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert compare_tiny(checkpoint, corpus, out, "magnitude") == 0
    before = read_json(out / "compare.json")
    (out / "runs" / "ratio-0.3" / "magnitude" / "row.json").unlink()
    monkeypatch.setattr("dilap.job.prune.prune", stop)
    assert compare_tiny(checkpoint, corpus, out, "magnitude") == 0
    assert read_json(out / "compare.json") == before


def test_a_comparison_leaves_a_folder_that_is_not_its_run(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert compare_tiny(checkpoint, corpus, out, "magnitude") == 0
    precious = out / "runs" / "ratio-0.3" / "uniform" / "precious"
    precious.parent.mkdir()
    precious.touch()
    assert compare_tiny(checkpoint, corpus, out, "uniform") == 0
    (row,) = read_json(out / "compare.json")["rows"]
    assert "is no run of this comparison" in str(row["error"])
    assert precious.exists()


def test_a_comparison_is_not_started_in_somebody_elses_folder(
    checkpoint: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    assert compare_tiny(checkpoint, corpus, tmp_path / "out", "magnitude") == 2
    assert "exists and is no comparison" in last_line(capsys)
    assert [one.name for one in (tmp_path / "out").iterdir()] == ["precious"]


def test_a_text_that_changed_between_the_rows_of_a_comparison_is_named(
    checkpoint: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare_tiny(checkpoint, corpus, tmp_path / "out", "magnitude") == 0
    corpus.write_text(corpus.read_text().replace("line", "lane"))
    assert compare_tiny(checkpoint, corpus, tmp_path / "out", "magnitude", "uniform") == 2
    assert "changed since the comparison in" in last_line(capsys)


def test_an_export_leaves_a_folder_that_appears_while_it_works(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, real = tmp_path / "out", GgufExporter.export

    def slow(self: GgufExporter, *arguments: Any, **named: Any) -> Any:
        out.mkdir()
        (out / "precious").touch()
        return real(self, *arguments, **named)

    monkeypatch.setattr(GgufExporter, "export", slow)
    assert call(export.main, "--backend", "llamacpp", checkpoint, "--out", out) == 2
    assert "made by somebody else" in last_line(capsys)
    assert [one.name for one in out.iterdir()] == ["precious"]
