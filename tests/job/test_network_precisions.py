"""Jobs of networks that choose the precision, on a made-up device that takes a nanosecond a byte of the file."""

from pathlib import Path
from typing import Any

import pytest
from standins.fake_job import QuickNetworkBench, use_fake_network_bench
from standins.network_jobs import Place, Result, place_in

from dilap import backends
from dilap.core.artifact import Artifact
from dilap.core.errors import InvalidInput, Unavailable, Unsupported
from dilap.job.precisions import offered_network_precisions
from dilap.job.result import read_result, summary, table
from dilap.report.report import Report

if reason := backends.get("onnxruntime").unavailable():
    pytest.skip(reason, allow_module_level=True)
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
pytest.importorskip("PIL", reason="Pillow is not installed")


@pytest.fixture(autouse=True)
def _fake_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_network_bench(monkeypatch, exports=False)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return place_in(tmp_path)


@pytest.fixture
def _quick_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let precisions be chosen for a method that takes no time, too."""
    monkeypatch.setattr("dilap.methods.chooses_precision", lambda _: True)


def prune(place: Place, **options: Any) -> Result:
    given: dict[str, Any] = {"method": "dilap", "settings": {"evaluations": "1"}, "precision": "auto"}
    return place.prune(**given | options)


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> tuple[Place, Result]:
    """A finished job whose budget 8 bits keep, made once and only to be read."""
    place = place_in(tmp_path_factory.mktemp("quantised"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_fake_network_bench(monkeypatch, exports=False)
        return place, prune(place, budget="80%", recover="full", recover_steps=2)


def test_where_quantising_is_enough_nothing_is_pruned(quantised: tuple[Place, Result]) -> None:
    _, result = quantised
    assert (result.status, result.pruned.artifact.precision) == ("kept", "int8")
    assert result.pruned.parameters == result.dense.parameters
    assert result.pruned.quality.kl < 0.01
    assert result.recovery == "none"
    assert "quantising alone is enough: the dense model in int8 keeps this budget with KL 0.000" in table(result)
    assert "nothing was pruned" in table(result)


def test_a_budget_is_of_the_dense_network_in_the_first_precision(quantised: tuple[Place, Result]) -> None:
    _, result = quantised
    assert (result.dense.artifact.precision, result.workload.precision) == ("f32", "f32")
    assert result.limit_seconds == pytest.approx(0.8 * result.dense.seconds)
    assert result.predicted_seconds == pytest.approx(result.pruned.seconds, rel=0.01)


def test_the_dense_network_is_shown_in_every_precision(quantised: tuple[Place, Result]) -> None:
    place, result = quantised
    assert [one.precision for one in result.formats] == ["f32", "int8"]
    seconds = {one.precision: one.seconds(result.dense, "p50") for one in result.formats}
    assert seconds["int8"] < 0.8 * seconds["f32"]
    assert set(summary(result)["dense_formats"]["int8"]) >= {"seconds", "kl", "agreement", "bytes"}
    assert "dense in int8" in Report.of([place.runs / "run"]).markdown()


def test_formats_are_read_as_they_were_written(quantised: tuple[Place, Result]) -> None:
    place, result = quantised
    assert read_result(place.runs / "run").formats == result.formats


@pytest.mark.usefixtures("_quick_choice")
def test_below_the_fastest_format_a_network_is_pruned_in_the_nearest_precision(place: Place) -> None:
    result = prune(place, budget="40%", method="uniform", settings={})
    assert (result.status, result.pruned.artifact.precision) == ("kept", "int8")
    assert result.pruned.parameters < result.dense.parameters
    assert "quantising alone is not enough: the fastest format of the dense model, int8" in table(result)
    distances = result.method_facts["distances"]
    assert distances["int8"] < distances["f32"]
    assert (place.runs / "run" / "table-int8.jsonl").exists()


@pytest.mark.usefixtures("_quick_choice")
def test_a_precision_that_loses_more_than_pruning_is_not_taken(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(QuickNetworkBench, "bad", True)
    result = prune(place, budget="95%", method="uniform", settings={})
    assert (result.status, result.pruned.artifact.precision) == ("kept", "f32")
    assert result.pruned.parameters < result.dense.parameters
    assert result.pruned.quality.kl < next(one.quality.kl for one in result.formats if one.precision == "int8")
    assert "quantising alone: the dense model in int8 keeps this budget with KL" in table(result)


def test_one_precision_is_taken_as_it_is(place: Place) -> None:
    result = prune(place, precision="int8", method="uniform", settings={})
    assert (result.dense.artifact.precision, result.pruned.artifact.precision) == ("int8", "int8")
    assert result.formats == ()


def test_methods_that_choose_no_precision_have_the_first_one(place: Place) -> None:
    result = prune(place, method="uniform", settings={})
    assert (result.pruned.artifact.precision, result.formats) == ("f32", ())


@pytest.mark.usefixtures("_quick_choice")
def test_an_estimate_chooses_too(place: Place) -> None:
    made_up: dict[str, Any] = {"target": "s23", "backend": "executorch", "estimate": True}
    result = prune(place, budget="80%", method="uniform", settings={}, **made_up)
    assert result.status == "estimated"
    assert [one.precision for one in result.formats] == ["f32", "int8"]
    assert result.budget_used <= 1


@pytest.mark.usefixtures("_quick_choice")
def test_without_the_runtime_no_precision_is_chosen(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise Unavailable("no such runtime here")

    monkeypatch.setattr("dilap.job.network_exam.open_network", missing)
    lines: list[str] = []
    result = prune(place, method="uniform", settings={}, progress=lines.append)
    assert (result.pruned.artifact.precision, result.formats) == ("f32", ())
    assert any("no precision is chosen, because what it loses cannot be seen here: no such" in line for line in lines)


@pytest.mark.usefixtures("_quick_choice")
def test_files_of_every_precision_are_scored_through_their_runtime(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_fake_network_bench(monkeypatch, exports=True)
    monkeypatch.setattr("dilap.job.network_stages.NetworkStages._share_used", lambda *_: None)  # nothing is corrected
    result = prune(place, budget="80%", method="uniform", settings={})
    f32, int8 = result.formats
    assert f32.quality.kl == pytest.approx(0, abs=1e-5)
    assert 1e-5 < int8.quality.kl < 0.1
    assert {f32.quality.through, int8.quality.through} == {"onnxruntime"}
    assert int8.artifact.details["operators"]["QuantizeLinear"] > 0


def refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the runtime hold no network in 8 bits."""
    export = QuickNetworkBench.export

    def refused(self: QuickNetworkBench, *given: Any, **named: Any) -> Artifact:
        if named.get("precision") == "int8":
            raise Unsupported("an operator has no 8 bits")
        return export(self, *given, **named)

    monkeypatch.setattr(QuickNetworkBench, "export", refused)


@pytest.mark.usefixtures("_quick_choice")
def test_a_precision_that_the_runtime_cannot_hold_is_left_out(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch)
    lines: list[str] = []
    result = prune(place, method="uniform", settings={}, progress=lines.append)
    assert (result.pruned.artifact.precision, result.formats) == ("f32", ())
    assert any("int8 is not tried: an operator has no 8 bits" in line for line in lines)


def test_a_precision_that_is_named_has_to_be_held(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch)
    with pytest.raises(Unsupported, match="an operator has no 8 bits"):
        prune(place, precision="f32,int8")


@pytest.mark.parametrize(
    ("asked", "found"),
    {None: ("f32", "int8"), (): ("f32",), ("int8", "f32"): ("f32", "int8")}.items(),
)
def test_the_precisions_on_offer(asked: tuple[str, ...] | None, found: tuple[str, ...]) -> None:
    assert offered_network_precisions(asked, backends.get("onnxruntime"), own="f32") == found


def test_a_precision_that_the_runtime_lacks_is_named(place: Place) -> None:
    with pytest.raises(Unsupported, match="runs image networks in f32 and int8, not in 'int4'"):
        prune(place, precision="f32,int4")


def test_one_table_is_not_of_several_precisions(place: Place) -> None:
    with pytest.raises(InvalidInput, match="the latency table of --table is of one precision, got f32, int8"):
        prune(place, precision="f32,int8", table="table.jsonl")
