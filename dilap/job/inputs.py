"""Digests of what a job reads beside its model: the content behind a path or a name may change between two starts."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dilap.core.codec import digest, file_sha256
from dilap.models.options import CalibrationOptions
from dilap.models.text_files import read_text, text_sha256
from dilap.models.vocabulary import Vocabulary
from dilap.models.windows import CORPORA, corpus_file
from dilap.profilers.tables.table import LatencyTable


def inputs_of(
    tokenizer: PreTrainedTokenizerBase,
    *,
    calibration: CalibrationOptions,
    evaluation: str,
    recovery: Sequence[str] = (),
    method: str,
    training: str | None = None,
    table: str | None = None,
    vocabulary: Vocabulary | None = None,
) -> dict[str, str]:
    """Return the digest of every input's content, by a name for messages such as "the tokenizer".

    The arguments are named as in the options of a job. Text that the model makes itself, corpora of the hub and methods
    of DiLAP's own are left out. Raises InvalidInput or Unavailable for what cannot be read.
    """
    found = {
        "the tokenizer": tokenizer_sha256(tokenizer),
        "the evaluation text": text_sha256(read_text(evaluation)),
    }
    if vocabulary is not None:
        found["the text of the vocabulary"] = vocabulary.facts.text_sha256
    if (sha256 := _calibration_sha256(calibration)) is not None:
        found["the calibration text"] = sha256
    if training is not None:
        found["the training text"] = text_sha256(read_text(training))
    if files := [Path(name).expanduser() for name in recovery if Path(name).expanduser().is_file()]:  # no hub set
        found["the text of the recovery"] = digest([file_sha256(file) for file in files])
    if table is not None:
        found["the latency table"] = digest(asdict(LatencyTable.read(Path(table))))
    if ":" in method:
        found[f"the code of {method}"] = code_sha256(method)
    return found


def _calibration_sha256(options: CalibrationOptions) -> str | None:
    if options.source in CORPORA:
        folder = options.data_dir
        return None if folder is None else file_sha256(corpus_file(options.source, Path(folder).expanduser()))
    return None if options.source == "self" else text_sha256(read_text(options.source))


def code_sha256(method: str) -> str:
    """Return the digest of the module that has a user's own method, `module:attribute`; a package is read whole.

    The module must have been imported.
    """
    module = sys.modules[method.partition(":")[0]]
    file = Path(str(module.__file__))
    files = sorted(file.parent.rglob("*.py")) if file.name == "__init__.py" else [file]
    return digest([[one.name, file_sha256(one)] for one in files])


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the digest of a tokenizer: of its rules, or its vocabulary where it shows none, and its special ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str()
    return digest([words, tokenizer.all_special_ids, tokenizer.bos_token_id, tokenizer.eos_token_id])
