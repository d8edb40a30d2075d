"""Recovery by distillation: the pruned model is trained to predict what the dense model does on the training split."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import nn
from transformers import PreTrainedModel

from dilap.models.anatomy import decoder_layers
from dilap.models.compute import shuffled_rows
from dilap.models.options import RecoveryOptions
from dilap.models.reference import Teacher, final_hidden, head_of

_TOKENS_AT_ONCE = 512  # in a forward and backward pass; those of all tokens of a step would hold gigabytes


def distil(
    model: PreTrainedModel,
    teacher: Teacher,
    options: RecoveryOptions,
    *,
    progress: Callable[[float], None] = lambda _: None,
) -> list[float]:
    """Train `model` in place to predict what `teacher` does, and return the KL of every step, in nats.

    Adapters are folded into the matrices at the end. `progress` gets each step's KL. The dense model is not needed in
    memory: the teacher has its answers, as one vector per position.
    """
    kept = {name: parameter.dtype for name, parameter in model.named_parameters()}
    if not (options.mode == "lora" and model.dtype == torch.bfloat16):
        # bf16's 8 bits are too few for the small steps of full training. f16 cannot hold the small numbers of gradients
        # and of Adam (a tiny model was NaN after one step). Adapters are f32 anyway, and may stand beside bf16 weights.
        model.float()
    student = _trainable(model, options)
    groups = _by_learning_rate(student, options)
    parameters = [parameter for group in groups for parameter in group["params"]]
    adam = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        adam, lambda step: rate_at(step, steps=options.steps, warmup=options.warmup)
    )
    losses: list[float] = []
    for _, rows in zip(
        range(options.steps),
        shuffled_rows(teacher.tokens, batch_tokens=options.batch_tokens, seed=options.seed),
        strict=False,
    ):
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
    """Run the sequences `rows` forward and backward, and return their mean KL per position."""
    head, length, total = head_of(model), teacher.tokens.shape[1], 0.0
    for few in rows.split(max(1, _TOKENS_AT_ONCE // length)):
        hidden = final_hidden(model, teacher.tokens[few])
        at_head = teacher.at_head(hidden.detach(), head, rows=few)
        hidden.backward((at_head.slope / (len(rows) * length)).to(hidden.dtype))
        total += float(at_head.kls.sum())
    return total / (len(rows) * length)


def _trainable(model: PreTrainedModel, options: RecoveryOptions) -> Any:
    """Return the model, with adapters if these are asked for, in which only what recovery may change is trainable."""
    torch.manual_seed(options.seed)
    if options.mode == "lora":
        config = LoraConfig(r=options.lora_rank, lora_alpha=2 * options.lora_rank, target_modules="all-linear")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft warns of its own names for the fused tensors of experts
            adapted: nn.Module = get_peft_model(model, config)
        return adapted
    model.requires_grad_(False)
    decoder_layers(model).requires_grad_(True)
    return model


def _by_learning_rate(student: nn.Module, options: RecoveryOptions) -> list[dict[str, Any]]:
    """Return all that is trained in groups for AdamW, each with its learning rate."""
    if options.mode == "lora":
        adapters = [module for module in student.modules() if isinstance(module, LoraLayer)]
        parts = [([*one.lora_A.parameters(), *one.lora_B.parameters()], _adapted(one)) for one in adapters]
        rate = options.lora_rate
    else:
        parts = [([parameter], parameter) for parameter in student.parameters()]
        rate = options.full_rate
    return [
        {"params": [one for one in trained if one.requires_grad], "lr": rate * size_of(weight)}
        for trained, weight in parts
    ]


def _adapted(adapter: LoraLayer) -> torch.Tensor:
    """Return the matrix that an adapter changes: of a layer, or one of several of the same module (experts)."""
    name = adapter.parameter_name if isinstance(adapter, ParamWrapper) else "weight"
    return adapter.get_base_layer().get_parameter(name)


def size_of(weight: torch.Tensor) -> float:
    """Return the root mean square of a tensor; that of a tensor of zeros, such as a new bias, is taken to be 0.001."""
    return max(float(weight.detach().float().square().mean().sqrt()), 1e-3)


def rate_at(step: int, *, steps: int, warmup: float) -> float:
    """Return the factor of the learning rate at `step`: a linear warm-up, then half a cosine down to a tenth."""
    warm = max(1, round(warmup * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
