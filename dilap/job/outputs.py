"""Where a job's files go by default, and how they are named after the model."""

from pathlib import Path


def name_of(model: str) -> str:
    """What the outputs of a model are named after: `.` has a name too."""
    path = Path(model)
    return (path.resolve() if path.exists() else path).name.removesuffix(".gguf")


def home_of(model: str) -> Path:
    """Where outputs go by default: the current folder, or, where that is the model's own, the one that holds it."""
    folder = Path(model).resolve()
    return folder.parent if folder.is_dir() and Path.cwd().is_relative_to(folder) else Path()
