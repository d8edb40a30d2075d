"""Who may import whom, and that packaging lists every folder."""

import ast
import graphlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomllib
from standins import ROOT

from dilap.profilers.instruments.archive import travelling

ROOMS = (  # from the ground up: a room imports only itself and those before it
    "core", "backends", "models", "export", "profilers", "search", "sparsity", "methods", "evaluation", "job", "report",
    "cli",
)  # fmt: skip
FACE = "dilap"  # `dilap/__init__` may import all
TRAVELLING = travelling()


def sources(room: str) -> list[Path]:
    return sorted((ROOT / "dilap" / room).resolve().rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "dilap" else ("dilap", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else FACE


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, at any depth and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def names(paths: list[Path]) -> list[str]:
    return [module_name(path) for path in paths]


def modules() -> dict[str, Path]:
    return {module_name(path): path for room in ROOMS for path in sources(room)}


def test_every_source_file_is_in_a_room() -> None:
    folders = {path.name for path in (ROOT / "dilap").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(ROOMS)
    assert [path.name for path in (ROOT / "dilap").glob("*.py")] == ["__init__.py"]


@pytest.mark.parametrize("room", ROOMS)
def test_room_imports_only_itself_and_the_rooms_below(room: str) -> None:
    allowed = {FACE, *ROOMS[: ROOMS.index(room) + 1]}
    assert [
        f"{module_name(path)} imports {name}"
        for path in sources(room)
        for name in imports(path)
        if name.split(".")[0] == "dilap" and room_of(name) not in allowed and room_of(name) in ROOMS
    ] == []


def test_no_circle_of_files() -> None:
    known = modules()
    graph = {name: {one for one in imports(path) if one in known and one != name} for name, path in known.items()}
    for package in [name for name, path in known.items() if path.name == "__init__.py"]:
        graph[package] -= {one for one in graph[package] if one.startswith(f"{package}.")}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(known)


@pytest.mark.parametrize("room", ROOMS)
def test_room_says_why_it_is_there(room: str) -> None:
    text = ast.get_docstring(ast.parse((ROOT / "dilap" / room / "__init__.py").read_text(encoding="utf-8")))
    assert text is not None
    assert len(text) > 100


@pytest.mark.parametrize("path", TRAVELLING, ids=names(TRAVELLING))
def test_what_travels_to_devices_imports_no_torch(path: Path) -> None:
    for name in imports(path):
        assert name.split(".")[0] not in {"torch", "transformers", "safetensors", "scipy", "peft"}
        assert name.split(".")[0] != "dilap" or room_of(name) not in ROOMS[2:], f"{name} does not travel"


@pytest.mark.parametrize("path", TRAVELLING, ids=names(TRAVELLING))
def test_what_travels_to_devices_parses_as_python_3_10(path: Path) -> None:
    ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))


@pytest.mark.parametrize("path", ["modeling_dilap.py", "convolutional/narrowing.py"])
def test_modelling_file_needs_torch_and_transformers_alone(path: str) -> None:
    roots = {name.split(".")[0] for name in imports(ROOT / "dilap" / "models" / path)}
    assert roots - set(sys.stdlib_module_names) - {"safetensors"} == {"torch", "transformers"}  # which needs it


def packaging() -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
        "setuptools"
    ]
    return found


def test_packaging_lists_every_package() -> None:
    packages = {FACE} | {name for name, path in modules().items() if path.name == "__init__.py"}
    assert set(packaging()["packages"]) == packages


@pytest.mark.parametrize("name", ["backends", "export", "profilers"])
def test_link_and_packaging_lead_to_one_folder(name: str) -> None:
    assert (ROOT / "dilap" / name).resolve() == ROOT / name
    assert (ROOT / packaging()["package-dir"][f"dilap.{name}"]).resolve() == ROOT / name
