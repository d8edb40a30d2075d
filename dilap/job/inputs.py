"""What a job reads beside its model, by content: what is named by a path or a name may change under it."""

import hashlib
import sys
from dataclasses import asdict
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dilap.core.codec import digest, file_sha256
from dilap.models.text_files import read_text
from dilap.profilers.tables.table import LatencyTable


def inputs_of(
    tokenizer: PreTrainedTokenizerBase, *, calibration: str, evaluation: str, method: str, table: str | None = None
) -> dict[str, str]:
    """Digests of the content of all that is named so, by what it is. Raises InvalidInput for what cannot be read."""
    found = {"the tokenizer": tokenizer_sha256(tokenizer), "the evaluation text": _text_sha256(evaluation)}
    if calibration != "self":
        found["the calibration text"] = _text_sha256(calibration)
    if table is not None:
        found["the latency table"] = digest(asdict(LatencyTable.read(Path(table))))
    if ":" in method:
        found[f"the code of {method}"] = code_sha256(method)
    return found


def code_sha256(method: str) -> str:
    """Of the module of a user's own `module:attribute`, which is imported; of all files where it is a package."""
    module = sys.modules[method.partition(":")[0]]
    file = Path(str(module.__file__))
    files = sorted(file.parent.rglob("*.py")) if file.name == "__init__.py" else [file]
    return digest([[one.name, file_sha256(one)] for one in files])


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of what turns text into ids, and of the ids that have a meaning of their own."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str()
    return digest([words, tokenizer.all_special_ids, tokenizer.bos_token_id, tokenizer.eos_token_id])


def _text_sha256(name: str) -> str:
    return hashlib.sha256(read_text(name).encode()).hexdigest()
