"""The only place that opens ONNX Runtime sessions: on the CPU, or else an error that says why in one line."""

import importlib
import os
from pathlib import Path
from typing import Any

from dilap.core.errors import InvalidInput, Unavailable

NO_FLASH = "ORT_GQA_DISABLE_FLASH_ATTENTION"
SPINNING = "session.intra_op.allow_spinning"
_FATAL_LEVEL = 4  # what it would log below this level it raises as well


def library() -> Any:
    """Return the onnxruntime module. Raises Unavailable where it is not installed."""
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise Unavailable(f"ONNX Runtime is not usable here ({error}); pip install onnxruntime") from error


def open_session(
    path: Path, *, threads: int, flash_attention: str = "on", spinning: str = "on", optimised: bool = True
) -> Any:
    """Open a file as an inference session. The switches are `on` or `off`; if not `optimised`, the graph runs as it is.

    Raises InvalidInput, in one line, where the file or its data is damaged.
    """
    if not path.is_file():
        raise InvalidInput(f"{path}: no such file")
    options = library().SessionOptions()
    options.log_severity_level = _FATAL_LEVEL
    options.intra_op_num_threads = threads
    # Threads may spin while a model runs, but not between two samples, when another model may be timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry(SPINNING, str(int(spinning == "on")))
    if not optimised:
        options.graph_optimization_level = library().GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_prepacking", "1")
    os.environ[NO_FLASH] = str(int(flash_attention == "off"))  # read when the session makes its attention operators
    try:
        return library().InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # a dozen types that share no base class of their own
        raise InvalidInput(f"{path}: ONNX Runtime cannot load it: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Return the last part of a message like `[ONNXRuntimeError] : 1 : FAIL : words`."""
    return " ".join(str(error).split()).split(" : ", 3)[-1]
