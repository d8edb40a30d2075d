"""dilap-export with a precision for every part."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
from huggingface_hub import ModelCard
from standins.fake_job import call, last_line
from standins.models import plan_for, tiny_model, tiny_tokenizer

import dilap
from dilap.cli import export
from dilap.core.codec import encode, read_json, write_json
from dilap.models.cut import shrink_
from dilap.models.load import save_checkpoint

REMOVED: dict[str, tuple[int, ...]] = {"layers.0.kv_groups": (), "layers.0.channels": ()}


def options(*precisions: str) -> list[str]:
    return [word for one in precisions for word in ("--precision", one)]


def types_in(folder: Path) -> dict[str, str]:
    return {one.name: one.tensor_type.name.lower() for one in gguf.GGUFReader(folder / "model.gguf").tensors}


@pytest.fixture
def planned(tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint without the first of its layers, and the plan that it was cut by, with precisions."""
    model = tiny_model("llama")
    plan = replace(plan_for(model, REMOVED), precisions={"layers.1.ffn": "q8_0", "head": "f16"})
    save_checkpoint(shrink_(model, plan), tiny_tokenizer(tmp_path / "words"), tmp_path / "checkpoint")
    write_json(tmp_path / "plan.json", encode(plan))
    return tmp_path / "checkpoint", tmp_path / "plan.json"


def test_parts_are_written_in_the_precisions_that_are_given(checkpoint: Path) -> None:
    given = options("layers.1.ffn=f16", "q4_0", "ffn=q8_0", "head=f16")
    assert call(export.main, "--backend", "llamacpp", *given, checkpoint) == 0
    folder = checkpoint.with_name(f"{checkpoint.name}-llamacpp-q4_0-mixed")
    types = types_in(folder)
    assert [types[f"blk.{index}.ffn_up.weight"] for index in range(3)] == ["q8_0", "f16", "q8_0"]
    assert types["blk.1.attn_q.weight"] == "q4_0"
    assert types["output.weight"] == "f16"
    found = read_json(folder / "artifact.json")
    assert found["precision"] == "q4_0"
    assert found["precisions"] == {
        **{f"layers.{index}.ffn": "q8_0" for index in (0, 2)},
        "layers.1.ffn": "f16",
        "head": "f16",
    }


def test_a_card_says_what_an_exported_file_is(checkpoint: Path, tmp_path: Path) -> None:
    words = ["--backend", "llamacpp", *options("q8_0", "head=f16"), "--out", tmp_path / "out", checkpoint]
    assert call(export.main, *words) == 0
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    head: Any = ModelCard(text).data
    assert (head.library_name, head.tags) == ("llama.cpp", ["dilap"])
    assert f"command: `dilap-export --backend llamacpp --precision q8_0 --precision head=f16 {checkpoint.name}`" in text
    assert str(tmp_path) not in text
    assert "llama-cli -m model.gguf" in text
    assert "precision: q8_0, parts in others: 1" in text
    assert "as near as 8 bits are" in text


def test_parts_get_the_precisions_of_a_plan_unless_they_are_named(planned: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint, plan = planned
    face: Any = dilap  # type checkers see the package alone
    artifact = face.export(
        checkpoint,
        backend="llamacpp",
        precision="q4_0",
        precisions={"head": "q8_0"},
        plan=plan,
        out=tmp_path / "out",
        progress=lambda _: None,
    )
    assert artifact.precisions == {"layers.0.ffn": "q8_0", "head": "q8_0"}  # the dense model's layer 1


def test_a_plan_with_precisions_needs_that_of_the_other_parts(
    planned: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, plan = planned
    assert call(export.main, "--backend", "llamacpp", "--plan", plan, checkpoint) == 2
    assert "name the precision of the others, too" in last_line(capsys)


def test_the_plan_of_another_model_is_refused(
    planned: tuple[Path, Path], checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, plan = planned
    assert call(export.main, "--backend", "llamacpp", *options("q4_0"), "--plan", plan, checkpoint) == 2
    assert "is the plan of a model with other layers than" in last_line(capsys)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("q4_0", "q8_0"), "--precision q4_0 and q8_0 are both for the whole model"),
        (("fnn=q8_0",), "the model has no part 'fnn'"),
        (("head=",), "unknown precision ''; llamacpp runs f16"),
    ],
)
def test_a_precision_that_is_not_understood_is_refused(
    given: tuple[str, ...], words: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(export.main, "--backend", "llamacpp", *options(*given), checkpoint) == 2
    assert words in last_line(capsys)
