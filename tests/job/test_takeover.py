"""What a run takes over from an earlier start, and what it claims of, is what it should be."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from standins.fake_job import FakeBench, compare_tiny, prune_tiny

from dilap.core.codec import read_json, write_json
from dilap.core.errors import InvalidInput, Mismatch
from dilap.core.measurement import Measurement
from dilap.export.gguf.writer import GgufExporter
from dilap.job import api, claims
from dilap.job import compare as comparing
from dilap.job.kinds import kind_of
from dilap.job.result import PruneResult
from dilap.models.load import load, save_checkpoint
from dilap.profilers.profiler import Case

pytestmark = pytest.mark.usefixtures("fake_device")
Run = Callable[[], PruneResult]


@pytest.fixture
def go(checkpoint: Path, corpus: Path, tmp_path: Path) -> Run:
    """Starts the same quick job into `tmp_path`/run, or goes on with it."""
    return lambda: prune_tiny(checkpoint, corpus, tmp_path / "run")


def stop(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.fixture
def stopped(go: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run that was interrupted before its claim."""
    with monkeypatch.context() as patch:
        patch.setattr(claims, "measured", stop)
        with pytest.raises(KeyboardInterrupt):
            go()
    return tmp_path / ".run.unfinished"


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def test_another_plans_artifact_is_not_taken_over(go: Run, stopped: Path) -> None:
    sidecar = stopped / "artifact" / "artifact.json"
    write_json(sidecar, read_json(sidecar) | {"plan_digest": "f" * 64})
    with pytest.raises(Mismatch, match=r"was exported from another plan or model \(ffffffffffff\)"):
        go()


@pytest.mark.parametrize("name", ["dense", "artifact"])
def test_a_file_that_changed_between_two_starts_is_refused(name: str, go: Run, stopped: Path) -> None:
    append(stopped / name / "model.gguf")
    with pytest.raises(Mismatch, match=r"model\.gguf is of another model than"):
        go()


def test_a_text_that_changed_between_two_starts_is_named(go: Run, stopped: Path, corpus: Path) -> None:
    corpus.write_text(corpus.read_text().replace("line", "lane"))
    with pytest.raises(InvalidInput, match="the evaluation text and the calibration text changed since"):
        go()
    assert stopped.is_dir()


def test_weights_that_changed_between_two_starts_are_named(go: Run, stopped: Path, checkpoint: Path) -> None:
    source = load(str(checkpoint))
    source.model.get_input_embeddings().weight.data.view(-1)[9000] += 1
    for file in checkpoint.iterdir():
        file.unlink()
    checkpoint.rmdir()
    save_checkpoint(source.model, source.tokenizer, checkpoint)
    with pytest.raises(InvalidInput, match="the model's weights changed since"):
        go()
    assert stopped.is_dir()


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_file_that_is_replaced_beside_its_measurement_is_not_claimed_of(
    moment: str, go: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    expected = {"before": "measured was a file of sha256 eeeeeeeeeeee", "after": "is of another model than"}
    with pytest.raises(Mismatch, match=expected[moment]):
        go()
    assert not (tmp_path / "run").exists()


def compare_ratio(checkpoint: Path, corpus: Path, out: Path, *names: str) -> None:
    compare_tiny(checkpoint, corpus, out, *names, ratios=[0.3], recover="none")


def test_a_comparison_goes_on_from_the_result_of_a_run_that_has_no_row(
    checkpoint: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    compare_ratio(checkpoint, corpus, out, "magnitude")
    before = read_json(out / "compare.json")
    (out / "runs" / "ratio-0.3" / "magnitude" / "row.json").unlink()
    monkeypatch.setattr(comparing, "kind_of", lambda options: replace(kind_of(options), prune=stop))
    compare_ratio(checkpoint, corpus, out, "magnitude")
    assert read_json(out / "compare.json") == before


def test_a_comparison_leaves_a_folder_that_is_not_its_run(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compare_ratio(checkpoint, corpus, out, "magnitude")
    precious = out / "runs" / "ratio-0.3" / "uniform" / "precious"
    precious.parent.mkdir()
    precious.touch()
    compare_ratio(checkpoint, corpus, out, "uniform")
    (row,) = read_json(out / "compare.json")["rows"]
    assert "is no run of this comparison" in str(row["error"])
    assert precious.exists()


def test_a_comparison_is_not_started_in_somebody_elses_folder(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(InvalidInput, match="exists and is no comparison"):
        compare_ratio(checkpoint, corpus, tmp_path / "out", "magnitude")
    assert [one.name for one in (tmp_path / "out").iterdir()] == ["precious"]


def test_a_text_that_changed_between_the_rows_of_a_comparison_is_named(
    checkpoint: Path, corpus: Path, tmp_path: Path
) -> None:
    compare_ratio(checkpoint, corpus, tmp_path / "out", "magnitude")
    corpus.write_text(corpus.read_text().replace("line", "lane"))
    with pytest.raises(InvalidInput, match="changed since the comparison in"):
        compare_ratio(checkpoint, corpus, tmp_path / "out", "magnitude", "uniform")


def test_an_export_leaves_a_folder_that_appears_while_it_works(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real = tmp_path / "out", GgufExporter.export

    def slow(self: GgufExporter, *arguments: Any, **named: Any) -> Any:
        out.mkdir()
        (out / "precious").touch()
        return real(self, *arguments, **named)

    monkeypatch.setattr(GgufExporter, "export", slow)
    with pytest.raises(InvalidInput, match="made by somebody else"):
        api.export(checkpoint, backend="llamacpp", out=out, progress=lambda _: None)
    assert [one.name for one in out.iterdir()] == ["precious"]
