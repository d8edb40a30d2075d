"""The commands: the whole job on a tiny model with fabricated seconds, and one clear line for bad input."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from standins.fake_job import FAST, FakeBench, call, fabricated_table, last_line
from standins.models import plan_for, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from dilap import backends
from dilap.backends.llamacpp.runtime import LlamaCpp
from dilap.cli import export, profile, prune
from dilap.cli.console import Console
from dilap.core.codec import decode, read_json
from dilap.core.measurement import Measurement
from dilap.core.plan import Plan
from dilap.core.shape import Architecture
from dilap.core.workload import Workload
from dilap.job.bench import Bench
from dilap.job.run_folder import held
from dilap.models.anatomy import architecture_of
from dilap.models.cut import shrink_
from dilap.models.load import load, save_checkpoint
from dilap.profilers.devices import device as devices
from dilap.profilers.devices import doctor
from dilap.profilers.profiler import Case
from dilap.profilers.tables.table import TableHeader
from dilap.search.journal import Evaluator


def prune_tiny(checkpoint: Path, corpus: Path, out: Path, *extra: str) -> int:
    arguments = ["--target", "host_cpu", "--model", checkpoint, "--calib", corpus, "--eval-text", corpus, "--out", out]
    return call(prune.main, *arguments, *FAST, *extra)


@pytest.mark.usefixtures("fake_device")
@pytest.mark.filterwarnings("ignore:::torch", "ignore:::torchao", "ignore:::executorch", "ignore:::copyreg")
@pytest.mark.parametrize("backend", ["onnxruntime", "executorch"])
def test_a_run_through_another_runtime_keeps_its_budget_in_what_ships_there(
    backend: str, checkpoint: Path, corpus: Path, tmp_path: Path
) -> None:
    if reason := backends.get(backend).unavailable():
        pytest.skip(reason)
    options = ["--budget", "70%", "--backend", backend, "--precision", devices.get("host_cpu").backends[backend]]
    if backend == "executorch":  # lowers every shape for seconds: one layer of two goes, and all shapes are the probes'
        as_probes = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5}
        model, checkpoint = tiny_model("llama", num_hidden_layers=2, **as_probes), tmp_path / "two layers"
        save_checkpoint(model, tiny_tokenizer(tmp_path / "more words"), checkpoint)
        options += ["--budget", "67%", "--method", "shortgpt"]
    assert prune_tiny(checkpoint, corpus, tmp_path / "run", *options) == 0
    result = read_json(tmp_path / "run" / "result.json")
    assert result["workload"]["precision"] == devices.get("host_cpu").backends[backend]
    assert 0.93 * result["limit_seconds"] <= result["pruned"]["seconds"] <= result["limit_seconds"]
    assert read_json(tmp_path / "run" / "artifact" / "artifact.json")["backend"] == backend


@pytest.mark.usefixtures("fake_device")
def test_a_run_keeps_its_budget(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    assert prune_tiny(checkpoint, corpus, tmp_path / "run", "--budget", "70%") == 0
    result = read_json(tmp_path / "run" / "result.json")
    assert 0.93 * result["limit_seconds"] <= result["pruned"]["seconds"] <= result["limit_seconds"]


@pytest.mark.usefixtures("fake_device")
def test_nothing_is_corrected_on_a_quick_measurement(
    checkpoint: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune_tiny(checkpoint, corpus, tmp_path / "quiet", "--budget", "70%")
    measure = FakeBench.measure_cases

    def disturbed(self: FakeBench, cases: Sequence[Case], *, final: bool = False) -> list[Measurement]:
        found = measure(self, cases, final=final)
        if final or len({case.path for case in cases}) == 1:
            return found
        *others, last = found
        return [*others, replace(last, samples_ns=tuple(round(1.2 * sample) for sample in last.samples_ns))]

    monkeypatch.setattr(FakeBench, "measure_cases", disturbed)
    assert prune_tiny(checkpoint, corpus, tmp_path / "disturbed", "--budget", "70%") == 0
    quiet, noisy = (read_json(tmp_path / name / "plan.json") for name in ("quiet", "disturbed"))
    assert quiet == noisy


def test_a_measurement_beside_other_load_is_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    statuses = ["contended", "ok"]

    def measured(*_: object, **__: object) -> list[SimpleNamespace]:
        return [SimpleNamespace(status=statuses.pop(0))]

    monkeypatch.setattr("dilap.job.measuring.Profiler.measure", measured)
    bench = Bench(device=devices.get("host_cpu"), backend=LlamaCpp(), workload=Workload(), progress=Console())
    assert [one.status for one in bench.measure([tmp_path / "model.gguf"])] == ["ok"]


@pytest.mark.usefixtures("fake_device")
def test_a_run_leaves_what_the_readme_lists(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    prune_tiny(checkpoint, corpus, tmp_path / "run", "--budget", "70%")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "result.json",
        "plan.json",
        "table.jsonl",
        "log.txt",
        "checkpoint",
        "artifact",
        "dense",
    }


@pytest.mark.usefixtures("fake_device")
def test_the_plan_digest_is_the_same_in_plan_checkpoint_and_artifact(
    checkpoint: Path, corpus: Path, tmp_path: Path
) -> None:
    prune_tiny(checkpoint, corpus, tmp_path / "run", "--budget", "70%")
    plan = decode(Plan, read_json(tmp_path / "run" / "plan.json"), source="plan.json")
    config = read_json(tmp_path / "run" / "checkpoint" / "config.json")
    artifact = read_json(tmp_path / "run" / "artifact" / "artifact.json")
    assert plan.digest == config["dilap_plan"] == artifact["plan_digest"]


@pytest.mark.usefixtures("fake_device")
def test_a_killed_run_goes_on_to_the_identical_plan(
    checkpoint: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune_tiny(checkpoint, corpus, tmp_path / "whole", "--budget", "70%")
    answers, real = 0, Evaluator.kls

    def dying(self: Evaluator, config: Sequence[int]) -> torch.Tensor:
        nonlocal answers
        answers += 1
        if answers == 3:
            raise KeyboardInterrupt
        return real(self, config)

    monkeypatch.setattr(Evaluator, "kls", dying)
    assert prune_tiny(checkpoint, corpus, tmp_path / "killed", "--budget", "70%") == 130
    assert not (tmp_path / "killed").exists()
    assert prune_tiny(checkpoint, corpus, tmp_path / "killed", "--budget", "70%") == 0
    whole, killed = (read_json(tmp_path / name / "plan.json") for name in ("whole", "killed"))
    assert whole == killed


@pytest.mark.usefixtures("fake_device")
def test_an_unfinished_run_with_other_options_is_not_touched(
    checkpoint: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dilap.search.levels.fit_choices", interrupt)
        assert prune_tiny(checkpoint, corpus, tmp_path / "run", "--budget", "70%") == 130
    assert prune_tiny(checkpoint, corpus, tmp_path / "run", "--budget", "60%") == 2
    assert "unfinished run with other options" in last_line(capsys)


@pytest.mark.usefixtures("fake_device")
def test_a_run_that_another_process_is_at_is_left_to_it(
    checkpoint: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with held(tmp_path / ".run.unfinished" / "cache"):
        assert prune_tiny(checkpoint, corpus, tmp_path / "run", "--budget", "70%") == 2
        assert "another process is at work" in last_line(capsys)
    assert prune_tiny(checkpoint, corpus, tmp_path / "run", "--budget", "70%") == 0


@pytest.mark.usefixtures("fake_device")
def test_a_budget_that_the_dense_model_keeps_changes_nothing(
    checkpoint: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prune_tiny(checkpoint, corpus, tmp_path / "run", "--budget", "1s") == 0
    assert "already keeps" in capsys.readouterr().err
    kept = [
        "corpus.txt",
        "tiny",
        "tiny.f16.configuration.json",
        "tiny.f16.jsonl",
        "words",
    ]  # the table and its configuration
    assert sorted(path.name for path in tmp_path.iterdir()) == kept


@pytest.mark.usefixtures("fake_device")
def test_an_unreachable_budget_says_what_is_reachable(
    checkpoint: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prune_tiny(checkpoint, corpus, tmp_path / "run", "--budget", "1%") == 2
    assert "fastest reachable" in last_line(capsys)


@pytest.mark.usefixtures("fake_device")
def test_recovery_lowers_the_kl(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    prune_tiny(checkpoint, corpus, tmp_path / "run", "--budget", "60%", "--recover", "full", "--recover-steps", "8")
    result = read_json(tmp_path / "run" / "result.json")
    assert result["pruned"]["quality"]["kl"] < result["kl_without_recovery"]


@pytest.mark.usefixtures("fake_device")
def test_a_ratio_removes_that_share_of_the_decoders_weights(
    checkpoint: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prune_tiny(checkpoint, corpus, tmp_path / "run", "--ratio", "0.3", "--method", "magnitude") == 0
    result = read_json(tmp_path / "run" / "result.json")
    dense, pruned = (result[side]["artifact"]["architecture"] for side in ("dense", "pruned"))
    embeddings = 2 * 300 * 64 + 64
    left = (result["pruned"]["parameters"] - embeddings) / (result["dense"]["parameters"] - embeddings)
    assert 0.55 < left <= 0.7  # 96 channels in steps of 32
    assert result["limit_seconds"] is None
    assert dense["hidden_size"] == pruned["hidden_size"]
    assert "pruning ratio 0.3: kept" in capsys.readouterr().out


@pytest.mark.usefixtures("fake_device")
def test_another_method_keeps_the_budget_and_its_biases_are_exported(
    checkpoint: Path, corpus: Path, tmp_path: Path
) -> None:
    settings = ("--method", "flap", "--set", "metric=WIFN")
    assert prune_tiny(checkpoint, corpus, tmp_path / "run", "--budget", "70%", *settings) == 0
    result = read_json(tmp_path / "run" / "result.json")
    assert result["budget_used"] <= 1
    assert result["pruned"]["artifact"]["architecture"]["ffn_out_bias"]
    assert result["options"]["settings"] == {"metric": "WIFN"}
    assert result["pruning_seconds"] > 0
    model = load(str(tmp_path / "run" / "checkpoint")).model
    assert architecture_of(model).out_bias


@pytest.mark.usefixtures("fake_device")
def test_a_killed_run_does_not_ask_its_method_again(
    checkpoint: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    arguments = ("--budget", "70%", "--method", "shortgpt")
    with monkeypatch.context() as patch:
        patch.setattr("dilap.job.proof.shrink_", interrupt)
        assert prune_tiny(checkpoint, corpus, tmp_path / "run", *arguments) == 130
    monkeypatch.setattr("dilap.methods.shortgpt.layer_statistics", interrupt)
    assert prune_tiny(checkpoint, corpus, tmp_path / "run", *arguments) == 0


@pytest.mark.usefixtures("fake_device")
def test_a_method_that_the_layout_does_not_hold_is_one_line(
    checkpoint: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--budget", "80%", "--method", "sprint", "--layout", "portable")
    assert prune_tiny(checkpoint, corpus, tmp_path / "run", *arguments) == 2
    assert "SPRINT removes single sublayers" in last_line(capsys)


@pytest.mark.usefixtures("fake_device")
def test_a_uniform_layout_gives_a_stock_checkpoint(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    prune_tiny(checkpoint, corpus, tmp_path / "run", "--budget", "60%", "--layout", "uniform")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint").config.architectures == [
        "LlamaForCausalLM"
    ]


@pytest.mark.usefixtures("fake_device")
def test_json_on_standard_output_is_json_alone(
    checkpoint: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prune_tiny(checkpoint, corpus, tmp_path / "run", "--budget", "70%", "--json")
    assert json.loads(capsys.readouterr().out)["status"] == "kept"


def test_export_works_alone_and_writes_the_sidecar(checkpoint: Path, tmp_path: Path) -> None:
    assert call(export.main, "--backend", "llamacpp", "--out", tmp_path / "out", checkpoint) == 0
    assert read_json(tmp_path / "out" / "artifact.json")["sqnr_db"] > 20


def test_the_doctor_names_every_runtime_and_device(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_tiny = doctor._run_tiny

    def quick(name: str, precision: str) -> None:
        if name in ("llamacpp", "onnxruntime"):  # lowering or compiling for the others takes most of a minute
            run_tiny(name, precision)

    monkeypatch.setattr(doctor, "_run_tiny", quick)
    assert call(profile.main, "--doctor") == 0
    printed = capsys.readouterr().out
    assert "ran q8_0, q5_0, iq4_nl, q4_0" in printed  # on tiny models
    assert all(name in printed for name in ("llamacpp", "host_cpu", "jetson_gpu", "jetson_cpu", "snapdragon_x", "s23"))


def test_listing_devices_imports_no_torch() -> None:
    program = (
        "import sys; from dilap.cli import profile; from dilap.profilers.devices import doctor; "
        "from dilap.profilers.devices.device import Registry; "
        "list(doctor.list_devices(Registry())); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("main", [prune.main, profile.main, export.main])
def test_help_has_examples(main: Callable[[], None], capsys: pytest.CaptureFixture[str]) -> None:
    call(main, "--help")
    assert "examples:\n  dilap-" in capsys.readouterr().out


def test_a_plan_that_a_runtime_cannot_hold_is_refused_by_group_and_rule(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model("qwen3")
    shrink_(model, plan_for(model, {"layers.1.channels": tuple(range(32))}))
    save_checkpoint(model, tiny_tokenizer(tmp_path / "words"), tmp_path / "pruned")
    assert call(export.main, "--backend", "llamacpp", tmp_path / "pruned") == 2
    assert "layers.1.channels keeps 32 where layer 0 keeps 96, and it needs equal widths" in last_line(capsys)


BAD = {
    "budget": (["--budget", "fast"], "budget 'fast' is not understood"),
    "device": (["--target", "jetson"], "unknown device 'jetson'"),
    "device out of reach": (["--target", "s23"], "it is not known where your s23"),
    "backend": (["--backend", "llama"], "unknown backend 'llama'"),
    "method": (["--method", "magic"], "unknown method 'magic'"),
    "precision": (["--precision", "q3"], "unknown precision 'q3'"),
    "threads": (["--threads", "0"], "a whole number from 1 to 512, got '0'"),
    "model": (["--model", "no-such-model"], "no model 'no-such-model'"),
    "table": (["--table", "no-table.jsonl", *FAST], "no-table.jsonl"),
    "setting": (["--method", "flap", "--set", "metric"], "--set takes NAME=VALUE, got 'metric'"),
    "step": (["--step", "0"], "--step is a share of the dense latency above 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(
    name: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra, message = BAD[name]
    before = sorted(tmp_path.iterdir())
    arguments = ["--target", "host_cpu", "--budget", "70%", "--model", checkpoint, "--out", tmp_path / "run"]
    assert call(prune.main, *arguments, *extra) == 2
    assert message in last_line(capsys)
    assert sorted(tmp_path.iterdir()) == before


MISMATCHES: dict[str, Callable[[TableHeader], TableHeader]] = {
    "device": lambda header: replace(header, fingerprint=replace(header.fingerprint, processor="Another")),
    "runtime_version": lambda header: replace(header, fingerprint=replace(header.fingerprint, runtime_version="0")),
    "precision": lambda header: replace(header, workload=replace(header.workload, precision="q4_0")),
    "model": lambda header: replace(header, architecture=replace(header.architecture, hidden_size=32)),
}


@pytest.mark.parametrize("what", MISMATCHES)
def test_a_table_of_something_else_is_refused(
    what: str, checkpoint: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = Bench.of([devices.get("host_cpu")], "llamacpp", Workload(threads=1), Console())
    architecture = read_architecture(checkpoint)
    table = fabricated_table(architecture, bench.workload)
    header = replace(table.header, fingerprint=bench.profiler.fingerprint())
    replace(table, header=MISMATCHES[what](header)).write(tmp_path / "table.jsonl")
    code = prune_tiny(
        checkpoint,
        corpus,
        tmp_path / "run",
        "--budget",
        "70%",
        "--threads",
        "1",
        "--table",
        str(tmp_path / "table.jsonl"),
    )
    assert code == 2
    assert "table" in last_line(capsys)


def test_a_table_without_held_out_plans_makes_no_claim(
    checkpoint: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = Bench.of([devices.get("host_cpu")], "llamacpp", Workload(threads=1, context=64), Console())
    table = fabricated_table(read_architecture(checkpoint), bench.workload)
    header = replace(table.header, fingerprint=bench.profiler.fingerprint())
    entries = tuple(one for one in table.entries if one.role != "holdout")
    replace(table, header=header, entries=entries).write(tmp_path / "table.jsonl")
    asked = ("--budget", "70%", "--threads", "1", "--table", str(tmp_path / "table.jsonl"))
    assert prune_tiny(checkpoint, corpus, tmp_path / "run", *asked) == 2
    said = last_line(capsys)
    assert "no held-out plans that count" in said
    assert "dilap-profile --device host_cpu --out" in said


def read_architecture(checkpoint: Path) -> Architecture:
    return architecture_of(load(str(checkpoint)).model)


@pytest.mark.usefixtures("fake_device")
def test_a_truncated_checkpoint_is_one_line(
    checkpoint: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert prune_tiny(checkpoint, corpus, tmp_path / "run", "--budget", "70%") == 2
    assert "cannot be loaded" in last_line(capsys)


@pytest.mark.usefixtures("fake_device")
def test_a_missing_runtime_is_one_line(
    checkpoint: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.undo()  # the real bench
    monkeypatch.setattr(LlamaCpp, "unavailable", lambda _: "llama.cpp is not installed; run: pip install x")
    assert prune_tiny(checkpoint, corpus, tmp_path / "run", "--budget", "70%") == 2
    assert "llama.cpp is not installed" in last_line(capsys)


@pytest.mark.usefixtures("fake_device")
def test_a_full_disk_is_one_line_and_leaves_no_artifact(
    checkpoint: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = os.rename

    def full(source: Any, target: Any) -> None:
        if Path(target).name == "dense":
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "rename", full)
    assert prune_tiny(checkpoint, corpus, tmp_path / "run", "--budget", "70%") == 2
    assert "no space left" in last_line(capsys)
    assert not list(tmp_path.rglob("model.gguf"))


def test_an_existing_output_is_not_overwritten(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    assert call(export.main, "--backend", "llamacpp", "--out", tmp_path / "out", checkpoint) == 2
    assert "already exists" in last_line(capsys)
    shutil.rmtree(tmp_path / "out")
