"""Latency tables of image networks and encoders by `dilap-profile`, with fabricated seconds."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from standins import encoders
from standins.fabricated import FINGERPRINT
from standins.fake_job import QuickNetwork, QuickNetworkBench, call, fabricated_measurement, last_line
from standins.networks import network, write_photograph

from dilap import backends
from dilap.cli import profile
from dilap.core.artifact import Artifact
from dilap.core.codec import decode, read_json
from dilap.core.measurement import Measurement
from dilap.job import api
from dilap.job.network_bench import NetworkBench
from dilap.job.profile import Profile
from dilap.models.convolutional.load import save_network
from dilap.profilers.profiler import Case, Profiler
from dilap.profilers.protocol import Protocol
from dilap.profilers.tables import sharing
from dilap.profilers.tables.networks.probes import build_network_table
from dilap.profilers.tables.networks.table import NetworkTable

if reason := backends.get("onnxruntime").unavailable():
    pytest.skip(reason, allow_module_level=True)
FEW_PROBES = partial(build_network_table, num_random=8, num_holdout=4)


class ProbingBench(QuickNetworkBench):
    """Writes and keeps real tables; a network takes a nanosecond a byte of its file."""

    table_path = NetworkBench.table_path
    configuration_path = NetworkBench.configuration_path
    build_table = NetworkBench.build_table


class Measured:
    """What was measured for tables; after `killed_after` blocks of probes the power goes off."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.killed_after = 99

    def __call__(self, cases: Sequence[Case], _: Protocol, **__: Any) -> list[Measurement]:
        if self.killed_after == 0:
            raise KeyboardInterrupt
        self.killed_after -= 1
        self.names += [case.path.parent.name for case in cases[1:]]
        return [self._of(case) for case in cases]

    def _of(self, case: Case) -> Measurement:
        artifact = decode(Artifact, read_json(case.path.with_name("artifact.json")), source="probe")
        return fabricated_measurement(artifact, case.workload, seconds=1e-9 * artifact.num_bytes)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Measured:
    found = Measured()
    monkeypatch.setattr(Profiler, "measure", found)
    monkeypatch.setattr(Profiler, "fingerprint", lambda _: FINGERPRINT)
    for module in ("network_profile", "network_prune"):
        monkeypatch.setattr(f"dilap.job.{module}.NetworkBench", ProbingBench)
    monkeypatch.setattr("dilap.job.network_bench.build_network_table", FEW_PROBES)
    monkeypatch.setattr("dilap.job.network_exam.open_network", QuickNetwork)
    return found


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    save_network(network("resnet_basic"), tmp_path / "resnet")
    return tmp_path / "resnet"


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    save_network(encoders.encoder(), tmp_path / "bert")
    encoders.write_tokenizer(tmp_path / "bert")
    return tmp_path / "bert"


def profiled(model: Path, **given: Any) -> Profile[Any]:
    default: dict[str, Any] = {"backend": "onnxruntime", "input_": "3x32x32", "progress": lambda _: None}
    return api.profile(str(model), **default | {"cache": model.parent / "cache"} | given)


def test_a_job_uses_the_table_that_was_measured_before(classifier: Path, measured: Measured) -> None:
    found = profiled(classifier)
    assert found.table is not None
    assert NetworkTable.read(found.table).model() == found.model
    photographs = classifier.parent / "photos"
    for number in range(16):
        write_photograph(photographs / f"{number}.png", seed=number)
    measured.names.clear()
    lines: list[str] = []
    given: dict[str, Any] = {"out": classifier.parent / "run", "cache": classifier.parent / "cache"}
    given |= {"input_": "3x32x32", "calib": str(photographs), "progress": lines.append}
    result = api.prune(str(classifier), backend="onnxruntime", budget="80%", method="uniform", **given)
    assert result is not None
    assert result.workload == found.model.workload
    assert (measured.names, result.status) == ([], "kept")


def test_a_killed_table_goes_on_where_it_was(classifier: Path, measured: Measured) -> None:
    measured.killed_after = 2
    with pytest.raises(KeyboardInterrupt):
        profiled(classifier)
    before, measured.killed_after = len(measured.names), 99
    found = profiled(classifier)
    assert found.table is not None
    entries = NetworkTable.read(found.table).entries
    assert (before, len(measured.names)) == (8, len(entries) - 1)  # the dense one is measured beside all others


def test_a_table_keeps_the_configuration_that_it_was_begun_in(classifier: Path, measured: Measured) -> None:
    out = classifier.parent / "mine.jsonl"
    begun = profiled(classifier, out=out, threads=1).model.workload
    measured.names.clear()
    assert profiled(classifier, out=out).model.workload == begun
    assert measured.names == []


@pytest.mark.usefixtures("measured")
def test_an_encoder_of_texts_has_a_table_of_its_length_and_batch(encoder: Path) -> None:
    found = profiled(encoder, input_=None, seq_length=12, batch=4)
    assert found.table is not None
    header = NetworkTable.read(found.table).header
    assert (header.workload.batch, header.network.input_size) == (4, (3, 12))


@pytest.mark.usefixtures("measured")
def test_the_command_prints_the_costs_of_layers(
    classifier: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(classifier.parent)
    given: list[object] = ["--device", "host_cpu", "--backend", "onnxruntime", "--model", classifier]
    given += ["--input", "3x32x32", "--configuration", "plain", "--out", "table.jsonl"]
    assert call(profile.main, *given, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["dense_seconds"] == pytest.approx(found["fixed_seconds"] + sum(found["layers"].values()))
    assert (found["table"], found["estimated"], len(found["holdout_errors"])) == ("table.jsonl", False, 4)
    assert call(profile.main, *given) == 0
    said = capsys.readouterr().out
    assert "held-out plan  predicted ms  measured ms   error" in said
    assert f"slowest of {len(found['layers'])} layers" in said
    shared = sharing.share(Path("table.jsonl"), None)
    assert shared.name.startswith("host_cpu-onnxruntime-forward-f32-network-")


@pytest.mark.parametrize("model", ["classifier", "encoder"])
def test_without_a_device_costs_are_estimated(model: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(model)
    input_ = "3x32x32" if model == "classifier" else None
    found = profiled(folder, input_=input_, target="s23", backend="executorch", estimate=True)
    assert found.table is None
    assert found.range_seconds is not None
    best, worst = found.range_seconds
    assert best < found.model.dense_seconds < worst


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--phase", "prefill"], "--phase does not apply to the image network"),
        (["--vocabulary", "x.txt"], "--vocabulary does not apply to the image network"),
        (["--seq-length", "64"], "--seq-length does not apply to the image network"),
        (["--backend", "llamacpp"], "llamacpp runs no image networks; use --backend executorch or"),
        (["--precision", "f16"], "runs image networks in f32 and int8, not in 'f16'"),
        (["--input", "224"], "input '224' is not understood; write channels, height and width"),
    ],
)
def test_what_does_not_apply_to_a_network_is_refused(
    given: list[str], words: str, classifier: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(profile.main, "--device", "host_cpu", "--model", classifier, *given) == 2
    assert words in last_line(capsys)


def test_what_is_asked_of_networks_alone_is_refused_for_a_decoder(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(profile.main, "--device", "host_cpu", "--model", "smollm2-135m", "--batch", "2") == 2
    assert "--batch does not apply to smollm2-135m, which is neither an image network nor" in last_line(capsys)
