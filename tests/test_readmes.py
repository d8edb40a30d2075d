"""Every README: its links lead somewhere, its commands are those that there are, its code runs.

Commands of DiLAP's are given to their parsers, and those that take no time are run; the others are run, on tiny models,
by the tests that RUN_IN names. Programs that are not DiLAP's are in ELSEWHERE, with the reason why no test runs them.
"""

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomllib
from standins import ROOT
from standins.fake_job import QUICK, FinishedJob, call

from dilap import methods
from dilap.cli import compare, profile, prune, report
from dilap.cli import eval as evaluation
from dilap.cli import export as exporting
from dilap.core.codec import read_json
from dilap.core.documents import parse_object
from dilap.job import api
from dilap.job.asked import asked_job
from dilap.profilers.devices.locations import read_registry
from tools import results

ROOMS = [path for path in ROOT.iterdir() if path.name[0] != "." and not path.is_symlink()]
READMES = [ROOT / "README.md", *sorted(path / "README.md" for path in ROOMS if (path / "README.md").exists())]
PARSERS: dict[str, Any] = {
    "dilap-prune": prune,
    "dilap-profile": profile,
    "dilap-export": exporting,
    "dilap-compare": compare,
    "dilap-eval": evaluation,
    "dilap-report": report,
}
RUN_IN = {
    "dilap-prune": ("tests/cli/test_jobs.py", "prune.main"),
    "dilap-profile": ("tests/profilers/test_estimate.py", "profile.main"),
    "dilap-export": ("tests/cli/test_export.py", "export.main"),
    "dilap-compare": ("tests/cli/test_jobs.py", "compare.main"),
    "dilap-eval": ("tests/cli/test_run_folders.py", "evaluation.main"),
    "dilap-report": ("tests/report/test_report.py", "report.main"),
}
ELSEWHERE = {
    "pip": "installs: .ci/run does so in a fresh environment",
    "CMAKE_ARGS=$(python3 backends/llamacpp/build.py)": "compiles llama.cpp for minutes: tools/setup does so",
    "ssh-copy-id": "needs a device of the reader's",
    "ssh": "needs a device of the reader's",
    "adb": "needs a phone; tests/profilers/test_remote.py drives the real adb",
    "cmake": "needs the NDK and llama.cpp's sources",
    "cat": "joins the files of the standard library",
}


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every line of every block of commands, as words, without remarks."""
    for path in READMES:
        for block in blocks(path, "sh"):
            for line in block.splitlines():
                if words := shlex.split(line, comments=True):
                    yield str(path.relative_to(ROOT)), words


COMMANDS = list(commands())
OURS = [pytest.param(words, id=f"{where}: {' '.join(words)}") for where, words in COMMANDS if words[0] in PARSERS]
AT_ONCE = [one for one in OURS if {*one.values[0]} & {"--list-devices", "--list-methods", "--dry-run"}]  # type: ignore[misc]


def test_every_room_has_a_readme() -> None:
    rooms = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
    mine = {"dilap", "backends", "export", "profilers", "tests", "tools"}
    assert mine <= rooms
    assert {path.parent.name for path in READMES[1:]} >= mine


def test_the_first_readme_is_short() -> None:
    assert len(READMES[0].read_text(encoding="utf-8").splitlines()) <= 200


@pytest.mark.parametrize("path", READMES, ids=lambda one: str(one.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", path.read_text(encoding="utf-8"))
    assert links
    for file, anchor in links:
        found = path.parent / file if file else path
        assert found.exists(), file
        assert not anchor or anchor in anchors(found), f"{file}#{anchor}"


def anchors(path: Path) -> list[str]:
    titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]


@pytest.mark.parametrize("path", READMES, ids=lambda one: str(one.relative_to(ROOT)))
def test_no_folder_of_one_machine_is_named(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.findall(r"(?<![\w.~/-])/(?:work|tmp|root|mnt/data)\b", text)


@pytest.mark.parametrize("words", [one for one in OURS if one not in AT_ONCE])
def test_a_command_has_the_options_that_are_shown(words: list[str]) -> None:
    PARSERS[words[0]]._parser().parse_args(words[1:])
    file, called = RUN_IN[words[0]]
    assert called in (ROOT / file).read_text(encoding="utf-8")


@pytest.mark.parametrize("words", AT_ONCE)
def test_a_command_that_takes_no_time_runs(
    words: list[str], finished: FinishedJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    model = ["--model", finished.checkpoint, "--context", "64"] if "--dry-run" in words else []
    assert call(PARSERS[words[0]].main, *words[1:], *model) == 0


@pytest.mark.parametrize(("where", "words"), [one for one in COMMANDS if one[1][0] not in PARSERS])
def test_another_program_is_a_tool_or_has_a_reason(where: str, words: list[str]) -> None:
    if words[0].startswith("tools/"):
        assert os.access(ROOT / words[0], os.X_OK), where
    else:
        assert ELSEWHERE[words[0]]


def test_options_in_running_text_are_options_of_some_command() -> None:
    actions = [action for one in PARSERS.values() for action in one._parser()._actions]
    known = {option for action in actions for option in action.option_strings}
    sources = [path for path in (ROOT / "tools").iterdir() if path.suffix in ("", ".py") and path.is_file()]
    tools = "".join(path.read_text(encoding="utf-8") for path in sources)
    for path in READMES:
        prose = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        shown = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", prose))
        unknown = {one for one in shown - known if f'"{one}"' not in tools}
        assert unknown <= {"--no-deps", "--no-cache-dir", "--nproc-per-node", "--no-python"}, path  # pip's, torchrun's


@pytest.mark.parametrize("text", [one for path in READMES for one in blocks(path, "toml")])
def test_devices_are_read_as_they_are_shown(text: str, tmp_path: Path) -> None:
    assert tomllib.loads(text)
    (tmp_path / "devices.toml").write_text(text)
    assert read_registry(tmp_path / "devices.toml").located


def test_tools_are_all_in_their_readme() -> None:
    text = (ROOT / "tools" / "README.md").read_text(encoding="utf-8")
    listed = set(
        re.findall(r"`([\w.]+)`", "".join(line.split("|")[1] for line in text.splitlines() if line[:1] == "|"))
    )
    there = {path.name for path in (ROOT / "tools").iterdir() if os.access(path, os.X_OK) and path.is_file()}
    assert listed - {"notebook.ipynb"} == there


def test_what_was_measured_is_shown_as_the_file_has_it() -> None:
    found = read_json(results.RESULTS)
    assert results.budgets(found) in READMES[0].read_text(encoding="utf-8")
    assert results.methods(found) in (ROOT / "dilap" / "README.md").read_text(encoding="utf-8")
    assert all(found[name] for name in ("model", "what", "machine", "command"))
    assert found["command"].split()[0] in PARSERS


def test_the_chart_is_drawn_from_the_file() -> None:
    pytest.importorskip("vl_convert", reason="vl-convert-python is not installed")
    assert results.CHART.read_text(encoding="utf-8") == results.chart(read_json(results.RESULTS))


def test_plain_formats_are_drawn_beside_methods() -> None:
    pytest.importorskip("vl_convert", reason="vl-convert-python is not installed")
    found = read_json(results.RESULTS)
    plain = {"name": "q4_0", "latency_percent": 52.1, "kl": 0.6, "perplexity": 30.0}
    more = found | {"rows": [*found["rows"], plain], "shown": [*found["shown"], "q4_0"]}
    assert ">q4_0</text>" in results.chart(more)
    assert (results.methods(more), results.budgets(more)) == (results.methods(found), results.budgets(found))


def code(path: Path, first: str) -> str:
    """The only block of Python in a README that begins with `first`."""
    (found,) = [block for block in blocks(path, "python") if block.startswith(first)]
    return found


def test_llama_cpp_says_something(finished: FinishedJob, capsys: pytest.CaptureFixture[str]) -> None:
    text = code(READMES[0], "from llama_cpp")
    assert text == code(ROOT / "export" / "README.md", "from llama_cpp")
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    exec(text.replace("runs/mine", str(finished.run)).replace("n_ctx=512", "n_ctx=64"), {})
    assert capsys.readouterr().out.strip()


def test_transformers_says_something(finished: FinishedJob, capsys: pytest.CaptureFixture[str]) -> None:
    text = code(READMES[0], "from transformers")
    assert text == code(ROOT / "export" / "README.md", "from transformers")
    exec(text.replace("runs/mine", str(finished.run)), {})
    assert capsys.readouterr().out.startswith("The river is")


def test_onnx_runtime_genai_says_something(
    finished: FinishedJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    folder = tmp_path / "mine-onnxruntime-int4"
    words = [finished.run / "checkpoint", "--backend", "onnxruntime", "--precision", "f32", "--out", folder]
    assert call(exporting.main, *words) == 0
    capsys.readouterr()
    exec(code(ROOT / "export" / "README.md", "import onnxruntime_genai").replace(folder.name, str(folder)), {})
    assert capsys.readouterr().out.startswith("The river is")


@pytest.mark.filterwarnings("ignore:::torch", "ignore:::torchao", "ignore:::executorch")
def test_executorch_says_something(in_executorch: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = code(ROOT / "export" / "README.md", "from executorch")
    exec(text.replace("mine-executorch-8da4w", str(in_executorch / "artifact")), {})
    assert capfd.readouterr().out.strip()


def test_contributed_tables_are_listed_by_the_lines_that_say_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    exec(code(ROOT / "profilers" / "README.md", "from pathlib"), {})
    assert "ms, dense" in capsys.readouterr().out


@pytest.mark.usefixtures("fake_device")
@pytest.mark.parametrize("where", ["dilap/README.md", "tools/notebook.ipynb"])
def test_the_lines_of_python_run(
    where: str, finished: FinishedJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The built-in model and text would take minutes: a tiny model stands in for both."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def shortened(**options: Any) -> Any:
        given = options["given"] | QUICK | {"calib": str(finished.corpus), "eval_text": str(finished.corpus)}
        return asked_job(**options | {"given": given})

    monkeypatch.setattr(api, "asked_job", shortened)
    text = cells(ROOT / where) if where.endswith("ipynb") else code(ROOT / where, "import dilap")
    assert len([line for line in text.splitlines() if line.strip()]) <= 6
    exec(text.replace("smollm2-135m", str(finished.checkpoint)), {})


def cells(path: Path) -> str:
    """The code of a notebook."""
    found = parse_object(path.read_text(encoding="utf-8"), source=str(path))
    return "\n".join("".join(cell["source"]) for cell in found["cells"] if cell["cell_type"] == "code")


def test_methods_and_their_settings_are_those_that_there_are() -> None:
    text = (ROOT / "dilap" / "README.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"^\| method \| removes .*?\n\n", text, re.MULTILINE | re.DOTALL)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.strip().splitlines()[2:]]
    named = {name: row[3] for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    assert set(named) == set(methods.METHODS) - set(methods.NOT_COMPARED)
    for name, shown in named.items():
        listed = {word for word in re.findall(r"`(\w+)`", shown) if word != "dilap"}
        assert listed <= set(methods.settings_of(name)), name
        assert listed == set(methods.settings_of(name)) or "..." in shown, name
