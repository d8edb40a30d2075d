"""What an error tells people to do exists: commands, their options, the extras of the package."""

import argparse
import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomllib
from standins import ROOT

from dilap.cli import compare, export, profile, prune, report
from dilap.cli import eval as evaluation

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PARSERS: dict[str, argparse.ArgumentParser] = {
    "dilap-prune": prune._parser(),
    "dilap-profile": profile._parser(),
    "dilap-export": export._parser(),
    "dilap-compare": compare._parser(),
    "dilap-eval": evaluation._parser(),
    "dilap-report": report._parser(),
}
OF_OTHERS = {"--fan", "--merge", "--n-depth", "--onnx", "--repack"}  # jetson_clocks, llama.cpp, trtexec
FOLDERS = ("dilap", "backends", "export", "profilers")


def sentences(path: Path) -> Iterator[str]:
    """The strings of a file that are words for people, their braces kept; docstrings and examples are not."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if id(node) in inner | documentation:
            continue
        text = ""
        if isinstance(node, ast.JoinedStr):
            text = "".join(str(one.value) if isinstance(one, ast.Constant) else "{}" for one in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
        if " " in text:
            yield text


def options_of(command: str) -> set[str]:
    return set(PARSERS[command]._option_string_actions)


HINTS = sorted(
    {
        (path.relative_to(ROOT).as_posix(), text)
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        for text in sentences(path)
        if path.name != "shells.py"  # programs, not words
        if re.search(r"(?<![\w-])--[a-z]|\bdilap-[a-z]|dilap\[|\btools/[a-z]", text)
    }
)


def test_hints_are_found() -> None:
    assert len(HINTS) > 40


@pytest.mark.parametrize(("path", "text"), HINTS)
def test_hint_names_what_exists(path: str, text: str) -> None:
    """The options that follow a command are its own; those that stand alone are of some command."""
    assert set(re.findall(r"(?<![\w./{-])dilap-[a-z]+", text)) <= {*PROJECT["scripts"], *PARSERS}
    text = re.sub(r"pip install[^;,]*", lambda found: re.sub("--[a-z0-9-]+", "", found[0]), text)  # pip's own options
    known = set().union(*map(options_of, PARSERS)) | OF_OTHERS
    assert set(re.findall(r"(?<![\w-])(--[a-z][a-z0-9-]*)", text)) <= known
    for command, options in re.findall(r"\b(dilap-[a-z]+)((?: [\w{}:./%-]+)*)", text):
        assert set(re.findall(r" (--[a-z][a-z0-9-]*)", options)) <= options_of(command)
    assert set(re.findall(r"dilap\[(\w+)\]", text)) <= set(PROJECT["optional-dependencies"])
    assert all((ROOT / one).exists() for one in re.findall(r"\btools/\w+", text))
