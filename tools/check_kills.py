"""Does a killed command, given again, end as if nothing had happened?

    tools/check_kills                               25 kills of each command, on a tiny random model
    tools/check_kills --kills 5 --commands export   fewer, of one command
    tools/check_kills --seed 1                      other moments

Every command runs once undisturbed. Then it is started in a fresh folder and killed with SIGKILL, its whole process
group, at random moments, and every third time the moment a temporary file or a left-over cache can be seen; after a
few kills it runs to its end. The exit code, the names of all files, and all content that does not depend on time must
be those of the undisturbed run, and no process may live on. Exit code 1 where something differs.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dilap.cli.arguments import whole
from dilap.cli.console import run
from tools.tiny_models import byte_level_tokenizer, tiny_model

_MARK = "DILAP_CHECK_KILLS"  # is set in the environment of a command, so that its processes are found
_SECONDS_TO_DIE = 20.0
_KILLS_A_JOB = 4
_WORK = "--model tiny --threads 1 --configuration plain --context 64"
_TEXT = "--calib corpus.txt --eval-text corpus.txt --calib-length 32"
_HERE = f"--target host_cpu {_WORK} {_TEXT} --evaluations 3 --step 0.2"
COMMANDS = {
    "prune": f"prune {_HERE} --ratio 0.3 --out run",
    "prune-estimate": f"prune {_HERE} --budget 70% --estimate --out run",
    "profile": f"profile --device host_cpu {_WORK} --out table.jsonl",
    "export": "export --backend llamacpp --precision f16 tiny --out exported",
    "compare": f"compare {_HERE} --ratio 0.3 --methods magnitude uniform --recover none --estimate --out compared",
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a command left: its exit code, and every file with a digest of what does not depend on time."""

    code: int
    files: Mapping[str, str]

    def differences(self, other: "Outcome") -> list[str]:
        found = [] if self.code == other.code else [f"exit code {other.code} after {self.code}"]
        for name in sorted({*self.files, *other.files}):
            mine, theirs = self.files.get(name, "absent"), other.files.get(name, "absent")
            if mine != theirs:
                found.append(f"{name}: {theirs[:12] or 'there'} after {mine[:12] or 'there'}")
        return found


def make_inputs(folder: Path) -> None:
    """A model of 3 layers with random weights, and a text."""
    tiny_model("llama").save_pretrained(folder / "tiny")
    byte_level_tokenizer(folder / "tiny")
    text = " ".join(f"the {word} of line {word * 7}" for word in range(4000))
    (folder / "corpus.txt").write_text(text, encoding="utf-8")


def files_of(folder: Path) -> dict[str, str]:
    """Return all files, folders and links below `folder`, each with the digest of what does not depend on time."""
    found = {}
    for path in sorted(folder.rglob("*")):
        content = b"" if path.is_dir() or path.is_symlink() else _timeless(path)
        found[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest() if content else ""
    return found


def _timeless(path: Path) -> bytes:
    if path.suffix in (".gguf", ".safetensors", ".txt", ".py") and path.name != "log.txt":
        return path.read_bytes()
    if path.name in ("plan.json", "config.json", "tokenizer.json", "artifact.json"):
        return path.read_bytes()
    if path.name == "result.json":
        return _result(json.loads(path.read_text(encoding="utf-8")))
    if path.name == "compare.json":
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return json.dumps([[row["method"], row["budget"], row["status"], row["artifact_kl"]] for row in rows]).encode()
    if path.suffix == ".jsonl":  # a latency table: what was measured
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return json.dumps([[line.get("role"), line.get("runs")] for line in lines]).encode()
    return b""


def _result(document: Mapping[str, Any]) -> bytes:
    names = ("status", "model_digest", "plan_digest", "calibration_sha256", "validation_kl", "kl_without_recovery")
    sides = [[document[side]["artifact"]["sha256"], document[side]["quality"]] for side in ("dense", "pruned")]
    return json.dumps([*(document[name] for name in names), sides]).encode()


class Command:
    """A command of DiLAP with its arguments, to be run in a folder."""

    def __init__(self, words: str, folder: Path) -> None:
        name, *self._arguments = words.split()
        self._program = f"from dilap.cli.{name} import main; main()"
        self._folder = folder

    def start(self) -> "Process":
        mark = uuid.uuid4().hex
        argv = [sys.executable, "-c", self._program, *self._arguments]
        environment = {**os.environ, _MARK: mark, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
        with tempfile.TemporaryFile() as said:
            child = subprocess.Popen(
                argv, cwd=self._folder, env=environment, stdout=said, stderr=said, start_new_session=True
            )
            return Process(child=child, mark=mark, said=os.dup(said.fileno()))


@dataclass(frozen=True, kw_only=True)
class Process:
    """A running command."""

    child: "subprocess.Popen[bytes]"
    mark: str
    said: int

    def text(self) -> str:
        """Return what it has written; this can be asked only once."""
        with open(self.said, "rb") as file:
            file.seek(0)
            return file.read().decode(errors="replace")

    def kill(self) -> None:
        """Kill the whole process group and wait until all of it is gone. Raises RuntimeError where something is not."""
        os.killpg(self.child.pid, signal.SIGKILL)
        self.child.wait()
        os.close(self.said)
        end = time.monotonic() + _SECONDS_TO_DIE
        while living := list(_processes(self.mark)):
            if time.monotonic() > end:
                raise RuntimeError(f"processes {living} live on {_SECONDS_TO_DIE:.0f} s after their command was killed")
            time.sleep(0.05)


def _processes(mark: str) -> Iterator[int]:
    """Yield the processes that have `mark` in their environment."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # gone, or another user's
            if entry.name.isdigit() and f"{_MARK}={mark}".encode() in (entry / "environ").read_bytes():
                yield int(entry.name)


def undisturbed(words: str, folder: Path) -> tuple[Outcome, float]:
    """Run a command to its end; return what it leaves, and its seconds. Raises RuntimeError where it fails."""
    start, process = time.monotonic(), Command(words, folder).start()
    code = process.child.wait()
    seconds, text = time.monotonic() - start, process.text()
    if code not in (0, 1):
        raise RuntimeError(f"dilap-{words} ended with {code} undisturbed: {text[-500:]}")
    return Outcome(code=code, files=files_of(folder)), seconds


def killed(words: str, folder: Path, *, kills: int, seconds: float, draw: random.Random, reference: Outcome) -> int:
    """Kill a command at most `kills` times, then let it end; return the number of kills that met it alive.

    Raises RuntimeError where it leaves anything else than `reference`.
    """
    met = 0
    for number in range(kills):
        process = Command(words, folder).start()
        wait = _until_seen(folder, after=draw.uniform(0, 0.7 * seconds)) if number % 3 == 2 else None
        if not _alive_after(process, seconds=draw.uniform(0, seconds), until=wait):
            break
        process.kill()
        met += 1
    process = Command(words, folder).start()
    code, text = process.child.wait(), process.text()
    if code == 2 and "already exists" in text:  # killed after its last step, or ended before it could be
        code = reference.code
    found = Outcome(code=code, files=files_of(folder))
    if differences := reference.differences(found):
        raise RuntimeError(f"{'; '.join(differences[:5])}; it said: {text[-300:]}")
    return met


def _until_seen(folder: Path, *, after: float) -> Callable[[float], bool]:
    """Return a test of whether, after so many seconds, a temporary file is there or a cache in a finished run."""

    def seen(elapsed: float) -> bool:
        if elapsed < after:
            return False
        names = [one for top, _, files in os.walk(folder) for one in (top, *files)]
        return any(one.endswith(".part") for one in names) or (folder / "run" / "cache").exists()

    return seen


def _alive_after(process: Process, *, seconds: float, until: Callable[[float], bool] | None) -> bool:
    """Wait for the time given, or until something is seen; return False where the command ended before."""
    start = time.monotonic()
    while process.child.poll() is None:
        elapsed = time.monotonic() - start
        if (elapsed >= seconds) if until is None else until(elapsed):
            return True
        time.sleep(0.0005)
    os.close(process.said)
    return False


def check(name: str, *, kills: int, seed: int, inputs: Path) -> list[str]:
    """Kill one command `kills` times, over several jobs, and return what differed."""
    met, draw = 0, random.Random(f"{name} {seed}")
    problems: list[str] = []
    with tempfile.TemporaryDirectory() as top:
        reference, seconds = undisturbed(COMMANDS[name], _fresh(Path(top) / "whole", inputs))
        for job in range(4 * kills):  # a job that ends early meets fewer kills
            if met >= kills or len(problems) > 2:
                break
            folder = _fresh(Path(top) / str(job), inputs)
            few = min(_KILLS_A_JOB, kills - met)
            try:
                met += killed(COMMANDS[name], folder, kills=few, seconds=seconds, draw=draw, reference=reference)
            except RuntimeError as error:
                problems.append(f"{name}, job {job}: {error}")
                met += few
    print(f"{name}: {met} kills in {job + 1} jobs of {seconds:.1f} s, {len(problems)} ended otherwise", flush=True)
    return problems


def _fresh(folder: Path, inputs: Path) -> Path:
    folder.mkdir()
    for one in inputs.iterdir():
        (folder / one.name).symlink_to(one)
    return folder


def _main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=whole(1, 10_000), default=25, help="of each command (25)")
    parser.add_argument("--commands", nargs="+", default=list(COMMANDS), choices=COMMANDS, metavar="NAME")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(given)
    problems: list[str] = []
    with tempfile.TemporaryDirectory() as inputs:
        make_inputs(Path(inputs))
        for name in asked.commands:
            problems += check(name, kills=asked.kills, seed=asked.seed, inputs=Path(inputs))
    print("\n".join(problems))
    return 1 if problems else 0


if __name__ == "__main__":
    run(_main)
