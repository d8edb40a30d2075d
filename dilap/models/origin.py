"""Where a model comes from: what its files say of its name, licence and authors, for what is made of it."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, try_to_load_from_cache
from transformers import PreTrainedConfig

from dilap.backends.llamacpp.gguf_header import read_header
from dilap.core.codec import checked
from dilap.core.errors import InvalidInput
from dilap.models.pretrained import errors_of_damaged_files

# The entries `general.*` of a GGUF file that are about the file, and not about the model in it.
_OF_THE_FILE = ("architecture", "alignment", "file_type", "quantization_version", "quantized_by", "size_label")
_HUB = re.compile(r"https://huggingface\.co/([\w.-]+/[\w.-]+)/?")


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What is known of the model that another one is made from.

    `base_models` are its id on the Hugging Face hub, or those of the models that it was made from itself. `license` is
    an id as the hub has them. `general` are the entries of a GGUF file, without `general.`, that are about the model.
    """

    name: str
    license: str = ""
    license_name: str = ""
    license_link: str = ""
    base_models: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    general: dict[str, Any] = field(default_factory=dict)


def note_origin_(config: PreTrainedConfig, name: str, path: Path) -> None:
    """Let the config of the model at `path` say where it comes from, unless it says so already.

    `name` is the model's own, or its id on the hub.
    """
    if getattr(config, "dilap_origin", None) is None:
        config.dilap_origin = asdict(_of_gguf(path) if path.is_file() else _of_card(name, path))


def origin_of(config: PreTrainedConfig) -> Origin:
    """Return where the model of a config comes from. Raises InvalidInput where a checkpoint says it in another form."""
    said = getattr(config, "dilap_origin", None) or {"name": ""}
    return checked(Origin, said, source="dilap_origin in config.json")


def _of_gguf(path: Path) -> Origin:
    found = {key: value for key, value in read_header(path, texts=True).metadata.items() if key.startswith("general.")}
    general = {
        key.removeprefix("general."): list(value) if isinstance(value, tuple) else value for key, value in found.items()
    }
    bases = sorted(key for key in general if re.fullmatch(r"base_model\.\d+\.repo_url", key))
    urls = [general.get(key) for key in ("repo_url", "source.repo_url", *bases)]
    ids = [match[1] for url in urls if isinstance(url, str) and (match := _HUB.fullmatch(url))]
    return Origin(
        name=str(general.get("name") or path.stem),
        license=str(general.get("license", "")),
        license_name=str(general.get("license.name", "")),
        license_link=str(general.get("license.link", "")),
        base_models=tuple(ids[:1]),
        languages=_texts(general.get("languages")),
        general={key: value for key, value in general.items() if key not in _OF_THE_FILE},
    )


def _of_card(name: str, path: Path) -> Origin:
    """Return what the README.md of a folder says, or that of a hub id in the hub's local cache."""
    is_folder = path.is_dir()
    card = path / "README.md" if is_folder else try_to_load_from_cache(name, "README.md")
    said = _front_matter(Path(card)) if isinstance(card, str | Path) else {}
    own = () if is_folder else (name,)
    return Origin(
        name=path.resolve().name if is_folder else name.rpartition("/")[2],
        license=str(said.get("license") or ""),
        license_name=str(said.get("license_name") or ""),
        license_link=str(said.get("license_link") or ""),
        base_models=own or _texts(said.get("base_model")),
        languages=_texts(said.get("language")),
    )


def _front_matter(card: Path) -> Any:
    """Return the facts at the head of a model card; none for a damaged one, which is no reason not to prune a model."""
    if not card.is_file():
        return {}
    try:
        with errors_of_damaged_files():
            if not card.read_text(encoding="utf-8-sig").startswith("---"):  # of which the library would warn
                return {}
            return ModelCard.load(card, ignore_metadata_errors=True).data
    except InvalidInput:
        return {}


def _texts(value: Any) -> tuple[str, ...]:
    """Return a text, or a list of texts, as a tuple; anything else is left out."""
    several: Sequence[Any] = value if isinstance(value, list | tuple) else [value]
    return tuple(one for one in several if isinstance(one, str) and one)
