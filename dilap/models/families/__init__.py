"""The families of decoder models that DiLAP knows, one file each. A new file is found without being listed anywhere.

from dilap.models.families import family_of
family_of(model.config).blocks(model)  # the sublayers that can be narrowed, with the tensors in which they lie
"""

import functools
import importlib
import pkgutil
from collections.abc import Mapping

from transformers import PreTrainedConfig

from dilap.core.errors import Unsupported
from dilap.models.families.family import Family
from dilap.models.nearest import nearest_words


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
        words = f"architecture {config.model_type!r} is not known; DiLAP prunes: {', '.join(sorted(known))}"
        raise Unsupported("; ".join(filter(None, (words, nearest_words(config, known.values())))))
    family, kinds = known[config.model_type], set(getattr(config, "layer_types", None) or ["full_attention"])
    if len(kinds) > 1 and not family.mixes_attention:
        raise Unsupported(f"layers of several attention types ({', '.join(sorted(kinds))}) cannot be pruned yet")
    return family
