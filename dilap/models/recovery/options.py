"""The settings of a recovery."""

import math
from dataclasses import dataclass
from typing import Literal

Mode = Literal["none", "lora", "full"]


@dataclass(frozen=True, kw_only=True)
class RecoveryOptions:
    """Settings of training with AdamW on KL(dense || pruned).

    The mode `lora` trains adapters on all linear layers, with `lora_vectors` also the norms and biases of the decoder
    layers; `full` trains the decoder layers. Both leave embeddings and head as they are. A step moves the numbers of a
    tensor by about its `rate` times their root mean square: of a matrix that is trained by an adapter, its own.
    `warmup` is the share of the steps in which the rate rises; then it falls by half a cosine to `least_rate` of it.

    `data` are files or hub data sets from which text is streamed, in packed sequences of `sequence_length` tokens;
    without, the calibration text is read. With `tokens`, there are as many `steps` of `batch_tokens` as they fill.
    `next_token` is the share of the loss of the next token in the loss, and `hidden` the weight of the squared distance
    of the final hidden states, relative to the size of the dense model's.

    Every `evaluate_every` steps the KL on the validation split is computed, and the best state is kept; 0 stands for
    ten times in a run. No more than `piece_tokens` run at once, with 0 as many as the device suggests;
    `checkpoint_activations` computes the activations of layers again in the backward pass, which takes a quarter more
    time and far less memory. With `has_8bit_states` the states of AdamW have 8 bits. What a killed run needs to go on
    is written every `checkpoint_seconds`. `tracker` is one of accelerate's (tensorboard, wandb, mlflow and so on),
    which is told loss and rate of every step.
    """

    mode: Mode = "none"
    steps: int = 60
    tokens: int | None = None
    batch_tokens: int = 2048
    data: tuple[str, ...] = ()
    sequence_length: int = 1024
    # Relative, as in Adafactor (arXiv 1804.04235): the matrices of SmolLM2-135M have a root mean square of 0.19, those
    # of Gemma 3 270M of 0.04, so that 3e-4, which suits the first, raised the KL of the second from 1.6 to 3.4 at once.
    full_rate: float = 1.6e-3
    lora_rate: float = 5e-3
    lora_rank: int = 16
    lora_vectors: bool = False
    warmup: float = 0.1
    least_rate: float = 0.1
    next_token: float = 0.0
    hidden: float = 0.0
    evaluate_every: int = 0
    piece_tokens: int = 0
    checkpoint_activations: bool = False
    has_8bit_states: bool = False
    checkpoint_seconds: float = 300.0
    tracker: str | None = None
    seed: int = 0

    @property
    def num_steps(self) -> int:
        """How many steps there are: those that `tokens` fill, or else `steps`."""
        return self.steps if self.tokens is None else max(1, round(self.tokens / self.tokens_in_step))

    @property
    def tokens_in_step(self) -> int:
        """How many tokens a step reads: of streamed text whole sequences, and at least one."""
        if not self.data:
            return self.batch_tokens
        return max(1, self.batch_tokens // self.sequence_length) * self.sequence_length

    @property
    def steps_between_evaluations(self) -> int:
        return self.evaluate_every or max(10, math.ceil(self.num_steps / 10))

    def rate(self, step: int) -> float:
        """Return the factor of the learning rate at `step`."""
        return rate_at(step, steps=self.num_steps, warmup=self.warmup, least=self.least_rate)


def rate_at(step: int, *, steps: int, warmup: float, least: float = 0.1) -> float:
    """Return the factor of the learning rate at `step`: a linear warm-up, then half a cosine down to `least`."""
    warm = max(1, round(warmup * steps))
    if step < warm:
        return (step + 1) / warm
    turned = math.pi * (step - warm) / max(1, steps - warm)
    return least + (1 - least) / 2 * (1 + math.cos(turned))
