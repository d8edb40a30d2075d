"""Who may import whom, and that packaging lists every folder."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomllib

from dilap.profilers.archive import travelling

ROOT = Path(__file__).parent.parent
LAYERS = {
    "dilap.cli": 5,
    "dilap.evaluation": 4,
    "dilap.profilers": 4,
    "dilap.report": 5,
    "dilap.export": 3,
    "dilap.backends": 2,
}
FOLDERS = ("", "backends", "cli", "evaluation", "export", "methods", "profilers", "report")
MODULES = sorted(path for folder in FOLDERS for path in (ROOT / "dilap" / folder).glob("*.py"))
TRAVELLING = travelling()


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> int:
    return LAYERS.get(".".join(module.split(".")[:2]), 1)


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


def test_every_layer_is_looked_at() -> None:
    assert {layer_of(name) for name in names(MODULES)} == {1, 2, 3, 4, 5}


@pytest.mark.parametrize("path", MODULES, ids=names(MODULES))
def test_module_imports_only_its_own_layer_or_a_lower_one(path: Path) -> None:
    mine = layer_of(module_name(path))
    higher = [name for name in imports(path) if name.split(".")[0] == "dilap" and layer_of(name) > mine]
    assert higher == []


@pytest.mark.parametrize("path", TRAVELLING, ids=names(TRAVELLING))
def test_what_travels_to_devices_imports_no_torch(path: Path) -> None:
    ours = {*names(TRAVELLING)}
    for name in imports(path):
        assert name.split(".")[0] not in {"torch", "transformers", "safetensors", "scipy", "peft"}
        if name.split(".")[0] == "dilap" and (ROOT / Path(*name.split("."))).with_suffix(".py").exists():
            assert name in ours, f"{name} does not travel"


@pytest.mark.parametrize("path", TRAVELLING, ids=names(TRAVELLING))
def test_what_travels_to_devices_parses_as_python_3_10(path: Path) -> None:
    ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))


def test_modelling_file_needs_torch_and_transformers_alone() -> None:
    roots = {name.split(".")[0] for name in imports(ROOT / "dilap" / "modeling_dilap.py")}
    assert roots - set(sys.stdlib_module_names) == {"torch", "transformers"}


def packaging() -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
        "setuptools"
    ]
    return found


def test_packaging_lists_every_package() -> None:
    packages = {module_name(path) for path in MODULES if path.name == "__init__.py"}
    assert set(packaging()["packages"]) == packages


@pytest.mark.parametrize("name", ["backends", "export", "profilers"])
def test_link_and_packaging_lead_to_one_folder(name: str) -> None:
    assert (ROOT / "dilap" / name).resolve() == ROOT / name
    assert (ROOT / packaging()["package-dir"][f"dilap.{name}"]).resolve() == ROOT / name
