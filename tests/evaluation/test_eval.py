"""dilap-eval: lm-eval's numbers, of checkpoints and artifacts alike."""

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from standins.fake_job import call, last_line
from standins.models import tiny_model, tiny_tokenizer

from dilap import backends, export
from dilap.backends import readers
from dilap.cli import eval as command
from dilap.cli.console import Console
from dilap.core.codec import read_json, write_json
from dilap.evaluation.subject import open_subject
from dilap.models.load import load, save_checkpoint
from dilap.models.reference import perplexity

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")
HFLM = pytest.importorskip("lm_eval.models.huggingface").HFLM
evaluate_task = pytest.importorskip("dilap.evaluation.evaluate").evaluate_task
load_tasks = pytest.importorskip("dilap.evaluation.tasks").load

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "the", "other", "lazy", "dog", "then", "and", "there"]


def sentence(number: int, length: int) -> str:
    return " ".join(WORDS[(number * 7 + step * (number % 5 + 1)) % len(WORDS)] for step in range(length))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    choices = {"text": [sentence(n, 3) for n in range(4)], "label": list("ABCD")}
    arc = [{"question": sentence(n, 8), "choices": choices, "answerKey": "ABCD"[n % 4]} for n in range(12)]
    write_rows(folder / "arc_easy" / "validation.jsonl.gz", arc)
    write_rows(folder / "arc_easy" / "train.jsonl", arc[::-1])
    piqa = [
        {"goal": sentence(n, 6), "sol1": sentence(n, 5), "sol2": sentence(n + 1, 4), "label": n % 2} for n in range(8)
    ]
    write_rows(folder / "piqa" / "train.jsonl", piqa)
    blanks = [{"option1": WORDS[n], "option2": WORDS[n + 1], "answer": "12"[n % 2]} for n in range(8)]
    winogrande = [{"sentence": f"{sentence(n, 5)} _ {sentence(n, 3)}", **row} for n, row in enumerate(blanks)]
    write_rows(folder / "winogrande" / "train.jsonl", winogrande)
    pages = [f" = {sentence(n, 2)} = \n \n {sentence(n, 150)} . \n " for n in range(3)]
    write_rows(folder / "wikitext" / "validation.jsonl", [{"page": page} for page in pages])
    write_rows(folder / "ptb" / "test.jsonl", [{"sentence": f" {sentence(n, 9)} "} for n in range(40)])
    return folder


def evaluate(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    assert call(command.main, *arguments, "--json", "--threads", "1") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert call(command.main, *arguments, "--threads", "1") == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ")
    return said


def exported(backend: str, checkpoint: Path, out: Path) -> Path:
    if reason := backends.get(backend).unavailable():
        pytest.skip(reason)
    source = load(str(checkpoint))
    export.get(backend).export(source.model, tokenizer=checkpoint, precision="f32", plan_digest="", out=out)
    return out


@pytest.mark.filterwarnings("ignore::DeprecationWarning:lm_eval", "ignore::UserWarning:lm_eval")
@pytest.mark.parametrize("shots", [0, 2])
def test_numbers_are_those_of_lm_evals_own_model(checkpoint: Path, data: Path, shots: int) -> None:
    subject = open_subject(str(checkpoint))
    theirs = HFLM(pretrained=str(checkpoint), dtype="float32", device="cpu", batch_size=4)
    names = ["arc_easy", "piqa", "winogrande", "wikitext", "ptb"]
    mine_and_theirs = (load_tasks(names, data_dir=data, num_fewshot=shots) for _ in range(2))  # each draws examples
    for task, same in zip(*mine_and_theirs, strict=True):
        mine = evaluate_task(subject, task, max_tokens=subject.reader.max_tokens, limit=None, bar=Console().bar)
        found: Any = lm_eval.evaluate(lm=theirs, task_dict=same.task_dict)
        wanted = {name.removesuffix(",none"): value for name, value in found["results"][task.name].items()}
        shared = [name for name in mine.metrics if name in wanted and isinstance(wanted[name], float)]
        assert {"acc", "word_perplexity"} & set(shared)
        assert {name: mine.metrics[name] for name in shared} == pytest.approx(
            {name: wanted[name] for name in shared}, rel=1e-5
        )


def test_json_has_a_number_by_task_and_metric(checkpoint: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = evaluate(capsys, checkpoint, "--tasks", "arc_easy", "--data-dir", data)
    assert 0 <= found["tasks"]["arc_easy"]["acc"] <= 1
    assert found["facts"]["arc_easy"]["data"].endswith("validation.jsonl.gz")
    assert len(found["facts"]["arc_easy"]["choices"]["arc_easy"]) == 12


@pytest.fixture(params=sorted(readers.READERS))
def both(request: pytest.FixtureRequest, checkpoint: Path, tmp_path: Path) -> tuple[str, Path, Path]:
    """A runtime, a checkpoint, and its artifact there."""
    if request.param == "executorch":
        made: Path = request.getfixturevalue("in_executorch")
        return request.param, made / "checkpoint", made / "artifact"
    return request.param, checkpoint, exported(request.param, checkpoint, tmp_path / "artifact")


def test_an_artifact_answers_as_its_checkpoint(
    both: tuple[str, Path, Path], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backend, checkpoint, artifact = both
    arguments = ("--tasks", "arc_easy,piqa,wikitext", "--data-dir", data)
    found = [evaluate(capsys, one, *arguments) for one in (checkpoint, artifact)]
    assert [one["backend"] for one in found] == ["torch", backend]
    for name in ("arc_easy", "piqa"):
        assert found[0]["facts"][name]["choices"] == found[1]["facts"][name]["choices"]
    texts = [one["tasks"]["wikitext"] for one in found]
    assert texts[1] == pytest.approx(texts[0], rel=1e-3)


def test_windows_shorter_than_asked_are_said(checkpoint: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = evaluate(capsys, checkpoint, "--tasks", "wikitext", "--data-dir", data)
    assert found["tasks"]["wikitext"]["window_tokens"] == found["max_tokens"] == 128  # what the tiny model holds


def test_window_perplexity_is_the_mean_over_whole_windows(
    checkpoint: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = load(str(checkpoint))
    text = " ".join(
        row["sentence"].strip() for row in map(json.loads, (data / "ptb" / "test.jsonl").read_text().splitlines())
    )
    ids = source.tokenizer(text)["input_ids"]
    windows = torch.tensor(ids[: len(ids) // 64 * 64]).reshape(-1, 64)
    found = evaluate(capsys, checkpoint, "--tasks", "ptb", "--data-dir", data, "--max-length", 64)
    assert found["tasks"]["ptb"]["window_perplexity"] == pytest.approx(perplexity(source.model, windows), rel=1e-5)


def test_a_model_beside_itself_has_no_kl(checkpoint: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = evaluate(capsys, checkpoint, "--reference", checkpoint, "--eval-text", corpus)["text"]
    assert (found["kl"], found["agreement"]) == (0.0, 1.0)
    assert found["perplexity"] == found["reference_perplexity"]


def test_killed_evaluation_goes_on_with_the_next_task(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "evaluation.json"
    arguments = (checkpoint, "--data-dir", data, "--out", out)
    evaluate(capsys, *arguments, "--tasks", "piqa")
    found = evaluate(capsys, *arguments, "--tasks", "piqa,arc_easy")
    assert list(found["tasks"]) == list(read_json(out)["tasks"]) == ["piqa", "arc_easy"]


def test_an_evaluation_adds_to_one_with_other_options(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (checkpoint, "--data-dir", data, "--out", tmp_path / "evaluation.json")
    evaluate(capsys, *arguments, "--tasks", "piqa", "--limit", 3)
    found = evaluate(capsys, *arguments, "--tasks", "arc_easy")
    assert {name: facts["num_rows"] for name, facts in found["facts"].items()} == {"piqa": 3, "arc_easy": 12}


def test_a_task_on_other_rows_than_before_is_scored_again(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (checkpoint, "--data-dir", data, "--out", tmp_path / "evaluation.json", "--tasks", "piqa")
    evaluate(capsys, *arguments, "--limit", 3)
    assert evaluate(capsys, *arguments)["facts"]["piqa"]["num_rows"] == 8


def test_a_share_of_few_rows_carries_its_interval() -> None:
    assert command._number({"acc": 0.35}, "acc", 20) == "35.0% [18.1%, 56.7%]"


def test_kept_evaluations_of_other_rows_do_not_mix(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(data, tmp_path / "copy")
    arguments = (checkpoint, "--data-dir", tmp_path / "copy", "--out", tmp_path / "evaluation.json", "--tasks", "piqa")
    evaluate(capsys, *arguments)
    rows = next((tmp_path / "copy" / "piqa").glob("*.jsonl"))
    kept = rows.read_text(encoding="utf-8").splitlines(keepends=True)
    rows.write_text("".join([*kept[1:], kept[0]]), encoding="utf-8")
    assert "the rows of piqa changed" in refused(capsys, *arguments)


def test_unknown_task_is_one_line(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no task 'arc_eazy'; did you mean arc_easy" in refused(capsys, checkpoint, "--tasks", "arc_eazy")


def test_missing_data_is_one_line(checkpoint: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, checkpoint, "--tasks", "openbookqa", "--data-dir", data)
    assert "openbookqa/test.jsonl" in said


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"goal": 1', "line 1 is not JSON"),
        (b"[1]\n", "line 1 is not a JSON object"),
        (b"\xff\xfe", "not readable"),
        (b"", "it holds no row"),
        (b'{"goal": "a", "sol1": "b", "label": 0}\n', "row 1 is not of piqa"),
        (b'{"goal": "a", "sol1": "b", "sol2": "c", "label": 7}\n', "row 1 is not of piqa"),
    ],
)
def test_broken_data_is_one_line(
    checkpoint: Path, data: Path, content: bytes, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "piqa" / "train.jsonl").write_bytes(content)
    found = refused(capsys, checkpoint, "--tasks", "piqa", "--data-dir", data)
    assert said in found
    assert "train.jsonl" in found


def test_cut_off_gzip_is_one_line(checkpoint: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = data / "arc_easy" / "validation.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-20])
    assert "validation.jsonl.gz: not readable" in refused(capsys, checkpoint, "--tasks", "arc_easy", "--data-dir", data)


def test_missing_examples_are_one_line(checkpoint: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "arc_easy" / "train.jsonl").unlink()
    said = refused(capsys, checkpoint, "--tasks", "arc_easy", "--data-dir", data, "--num-fewshot", 2)
    assert "2 examples need" in said


def test_text_shorter_than_a_window_is_one_line(
    checkpoint: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(data / "ptb" / "test.jsonl", [{"sentence": "the fox"}])
    assert "a window 128" in refused(capsys, checkpoint, "--tasks", "ptb", "--data-dir", data)


def test_artifact_of_another_model_is_one_line(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = exported("llamacpp", checkpoint, tmp_path / "artifact")
    with (artifact / "model.gguf").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\1\2\3\4")
    assert "of another model" in refused(capsys, artifact, "--tasks", "piqa", "--data-dir", data)


def test_reference_with_another_vocabulary_is_one_line(
    checkpoint: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    save_checkpoint(tiny_model("llama", vocab_size=310), tiny_tokenizer(tmp_path / "w"), other)
    said = refused(capsys, checkpoint, "--reference", other, "--eval-text", corpus)
    assert "is of another model" in said


@pytest.mark.parametrize("option", ["--reference", "--eval-text"])
def test_what_is_to_be_compared_is_looked_for_before_any_task_is_scored(
    option: str, checkpoint: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dilap.job.evaluate.open_subject", pytest.fail)
    given = [checkpoint, "--tasks", "piqa", "--data-dir", data, "--reference", checkpoint, option, "nothing"]
    words = {"--reference": "no model 'nothing'", "--eval-text": "text 'nothing' does not exist"}
    assert words[option] in refused(capsys, *given)


def test_runs_artifact_is_scored_and_kept_in_the_run(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    exported("llamacpp", checkpoint, run / "artifact")
    sidecar = read_json(run / "artifact" / "artifact.json")
    write_json(run / "result.json", {"pruned": {"artifact": sidecar}})
    shutil.copytree(checkpoint, run / "checkpoint")
    arguments = (run, "--tasks", "piqa", "--data-dir", data)
    assert evaluate(capsys, *arguments)["backend"] == "llamacpp"
    assert evaluate(capsys, *arguments, "--backend", "torch")["backend"] == "torch"
    assert {"evaluation.json", "evaluation-torch.json"} <= {path.name for path in run.iterdir()}


def test_without_lm_eval_there_is_one_line(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "dilap.evaluation.tasks", None)
    assert "pip install 'dilap[eval]'" in refused(capsys, checkpoint, "--tasks", "piqa")


def test_nothing_asked_is_one_line(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(command.main, checkpoint) == 2
    assert "nothing to do" in last_line(capsys)
