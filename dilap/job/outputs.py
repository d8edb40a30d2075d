"""Where a job's files go by default, and how they are named after the model."""

from pathlib import Path


def name_of(model: str, *, merge_adapter: str | None = None, vocabulary: str | None = None) -> str:
    """Return the name for a model's outputs: that of its file or folder (for `.` too), or the end of its hub id.

    That of an adapter which is merged into it stands after a plus, that of the text of its vocabulary at the end.
    """
    path = Path(model)
    name = (path.resolve() if path.exists() else path).name.removesuffix(".gguf")
    adapter = "" if merge_adapter is None else f"+{name_of(merge_adapter)}"
    name = name.replace(":", "-")  # of module:function
    return f"{name}{adapter}" + ("" if vocabulary is None else f"-{name_of_vocabulary(vocabulary)}")


def name_of_vocabulary(text: str) -> str:
    """Return the name for outputs of a model whose vocabulary was cut to a text."""
    return f"vocabulary-{Path(text).name.partition('.')[0]}"


def home_of(model: str) -> Path:
    """Return the default folder for outputs: the current one; the model's parent where that is inside the model's."""
    folder = Path(model).resolve()
    return folder.parent if folder.is_dir() and Path.cwd().is_relative_to(folder) else Path()
