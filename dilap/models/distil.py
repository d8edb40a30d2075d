"""Recovery by distillation: the pruned model learns from what the dense model said about the training split."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from dilap.models.anatomy import decoder_layers
from dilap.models.reference import Teacher, final_hidden, head_of

Mode = Literal["none", "lora", "full"]
_TOKENS_AT_ONCE = 512  # forward and backward; all tokens of a step would hold gigabytes of activations


@dataclass(frozen=True, kw_only=True)
class RecoveryOptions:
    """AdamW on KL(dense || pruned). `full` trains the decoder layers and leaves embeddings and head alone."""

    mode: Mode = "none"
    steps: int = 60
    batch_tokens: int = 2048
    full_learning_rate: float = 3e-4
    lora_learning_rate: float = 1e-3
    lora_rank: int = 16
    warmup: float = 0.1
    seed: int = 0


def distil(
    model: PreTrainedModel,
    teacher: Teacher,
    options: RecoveryOptions,
    *,
    progress: Callable[[float], None] = lambda _: None,
) -> list[float]:
    """Train `model` in place towards `teacher`, adapters folded in the end; returns the KL of every step.

    `progress` gets each step's KL. The teacher holds a vector a position instead of logits, so the dense model
    is not needed beside the pruned one.
    """
    kept = {name: parameter.dtype for name, parameter in model.named_parameters()}
    if not (options.mode == "lora" and model.dtype == torch.bfloat16):
        # A step of full training is lost in bf16's 8 bits; f16 has no room for a gradient's small numbers, nor for
        # Adam's (a tiny model was NaN after one step). Adapters are f32 anyway, beside bf16 weights that stay.
        model.float()
    student = _trainable(model, options)
    parameters = [p for p in student.parameters() if p.requires_grad]
    rate = options.lora_learning_rate if options.mode == "lora" else options.full_learning_rate
    adam = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: _rate(step, options))
    losses: list[float] = []
    for _, rows in zip(range(options.steps), _shuffled_rows(teacher, options), strict=False):
        adam.zero_grad()
        losses.append(_accumulate_gradients_(model, teacher, rows))
        nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        schedule.step()
        progress(losses[-1])
    if options.mode == "lora":
        student.merge_and_unload()  # puts plain matrices back into `model`
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(kept[name])
    model.eval().requires_grad_(False)
    return losses


def _accumulate_gradients_(model: PreTrainedModel, teacher: Teacher, rows: torch.Tensor) -> float:
    """Mean KL of the sequences `rows`."""
    head, length, total = head_of(model), teacher.tokens.shape[1], 0.0
    for few in rows.split(max(1, _TOKENS_AT_ONCE // length)):
        hidden = final_hidden(model, teacher.tokens[few])
        at_head = teacher.at_head(hidden.detach(), head, rows=few)
        hidden.backward((at_head.slope / (len(rows) * length)).to(hidden.dtype))
        total += float(at_head.kls.sum())
    return total / (len(rows) * length)


def _trainable(model: PreTrainedModel, options: RecoveryOptions) -> Any:
    """The model with only what recovery may change left trainable."""
    torch.manual_seed(options.seed)
    if options.mode == "lora":
        config = LoraConfig(r=options.lora_rank, lora_alpha=2 * options.lora_rank, target_modules="all-linear")
        adapted: nn.Module = get_peft_model(model, config)
        return adapted
    model.requires_grad_(False)
    decoder_layers(model).requires_grad_(True)
    return model


def _rate(step: int, options: RecoveryOptions) -> float:
    """Linear warm-up, then half a cosine down to a tenth."""
    warm = max(1, round(options.warmup * options.steps))
    if step < warm:
        return (step + 1) / warm
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, options.steps - warm)))


def _shuffled_rows(teacher: Teacher, options: RecoveryOptions) -> Iterator[torch.Tensor]:
    """Batches of sequence indices, epoch after epoch."""
    generator = torch.Generator().manual_seed(options.seed)
    size = max(1, options.batch_tokens // teacher.tokens.shape[1])
    while True:
        yield from torch.randperm(len(teacher.tokens), generator=generator).split(size)
