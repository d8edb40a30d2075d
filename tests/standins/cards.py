"""Model cards as their readers use them: the head that the hub reads, and the code that is copied and run."""

import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard


def text_of(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def head_of(folder: Path) -> Any:
    """What the hub reads of a card."""
    return ModelCard(text_of(folder)).data


def run_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the Python code of the card in its folder, as it stands, and return its variables."""
    found = re.search(r"```python\n(.*?)\n```", text_of(folder), re.DOTALL)
    assert found is not None
    variables: dict[str, Any] = {}
    with monkeypatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        exec(found[1], variables)
    return variables
