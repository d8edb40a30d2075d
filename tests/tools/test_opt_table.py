"""The command that makes nn-pruning's table of perplexities, on a tiny OPT."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from standins.models import tiny_model, tiny_tokenizer

from dilap.models.load import save_checkpoint

tool: Any = importlib.import_module("tools.opt_table")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    texts = [" ".join(f"word{n * k} the fox" for k in range(40)) for n in range(6)]
    for name, column in (("c4/train.jsonl", "text"), ("wikitext/test.jsonl", "page")):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts), encoding="utf-8")
    return tmp_path / "data"


def test_the_table_has_all_rows_of_every_checkpoint_and_is_gone_on_with(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    save_checkpoint(tiny_model("opt"), tiny_tokenizer(tmp_path / "words"), tmp_path / "opt-tiny")
    words = [str(tmp_path / "opt-tiny"), "--data-dir", str(data), "--out", str(tmp_path / "out")]
    words += ["--calib-length", "32", "--calib-sequences", "4", "--patterns", "2:4", "--limit", "3"]
    assert tool.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| | opt-tiny |"
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    assert [row for row, _ in cells] == ["dense", "2:4 magnitude", "2:4 wanda", "2:4 sparsegpt"]
    assert len({float(value) for _, value in cells}) == 4
    monkeypatch.setattr(tool, "_row", None)  # nothing is computed again
    assert tool.main(words) == 0
    assert capsys.readouterr().out.splitlines() == lines
