"""Which models are image networks and encoders of texts, by their names and files alone."""

from pathlib import Path

from dilap.core.codec import read_json
from dilap.models.builtin import BUILTIN_NETWORKS

_CLASSIFIER = "ForImageClassification"  # ends the names of transformers' classes
_ENCODERS = ("bert", "roberta", "xlm-roberta")  # the types of encoders of texts


def is_network(name: str) -> bool:
    """Return whether a model is no decoder: built in, a classifier's or encoder's folder or run, or a user's own."""
    if name in BUILTIN_NETWORKS or not Path(name).expanduser().exists():
        return name in BUILTIN_NETWORKS or ":" in name
    folder = _folder_of(name)
    config = folder / "config.json"
    if not config.is_file():
        return (folder / "narrowed.json").is_file()
    classes = read_json(config).get("architectures")
    is_classifier = isinstance(classes, list) and any(str(one).endswith(_CLASSIFIER) for one in classes)
    return is_classifier or reads_texts(name)


def reads_texts(name: str) -> bool:
    """Return whether a model is an encoder of texts: built in, or its folder or run."""
    config = _folder_of(name) / "config.json"
    return config.is_file() and read_json(config).get("model_type") in _ENCODERS


def in_words(name: str) -> str:
    """Return a network's name after what it is, for messages."""
    return f"the {'encoder of texts' if reads_texts(name) else 'image network'} {name}"


def _folder_of(name: str) -> Path:
    """Return where the files of a network are, for a run those of its checkpoint."""
    folder = BUILTIN_NETWORKS[name]() if name in BUILTIN_NETWORKS else Path(name).expanduser()
    return folder / "checkpoint" if (folder / "result.json").is_file() else folder
