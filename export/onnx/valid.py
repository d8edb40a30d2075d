"""onnx's own word on what is written: its checker, and its inference of all shapes and types."""

import importlib
from pathlib import Path
from typing import Any

from dilap.core.errors import VerificationFailed, reason_of


def require_valid(path: Path) -> None:
    """Raise VerificationFailed where a file is no valid ONNX, or where shapes or types in it contradict each other.

    Operators of ONNX Runtime's own, which onnx does not know, are passed over. Weights beside the graph are not read.
    """
    onnx: Any = importlib.import_module("onnx")
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise VerificationFailed(f"{path.name} is not valid ONNX: {reason_of(error)}") from error
