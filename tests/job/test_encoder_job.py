"""Prune jobs of encoders of texts, with fabricated seconds; one is exported for real and scored in a runtime."""

import json
import random
import shlex
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from standins.cards import head_of, run_code, text_of
from standins.encoders import encoder, write_tokenizer
from standins.fake_job import call, last_line, use_fake_network_bench

from dilap import backends
from dilap.cli import prune
from dilap.core.errors import InvalidInput, Unsupported
from dilap.core.network_input import TokenInput
from dilap.evaluation.sentence_quality import cosines
from dilap.job import api
from dilap.job.command import command_line
from dilap.job.networks import is_network, reads_texts
from dilap.job.quality import EmbeddingQuality
from dilap.job.result import PruneResult, read_result, summary, table
from dilap.models.convolutional.load import load_network, save_network
from dilap.models.network import TorchNetwork
from dilap.models.sentences import read_sentences
from dilap.profilers.devices import device as devices
from dilap.report.report import Report

if reason := backends.get("onnxruntime").unavailable():
    pytest.skip(reason, allow_module_level=True)
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
Result = PruneResult[EmbeddingQuality]


@dataclass(frozen=True, kw_only=True)
class Place:
    """A tiny encoder, a text, and a folder for runs."""

    encoder: Path
    text: Path
    runs: Path

    def prune(self, name: str = "run", **options: Any) -> Result:
        given: dict[str, Any] = {"method": "uniform", "budget": "80%", "backend": "onnxruntime", "seq_length": 12}
        given["calib"] = str(self.text)
        out: dict[str, Any] = {"out": self.runs / name, "cache": self.runs / "cache", "progress": lambda _: None}
        found = api.prune(str(self.encoder), **out | given | options)
        assert found is not None
        return found


def place_in(folder: Path) -> Place:
    save_network(encoder(), folder / "bert")
    write_tokenizer(folder / "bert")
    return Place(encoder=folder / "bert", text=write_text(folder / "text.txt"), runs=folder / "runs")


def write_text(path: Path, *, count: int = 32, seed: int = 0) -> Path:
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghij", k=2)) for _ in range(20)]
    sentences = [" ".join(draw.choices(words, k=draw.randint(4, 6))) for _ in range(count)]
    path.write_text("\n\n".join(sentences))
    return path


@pytest.fixture(autouse=True)
def _fake_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_network_bench(monkeypatch, exports=False)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return place_in(tmp_path)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Place, Result]:
    """A finished job with a recovery, made once and only to be read."""
    place = place_in(tmp_path_factory.mktemp("done"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_fake_network_bench(monkeypatch, exports=True)
        return place, place.prune(recover="full", recover_steps=20)


def test_a_job_keeps_its_budget(done: tuple[Place, Result]) -> None:
    _, result = done
    assert (result.status, result.workload.phase, result.pruned.artifact.input) == (
        "kept",
        "forward",
        TokenInput(length=12),
    )
    assert 0.8 < result.budget_used <= 1
    assert result.pruned.parameters < result.dense.parameters
    assert result.pruned.flops < result.dense.flops


def test_its_files_are_scored_through_their_runtime(done: tuple[Place, Result]) -> None:
    _, result = done
    assert result.dense.quality.through == result.pruned.quality.through == "onnxruntime"
    assert result.dense.quality.cosine == pytest.approx(1, abs=1e-5)
    assert result.pruned.quality.cosine == pytest.approx(result.pruned.in_torch.cosine, abs=1e-4)
    assert result.pruned.quality.cosine < 1 - 1e-4
    assert result.calibration_sequences + result.pruned.quality.num_sentences == 32


def test_the_checkpoint_gives_the_embeddings_that_were_scored(done: tuple[Place, Result]) -> None:
    place, result = done
    quality, input_ = result.pruned.in_torch, TokenInput(length=12)
    _, scored = read_sentences(str(place.text), tokenizer=place.encoder).split(train=16, validation=16, seed=0)
    tokens = scored.all_tokens(input_)
    both = [load_network(str(one), input_=input_).model for one in (place.encoder, place.runs / "run" / "checkpoint")]
    found = cosines(*(TorchNetwork(one).outputs(tokens) for one in both))
    assert len(scored) == quality.num_sentences
    assert quality.cosine == pytest.approx(float(found.mean()), abs=1e-6)


def test_the_code_of_its_cards_gives_the_embeddings_of_a_text(
    done: tuple[Place, Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint by transformers, and the artifact by ONNX Runtime, as a copy and paste of it does."""
    place, _ = done
    run = place.runs / "run"
    assert head_of(run / "checkpoint").pipeline_tag == head_of(run / "artifact").pipeline_tag == "feature-extraction"
    assert "input: a batch of 1, each a text of 12 tokens" in text_of(run / "artifact")
    embeddings = run_code(run / "checkpoint", monkeypatch)["embeddings"].numpy()
    outputs = run_code(run / "artifact", monkeypatch)["outputs"]
    np.testing.assert_allclose(outputs, embeddings, rtol=1e-4, atol=1e-5)


def test_recovery_brings_the_embeddings_nearer(done: tuple[Place, Result]) -> None:
    _, result = done
    assert len(result.recovery_kls) == 20
    assert result.pruned.in_torch.distance < result.kl_without_recovery


def test_a_result_is_read_as_it_was_written(done: tuple[Place, Result]) -> None:
    place, result = done
    read = read_result(place.runs / "run")
    assert replace(read, options={}) == replace(result, options={})
    assert isinstance(read.pruned.quality, EmbeddingQuality)


def test_its_run_is_an_encoder_for_the_other_commands(done: tuple[Place, Result]) -> None:
    place, _ = done
    assert is_network(str(place.runs / "run"))
    assert reads_texts(str(place.runs / "run"))
    assert (place.runs / "run" / "artifact" / "tokenizer.json").is_file()
    assert load_network(str(place.runs / "run")).tokenizer == place.runs / "run" / "checkpoint"


def test_the_table_says_what_it_is_about(done: tuple[Place, Result]) -> None:
    _, result = done
    said = table(result)
    for words in ("texts a second", "cosine similarity", "reached by 95 %", "16 sentences, never seen by the search"):
        assert words in said
    for words in ("KL", "perplexity", "photograph", "image"):
        assert words not in said
    names = {"cosine", "low_cosine", "same_nearest", "torch_cosine", "torch_cosine_distance_without_recovery"}
    assert names <= set(summary(result))


def test_a_report_shows_what_encoders_have(done: tuple[Place, Result]) -> None:
    place, _ = done
    made = Report.of([place.runs / "run"])
    heading = next(line for line in made.markdown().splitlines() if line.startswith("| Model"))
    assert "| Texts a second | Of dense | Cosine similarity | Reached by 95 % | Same nearest |" in heading
    assert [one.name for one in made._figures] == ["tradeoff-cosine", "kept-groups", "prediction", "recovery"]
    assert "cosine distance" in made.markdown()
    assert "KL" not in made.markdown()


def test_the_command_of_a_report_asks_for_the_same_job(place: Place, tmp_path: Path) -> None:
    other = write_text(tmp_path / "other.txt", seed=1)
    result = place.prune(eval_text=str(other))
    assert result.pruned.quality.text == str(other)
    given = prune._parser().parse_args(shlex.split(command_line(result))[1:])
    asked = prune.options_of(given, device=devices.get(given.target))
    assert json.loads(json.dumps(asdict(asked))) == json.loads(json.dumps(result.options))


def test_sentences_that_are_searched_on_are_not_scored(place: Place, tmp_path: Path) -> None:
    others = write_text(tmp_path / "others.txt", count=8, seed=1)
    both = tmp_path / "both.txt"
    both.write_text(f"{others.read_text()}\n\n{place.text.read_text()}")
    assert place.prune(eval_text=str(both)).pruned.quality.num_sentences == 8
    with pytest.raises(InvalidInput, match="0 sentences of --eval-text are not among those of --calib"):
        place.prune("again", eval_text=str(place.text))


@pytest.mark.parametrize("method", ["magnitude", "taylor"])
def test_every_method_keeps_the_budget(method: str, place: Place) -> None:
    assert place.prune(method=method).status == "kept"


@pytest.mark.usefixtures("no_starts")
def test_without_a_device_a_latency_is_estimated(place: Place) -> None:
    result = place.prune(target="s23", backend="executorch", estimate=True)
    assert (result.status, result.budget_used <= 1) == ("estimated", True)


def test_methods_are_compared_by_their_embeddings(place: Place, tmp_path: Path) -> None:
    given: dict[str, Any] = {"backend": "onnxruntime", "calib": str(place.text), "recover_steps": 1, "seq_length": 12}
    given |= {"out": tmp_path / "compared", "cache": tmp_path / "cache", "progress": lambda _: None}
    rows = api.compare(str(place.encoder), budgets="80%", methods=["uniform", "taylor"], **given)
    assert [(row.method, row.error, row.status) for row in rows] == [
        ("uniform", None, "kept"),
        ("taylor", None, "kept"),
    ]
    written = (tmp_path / "compared" / "compare.md").read_text()
    assert "| torch cosine similarity | cosine similarity | reached by 95 % | same nearest |" in written
    assert "Calibrated on the same 16 sentences." in written


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--input", "3x32x32"], "--input does not apply to the encoder of texts"),
        (["--processor", "here"], "--processor does not apply to the encoder of texts"),
        (["--eval-images", "here"], "--eval-images does not apply to the encoder of texts"),
        (["--context", "64"], "--context does not apply to the encoder of texts"),
        (["--calib", "self"], "is pruned with sentences: give a text as --calib"),
        (["--calib", "nowhere.txt"], "text 'nowhere.txt' does not exist"),
        (["--recover", "lora"], "recover is none or full for the encoder of texts"),
        (["--seq-length", "40"], "takes no input of 40 tokens"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(
    given: list[str], words: str, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--target", "host_cpu", "--budget", "80%", "--model", place.encoder, "--calib", place.text]
    assert call(prune.main, *arguments, "--out", place.runs / "run", *given) == 2
    assert words in last_line(capsys)
    assert not place.runs.exists()


def test_too_few_sentences_are_refused(place: Place, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="5 sentences are too few to prune with; give 8 or more"):
        place.prune(calib=str(write_text(tmp_path / "few.txt", count=5)))


def test_a_classifier_of_texts_is_refused(place: Place) -> None:
    classifier = place.encoder.with_name("classifier")
    save_network(encoder("classifier"), classifier, source=place.encoder)
    with pytest.raises(Unsupported, match="classifies texts, and encoders of texts are pruned by their embeddings"):
        replace(place, encoder=classifier).prune()
