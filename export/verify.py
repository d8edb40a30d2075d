"""Check that an exported file computes what its torch model computes."""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from dilap.backends import Network
from dilap.core.errors import VerificationFailed
from dilap.core.sqnr import sqnr_db
from dilap.models.compute_device import HOST

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NUM_TOKENS = 64
# The least SQNR where torch itself computes in such a type, and loses by it: dense models measure 33.7 and 53.1.
TORCH_BOUNDS_DB = {torch.bfloat16: 10.0, torch.float16: 20.0}
# An artifact in half precision may lose the first number more than torch does in it, and must keep the second in any
# case: a misordered matrix keeps less.
_ROOM_DB, _LEAST_DB = 6.0, 10.0


class HasLogits(Protocol):
    """An artifact that is open in its runtime."""

    def logits(self, token_ids: Sequence[int], *, incremental: bool) -> NDArray[np.float32]:
        """Return the logits (tokens x vocabulary) at all positions, in one pass or through the KV cache."""


def verify_logits(
    model: "PreTrainedModel",
    artifact: HasLogits,
    token_ids: Sequence[int],
    *,
    bound_db: float,
    name: str,
    half: torch.dtype | None = None,
) -> float:
    """Return the SQNR in dB against torch in the model's dtype: the worse of one pass and of decoding by token.

    `name` says in an error what was compared. `half` is the type of an artifact that computes in half precision: a
    damaged model amplifies rounding, so an artifact that misses the bound is judged by what torch itself loses in that
    type. Raises VerificationFailed below the bound.
    """
    reference = torch_logits(model, token_ids)
    together = sqnr_db(reference, artifact.logits(token_ids, incremental=False))
    incremental = sqnr_db(reference, artifact.logits(token_ids, incremental=True))
    bound = min(bound_db, TORCH_BOUNDS_DB.get(model.dtype, np.inf))
    worst = min(together, incremental)
    if not worst >= bound and half:
        rounded = sqnr_db(reference, torch_logits(copy.deepcopy(model).to(half), token_ids))
        bound = min(bound, max(_LEAST_DB, rounded - _ROOM_DB))
    if not worst >= bound:
        hint = (
            ""
            if model.dtype == torch.float32
            else "; a copy of the checkpoint in float32 rules out torch's own rounding"
        )
        raise VerificationFailed(
            f"{name} differs from the torch model ({model.dtype}): SQNR {together:.1f} dB in one pass,"
            f" {incremental:.1f} dB token by token, over {len(token_ids)} tokens; {bound:.3g} dB expected{hint}"
        )
    return worst


def verify_outputs(
    expected: NDArray[np.float32], network: Network, images: NDArray[Any], *, bound_db: float, name: str
) -> float:
    """Return the SQNR in dB of an open network's outputs against those that torch gives for `images`, or for texts.

    `name` says in an error what was compared. Raises VerificationFailed below the bound.
    """
    found = sqnr_db(expected, network.outputs(images))
    if not found >= bound_db:
        raise VerificationFailed(
            f"{name} differs from the torch model: SQNR {found:.1f} dB over {len(images)} examples; {bound_db:.3g} dB "
            "expected"
        )
    return found


@torch.no_grad()
def torch_logits(model: "PreTrainedModel", token_ids: Sequence[int]) -> NDArray[np.float32]:
    """Return the logits (tokens x vocabulary) that torch computes in the model's own dtype.

    The model is not converted to f32, because a copy of a large one would not fit into memory beside it.
    """
    was_training = model.training
    model.eval()
    try:
        logits = model(torch.tensor([list(token_ids)], device=model.device), use_cache=False).logits[0]
    finally:
        model.train(was_training)
    array: NDArray[np.float32] = logits.float().to(HOST).numpy()
    return array
