"""Settings of calibration text, apart from what carries them out, which imports torch for seconds."""

from dataclasses import dataclass

CORPORA = ("c4", "wikitext2", "ptb")  # the names of those in `dilap.models.windows`


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
