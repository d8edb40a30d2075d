"""ExecuTorch's Python bindings: the exporter checks its programs with them, and the backend times them."""

import functools
import importlib
import logging
import warnings
from typing import Any

from dilap.core.errors import Unavailable, reason_of

MAX_CONTEXT = 2048  # most tokens of a program, which reserves its KV cache for as many as it can take


@functools.cache
def bindings() -> Any:
    """Return the low-level module; import the libraries that register attention, cache and quantised kernels in it.

    Raises Unavailable where ExecuTorch cannot be loaded.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # torchao lists the GPU libraries that it did not find
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "this API is experimental", and deprecations between these packages
            module = importlib.import_module("executorch.extension.pybindings.portable_lib")
            importlib.import_module("executorch.extension.llm.custom_ops.custom_ops")
            importlib.import_module("executorch.kernels.quantized")
    except (ImportError, OSError, RuntimeError) as error:
        hint = "pip install 'dilap[executorch]'"
        raise Unavailable(f"ExecuTorch cannot be loaded here ({reason_of(error)}); {hint}") from error
    finally:
        logging.disable(before)
    return module
