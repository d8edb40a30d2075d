"""Every argument of a seed is what its table says: the options are taken, the names are there."""

import importlib
import operator
from typing import Any

import pytest
from standins import ROOT

from dilap import methods
from dilap.cli import prune
from dilap.profilers.devices import device as devices
from dilap.sparsity.rules import RULES

tool: Any = importlib.import_module("tools.seed_table")
ENTRIES = [(seed, entry) for seed in tool.SEEDS for entry in seed.entries]


def words(seed: Any, entry: Any) -> str:
    return f"{seed.name}: {entry.argument}"


@pytest.mark.parametrize(("seed", "entry"), [pytest.param(*one, id=words(*one)) for one in ENTRIES if one[1].options])
def test_options_are_taken(seed: Any, entry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given = prune._parser().parse_args(seed.words_of(entry))
    settings = prune._settings(given.set)
    if given.pattern is None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        assert prune.options_of(given, device=devices.get(given.target)).settings == settings
        methods.get(given.method, settings)
    else:
        methods.get(given.method, settings, table=RULES)


@pytest.mark.parametrize("entry", [pytest.param(one, id=one.argument) for _, one in ENTRIES if one.name])
def test_names_are_there(entry: Any) -> None:
    module, _, attribute = entry.name.partition(":")
    if attribute:
        assert callable(operator.attrgetter(attribute)(importlib.import_module(module)))
    else:
        assert (ROOT / module).is_file()


def test_the_twelve_settings_of_sprint_are_in_the_table() -> None:
    """All that the dataclass has, so that none is added without a word."""
    text = " ".join(entry.options for entry in tool.SPRINT.entries)
    absent = {name for name in methods.settings_of("sprint") if f"--set {name}=" not in text}
    assert absent == {"distance", "norm", "compute_on"}


def test_tables_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main([]) == 0
    assert "| `unstr` | `--set masks_only=true`; nothing gets faster |" in capsys.readouterr().out


def test_the_readme_has_the_tables_of_the_tool() -> None:
    assert tool.markdown() in (ROOT / "dilap" / "README.md").read_text(encoding="utf-8")
