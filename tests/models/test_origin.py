"""What a model's files say of its name, licence and authors stays with everything that is made of it."""

from pathlib import Path
from typing import Any

import gguf
import pytest
from standins.models import needs_llamacpp, tiny_model, tiny_tokenizer

from dilap import export
from dilap.models.load import load, save_checkpoint
from dilap.models.origin import Origin, origin_of

CARD = """\
---
license: other
license_name: tiny-licence
license_link: LICENSE.md
base_model: people/tiny-base
language: [en, de]
---
# Tiny
"""


def origin(name: str | Path) -> Origin:
    return origin_of(load(str(name)).model.config)


def test_a_folder_says_what_its_card_says(checkpoint: Path) -> None:
    (checkpoint / "README.md").write_text(CARD)
    assert origin(checkpoint) == Origin(
        name="tiny",
        license="other",
        license_name="tiny-licence",
        license_link="LICENSE.md",
        base_models=("people/tiny-base",),
        languages=("en", "de"),
    )


@pytest.mark.parametrize("card", ["# no facts\n", "---\nlicense: [\n---\n", "---\nlicense: 7\nlanguage: {a: b}\n---\n"])
def test_a_card_without_facts_or_with_damaged_ones_is_no_obstacle(card: str, checkpoint: Path) -> None:
    (checkpoint / "README.md").write_text(card)
    assert (origin(checkpoint).name, origin(checkpoint).languages) == ("tiny", ())


def test_a_checkpoint_remembers_where_it_comes_from(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "README.md").write_text(CARD)
    source = load(str(checkpoint))
    save_checkpoint(source.model, source.tokenizer, tmp_path / "again")
    assert origin(tmp_path / "again") == origin(checkpoint)
    assert load(str(tmp_path / "again")).digest == source.digest


GENERAL: dict[str, Any] = {
    "name": "Tiny",
    "author": "people",
    "license": "mit",
    "languages": ["en"],
    "repo_url": "https://huggingface.co/people/tiny",
    "base_model.count": 1,
}


@pytest.mark.parametrize("precision", ["f16", "q8_0"])
def test_a_gguf_file_keeps_what_its_source_says(precision: str, tmp_path: Path) -> None:
    needs_llamacpp()
    tiny_tokenizer(tmp_path / "words")
    model = tiny_model("llama")
    model.config.dilap_origin = {"name": "Tiny", "general": GENERAL}
    files = []
    for number in range(2):
        out = tmp_path / str(number)
        export.get("llamacpp").export(model, tokenizer=tmp_path / "words", precision=precision, plan_digest="", out=out)
        files.append(out / "model.gguf")
        model = load(str(files[-1])).model
    assert origin_of(model.config) == Origin(
        name="Tiny", license="mit", base_models=("people/tiny",), languages=("en",), general=GENERAL
    )
    fields = gguf.GGUFReader(files[1]).fields
    assert {key: fields[f"general.{key}"].contents() for key in GENERAL} == GENERAL


def test_a_gguf_file_says_what_a_card_says(checkpoint: Path, tmp_path: Path) -> None:
    needs_llamacpp()
    (checkpoint / "README.md").write_text(CARD)
    source = load(str(checkpoint))
    export.get("llamacpp").export(
        source.model, tokenizer=checkpoint, precision="f16", plan_digest="", out=tmp_path / "out"
    )
    found = origin(tmp_path / "out" / "model.gguf")
    assert (found.name, found.license, found.base_models) == ("tiny", "other", ("people/tiny-base",))
