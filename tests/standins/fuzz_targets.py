"""What is fuzzed: every kind of file and answer that DiLAP reads, with the code that reads it and what must hold."""

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

from dilap.backends.tensorrt.trtexec import read_times
from dilap.core.artifact import Artifact
from dilap.core.codec import decode, encode, read_json, write_json
from dilap.core.errors import LinkLost
from dilap.core.measurement import DeviceState
from dilap.core.plan import Plan
from dilap.core.workload import Workload
from dilap.evaluation.local_task import _read as read_rows
from dilap.job import comparison, result
from dilap.job.command import command_line
from dilap.models.gguf_tokenizer import tokenizer_fields
from dilap.models.load import load
from dilap.models.pretrained import require_sound_gguf
from dilap.models.text_files import read_text
from dilap.profilers.devices.locations import read_registry
from dilap.profilers.instruments.agent import AgentClient
from dilap.profilers.instruments.phone import parse_state
from dilap.profilers.instruments.runners import _max_context, parse_llama_bench, parse_llama_main
from dilap.profilers.links.store import Files
from dilap.profilers.tables.networks.table import NetworkTable
from dilap.profilers.tables.table import LatencyTable
from dilap.report import diff, inputs, summary, tables
from dilap.report.figures import figures
from standins.fabricated import FINGERPRINT
from standins.network_tables import measured_table


@dataclass(frozen=True)
class Target:
    """Something that is read: its content, who reads it, and how often it is drawn."""

    content: bytes
    read: Callable[[bytes], None]
    weight: int = 10
    is_text: bool = True


def documents(run: Path, folder: Path) -> dict[str, Target]:
    """What a run leaves, read as reports, exports and later runs read it."""
    sidecar = run / "artifact" / "artifact.json"  # with what those of ExecuTorch say too
    artifact = read_json(sidecar)
    write_json(sidecar, artifact | {"details": artifact["details"] | {"max_context": 64}})
    copy = folder / "copy"
    shutil.copytree(run, copy)

    def in_run(name: str, use: Callable[[Path], None]) -> Target:
        def read(content: bytes) -> None:
            (copy / name).write_bytes(content)
            try:
                use(copy / name)
            finally:
                (copy / name).write_bytes((run / name).read_bytes())

        return Target((run / name).read_bytes(), read)

    return {
        "table": in_run("table.jsonl", use_table),
        "table of a network": network_table_target(folder),
        "plan": in_run("plan.json", use_plan),
        "result": in_run("result.json", lambda _: use_run(copy)),
        "evaluation": in_run("evaluation.json", lambda _: use_run(copy)),
        "artifact": in_run("artifact/artifact.json", use_artifact),
        "comparison": comparison_target(folder),
        "devices.toml": devices_target(folder),
    }


def use_table(path: Path) -> None:
    table = LatencyTable.read(path)
    for entry in table.entries:
        assert min((*entry.samples_ns, *entry.sentinel_ns)) > 0
        assert sum(run[0] for run in entry.runs) <= len(table.header.architecture.layers)
    model = table.model()
    assert all(math.isfinite(error) for error in model.holdout_errors())
    assert model.predict(table.header.architecture.layers) > 0


def network_table_target(folder: Path) -> Target:
    path = folder / "network-table.jsonl"
    measured_table().write(path)

    def read(content: bytes) -> None:
        path.write_bytes(content)
        table = NetworkTable.read(path)
        model = table.model()
        assert all(math.isfinite(error) for error in model.holdout_errors())
        assert model.predict({}) >= 0

    return Target(path.read_bytes(), read)


def use_plan(path: Path) -> None:
    plan = decode(Plan, read_json(path), source=str(path))
    dense, pruned = plan.architecture, plan.pruned_architecture()
    assert 0 < pruned.num_parameters <= dense.num_parameters
    assert len(plan.digest) == 64


def use_run(folder: Path) -> None:
    contents = inputs.read([folder])
    rows = summary.rows(contents)
    parts = [tables.summary_table(rows), *tables.device_tables(contents.runs), *map(tables.facts_table, contents.runs)]
    parts += [*tables.evaluation_tables(contents.all_evaluations), *map(tables.figure_table, figures(contents, rows))]
    assert "<script>" not in tables.to_markdown("title", "lead", parts, tables.notes(contents))
    tables.to_csv(rows)
    for run in contents.runs:
        assert result.table(run.result)
        assert command_line(run.result)
    for row in rows:
        assert row.seconds > 0
        assert row.perplexity is None or row.perplexity >= 0
        assert row.file_bytes >= 0
    diff.text(diff.compare(folder, folder))


def use_artifact(path: Path) -> None:
    artifact = decode(Artifact, read_json(path), source=str(path))
    assert (path.parent / artifact.path).parent == path.parent
    assert artifact.num_bytes >= 0
    assert 0 < _max_context(path.with_name("model")) <= 1 << 24


def comparison_target(folder: Path) -> Target:
    rows = [
        comparison.Row(method="flap", budget="70%", status="kept", seconds=0.01, seconds_ci=(0.009, 0.011)),
        comparison.Row(method="sleb", budget="70%", error="it failed"),
    ]
    place = folder / "comparison"
    comparison.write(place, rows)

    def read(content: bytes) -> None:
        (place / "compare.json").write_bytes(content)
        inputs.read([place])

    return Target((place / "compare.json").read_bytes(), read)


def devices_target(folder: Path) -> Target:
    path = folder / "devices.toml"
    content = b"""\
[jetson_cpu]
ssh = "me@jetson"
port = 22
folder = "models"
[[s23]]
adb = "R5CW123"
affinity = "f8"
runner = "build/llama-bench"
[[s23]]
adb = "R5CW124"
[snapdragon_x]
ssh = "laptop"
system = "windows"
python = 'C:\\py\\python.exe'
"""

    def read(changed: bytes) -> None:
        path.write_bytes(changed)
        for device in read_registry(path).all():
            assert device.location is None or device.location.folder
            assert device.label

    return Target(content, read)


def models(checkpoint: Path, folder: Path) -> dict[str, Target]:
    """A model's folder, and a GGUF file."""
    copy = folder / "model copy"
    shutil.copytree(checkpoint, copy)

    def in_folder(name: str, *, head: int | None = None, weight: int = 2) -> Target:
        whole = (checkpoint / name).read_bytes()

        def read(content: bytes) -> None:
            (copy / name).write_bytes(content + (b"" if head is None else whole[head:]))
            try:
                source = load(str(copy))
                assert source.model.num_parameters() > 0
            finally:
                (copy / name).write_bytes(whole)

        return Target(whole[:head], read, weight=weight, is_text=name.endswith(".json"))

    weights = (checkpoint / "model.safetensors").read_bytes()
    found = {
        "config.json": in_folder("config.json", weight=4),
        "tokenizer.json": in_folder("tokenizer.json"),
        "tokenizer_config.json": in_folder("tokenizer_config.json"),
        "safetensors": in_folder("model.safetensors", head=8 + int.from_bytes(weights[:8], "little")),
        "gguf": gguf_target(folder),
    }
    if (checkpoint / "generation_config.json").exists():
        found["generation_config.json"] = in_folder("generation_config.json")
    return found


def gguf_target(folder: Path) -> Target:
    path = folder / "fuzzed.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {"block_count": 2, "embedding_length": 8, "context_length": 64}.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.rope.freq_base", 1e4)
    writer.add_array("llama.feed_forward_length", [16, 16])
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "ab"])
    writer.add_array("tokenizer.ggml.merges", ["a b"])
    writer.add_tensor("token_embd.weight", np.zeros((3, 8), np.float32))
    writer.add_tensor("output.weight", np.zeros((3, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    def read(content: bytes) -> None:
        path.write_bytes(content)
        require_sound_gguf(path)
        tokenizer_fields(path)

    return Target(path.read_bytes(), read, is_text=False)


class Scripted:
    """An agent whose lines are written down, and a way to it."""

    def __init__(self, lines: list[str]) -> None:
        self._lines = lines
        self.files: Files = self

    def place(self, path: Path, *, sha256: str, companions: Mapping[str, str]) -> str:
        return str(path)

    def start_agent(self) -> "Scripted":
        return self

    def write(self, text: str) -> None:
        json.loads(text)

    def read_line(self, *, timeout: float) -> str:
        if not self._lines:
            raise LinkLost("it ended")
        return self._lines.pop(0)

    def status_of_death(self) -> int | None:
        return None

    def close(self) -> None:
        self._lines = []


def answers(folder: Path) -> dict[str, Target]:
    """What agents, phones and timing programs say."""
    lines: list[dict[str, object]] = [
        {"seq": 1, "dilap": "0", "fingerprint": encode(FINGERPRINT)},
        {"seq": 2},
        {"seq": 3, "handle": 1, "load_seconds": 0.5, "peak_memory_bytes": 1000},
        {"seq": 4, "samples_ns": [1000, 1001, 1002], "host_ns": [], "seconds": 0.1, "other_seconds": 0.0},
        {"seq": 5, "state": encode(DeviceState(clocks_khz={"policy0": 1000}, load=0.5))},
        {"seq": 6, "average_bytes": 1000},
    ]
    refusal = [lines[0], {"seq": 2, "error": {"type": "Unfit", "message": "it is hot"}}]
    times = folder / "times.json"

    def agent(content: bytes) -> None:
        words = content.decode("utf-8", "replace")
        with AgentClient(Scripted(words.splitlines(keepends=True)), backend="llamacpp", device="host_cpu") as client:
            assert isinstance(client.fingerprint.num_cores, int)
            loaded = client.load(Path("x"), sha256="", workload=Workload())
            assert loaded.load_seconds >= 0
            assert min(client.sample(loaded.handle, 3).samples_ns, default=1) > 0
            assert client.state().power_mode.isprintable()
            client.average_memory(loaded.handle, 1)

    def bench(content: bytes) -> None:
        assert all(isinstance(one, int) for one in parse_llama_bench(content.decode("utf-8", "replace")))

    def exported(content: bytes) -> None:
        times.write_bytes(content)
        assert min(min(pair) for pair in read_times(times)) > 0

    return {
        "agent": Target(_lines(lines), agent, weight=30),
        "agent's refusal": Target(_lines(refusal), agent),
        "llama-bench": Target(b'{"n_prompt": 0, "n_gen": 8, "samples_ns": [ 80000000, 82000000 ]}\n', bench),
        "llama_main": Target(
            b'PyTorchObserver {"prompt_tokens":256,"generated_tokens":32,"inference_start_ms":1600,'
            b'"inference_end_ms":2050,"prompt_eval_end_ms":1650}\n',
            lambda content: _integer(parse_llama_main(content.decode("utf-8", "replace"), Workload())),
        ),
        "phone": Target(
            b"load 1.25 0.90\ncores 8\nlow_power 0\ngovernor walt\nclock policy0 1344000 1344000 1344000\n"
            b"  AC powered: false\n  level: 57\n  temperature: 312\nThermal Status: 1\n{mValue=36.4, mType=3, x}\n",
            lambda content: _state(parse_state(content.decode("utf-8", "replace"), affinity="f8")),
        ),
        "trtexec": Target(b'[{"computeMs": 1.5, "startEnqMs": 1.0, "endComputeMs": 2.6}]', exported),
    }


def _lines(documents: Sequence[Mapping[str, object]]) -> bytes:
    return "".join(json.dumps(one) + "\n" for one in documents).encode()


def _integer(value: int) -> None:
    assert type(value) is int


def _state(state: DeviceState) -> None:
    numbers = (state.load, state.battery_percent, *state.temperatures_celsius.values())
    assert all(one is None or math.isfinite(one) for one in numbers)


def texts(folder: Path) -> dict[str, Target]:
    """Calibration text, and rows of a task."""

    def read_as(name: str, use: Callable[[Path], object]) -> Callable[[bytes], None]:
        def read(content: bytes) -> None:
            (folder / name).write_bytes(content)
            use(folder / name)

        return read

    def _text(path: Path) -> str:
        return read_text(str(path))

    rows = b'{"text": "one two"}\n{"text": "three"}\n'
    return {
        "calibration.txt": Target(b"some words\nand more\n", read_as("words.txt", _text)),
        "calibration.jsonl": Target(rows, read_as("words.jsonl", _text), weight=1),
        "calibration.csv": Target(b"text,n\na,1\nb,2\n", read_as("words.csv", _text), weight=1),
        "rows": Target(rows, read_as("rows.jsonl", read_rows)),
    }
