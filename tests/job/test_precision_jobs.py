"""Jobs that choose the precision of every part, on a made-up device."""

from pathlib import Path

import pytest
from conftest import use_fake_device
from standins.fake_job import LLAMACPP, FinishedJob, prune_tiny
from standins.models import tiny_model

from dilap import backends
from dilap.core.codec import encode
from dilap.core.errors import InvalidInput, Unsupported
from dilap.core.printable import milliseconds
from dilap.job import comparison, ending
from dilap.job.precisions import asked_precisions, offered_precisions
from dilap.job.result import PruneResult, table
from dilap.models.anatomy import architecture_of
from dilap.report.inputs import Contents, Run
from dilap.report.summary import rows

pytestmark = pytest.mark.usefixtures("fake_device")
AUTO = {"method": "dilap", "precision": "auto"}


@pytest.mark.parametrize(
    ("text", "found"),
    {
        None: ("q4_0", None),
        "auto": ("q4_0", None),
        "q8_0": ("q8_0", ()),
        "q8_0,q4_0": ("q4_0", ("q8_0", "q4_0")),
        "f16, q8_0": ("f16", ("f16", "q8_0")),
    }.items(),
)
def test_the_precisions_asked_for(text: str | None, found: tuple[str, tuple[str, ...] | None]) -> None:
    assert asked_precisions(text, default="q4_0") == found


def test_the_best_precision_is_the_reference() -> None:
    architecture = architecture_of(tiny_model("llama"))
    found = offered_precisions(None, LLAMACPP, architecture, own="q4_0")
    assert found == ("f16", "q8_0", "q5_0", "iq4_nl", "q4_0")


def test_a_runtime_that_mixes_none_is_refused_where_several_are_named() -> None:
    architecture, tensorrt = architecture_of(tiny_model("llama")), backends.get("tensorrt")
    assert offered_precisions(None, tensorrt, architecture, own="f16") == ("f16",)
    with pytest.raises(Unsupported, match="in one precision, got f16, bf16"):
        offered_precisions(("f16", "bf16"), tensorrt, architecture, own="f16")


@pytest.fixture(scope="module")
def chosen(finished: FinishedJob, tmp_path_factory: pytest.TempPathFactory) -> PruneResult:
    out = tmp_path_factory.mktemp("chosen") / "out"
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_fake_device(monkeypatch)
        return prune_tiny(finished.checkpoint, finished.corpus, out, budget="70%", **AUTO)


def test_a_share_is_of_the_dense_model_as_it_ships(chosen: PruneResult) -> None:
    assert chosen.dense.artifact.precision == "q4_0"
    assert chosen.workload.precision == "q4_0"
    assert chosen.limit_seconds == pytest.approx(0.7 * chosen.dense.seconds)
    assert chosen.status == "kept"


def test_the_dense_model_is_shown_in_every_precision(chosen: PruneResult) -> None:
    assert [one.precision for one in chosen.formats] == ["f16", "q8_0", "q5_0", "iq4_nl", "q4_0"]
    seconds = {one.precision: one.seconds(chosen.dense, "p50") for one in chosen.formats}
    assert seconds["f16"] > seconds["q8_0"] > seconds["q4_0"] == pytest.approx(chosen.dense.seconds)
    assert all(one.quality.through == "llamacpp" for one in chosen.formats)


def test_formats_stand_with_interval_and_perplexity(chosen: PruneResult) -> None:
    lines = table(chosen).splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("the dense model alone"))
    assert lines[at].split()[4:] == ["latency", "95", "%", "interval", "KL", "perplexity", "file"]
    for line, one in zip(lines[at + 1 :], chosen.formats, strict=False):
        interval = one.interval(chosen.dense)
        assert interval is not None
        ends = "-".join(milliseconds(end) for end in (interval.low, interval.high))
        assert line.split()[4:7] == [ends, f"{one.quality.kl:.3f}", f"{one.quality.perplexity:.2f}"]


def test_a_comparison_has_the_dense_model_in_every_precision(chosen: PruneResult) -> None:
    row = comparison.row_of(chosen)
    assert comparison.read_row(encode(row), source="row.json") == row
    lines = comparison.markdown([row]).splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("| format |"))
    for line, one in zip(lines[at + 2 :], chosen.formats, strict=False):
        assert line.startswith(f"| {one.precision} | {milliseconds(one.seconds(chosen.dense, 'p50'))} |")
    assert [one.perplexity for one in row.formats] == [one.quality.perplexity for one in chosen.formats]


def test_words_say_that_quantising_alone_is_not_enough(chosen: PruneResult) -> None:
    assert "quantising alone is not enough: the fastest format of the dense model, q4_0, takes 143%" in table(chosen)


def test_the_torch_model_is_compared_with_the_dense_head_as_the_artifact_is(chosen: PruneResult) -> None:
    """Its own head was rounded, so that answers of the dense model through it would be others."""
    assert chosen.pruned.artifact.precisions["head"] not in ("f16", "f32")
    assert chosen.pruned.in_torch.kl == pytest.approx(chosen.pruned.quality.kl, rel=0.02)


def test_the_artifact_is_in_the_precisions_of_the_plan(chosen: PruneResult) -> None:
    assert chosen.precisions
    assert chosen.pruned.artifact.precisions == chosen.precisions


def test_where_quantising_is_enough_nothing_is_pruned(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    """Twice the latency as it ships is more than that of 8 bits, and less than that of f16."""
    result = prune_tiny(checkpoint, corpus, tmp_path / "out", budget="200%", **AUTO)
    assert result.pruned.parameters == result.dense.parameters
    assert result.pruned.quality.kl <= min(one.quality.kl for one in result.formats if one.precision != "f16") + 1e-3
    assert "nothing was pruned" in table(result)
    said = ending.verdict_sentence(result)
    assert said.startswith("tiny, quantised and not pruned, keeps the budget of 200% on host_cpu: ")
    assert "quantising alone is enough" in said
    card = (tmp_path / "out" / "checkpoint" / "README.md").read_text(encoding="utf-8")
    assert "# tiny, quantised to 200% on host_cpu" in card


def test_a_pruned_model_is_called_so(chosen: PruneResult) -> None:
    assert ending.verdict_sentence(chosen).startswith("tiny, pruned, keeps")


def test_methods_that_choose_no_precision_use_the_one_that_ships(
    checkpoint: Path, corpus: Path, tmp_path: Path
) -> None:
    result = prune_tiny(checkpoint, corpus, tmp_path / "out", method="magnitude", precision="auto")
    assert (result.pruned.artifact.precision, result.precisions, result.formats) == ("q4_0", {}, ())


def test_an_unknown_precision_is_named(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="unknown precision 'q9'"):
        prune_tiny(checkpoint, corpus, tmp_path / "out", precision="q8_0,q9", method="dilap")


def test_a_report_has_the_dense_model_in_every_precision(chosen: PruneResult) -> None:
    run = Run(name="half", result=chosen, widths=(), table=None, evaluation=None)
    contents = Contents(runs=(run,), evaluations=(), failures=())
    found = {row.run: row for row in rows(contents)}
    assert [*found] == ["dense", *(f"dense in {one.precision}" for one in chosen.formats), "half"]
    eight = found["dense in q8_0"]
    assert eight.of_dense == pytest.approx(eight.seconds / found["dense"].seconds)
    assert (eight.decode_bytes or 0) > (found["dense"].decode_bytes or 0) > 0
