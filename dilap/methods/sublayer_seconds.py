"""What removing a sublayer saves: seconds of a plan by the latency table, of the device, or of generating in torch."""

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack

import torch
from transformers import PreTrainedModel

from dilap.core.errors import Mismatch
from dilap.core.groups import Block
from dilap.models.anatomy import decoder_layers
from dilap.models.compute import compute_precision
from dilap.models.compute_device import HOST
from dilap.models.skipping import sublayer_skipped


def saved_seconds(*, dense: float, without: Mapping[str, float], num_removed: int) -> dict[str, float]:
    """Return the seconds that removing one sublayer saves, by kind.

    `without` has, by kind, the latency of a model without `num_removed` sublayers of that kind. Raises Mismatch where
    removing a kind saves no time: there is no importance per second then.
    """
    saved = {kind: (dense - seconds) / num_removed for kind, seconds in without.items()}
    for kind, seconds in saved.items():
        if seconds <= 0:
            raise Mismatch(f"removing {kind} sublayers saves no time here ({seconds:.3g} s); measure the table again")
    return saved


@torch.no_grad()
def generation_seconds(
    model: PreTrainedModel,
    without: list[Block],
    *,
    prompt_tokens: int,
    new_tokens: int,
    batch: int,
    iterations: int,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Return the median seconds in which the torch model, without these sublayers, reads a prompt and goes on.

    It reads `batch` prompts at once, then generates `new_tokens` tokens of each, greedily; 0 of them is a prefill. One
    run to warm up goes before the `iterations`.
    """
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(model.config.vocab_size, (batch, prompt_tokens), generator=generator).to(model.device)
    layers = decoder_layers(model)
    with ExitStack() as skipped, compute_precision(model.device):
        for block in without:
            skipped.enter_context(sublayer_skipped(layers[block.layer], model, block.kind))
        seconds = [_generated(model, prompt, new_tokens, clock) for _ in range(1 + iterations)]
    return statistics.median(seconds[1:])


def _generated(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int, clock: Callable[[], float]) -> float:
    start = clock()
    out = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    for _ in range(new_tokens):
        chosen = out.logits[:, -1:].argmax(-1)
        out = model(input_ids=chosen, past_key_values=out.past_key_values, use_cache=True)
    chosen = out.logits[:, -1:].argmax(-1)
    chosen.to(HOST)  # a GPU has finished when its answer is here
    return clock() - start
