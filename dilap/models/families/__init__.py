"""The families of decoder models that DiLAP knows, one file each. A new file is found without being listed anywhere.

from dilap.models.families import family_of
family_of(model.config).blocks(model)  # the sublayers that can be narrowed, with the tensors in which they lie
"""

import functools
import importlib
import pkgutil
from collections.abc import Collection, Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from dilap.core.errors import Unsupported
from dilap.models.families.family import Family
from dilap.models.nearest import nearest_words, nearest_words_of_tensors


@functools.cache
def families() -> Mapping[str, Family]:
    """Return the known families by the `model_type` of their configs: the FAMILY of every module in this folder."""
    modules = (importlib.import_module(f"{__name__}.{one.name}") for one in pkgutil.iter_modules(__path__))
    found = [module.FAMILY for module in modules if hasattr(module, "FAMILY")]
    return {family.name: family for family in found}


def family_of(config: PreTrainedConfig) -> Family:
    """Return the family of a model. Raises Unsupported for an unknown one, or for kinds of layers it should not mix."""
    known = families()
    if config.model_type not in known:
        raise _unknown(config.model_type, nearest_words(config, known.values()))
    family, kinds = known[config.model_type], set(getattr(config, "layer_types", None) or ["full_attention"])
    if len(kinds) > 1 and not family.mixes_attention:
        raise Unsupported(f"layers of several attention types ({', '.join(sorted(kinds))}) cannot be pruned yet")
    return family


def require_class(config: Mapping[str, Any], tensors: Collection[str]) -> None:
    """Raise Unsupported for the entries of a config of whose `model_type` transformers has no class.

    `tensors` are the names of the model's. Where there is no `model_type` at all, transformers says so.
    """
    kind = config.get("model_type")
    if isinstance(kind, str) and kind not in CONFIG_MAPPING:
        own = "it needs Python code of its own, which DiLAP never runs" if config.get("auto_map") else ""
        raise _unknown(kind, own, nearest_words_of_tensors(tensors, kind, families().values()))


def _unknown(model_type: str, *more: str) -> Unsupported:
    words = f"architecture {model_type!r:.80} is not known; DiLAP prunes: {', '.join(sorted(families()))}"
    return Unsupported("; ".join(filter(None, (words, *more))))
