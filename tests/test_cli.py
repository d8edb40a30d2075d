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
from typing import Any

import pytest
import torch
from fabricated import FINGERPRINT
from models import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from dilap.anatomy import architecture_of
from dilap.backends.llamacpp import LlamaCpp
from dilap.cli import export, profile, prune
from dilap.cli.bench import Bench
from dilap.cli.console import Console
from dilap.codec import decode, read_json
from dilap.evaluator import Evaluator
from dilap.profilers import devices
from dilap.profilers.devices import Device
from dilap.profilers.probes import default_levels, list_probes, spread
from dilap.profilers.protocol import TABLE
from dilap.profilers.table import LatencyTable, TableEntry, TableHeader, runs_of
from dilap.source import load, save_checkpoint
from dilap.types import Architecture, Artifact, LayerWidths, Measurement, Plan, Workload

FAST = ["--evaluations", "3", "--step", "0.2", "--calib-length", "32"]


def seconds_of(widths: Sequence[LayerWidths]) -> float:
    """A made-up device: 0.2 ms and a few microseconds a head and channel."""
    per_layer = (20e-6 * one.num_heads + 30e-6 * one.num_kv_heads + 1e-6 * one.num_channels for one in widths)
    return 0.2e-3 + sum(per_layer)


class FakeBench(Bench):
    """Real exports, fabricated seconds."""

    def measure(self, paths: Sequence[Path], *, final: bool = False) -> list[Measurement]:
        found = []
        for path in paths:
            artifact = decode(Artifact, read_json(path.with_name("artifact.json")), source=str(path))
            center = round(seconds_of(artifact.architecture.layers) * 1e9)
            found.append(
                Measurement(
                    artifact_sha256=artifact.sha256,
                    workload=self.workload,
                    fingerprint=FINGERPRINT,
                    samples_ns=tuple(center + 10 * step for step in range(-7, 8)),
                    rounds=tuple(range(15)),
                    peak_memory_bytes=artifact.num_bytes,
                    load_seconds=0.1,
                    started="2026-01-01T00:00:00+00:00",
                    status="ok",
                )
            )
        return found

    def table_path(self, model: str, architecture: Architecture) -> Path:
        return Path(model).with_suffix(".jsonl")

    def build_table(self, architecture: Architecture, path: Path) -> LatencyTable:
        table = fabricated_table(architecture, self.workload)
        table.write(path)
        return table


def fabricated_table(architecture: Architecture, workload: Workload) -> LatencyTable:
    capabilities = LlamaCpp().capabilities(architecture.family, precision=workload.precision)
    attention, ffn = default_levels(architecture, capabilities)
    header = TableHeader(
        fingerprint=FINGERPRINT,
        workload=workload,
        architecture=architecture,
        backend="llamacpp",
        protocol=TABLE,
        created="2026-01-01T00:00:00+00:00",
    )
    probes = list_probes(
        architecture,
        measured=(spread(attention, 6), spread(ffn, 6)),
        levels=(attention, ffn),
        uniform=not capabilities.per_layer_widths,
        num_random=6,
        num_holdout=3,
        seed=0,
    )
    dense = round(seconds_of(architecture.layers) * 1e9)
    return LatencyTable(header).with_entries(
        TableEntry(
            role=probe.role,
            runs=runs_of(probe.widths),
            samples_ns=(round(seconds_of(probe.widths) * 1e9),) * 15,
            sentinel_ns=(dense,) * 15,
            status="ok",
        )
        for probe in probes
    )


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A tiny llama with a tokenizer, as a user would have it."""
    folder = tmp_path / "tiny"
    model = tiny_model("llama")
    save_checkpoint(model, tiny_tokenizer(tmp_path / "words"), folder)
    return folder


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text(" ".join(f"the {word} of line {word * 7}" for word in range(4000)))
    return path


@pytest.fixture
def fake_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(
        device: Device, backend: str, workload: Workload, console: Console, *, helpers: object, force: bool
    ) -> FakeBench:
        return FakeBench(device=device, backend=LlamaCpp(), workload=workload, console=console)

    monkeypatch.setattr("dilap.cli.job.Bench.of", made)


def call(main: Callable[[], None], *arguments: object) -> int:
    """Run a command's main; its exit code."""
    sys.argv = ["dilap", *map(str, arguments)]
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


def prune_tiny(checkpoint: Path, corpus: Path, out: Path, *extra: str) -> int:
    arguments = ["--target", "host_cpu", "--model", checkpoint, "--calib", corpus, "--eval-text", corpus, "--out", out]
    return call(prune.main, *arguments, *FAST, *extra)


@pytest.mark.usefixtures("fake_device")
def test_a_run_keeps_its_budget(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    assert prune_tiny(checkpoint, corpus, tmp_path / "run", "--budget", "70%") == 0
    result = read_json(tmp_path / "run" / "result.json")
    assert 0.93 * result["limit_seconds"] <= result["pruned"]["seconds"] <= result["limit_seconds"]


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
        patch.setattr("dilap.cli.stages.build_library", interrupt)
        assert prune_tiny(checkpoint, corpus, tmp_path / "run", "--budget", "70%") == 130
    assert prune_tiny(checkpoint, corpus, tmp_path / "run", "--budget", "60%") == 2
    assert "unfinished run with other options" in last_line(capsys)


@pytest.mark.usefixtures("fake_device")
def test_a_budget_that_the_dense_model_keeps_changes_nothing(
    checkpoint: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prune_tiny(checkpoint, corpus, tmp_path / "run", "--budget", "1s") == 0
    assert "already keeps" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.txt", "tiny", "tiny.jsonl", "words"]


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


def test_the_doctor_names_every_runtime_and_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(profile.main, "--doctor") == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("llamacpp", "host_cpu", "jetson_gpu", "jetson_cpu", "snapdragon_x", "s23"))


def test_the_doctor_imports_no_torch() -> None:
    program = "import sys; from dilap.cli import doctor, profile; doctor.examine(); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("main", [prune.main, profile.main, export.main])
def test_help_has_examples(main: Callable[[], None], capsys: pytest.CaptureFixture[str]) -> None:
    call(main, "--help")
    assert "examples:\n  dilap-" in capsys.readouterr().out


BAD = {
    "budget": (["--budget", "fast"], "budget 'fast' is not understood"),
    "device": (["--target", "jetson"], "unknown device 'jetson'"),
    "device out of reach": (["--target", "s23"], "it is not known where your s23"),
    "backend": (["--backend", "llama"], "unknown backend 'llama'"),
    "method": (["--method", "magic"], "unknown method 'magic'"),
    "precision": (["--precision", "q3"], "unknown precision 'q3'"),
    "threads": (["--threads", "0"], "at least 1"),
    "model": (["--model", "no-such-model"], "no model 'no-such-model'"),
    "table": (["--table", "no-table.jsonl"], "no-table.jsonl"),
    "step": (["--step", "0"], "--step is a share of the dense latency between 0 and 1, got 0"),
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
    bench = Bench.of(devices.get("host_cpu"), "llamacpp", Workload(threads=1), Console())
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
    real = os.replace

    def full(source: Any, target: Any) -> None:
        if Path(target).name == "dense":
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", full)
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


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]
