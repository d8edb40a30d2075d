"""Folders are what they say, nothing that was done is lost, and nothing of anybody else's is removed."""

import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from standins.models import tiny_model

from dilap.backends import host
from dilap.core.codec import scratch_folder, write_json, written_aside
from dilap.core.errors import Infeasible, InvalidInput, LinkLost
from dilap.job import run_folder
from dilap.job.api import Lines
from dilap.job.inputs import code_sha256, inputs_of
from dilap.job.outputs import home_of, name_of
from dilap.job.run_folder import Workspace, tidy
from dilap.models.anatomy import model_digest
from dilap.models.options import CalibrationOptions

IDENTITY: dict[str, Any] = {"options": {"budget": "70%"}, "model": "abc", "inputs": {"the evaluation text": "1"}}


@pytest.fixture
def dead() -> int:
    """The number of a process that has ended."""
    child = subprocess.Popen(["true"])
    child.wait()
    return child.pid


def ignore(_: str) -> None:
    pass


def space(tmp_path: Path, *, progress: Callable[[str], None] = ignore) -> Workspace:
    return Workspace(tmp_path / "run", Lines(progress))


def begin(workspace: Workspace, error: Exception, *, stage: str | None = None) -> None:
    """A run that ends with an error, after a stage perhaps."""
    with pytest.raises(type(error)):
        _fail(workspace, error, stage)


def _fail(workspace: Workspace, error: Exception, stage: str | None) -> None:
    with workspace.opened(IDENTITY):
        if stage is not None:
            with workspace.stage(stage):
                pass
        raise error


def finished(tmp_path: Path) -> Path:
    workspace = space(tmp_path)
    with workspace.opened(IDENTITY):
        write_json(workspace.folder / "result.json", {})
        workspace.finish()
    return tmp_path / "run"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_finished_run_has_its_name_and_no_cache(tmp_path: Path) -> None:
    assert names(finished(tmp_path)) == ["result.json"]
    assert names(tmp_path) == ["run"]


def test_the_peak_memory_of_a_stage_has_that_of_the_stages_inside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks = iter([1, 5, 9, 2, 2, 3])  # read where a stage begins or ends

    def memory_use() -> host.MemoryUse:
        return host.MemoryUse(peak_bytes=next(peaks), resident_bytes=0)

    monkeypatch.setattr(host, "memory_use", memory_use)
    workspace = space(tmp_path)
    with workspace.stage("outer"):
        with workspace.stage("inner"):
            pass
        with workspace.stage("later"):
            pass
    assert workspace.stage_peak_bytes == {"inner": 9, "later": 2, "outer": 9}


def test_a_continued_run_knows_the_seconds_and_the_memory_of_earlier_stages(tmp_path: Path) -> None:
    first = space(tmp_path)
    begin(first, LinkLost("gone"), stage="measure")
    second = space(tmp_path)
    with second.opened(IDENTITY):
        assert second.stage_seconds == first.stage_seconds
        assert second.stage_peak_bytes == first.stage_peak_bytes


def test_a_run_killed_between_its_name_and_its_cache_is_tidied_and_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(_: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "drop", killed)
        with pytest.raises(KeyboardInterrupt):
            finished(tmp_path)
    assert (tmp_path / "run" / "cache").is_dir()
    with pytest.raises(InvalidInput, match="already exists"):
        space(tmp_path)
    assert not (tmp_path / "run" / "cache").exists()


def test_a_cache_killed_while_it_was_removed_is_no_cache(tmp_path: Path, dead: int) -> None:
    run = finished(tmp_path)
    (run / f".cache.{dead}.part").mkdir()
    tidy(run)
    assert f".cache.{dead}.part" not in names(run)


def test_somebody_elses_cache_stays(tmp_path: Path) -> None:
    (tmp_path / "run" / "cache").mkdir(parents=True)
    (tmp_path / "run" / "cache" / "precious").touch()
    with pytest.raises(InvalidInput):
        space(tmp_path)
    assert (tmp_path / "run" / "cache" / "precious").exists()


def test_a_folder_that_appears_at_the_end_of_a_run_is_left_and_so_is_the_run(tmp_path: Path) -> None:
    workspace = space(tmp_path)
    with workspace.opened(IDENTITY):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "precious").touch()
        with pytest.raises(InvalidInput, match="made by somebody else"):
            workspace.finish()
    assert names(tmp_path / "run") == ["precious"]
    assert (workspace.folder / "cache" / "identity.json").exists()


@pytest.mark.parametrize("content", ["artifact/model.gguf", "notes.txt", "cache/stages.json"])
def test_a_folder_with_content_and_no_identity_is_not_started_in(content: str, tmp_path: Path) -> None:
    path = tmp_path / ".run.unfinished" / content
    path.parent.mkdir(parents=True)
    path.touch()
    with pytest.raises(InvalidInput, match="does not say which run it is of"), space(tmp_path).opened(IDENTITY):
        pass
    assert path.exists()
    assert len([one for one in tmp_path.rglob("*") if one.is_file()]) == 1


def test_a_run_killed_before_it_said_what_it_is_starts(tmp_path: Path, dead: int) -> None:
    cache = tmp_path / ".run.unfinished" / "cache"
    cache.mkdir(parents=True)
    (cache / "lock").touch()
    (cache / f".identity.json.{dead}.part").touch()
    finished(tmp_path)
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"inputs": {"the evaluation text": "2"}}, "the evaluation text changed since"),
        ({"model": "other"}, "the model's weights changed since"),
        ({"options": {"budget": "60%"}}, "an unfinished run with other options"),
    ],
)
def test_what_changed_since_a_run_began_is_said(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    begin(space(tmp_path), LinkLost("gone"), stage="calibration text")
    with pytest.raises(InvalidInput, match=words), space(tmp_path).opened(IDENTITY | change):
        pass


@pytest.mark.parametrize("error", [LinkLost("gone"), InvalidInput("no space left"), RuntimeError("a defect")])
def test_an_error_after_a_stage_keeps_the_work(error: Exception, tmp_path: Path) -> None:
    begin(space(tmp_path), error, stage="calibration text")
    workspace = space(tmp_path)
    with workspace.opened(IDENTITY):
        assert workspace.is_continued
        assert "calibration text" in workspace.stage_seconds


def test_an_error_after_a_stage_says_where_the_work_is(tmp_path: Path) -> None:
    lines: list[str] = []
    begin(space(tmp_path, progress=lines.append), LinkLost("gone"), stage="calibration text")
    assert f"kept in {tmp_path / '.run.unfinished'}: the same command" in lines[-1]


@pytest.mark.parametrize(("error", "stage"), [(InvalidInput("bad"), None), (Infeasible("never"), "latency table")])
def test_a_new_run_that_has_nothing_or_can_never_work_leaves_nothing(
    error: Exception, stage: str | None, tmp_path: Path
) -> None:
    begin(space(tmp_path), error, stage=stage)
    assert names(tmp_path) == []


def test_a_run_killed_while_it_is_discarded_starts_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dead: int
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", _killed)
        patch.setattr(os, "getpid", lambda: dead)
        with pytest.raises(KeyboardInterrupt):
            _fail(space(tmp_path), InvalidInput("bad"), None)
    assert names(tmp_path) == [f"..run.unfinished.{dead}.part"]
    finished(tmp_path)
    assert names(tmp_path) == ["run"]


def _killed(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_a_change_of_one_weight_in_the_middle_changes_the_digest() -> None:
    model = tiny_model("llama")
    before = model_digest(model)
    with torch.no_grad():
        model.get_input_embeddings().weight.view(-1)[9000] += 1e-3
    assert model_digest(model) != before


def test_other_types_of_equal_weights_are_other_models() -> None:
    model = tiny_model("llama")
    half = model_digest(model.to(torch.bfloat16))
    assert half != model_digest(model.float())


def test_another_setting_of_the_numerics_is_another_model() -> None:
    model = tiny_model("llama")
    before = model_digest(model)
    model.config.rms_norm_eps *= 2
    assert model_digest(model) != before


def test_a_model_has_one_digest_wherever_it_lies() -> None:
    model = tiny_model("llama")
    before = model_digest(model)
    model.config._name_or_path = "elsewhere"
    assert model_digest(model) == before


class Words:
    """A tokenizer, as far as its content is asked for."""

    bos_token_id = eos_token_id = 0
    all_special_ids = (0,)

    def __init__(self, *words: str) -> None:
        self._words = words

    def get_vocab(self) -> dict[str, int]:
        return {word: number for number, word in enumerate(self._words)}


def test_inputs_are_known_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text.txt"
    (tmp_path / "my_own_method.py").write_text("prune = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    __import__("my_own_method")

    def inputs(*words: str) -> dict[str, str]:
        tokenizer: Any = Words(*words)
        return inputs_of(
            tokenizer,
            calibration=CalibrationOptions(source=str(text)),
            evaluation=str(text),
            method="my_own_method:prune",
        )

    text.write_text("one")
    first = inputs("a")
    text.write_text("two")
    (tmp_path / "my_own_method.py").write_text("prune = 2\n")
    second = inputs("a", "b")
    assert set(first) == {
        "the tokenizer", "the evaluation text", "the calibration text", "the code of my_own_method:prune"
    }  # fmt: skip
    assert all(first[name] != second[name] for name in first)


def test_the_code_of_a_package_is_all_of_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "my_package"
    package.mkdir()
    (package / "__init__.py").write_text("from my_package.inner import prune\n")
    (package / "inner.py").write_text("prune = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    __import__("my_package")
    before = code_sha256("my_package:prune")
    (package / "inner.py").write_text("prune = 2\n")
    assert code_sha256("my_package:prune") != before


def write(path: Path, text: str) -> None:
    with written_aside(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def test_a_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("old")
    (tmp_path / "link").symlink_to(Path("there") / "file")
    write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "file").read_text() == "new"
    assert names(tmp_path / "there") == ["file"]


def test_a_link_to_nothing_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "absent")
    write(tmp_path / "link", "new")
    assert (tmp_path / "absent").read_text() == "new"
    assert (tmp_path / "link").is_symlink()


def test_a_pipe_is_written_into(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    write(tmp_path / "pipe", "all of it")
    reader.join()
    assert read == ["all of it"]
    assert names(tmp_path) == ["pipe"]


def test_a_device_is_written_into(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/dev/null")
    write(tmp_path / "link", "lost")
    write(Path("/dev/null"), "lost")
    assert Path("/dev/null").is_char_device()
    assert (tmp_path / "link").is_symlink()


def test_standard_output_in_a_file_gets_what_is_written_to_it(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from dilap.core.codec import written_aside\n"
        "print('before', flush=True)\n"
        "with written_aside(Path('/dev/stdout')) as temporary: temporary.write_text('content\\n')\n"
        "print('after')\n"
    )
    with (tmp_path / "out").open("a") as out:
        subprocess.run(["python", "-c", program], stdout=out, check=True)
    assert (tmp_path / "out").read_text() == "before\ncontent\nafter\n"


def test_a_folder_that_appears_while_its_namesake_is_written_is_left(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def write_folder() -> None:
        with written_aside(out) as temporary:
            temporary.mkdir()
            out.mkdir()
            (out / "precious").touch()

    with pytest.raises(InvalidInput, match="made by somebody else"):
        write_folder()
    assert names(out) == ["precious"]
    assert names(tmp_path) == ["out"]


def test_leftovers_of_dead_processes_go_and_those_of_living_ones_stay(tmp_path: Path, dead: int) -> None:
    others = (f".x.{os.getppid()}.part", ".x.notes.part", f".y.{dead}.part")
    for name in (*others, f".x.{dead}.part"):
        (tmp_path / name).touch()
    write(tmp_path / "x", "new")
    assert names(tmp_path) == sorted([*others, "x"])


def test_a_scratch_folder_of_a_dead_process_is_removed_by_the_next(tmp_path: Path, dead: int) -> None:
    (tmp_path / f".table.scratch.{dead}.part").mkdir()
    with scratch_folder(tmp_path / "table") as folder:
        assert names(tmp_path) == [folder.name]
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("cwd", "given"), [("llama", "."), ("llama", "./"), ("llama/sub", ".."), ("", "llama/"), ("", "llama/sub/..")]
)
def test_outputs_are_named_after_the_model_and_lie_outside_of_it(
    cwd: str, given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "llama" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / cwd)
    assert (name_of(given), home_of(given).resolve()) == ("llama", tmp_path)


def test_a_hub_id_is_named_as_it_is() -> None:
    assert (name_of("user/model"), home_of("user/model")) == ("model", Path())
