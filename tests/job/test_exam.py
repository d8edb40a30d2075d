"""The quality that a run shows is that of the file that it ships, read through the file's own runtime."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from standins.fake_job import FakeBench, compare_tiny, prune_tiny
from standins.models import pruned_model, random_tokens, tiny_model

from dilap import backends
from dilap.backends import readers
from dilap.core.codec import read_json, write_json
from dilap.core.errors import Crashed, Mismatch, Unsupported
from dilap.core.measurement import Measurement
from dilap.evaluation.scoring import beside_teacher
from dilap.evaluation.subject import open_subject
from dilap.evaluation.text_quality import compare as beside
from dilap.evaluation.torch_reader import TorchReader
from dilap.job import exam, result
from dilap.job.result import read_result
from dilap.models.reference import Teacher, head_of
from dilap.profilers.profiler import Case

pytestmark = pytest.mark.usefixtures("fake_device")
TOKENS = random_tokens(3, 24)


@pytest.fixture
def quantised(checkpoint: Path, corpus: Path, tmp_path: Path) -> Path:
    """A run that ships 4-bit weights."""
    if reason := backends.get("onnxruntime").unavailable():
        pytest.skip(reason)
    out = tmp_path / "run"
    assert prune_tiny(checkpoint, corpus, out, backend="onnxruntime", precision="int4").status == "kept"
    return out


def test_quality_is_that_of_the_file_and_torchs_stands_beside_it(
    quantised: Path, checkpoint: Path, corpus: Path
) -> None:
    found = read_result(quantised)
    dense = open_subject(str(checkpoint))
    for side, artifact in ((found.dense, quantised / "dense"), (found.pruned, quantised)):
        alone = beside(open_subject(str(artifact)), dense, text=str(corpus), length=32)
        assert side.quality.through == "onnxruntime"
        assert (side.quality.kl, side.quality.perplexity) == pytest.approx((alone.kl, alone.perplexity), rel=1e-3)
        assert side.quality.artifact_sha256 == side.measurement.artifact_sha256 == side.artifact.sha256
    in_torch = beside(open_subject(str(quantised), backend="torch"), dense, text=str(corpus), length=32)
    assert found.pruned.in_torch.kl == pytest.approx(in_torch.kl, rel=1e-3)
    assert found.dense.in_torch.kl == 0 < found.dense.quality.kl
    assert found.pruned.quality.kl != found.pruned.in_torch.kl


def test_the_table_says_whose_quality_it_shows(quantised: Path) -> None:
    found = read_result(quantised)
    printed = result.table(found)
    assert "of the artifacts, read through onnxruntime" in printed
    assert f"torch model in floats: KL {found.pruned.in_torch.kl:.3f}" in printed
    assert result.summary(found)["kl"] == found.pruned.quality.kl
    assert result.summary(found)["torch_kl"] == found.pruned.in_torch.kl


def test_what_cannot_be_read_here_has_torchs_quality_and_the_reason(
    checkpoint: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(readers.READERS, "llamacpp")
    assert prune_tiny(checkpoint, corpus, tmp_path / "run").status == "kept"
    found = read_result(tmp_path / "run")
    assert (found.pruned.quality.through, found.pruned.quality.kl) == ("torch", found.pruned.in_torch.kl)
    printed = result.table(found)
    assert "KL to dense (torch)" in printed
    assert (
        "of the torch models in floats, not of the artifacts (llamacpp artifacts run on their device alone" in printed
    )


def test_a_runtime_that_dies_while_it_reads_costs_the_run_its_numbers_alone(
    checkpoint: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dying(*_: object, **__: object) -> None:
        raise Crashed("llamacpp died of a segmentation fault")

    monkeypatch.setattr(exam, "open_reader", dying)
    assert prune_tiny(checkpoint, corpus, tmp_path / "run").status == "kept"
    printed = result.table(read_result(tmp_path / "run"))
    assert "not of the artifacts (llamacpp died of a segmentation fault)" in printed


def test_a_file_that_changes_before_it_is_measured_is_one_line(
    checkpoint: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = FakeBench.measure_cases

    def changed(self: FakeBench, cases: Sequence[Case], *, final: bool = False) -> list[Measurement]:
        found = measure(self, cases, final=final)
        is_claim = any(case.path.parent.name == "artifact" for case in cases)
        return [replace(one, artifact_sha256="f" * 64) for one in found] if is_claim else found

    monkeypatch.setattr(FakeBench, "measure_cases", changed)
    with pytest.raises(Mismatch, match=r"measured was a file of sha256 ffffffffffff, exported model\.gguf") as caught:
        prune_tiny(checkpoint, corpus, tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_a_comparison_reads_the_dense_file_once(
    checkpoint: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_files, real = [], readers.open_reader

    def counted(name: str, path: Path, **options: Any) -> Any:
        read_files.append(path.parent.name)
        return real(name, path, **options)

    monkeypatch.setattr(exam, "open_reader", counted)
    compare_tiny(checkpoint, corpus, tmp_path / "out", "magnitude", "uniform", budgets=["80%"], recover="none")
    assert sorted(read_files) == ["artifact", "artifact", "dense"]


def test_results_of_earlier_versions_show_torchs_quality(run: Path) -> None:
    document = read_json(run / "result.json")
    for side in ("dense", "pruned"):
        del document[side]["torch_quality"]
        for name in ("through", "reason", "artifact_sha256"):
            del document[side]["quality"][name]
    write_json(run / "result.json", document)
    assert "of the torch models in floats" in result.table(read_result(run))


def test_a_model_beside_its_own_teacher_has_no_kl() -> None:
    model = tiny_model("llama")
    teacher = Teacher.of(model, TOKENS, keep_states=True)
    found = beside_teacher(TorchReader(model), teacher, head_of(model))
    assert found.kl == pytest.approx(0, abs=1e-6)
    assert found.perplexity == pytest.approx(teacher.perplexity, rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "granite"])
def test_a_reader_beside_a_teacher_scores_as_its_torch_model(family: str) -> None:
    teacher = Teacher.of(tiny_model(family), TOKENS, keep_states=True)
    pruned = pruned_model(family, {"layers.1.channels": tuple(range(32))})
    found, wanted = beside_teacher(TorchReader(pruned), teacher, head_of(pruned)), teacher.scores(pruned)
    torch.testing.assert_close(found.kls, wanted.kls, rtol=1e-3, atol=1e-5)  # another order of sums
    torch.testing.assert_close(found.losses, wanted.losses, rtol=1e-4, atol=1e-5)


def test_a_text_longer_than_the_artifact_reads_is_refused() -> None:
    model = tiny_model("llama")
    teacher = Teacher.of(model, random_tokens(1, 24), keep_states=True)
    reader = TorchReader(model)
    reader.max_tokens = 16
    with pytest.raises(Unsupported, match="16 tokens at once"):
        beside_teacher(reader, teacher, head_of(model))
