"""Jobs with a cut vocabulary: budgets are shares of the model as it was given, and everything says what was cut."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from standins.fake_job import FakeBench, call, compare_tiny, prune_tiny, quick
from standins.models import tiny_model
from standins.tokenizers import byte_level
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

import dilap
from dilap import backends
from dilap.cli import export, prune
from dilap.core.codec import decode, read_json
from dilap.core.errors import InvalidInput, Mismatch
from dilap.core.measurement import Measurement
from dilap.evaluation.subject import open_subject
from dilap.job import claims, sparsify
from dilap.job.api import Lines
from dilap.job.bench import Bench
from dilap.job.command import command_line
from dilap.job.evaluate import EvaluationOptions, evaluate
from dilap.job.outputs import name_of
from dilap.job.result import PruneResult, table
from dilap.models.load import load, save_checkpoint
from dilap.models.options import CalibrationOptions
from dilap.profilers.profiler import Case
from dilap.report.report import report

TEXT = "The quick brown fox jumps over the lazy dog.\n\nIt isn't the dog's fault, they've said; we see a fox.\n\n" * 20
ROWS, CUT = 744, 320
ROW_NS = 500  # what a row of the head costs on the fake device: 0.21 of 1.1 ms


@dataclass(frozen=True, kw_only=True)
class Given:
    """A tiny Llama whose tokenizer has more tokens than the text `needs`, another text, and a run with all of them."""

    checkpoint: Path
    needs: Path
    corpus: Path
    run: Path
    result: PruneResult


class SlowHeads(FakeBench):
    """A fake device on which a larger head is slower, so that the whole vocabulary takes longer than the cut one."""

    def measure_cases(self, cases: Sequence[Case], *, final: bool = False) -> list[Measurement]:
        def delayed(case: Case, one: Measurement) -> Measurement:
            delay = ROW_NS * (self.read_artifact(case.path.parent).decoder.vocab_size - CUT)
            return replace(one, samples_ns=tuple(sample + delay for sample in one.samples_ns))

        return [delayed(*both) for both in zip(cases, super().measure_cases(cases, final=final), strict=True)]


@pytest.fixture(autouse=True)
def _slow_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    use_slow_heads(monkeypatch)


def use_slow_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Bench.of

    def made(devices: Any, backend: str, workload: Any, progress: Any, *, estimate: bool, **rest: Any) -> Bench:
        if estimate:
            return real(devices, backend, workload, progress, estimate=True, **rest)
        return SlowHeads(device=devices[0], backend=backends.get(backend), workload=workload, progress=progress)

    monkeypatch.setattr(Bench, "of", made)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    """Made once, and only to be read."""
    folder = tmp_path_factory.mktemp("given")
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = AutoTokenizer.from_pretrained(byte_level(folder / "words", gpt2, eos_token="<|end|>"))
    save_checkpoint(tiny_model("llama", vocab_size=ROWS, bos_token_id=0, eos_token_id=0), tokenizer, folder / "tiny")
    (folder / "needs.txt").write_text(TEXT)
    (folder / "corpus.txt").write_text(" ".join(f"the {word} of naïf line {word * 7}" for word in range(2000)))
    paths = {"checkpoint": folder / "tiny", "needs": folder / "needs.txt", "corpus": folder / "corpus.txt"}
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_slow_heads(monkeypatch)
        needs = str(paths["needs"])
        result = prune_tiny(paths["checkpoint"], paths["corpus"], folder / "run", budget="60%", vocabulary=needs)
    return Given(**paths, run=folder / "run", result=result)


@pytest.fixture
def checkpoint(given: Given) -> Path:
    return given.checkpoint


@pytest.fixture
def corpus(given: Given) -> Path:
    return given.corpus


@pytest.fixture
def needs(given: Given) -> Path:
    return given.needs


@pytest.fixture
def pruned(given: Given) -> PruneResult:
    return given.result


def test_a_budget_is_a_share_of_the_model_as_it_was_given(pruned: PruneResult, checkpoint: Path) -> None:
    assert pruned.dense.artifact.decoder.vocab_size == ROWS
    assert pruned.pruned.artifact.decoder.vocab_size == CUT
    assert pruned.limit_seconds == pytest.approx(0.6 * pruned.dense.seconds)
    assert pruned.status == "kept"
    assert pruned.speedup is not None
    assert pruned.speedup.value == pytest.approx(pruned.dense.seconds / pruned.pruned.seconds)
    assert pruned.dense.parameters == sum(p.numel() for p in load(str(checkpoint)).model.parameters())


def test_what_is_predicted_is_what_is_measured(pruned: PruneResult) -> None:
    """On the fake device the table is exact, so the vocabulary's share has to be counted once."""
    assert pruned.predicted_seconds == pytest.approx(pruned.pruned.seconds, rel=1e-3)


def test_the_cut_is_not_paid_for_twice(pruned: PruneResult, checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    """Without it the same budget leaves fewer weights in the layers."""
    without = prune_tiny(checkpoint, corpus, tmp_path / "without", budget="60%")

    def in_layers(result: PruneResult) -> int:
        architecture = result.pruned.artifact.decoder
        return architecture.num_parameters - 2 * architecture.vocab_size * architecture.hidden_size

    assert in_layers(pruned) > 1.1 * in_layers(without)


def test_the_dense_artifact_is_scored_among_the_kept_tokens(pruned: PruneResult) -> None:
    assert pruned.dense.quality.through == "llamacpp"
    assert 0 <= pruned.dense.quality.kl < 1e-3  # f16
    assert pruned.dense.quality.perplexity == pytest.approx(pruned.dense.in_torch.perplexity, rel=1e-3)
    assert pruned.pruned.quality.kl > 10 * pruned.dense.quality.kl


def test_the_result_says_what_was_cut_and_what_it_costs(given: Given) -> None:
    pruned, run = given.result, given.run
    facts = pruned.vocabulary
    assert facts is not None
    assert (facts.text, facts.tokens, facts.whole_tokens) == ("needs.txt", CUT, ROWS)
    assert [one.text.split(",")[0] for one in facts.growths] == ["the last tenth of needs.txt", "corpus.txt"]
    written = read_json(run / "result.json")
    assert decode(PruneResult, written, source="").vocabulary == facts
    text = table(pruned)
    assert "vocabulary: 320 of 744 tokens are kept, those that needs.txt needs" in text
    assert "no numbers of another vocabulary compare with them" in text
    assert "320 of 744 tokens are kept" in (run / "log.txt").read_text()
    note = json.loads((run / "artifact" / "artifact.json").read_text())["details"]["notes"][-1]
    assert note.startswith("its vocabulary was cut to what needs.txt needs, 320 of 744 tokens")
    assert f"--vocabulary {given.needs}" in command_line(pruned)


def test_the_report_says_it(given: Given, tmp_path: Path) -> None:
    report(given.run, out=tmp_path / "report.md")
    assert "vocabulary: 320 of 744 tokens are kept" in (tmp_path / "report.md").read_text().replace("\\", "")


def test_the_checkpoint_of_a_run_has_the_cut_tokenizer(given: Given) -> None:
    stock = AutoTokenizer.from_pretrained(given.run / "checkpoint")
    assert len(stock) == CUT
    assert stock.decode(stock(TEXT)["input_ids"]) == TEXT


def test_a_budget_that_the_vocabulary_alone_keeps_needs_no_pruning(
    checkpoint: Path, corpus: Path, needs: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    options = quick(
        corpus, tmp_path / "run", budget="95%", vocabulary=needs, method="magnitude", progress=Lines(said.append)
    )
    assert dilap.prune(str(checkpoint), **options) is None
    assert any("which keeps this budget: nothing to prune" in line for line in said)


def test_a_text_of_the_vocabulary_that_changed_between_two_starts_is_named(
    checkpoint: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = tmp_path / "needs.txt"
    needs.write_text(TEXT)

    def go() -> PruneResult:
        return prune_tiny(checkpoint, corpus, tmp_path / "run", vocabulary=str(needs))

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(claims, "measured", stop)
        with pytest.raises(KeyboardInterrupt):
            go()
    needs.write_text(TEXT.replace("fox", "cat"))
    with pytest.raises(InvalidInput, match="the tokenizer and the text of the vocabulary changed since"):
        go()
    needs.write_text(TEXT + TEXT)  # the same tokens, and other counts
    with pytest.raises(InvalidInput, match="the text of the vocabulary changed since"):
        go()
    needs.write_text(TEXT)
    assert go().status == "kept"


def test_a_loaded_model_brings_its_vocabulary(checkpoint: Path, corpus: Path, needs: Path, tmp_path: Path) -> None:
    source = dilap.load(str(checkpoint), vocabulary=needs)
    result = dilap.prune(source, **quick(corpus, tmp_path / "run", budget="60%", method="magnitude"))
    assert result.model_digest == source.digest
    assert result.dense.artifact.decoder.vocab_size == ROWS
    assert result.options["vocabulary"] == str(needs)
    with pytest.raises(InvalidInput, match=r"give vocabulary to dilap\.load instead"):
        dilap.prune(source, **quick(corpus, tmp_path / "other", budget="60%", vocabulary=needs))


def test_a_model_that_changed_since_it_was_loaded_is_refused(
    checkpoint: Path, corpus: Path, needs: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "tiny")
    source = dilap.load(str(copy), vocabulary=needs)
    changed = load(str(copy))
    changed.model.get_input_embeddings().weight.data[ROWS - 1] += 1
    changed.model.save_pretrained(copy)
    with pytest.raises(Mismatch, match="the model's files changed since it was loaded"):
        dilap.prune(source, **quick(corpus, tmp_path / "run", budget="60%", method="magnitude"))


def test_an_estimate_knows_both_heads(checkpoint: Path, corpus: Path, needs: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"estimate": True, "budget": None, "ratio": 0.3}
    both = [
        prune_tiny(checkpoint, corpus, tmp_path / name, vocabulary=text, **options)
        for name, text in (("whole", None), ("cut", str(needs)))
    ]
    assert both[0].dense.seconds == both[1].dense.seconds
    assert both[1].pruned.seconds < both[0].pruned.seconds


def test_methods_are_compared_with_it(checkpoint: Path, corpus: Path, needs: Path, tmp_path: Path) -> None:
    rows = compare_tiny(checkpoint, corpus, tmp_path / "all", "magnitude", "uniform", budgets="60%", vocabulary=needs)
    assert [row.error for row in rows] == [None, None]
    assert all(any("320 of 744 tokens" in note for note in row.notes) for row in rows)


def test_zeros_are_put_into_a_model_with_it(checkpoint: Path, corpus: Path, needs: Path, tmp_path: Path) -> None:
    options = sparsify.SparseOptions(
        pattern="2:4",
        method="magnitude",
        model=str(checkpoint),
        vocabulary=str(needs),
        calibration=CalibrationOptions(source=str(corpus), sequence_length=32),
        evaluation_text=str(corpus),
    )
    result = sparsify.sparsify(options, out=tmp_path / "zeros", progress=Lines(lambda _: None))
    assert result.vocabulary is not None
    assert "320 of 744 tokens are kept" in sparsify.table(result)
    assert load(str(tmp_path / "zeros")).model.config.vocab_size == CUT


def test_a_run_is_evaluated_beside_the_dense_model_with_its_vocabulary(given: Given) -> None:
    asked = EvaluationOptions(
        subject=str(given.run),
        reference=str(given.checkpoint),
        vocabulary=str(given.needs),
        eval_text=str(given.corpus),
        out=given.run.with_name("evaluation.json"),
    )
    text = evaluate(asked, progress=Lines(lambda _: None)).text
    assert text is not None
    assert text.kl == pytest.approx(given.result.pruned.quality.kl, rel=0.1)  # of sequences of another length
    with pytest.raises(Mismatch, match="where one was made with --vocabulary TEXT, give it here too"):
        evaluate(replace(asked, vocabulary=None), progress=Lines(lambda _: None))


def test_no_vocabulary_is_cut_from_an_artifact(given: Given) -> None:
    with pytest.raises(InvalidInput, match="is an artifact, whose vocabulary cannot be cut"):
        open_subject(str(given.run), vocabulary=str(given.needs))


def test_outputs_are_named_after_the_text(tmp_path: Path) -> None:
    assert name_of("user/model", vocabulary="texts/corpus.jsonl.gz") == "model-vocabulary-corpus"
    assert name_of("model.gguf", merge_adapter="lora", vocabulary="user/set") == "model+lora-vocabulary-set"


def test_the_command_names_its_folder_after_the_text(
    checkpoint: Path, corpus: Path, needs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    texts = ["--calib", corpus, "--eval-text", corpus, "--vocabulary", needs, "--method", "magnitude"]
    arguments = ["--target", "host_cpu", "--budget", "60%", "--model", checkpoint, *texts]
    assert call(prune.main, *arguments, "--calib-length", "32", "--context", "64") == 0
    assert (tmp_path / "runs" / "tiny-vocabulary-needs-host_cpu-60pct-magnitude" / "result.json").is_file()


def test_an_exported_folder_is_named_after_the_text(checkpoint: Path, needs: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "tiny")
    assert call(export.main, "--backend", "onnxruntime", tmp_path / "tiny", "--vocabulary", needs) == 0
    found = sorted(path.name for path in tmp_path.iterdir())
    assert found == ["tiny", f"tiny-vocabulary-needs-onnxruntime-{backends.get('onnxruntime').precisions()[0]}"]
