"""Does an exported file compute what its torch model computes?"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from dilap.errors import VerificationFailed
from dilap.export.llamacpp import Gguf
from dilap.export.text_samples import SAMPLES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NUM_TOKENS = 64
NUM_ONE_BY_ONE = 16  # through the KV cache, after the others in one pass

# Measured, in dB (f32, f16, q8_0, q4_0):
#   tiny random models of four families, the worst   120    56    28    7.1
#   SmolLM2-135M                                      114    56    26    7.5
#   SmolLM2-135M pruned at random, best of four       112    56    24    5.4
#   SmolLM2-135M pruned at random, worst of four       87    27   2.1   -1.4
#   SmolLM2-135M, query rows of one layer misordered  6.3   6.3
# A damaged model amplifies rounding, so the bounds leave it room; f32 and f16 still tell it from a wrong layout.
# The quantised bounds only tell it from unrelated logits (-3): their layout is verified in f16 before.
SQNR_BOUNDS_DB = {"f32": 60.0, "f16": 20.0, "q8_0": 0.0, "q4_0": -2.5}
# What torch itself loses by computing in these types: dense models measure 33.7 and 53.1.
TORCH_BOUNDS_DB = {torch.bfloat16: 10.0, torch.float16: 20.0}


def sqnr_db(reference: NDArray[np.floating], other: NDArray[np.floating]) -> float:
    """Signal to quantisation noise of logits, rows centred first: a constant added to a row is no difference."""
    signal = reference.astype(np.float64) - reference.mean(axis=-1, keepdims=True, dtype=np.float64)
    noise = signal - (other.astype(np.float64) - other.mean(axis=-1, keepdims=True, dtype=np.float64))
    if not np.isfinite(noise).all():
        return -np.inf
    power = float(np.square(noise).sum())
    return 10 * float(np.log10(np.square(signal).sum() / power)) if power else np.inf


def validate(path: Path) -> None:
    """Open a GGUF file as llama.cpp does. Raises InvalidInput, in one line, where a tensor is missing or wrong."""
    Gguf(path, num_tokens=1).close()


def verify_logits(model: "PreTrainedModel", path: Path, *, precision: str) -> float:
    """The worse SQNR in dB of one pass and of token-by-token decoding, against torch in the model's own dtype.

    Raises VerificationFailed below the bound of the precision.
    """
    with Gguf(path, num_tokens=NUM_TOKENS) as file:
        token_ids = _token_ids(file, min(NUM_TOKENS, model.config.max_position_embeddings))
        reference = _torch_logits(model, token_ids)
        together = sqnr_db(reference, file.logits(token_ids))
        one_by_one = sqnr_db(reference, file.logits(token_ids, one_by_one=min(NUM_ONE_BY_ONE, len(token_ids) - 1)))
    bound = min(SQNR_BOUNDS_DB[precision], TORCH_BOUNDS_DB.get(model.dtype, np.inf))
    worst = min(together, one_by_one)
    if not worst >= bound:
        hint = "" if model.dtype == torch.float32 else "; load the model in float32 to rule out torch's own rounding"
        raise VerificationFailed(
            f"{path.name} in {precision} differs from the torch model ({model.dtype}): SQNR {together:.1f} dB in one"
            f" pass, {one_by_one:.1f} dB token by token, over {len(token_ids)} tokens; {bound:g} dB expected{hint}"
        )
    return worst


def _token_ids(file: Gguf, count: int) -> list[int]:
    """Real text where the file has a tokenizer, as a trained model's logits are only typical there."""
    if file.has_vocabulary:
        return file.tokens("\n".join(SAMPLES))[:count]
    return [int(token) for token in np.random.default_rng(0).integers(0, file.vocab_size, count)]


@torch.no_grad()
def _torch_logits(model: "PreTrainedModel", token_ids: list[int]) -> NDArray[np.floating]:
    """In the dtype that the model has: an f32 copy would not fit beside a large one."""
    was_training = model.training
    model.eval()
    try:
        logits = model(torch.tensor([token_ids], device=model.device), use_cache=False).logits[0]
    finally:
        model.train(was_training)
    array: NDArray[np.floating] = logits.float().cpu().numpy()
    return array
