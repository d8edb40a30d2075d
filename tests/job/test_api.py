"""The Python interface: what `import dilap` gives."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from standins import ROOT
from standins.fake_job import FinishedJob, quick

import dilap
from dilap.core.codec import decode, read_json
from dilap.core.errors import InvalidInput
from dilap.core.workload import Workload
from dilap.job import api
from dilap.job.bench import Bench
from dilap.job.result import PruneResult
from dilap.models.anatomy import model_digest
from dilap.profilers.devices import device as devices


def job(corpus: Path, tmp_path: Path, **changes: Any) -> dict[str, Any]:
    return quick(corpus, tmp_path / "run", budget="70%", method="magnitude", **changes)


@pytest.mark.parametrize("name", dilap.__all__)
def test_everything_named_is_there(name: str) -> None:
    assert getattr(dilap, name)


def test_importing_dilap_imports_no_torch() -> None:
    words = "import sys, dilap; dir(dilap); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", words], cwd=ROOT, check=False).returncode == 0


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'prun'"):
        dilap.prun  # noqa: B018


def test_packages_of_functions_names_are_called(tmp_path: Path) -> None:
    import dilap.export.gguf  # noqa: PLC0415

    face: Any = dilap  # type checkers see the package alone
    with pytest.raises(InvalidInput, match="no model"):
        face.export(tmp_path / "none", backend="llamacpp", out=tmp_path / "out")
    with pytest.raises(InvalidInput, match="at least one run"):
        face.report()


@pytest.mark.usefixtures("fake_device")
def test_a_job_is_that_of_the_command(finished: FinishedJob, tmp_path: Path) -> None:
    lines: list[str] = []
    options = job(finished.corpus, tmp_path, recover="full", recover_steps=3, progress=lines.append)
    result = dilap.prune(str(finished.checkpoint), **options)
    assert (
        result.plan_digest
        == decode(PruneResult, read_json(finished.run / "result.json"), source="result.json").plan_digest
    )
    assert any("latency table" in line for line in lines)


@pytest.mark.usefixtures("fake_device")
def test_a_loaded_model_is_left_as_it_is(finished: FinishedJob, tmp_path: Path) -> None:
    source = dilap.load(str(finished.checkpoint))
    dilap.prune(source, **job(finished.corpus, tmp_path))
    assert model_digest(source.model) == source.digest


@pytest.mark.usefixtures("fake_device")
def test_nothing_is_written_but_into_out_and_the_cache(
    finished: FinishedJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    dilap.prune(str(finished.checkpoint), **job(finished.corpus, tmp_path))
    assert list((tmp_path / "here").iterdir()) == []


def test_tables_lie_in_the_cache(tmp_path: Path, finished: FinishedJob, monkeypatch: pytest.MonkeyPatch) -> None:
    result = decode(PruneResult, read_json(finished.run / "result.json"), source="result.json")
    bench = Bench.of([devices.get("host_cpu")], "llamacpp", Workload(), api.Bars(), tables=tmp_path)
    assert bench.table_path("tiny", result.dense.artifact.decoder).parent == tmp_path


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"budget": None}, "give a budget"),
        ({"ratio": 0.2}, "not both"),
        ({"budgt": "70%"}, "no option 'budgt'"),
        ({"target": "toaster"}, "toaster"),
        ({"step": 0.0}, "--step"),
        ({"stat": "p95"}, "a latency is p50 or p90, got 'p95'"),
        ({"layout": "unifrm"}, "layout is one of free, portable, uniform, got 'unifrm'"),
        ({"configuration": "fast"}, "configuration is one of fastest, plain"),
        ({"importance": "wnda"}, "importance is one of"),
        ({"recover": "ful"}, "recover is one of none, lora, full"),
        ({"calib_length": 0}, "calib_length is a whole number from 1 to 1,048,576, got 0"),
        ({"recover_steps": 0}, "recover_steps is a whole number from 1"),
        ({"recover_tokens": 0}, "recover_tokens is a whole number from 1"),
        ({"recover_next_token": 1.5}, "recover_next_token is a number from 0 to 1, got 1.5"),
        ({"recover_rate": float("nan")}, "recover_rate is a number from 0 to 1, got nan"),
        ({"compute": "tpu"}, "torch has no device 'tpu' to compute on here"),
        ({"evaluations": -1}, "evaluations is a whole number from 0"),
        ({"seed": -1}, "seed is a whole number from 0"),
        ({"threads": 1.5}, "threads is a whole number from 1 to .* got 1.5"),
    ],
)
def test_impossible_options_are_told_in_one_line(given: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=words) as caught:
        dilap.prune(**{"budget": "70%", "out": tmp_path / "run"} | given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"budgets": []}, "nothing to compare at"),
        ({"budgets": ["8"]}, "budget '8' is not understood"),
        ({"methods": ["magnitud"]}, "unknown method 'magnitud'; known: all"),
        ({"methods": ["no_such_module:prune"]}, "method 'no_such_module:prune' cannot be imported"),
        ({"methods": ["flap"], "settings": {"flap": {"metrc": "x"}}}, "method flap has no setting 'metrc'"),
        ({"methods": ["flap"], "settings": {"sleb": {}}}, "settings of 'sleb', which is not compared"),
        ({"method": "flap"}, "no option 'method'"),
    ],
)
def test_a_comparison_that_cannot_end_well_does_not_begin(given: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=words):
        dilap.compare(**{"budgets": "80%", "out": tmp_path / "out"} | given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: dilap.profile(method="flap"), "no option 'method'; there are: backend"),
        (lambda: dilap.evaluate("x", task="piqa"), "no option 'task'"),
    ],
)
def test_an_option_of_another_function_is_refused(call: Callable[[], object], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        call()


@pytest.mark.usefixtures("fake_device")
def test_paths_may_be_given_as_paths(finished: FinishedJob, tmp_path: Path) -> None:
    options = job(finished.corpus, tmp_path, calib=finished.corpus, eval_text=finished.corpus)
    result = dilap.prune(finished.checkpoint, **options)
    assert result.model == str(finished.checkpoint)


def test_an_adapter_is_merged_when_a_model_is_loaded_and_not_later(finished: FinishedJob, tmp_path: Path) -> None:
    source = dilap.load(str(finished.checkpoint))
    with pytest.raises(InvalidInput, match=r"give merge_adapter to dilap\.load instead"):
        dilap.prune(source, **job(finished.corpus, tmp_path, merge_adapter="adapter"))
