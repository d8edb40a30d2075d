"""Settings of calibration text and of recovery, apart from what carries them out, which imports torch for seconds."""

from dataclasses import dataclass
from typing import Literal

Mode = Literal["none", "lora", "full"]


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """Which calibration text to use, and how much.

    `source` is `self` (the model samples its own text), a corpus of `dilap.models.windows` (c4, wikitext2, ptb), read
    from `data_dir` or the hub, or a name that `dilap.models.text_files.read_text` takes; `sequence_length` is in
    tokens.
    """

    source: str = "self"
    data_dir: str | None = None
    sequence_length: int = 256
    train_sequences: int = 128
    validation_sequences: int = 16
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class RecoveryOptions:
    """Settings of training with AdamW on KL(dense || pruned).

    The mode `lora` trains adapters on all linear layers, `full` trains the decoder layers and leaves embeddings and
    head as they are. A step moves the numbers of a tensor by about its `rate` times their root mean square: of a
    matrix that is trained by an adapter, its own. `warmup` is the share of the steps in which the rate rises.
    """

    mode: Mode = "none"
    steps: int = 60
    batch_tokens: int = 2048
    # Relative, as in Adafactor (arXiv 1804.04235): the matrices of SmolLM2-135M have a root mean square of 0.19, those
    # of Gemma 3 270M of 0.04, so that 3e-4, which suits the first, raised the KL of the second from 1.6 to 3.4 at once.
    full_rate: float = 1.6e-3
    lora_rate: float = 5e-3
    lora_rank: int = 16
    warmup: float = 0.1
    seed: int = 0
