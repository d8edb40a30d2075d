"""Prune jobs of image networks, with fabricated seconds; two of them are exported for real and scored in a runtime."""

import copy
import json
import shlex
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from standins.cards import head_of, run_code, text_of
from standins.fake_job import FakeNetworkBench, call, last_line, use_fake_network_bench
from standins.network_jobs import Place, Result, place_in, write_photographs
from standins.network_tables import measured_table
from standins.networks import output, write_photograph
from standins.quick_methods import QUICK

from dilap import backends
from dilap.cli import prune
from dilap.core.codec import decode, read_json
from dilap.core.errors import InvalidInput, Mismatch
from dilap.core.graph import Network
from dilap.core.groups import indices_kept
from dilap.core.measurement import Measurement
from dilap.core.plan import Plan
from dilap.core.workload import Workload
from dilap.evaluation.image_subject import open_image_subject
from dilap.job import api, claims
from dilap.job.api import Lines
from dilap.job.command import command_line
from dilap.job.network_recovery import _Best
from dilap.job.networks import is_network
from dilap.job.photographs import GUESSED
from dilap.job.quality import PhotoQuality
from dilap.job.result import read_result, summary, table
from dilap.models.convolutional.load import load_network
from dilap.models.convolutional.proof import masked_
from dilap.profilers.devices import device as devices
from dilap.profilers.profiler import Case
from dilap.profilers.protocol import TABLE
from dilap.profilers.tables.networks.entries import NetworkEntry, named
from dilap.profilers.tables.networks.probes import list_network_probes
from dilap.profilers.tables.networks.table import NetworkTable, NetworkTableHeader
from dilap.report.report import Report
from dilap.search.networks.supernet import NetworkSupernet

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


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Place, Result]:
    """A finished job with a recovery, made once and only to be read."""
    place = place_in(tmp_path_factory.mktemp("done"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_fake_network_bench(monkeypatch, exports=True)
        return place, place.prune(recover="full", recover_steps=3)


def test_a_job_keeps_its_budget(done: tuple[Place, Result]) -> None:
    _, result = done
    assert (result.status, result.workload.phase, result.backend) == ("kept", "forward", "onnxruntime")
    assert 0.8 < result.budget_used <= 1
    assert result.pruned.parameters < result.dense.parameters
    assert result.pruned.flops < result.dense.flops


def test_its_files_are_scored_through_their_runtime(done: tuple[Place, Result]) -> None:
    _, result = done
    assert result.dense.quality.through == result.pruned.quality.through == "onnxruntime"
    assert result.dense.quality.kl == pytest.approx(0, abs=1e-5)
    assert result.pruned.quality.kl == pytest.approx(result.pruned.in_torch.kl, abs=1e-4)
    assert result.pruned.quality.top1 is not None
    assert result.pruned.quality.num_images == 8


def test_a_result_is_read_as_it_was_written(done: tuple[Place, Result]) -> None:
    place, result = done
    read = read_result(place.runs / "run")
    assert replace(read, options={}) == replace(result, options={})  # lists have become of tuples there
    assert isinstance(read.pruned.quality, PhotoQuality)


def test_the_checkpoint_computes_what_the_masked_network_does(done: tuple[Place, Result]) -> None:
    place, _ = done
    dense, checkpoint = load_network(str(place.classifier)), load_network(str(place.runs / "run" / "checkpoint"))
    plan: Plan[Network] = decode(Plan, read_json(place.runs / "run" / "plan.json"), source="plan")
    expanded = expanded_like(dense.model, checkpoint.model, plan)  # its numbers were measured and trained again
    masked_(expanded, plan.architecture, plan.kept)
    torch.testing.assert_close(output(checkpoint.model), output(expanded), rtol=1e-4, atol=1e-4)


def expanded_like(dense: torch.nn.Module, cut: torch.nn.Module, plan: Plan[Network]) -> torch.nn.Module:
    """A network of the dense shape that has a cut one's numbers wherever both have any."""
    made, own = copy.deepcopy(dense), dict(cut.state_dict())
    indices = indices_kept(plan.architecture.groups, plan.kept)
    with torch.no_grad():
        for name, value in made.state_dict().items():
            kept = [
                torch.from_numpy(indices[name, axis]) if (name, axis) in indices else torch.arange(size)
                for axis, size in enumerate(value.shape)
            ]
            if kept:
                value[torch.meshgrid(*kept, indexing="ij")] = own[name]
    return made


def test_its_run_is_a_network_for_the_other_commands(done: tuple[Place, Result]) -> None:
    place, result = done
    run = place.runs / "run"
    assert is_network(str(run))
    assert load_network(str(run)).digest == load_network(str(run / "checkpoint")).digest
    with closing(open_image_subject(str(run))) as subject:
        assert (subject.backend, subject.digest) == ("onnxruntime", result.pruned.artifact.sha256)


def test_the_hub_reads_the_heads_of_its_cards(done: tuple[Place, Result]) -> None:
    place, _ = done
    for folder, library in (("checkpoint", "transformers"), ("artifact", "onnxruntime")):
        found = head_of(place.runs / "run" / folder)
        assert (found.library_name, found.pipeline_tag) == (library, "image-classification")
        assert found.tags == ["dilap", "pruned"]


@pytest.mark.parametrize("folder", ["checkpoint", "artifact"])
def test_a_card_says_how_the_network_was_made(folder: str, done: tuple[Place, Result]) -> None:
    place, result = done
    text = text_of(place.runs / "run" / folder)
    plan: Plan[Network] = decode(Plan, read_json(place.runs / "run" / "plan.json"), source="plan")
    name, count = next(iter(plan.counts.items()))
    assert f"units kept in each group: {name} {count} of " in text
    assert f"plan: {result.plan_digest}" in text
    assert "command: `dilap-prune --target host_cpu --budget 80% --model resnet " in text
    assert "a photograph is resized to 32x32 (" in text
    assert "scored on one set of photographs only" in text
    assert "| latency p50 | " in text
    assert str(place.classifier.parent) not in text


def test_the_code_of_its_cards_classifies_a_photograph(
    done: tuple[Place, Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint by transformers, and the artifact by ONNX Runtime, as a copy and paste of it does."""
    place, result = done
    run = place.runs / "run"
    write_photograph(run / "checkpoint" / "photo.jpg", seed=1)
    logits = run_code(run / "checkpoint", monkeypatch)["logits"]
    (run / "checkpoint" / "photo.jpg").unlink()
    assert logits.shape == (1, 7)
    outputs = run_code(run / "artifact", monkeypatch)["outputs"]
    assert result.pruned.artifact.input is not None
    wanted = load_network(str(run / "checkpoint")).model(torch.zeros(result.pruned.artifact.input.shape)).logits
    torch.testing.assert_close(torch.from_numpy(outputs), wanted, rtol=1e-4, atol=1e-4)


def test_recovery_is_judged_on_other_photographs(done: tuple[Place, Result]) -> None:
    _, result = done
    assert len(result.recovery_kls) == 3
    assert result.recovery == "full"


def test_recovery_that_does_not_help_is_undone(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(model: torch.nn.Module, *_: object, **__: object) -> list[float]:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float("nan"))
        return [1.0, float("nan")]

    monkeypatch.setattr("dilap.job.network_recovery.distil_network", spoil)
    result = place.prune(recover="full", recover_steps=2)
    assert result.pruned.in_torch.kl == result.kl_without_recovery
    assert "recovery is undone, because it did not help" in result.all_notes


def test_recovery_keeps_its_best_state(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 1)
    best = _Best(model=model, path=tmp_path / "best.safetensors", distance=1.0)
    for number, distance in enumerate((0.5, 0.7, float("nan")), start=1):
        torch.nn.init.constant_(model.weight, number)
        best.num_steps = number
        best.judge(distance)
    best.restore_()
    assert (best.step, best.distance) == (1, 0.5)
    assert model.weight.tolist() == [[1.0, 1.0]]
    assert not best.path.exists()


def test_the_table_says_what_it_is_about(done: tuple[Place, Result]) -> None:
    _, result = done
    said = table(result)
    for words in ("images a second", "same class", "top-1", "8 photographs, never seen by the search", "forward of"):
        assert words in said
    assert "perplexity" not in said
    assert {"kl", "agreement", "top1", "dense_top1", "torch_kl"} <= set(summary(result))


def test_photographs_that_are_scored_are_not_searched_on(done: tuple[Place, Result]) -> None:
    _, result = done
    assert result.calibration_sequences + result.pruned.quality.num_images == 16


def test_a_report_shows_what_networks_have(done: tuple[Place, Result]) -> None:
    place, _ = done
    made = Report.of([place.runs / "run"])
    heading = next(line for line in made.markdown().splitlines() if line.startswith("| Model"))
    assert "| Same class | Top-1 | Top-5 |" in heading
    assert "Images a second" in heading
    assert "Perplexity" not in heading
    assert [one.name for one in made._figures] == [
        "tradeoff-kl",
        "tradeoff-agreement",
        "tradeoff-top1",
        "kept-groups",
        "prediction",
        "recovery",
    ]
    assert "KL (nats a photograph)" in made.markdown()
    assert {int(str(row["kept"])) % 8 for row in made._figures[3].rows} == {0}


def test_the_command_of_a_report_asks_for_the_same_job(done: tuple[Place, Result]) -> None:
    _, result = done
    given = prune._parser().parse_args(shlex.split(command_line(result))[1:])
    asked = prune.options_of(given, device=devices.get(given.target))
    assert json.loads(json.dumps(asdict(asked))) == json.loads(json.dumps(result.options))


@pytest.mark.parametrize("method", ["magnitude", "taylor", "halp", "torch_pruning"])
def test_every_method_keeps_the_budget(method: str, place: Place) -> None:
    result = place.prune(method=method, settings=QUICK.get(method, {}))
    assert (result.status, result.method) == ("kept", method)


def test_dilaps_search_keeps_the_budget(place: Place) -> None:
    result = place.prune(method="dilap", precision="f32", settings={"evaluations": "2"})
    assert (result.status, result.method) == ("kept", "dilap")


def test_a_share_of_the_weights_can_be_removed_instead(place: Place) -> None:
    result = place.prune(budget=None, ratio=0.3)
    assert result.status == "kept"
    assert result.limit_seconds is None


def write_table(place: Place) -> Path:
    """A table of the network on this machine: it is as fast as it has little to compute."""
    source, path = load_network(str(place.classifier)), place.runs.parent / "table.jsonl"
    network, workload = source.traced.network, Workload(phase="forward", precision="f32", threads=2)
    bench = FakeNetworkBench.of([devices.get("host_cpu")], "onnxruntime", workload, Lines(lambda _: None))
    header = NetworkTableHeader(
        fingerprint=bench.profiler.fingerprint(),
        workload=workload,
        network=network,
        backend="onnxruntime",
        protocol=TABLE,
        created="2026-01-01T00:00:00+00:00",
    )
    probes = list_network_probes(network, multiple=8, num_random=8, num_holdout=4, seed=0)
    samples = [(round(1e6 + network.flops(named(network, one.counts)) / 10),) * 15 for one in probes]
    entries = [
        NetworkEntry(role=one.role, counts=one.counts, samples_ns=taken, sentinel_ns=samples[0], status="ok")
        for one, taken in zip(probes, samples, strict=True)
    ]
    NetworkTable(header).with_entries(entries).write(path)
    return path


def test_a_table_that_was_measured_before_is_used_with_its_threads(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeNetworkBench, "build_table", None)  # nothing is measured for a table
    path = write_table(place)
    result = place.prune(table=str(path))
    assert result.workload.threads == 2
    assert result.predicted_seconds is not None
    assert (place.runs / "run" / "table.jsonl").read_bytes() == path.read_bytes()
    assert f"--table {path}" in command_line(result)


def test_a_table_of_another_network_is_refused(place: Place, tmp_path: Path) -> None:
    measured_table().write(tmp_path / "other.jsonl")
    with pytest.raises(Mismatch, match="network tensors differ"):
        place.prune(table=str(tmp_path / "other.jsonl"))


def test_without_a_device_a_latency_is_estimated(place: Place) -> None:
    result = place.prune(target="s23", backend="executorch", estimate=True)
    assert result.status == "estimated"
    assert result.limit_seconds is not None
    assert result.predicted_seconds is not None
    assert result.budget_used == pytest.approx(result.predicted_seconds / result.limit_seconds, rel=1e-3)
    assert result.budget_used <= 1


def test_a_job_goes_on_where_it_was_stopped(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(claims, "measured", stop)
        with pytest.raises(KeyboardInterrupt):
            place.prune()
    assert (place.runs / ".run.unfinished" / "plan.json").is_file()
    monkeypatch.setattr("dilap.methods.networks.magnitude.norms", stop)  # the method is not asked again
    lines: list[str] = []
    assert place.prune(progress=lines.append).status == "kept"
    assert any("going on with the unfinished run" in line for line in lines)
    assert not (place.runs / "run" / "cache").exists()


def test_a_killed_search_goes_on_where_it_was_and_says_its_rounds(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute, lives = NetworkSupernet._linearised, [2, 10**9]

    def mortal(*given: Any) -> Any:
        if not lives[0]:
            raise KeyboardInterrupt
        lives[0] -= 1
        return compute(*given)

    monkeypatch.setattr(NetworkSupernet, "_linearised", mortal)
    lines: list[str] = []
    asked: dict[str, Any] = {"method": "dilap", "settings": {"evaluations": "2"}, "budget": "60%", "precision": "f32"}
    with pytest.raises(KeyboardInterrupt):
        place.prune(**asked, progress=lines.append)
    rounds = [line for line in lines if line.startswith("round ")]
    assert rounds[0].startswith("round 1: limit 90.0% of dense, KL predicted ")
    lives.pop(0)
    monkeypatch.setattr("dilap.search.networks.library.layer_statistics", None)  # the levels are there already
    again: list[str] = []
    assert place.prune(**asked, progress=again.append).status == "kept"
    assert [line for line in again if line.startswith("round ")][: len(rounds)] == rounds


def test_photographs_that_changed_between_two_starts_are_named(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(claims, "measured", stop)
    with pytest.raises(KeyboardInterrupt):
        place.prune()
    for number in range(16):
        write_photograph(place.photographs / str(number % 7) / f"{number}.png", seed=100 + number)
    with pytest.raises(InvalidInput, match="the photographs of --calib and the photographs scored changed since"):
        place.prune()


def test_a_file_that_is_replaced_while_it_is_measured_is_not_claimed_of(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = FakeNetworkBench.measure_cases

    def replaced(self: FakeNetworkBench, cases: Sequence[Case], *, final: bool = False) -> list[Measurement]:
        found = real(self, cases, final=final)
        is_claim = cases[-1].path.parent.name == "artifact"
        return [replace(one, artifact_sha256="e" * 64) for one in found] if is_claim else found

    monkeypatch.setattr(FakeNetworkBench, "measure_cases", replaced)
    with pytest.raises(Mismatch, match="measured was a file of sha256 eeeeeeeeeeee"):
        place.prune()


def test_a_budget_that_is_kept_already_writes_nothing(place: Place) -> None:
    out = place.runs / "run"
    given: dict[str, Any] = {"method": "uniform", "backend": "onnxruntime", "progress": lambda _: None}
    given["calib"] = str(place.photographs)
    assert api.prune(str(place.classifier), budget="100s", out=out, cache=place.runs / "cache", **given) is None
    assert not out.exists()


_OWN = """
import torch
from torch import nn
from standins.networks import network

def build():
    return network("lite")

class Fixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8192, 7)

    def forward(self, x):
        return self.last(self.first(x).reshape(len(x), 8192))
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a user's own module."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "lite_module.py").write_text(_OWN)
    monkeypatch.syspath_prepend(tmp_path / "code")
    monkeypatch.delitem(sys.modules, "lite_module", raising=False)
    return "lite_module:build"


def test_a_users_own_module_is_pruned_by_the_command(
    own: str, place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_fake_network_bench(monkeypatch, exports=True)
    monkeypatch.chdir(tmp_path)
    others = write_photographs(tmp_path / "others", count=8, first=100)
    given: list[object] = ["--target", "host_cpu", "--budget", "90%", "--method", "taylor"]
    given += ["--model", own, "--input", "3x32x32"]
    given += ["--calib", place.photographs, "--eval-images", others, "--batch", "2", "--configuration", "plain"]
    assert call(prune.main, *given, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["out"] == "runs/lite_module-build-host_cpu-90pct-taylor"
    assert found["quality_through"] == "onnxruntime"
    assert GUESSED in found["notes"]
    result = read_result(tmp_path / found["out"])
    assert (result.workload.batch, result.pruned.quality.images) == (2, str(others))
    assert result.pruned.artifact.input is not None
    assert result.pruned.artifact.input.shape == (2, 3, 32, 32)
    loaded = load_network(own, input_=result.pruned.artifact.input, weights=tmp_path / found["out"] / "checkpoint")
    assert head_of(tmp_path / found["out"] / "checkpoint").library_name == "pytorch"
    as_in_card = run_code(tmp_path / found["out"] / "checkpoint", monkeypatch)["model"]
    torch.testing.assert_close(output(as_in_card), output(loaded.model), rtol=0, atol=0)
    assert sum(one.numel() for one in loaded.model.parameters()) == result.pruned.parameters


@pytest.mark.usefixtures("own")
def test_a_network_that_forbids_cutting_is_refused(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    given: list[object] = ["--target", "host_cpu", "--budget", "90%", "--calib", place.photographs]
    given += ["--model", "lite_module:Fixed", "--input", "3x32x32", "--out", place.runs / "run"]
    assert call(prune.main, *given) == 2
    assert "network lite_module:Fixed: no channel can be removed; for example, first cannot be cut" in last_line(capsys)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--backend", "llamacpp"], "llamacpp runs no image networks; use --backend executorch or"),
        (["--precision", "int4"], "runs image networks in f32 and int8, not in 'int4'"),
        (["--vocabulary", "x"], "--vocabulary does not apply to the image network"),
        (["--context", "64"], "--context does not apply to the image network"),
        (["--calib", "self"], "is pruned with photographs: give a folder of them as --calib"),
        (["--calib", "nowhere"], "images 'nowhere' does not exist"),
        (["--recover", "lora"], "recover is none or full for the image network"),
        (["--method", "flap"], "unknown method 'flap'; did you mean 'dilap'"),
        (["--input", "224"], "write channels, height and width: 3x224x224"),
        (["--input", "1x32x32"], "nobody says how photographs become inputs of 1x32x32: give a folder with"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(
    given: list[str], words: str, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--target", "host_cpu", "--budget", "80%", "--model", place.classifier, "--calib", place.photographs]
    assert call(prune.main, *arguments, "--out", place.runs / "run", *given) == 2
    assert words in last_line(capsys)
    assert not place.runs.exists()


def test_a_decoder_has_no_batch_of_images(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--target", "host_cpu", "--budget", "80%", "--model", checkpoint, "--batch", "2"]
    assert call(prune.main, *given) == 2
    assert f"--batch does not apply to {checkpoint}, which is neither an image network nor an encoder" in last_line(
        capsys
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("few", "4 photographs are too few to prune with; give 8 or more"),
        ("labels", "labels are no classes of the model's 7, first '9'"),
        ("unreadable", "that Pillow cannot open; remove them"),
    ],
)
def test_photographs_that_are_of_no_use_are_refused(name: str, words: str, place: Place, tmp_path: Path) -> None:
    photographs = write_photographs(tmp_path / name, count=4 if name == "few" else 8)
    if name == "labels":
        write_photograph(photographs / "9" / "odd.png")
    if name == "unreadable":
        (photographs / "3" / "broken.png").write_bytes(b"no image")
    with pytest.raises(InvalidInput, match=words):
        place.prune(calib=str(photographs))


def test_photographs_that_are_searched_on_are_not_scored(place: Place) -> None:
    with pytest.raises(InvalidInput, match="are among those of --calib, which the search sees"):
        place.prune(eval_images=str(place.photographs))


def test_methods_are_compared_at_the_same_latency(place: Place, tmp_path: Path) -> None:
    given: dict[str, Any] = {"backend": "onnxruntime", "calib": str(place.photographs), "recover_steps": 1}
    given["progress"] = lambda _: None
    out, cache = tmp_path / "compared", tmp_path / "cache"
    rows = api.compare(
        str(place.classifier), out=out, cache=cache, budgets="80%", methods=["uniform", "taylor"], **given
    )
    assert [(row.method, row.error, row.status) for row in rows] == [
        ("uniform", None, "kept"),
        ("taylor", None, "kept"),
    ]
    assert all(row.artifact_agreement is not None and row.artifact_top1 is not None for row in rows)
    written = (out / "compare.md").read_text()
    assert "| KL | same class | top-1 |" in written
    assert "Calibrated on the same 8 photographs." in written
