"""Read text as people keep it: plain files, tables and records (through the `datasets` library), hub data sets."""

import hashlib
import importlib
import logging
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dilap.core.documents import content_of
from dilap.core.errors import DilapError, InvalidInput, Unavailable, reason_of

PLAIN = (".txt", ".text", ".md")
# For every suffix, the `datasets` library's name of its reader, and the options that the reader needs.
READERS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".ndjson": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".parquet": ("parquet", {}),
}
# Names of columns that hold the text; the first of them that a table has is read.
COLUMNS = ("text", "content", "page", "document", "passage", "article", "body", "sentence")
# What a question and its answer are called in instruction sets; a row may have an `input` that belongs to the question.
_QUESTION, _ANSWERS = "instruction", ("output", "response")
# The prompt of Stanford Alpaca, with which most instruction sets are trained on.
_PROMPT = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the request."
)
_PAIRED = ", paired with an input that provides further context"
KNOWN = (
    f"files read are plain text ({' '.join(PLAIN)}) and records ({' '.join(READERS)}), of these the column "
    f"{', '.join(COLUMNS[:-1])} or {COLUMNS[-1]}, or the only one of strings, or {_QUESTION} and {_ANSWERS[0]}; each "
    "may end in .gz"
)
_HUB_RECORDS = 2000


def read_text(name: str) -> str:
    """Return the text of a file, of `python-docs` (the language reference that comes with CPython) or a hub data set.

    Records are joined by blank lines, in the order of the file. Raises InvalidInput where there is no such text or it
    cannot be read, Unavailable where the hub or the `datasets` library is missing.
    """
    return "\n\n".join(read_documents(name))


def read_documents(name: str, *, most: int = _HUB_RECORDS) -> list[str]:
    """Return the documents of a text: the records of a file, or of a hub data set its first `most`; plain text is one.

    Records of questions and answers are written as instructions. Raises what `read_text` does.
    """
    if name == "python-docs":
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
        return [topics[key] for key in sorted(topics)]
    path = Path(name).expanduser()
    if path.is_file():
        texts = _file_texts(path)
    elif name.partition(":")[0].count("/") == 1 and not path.suffix and not path.exists():
        texts = hub_documents(name, most=most)
    else:
        what = "is no file" if path.exists() else "does not exist"
        raise InvalidInput(
            f"text {name!r} {what}: give a file or a hub data set (user/name, or user/name:configuration); {KNOWN}"
        )
    if not any(text.strip() for text in texts):
        raise InvalidInput(f"{name}: it holds no text; {KNOWN}")
    return texts


def streamed(name: str, *, links: Path) -> Any:
    """Return the records of a file or a hub data set (`user/name`, `user/name:configuration`) as they are read.

    They are an iterable of the `datasets` library, whose position can be kept. A plain text file has a record for every
    paragraph. `links` is a new folder that is needed as long as files are read. Raises InvalidInput where there is no
    such file, Unavailable where the `datasets` library is missing.
    """
    datasets, path = _library("streaming text"), Path(name).expanduser()
    if not path.is_file():
        hub, _, configuration = name.partition(":")
        if hub.count("/") != 1 or path.exists():
            raise InvalidInput(f"text {name!r} is no file: give files or hub data sets (user/name); {KNOWN}")
        return datasets.load_dataset(hub, configuration or None, split="train", streaming=True)
    suffix, is_packed = _suffix(path)
    kind, options = ("text", {"sample_by": "paragraph"}) if suffix in PLAIN else READERS[suffix]
    links.mkdir(parents=True, exist_ok=True)
    # The file gets a plain name, because the library reads brackets and stars in a name as a pattern.
    plain = links / f"records{suffix}{'.gz' * is_packed}"
    if not plain.exists():
        plain.symlink_to(path.resolve())
    return datasets.load_dataset(kind, data_files=str(plain), split="train", streaming=True, **options)


def is_plain(name: str) -> bool:
    """Return whether a name is that of a plain text file."""
    path = Path(name).expanduser()
    return path.is_file() and _suffix(path)[0] in PLAIN


def text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _file_texts(path: Path) -> list[str]:
    suffix, is_packed = _suffix(path)
    try:
        if suffix in PLAIN:
            return [_plain_text(content_of(path))]
        with tempfile.TemporaryDirectory() as temporary:
            # The file gets a plain name, because the library reads brackets and stars in a name as a pattern.
            plain = Path(temporary) / f"records{suffix}"
            if is_packed:
                plain.write_bytes(content_of(path))
            else:
                plain.symlink_to(path.resolve())
            return _record_texts(plain, suffix)
    except DilapError as error:
        raise type(error)(f"{path}: {error}") from error
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise InvalidInput(f"{path}: not readable text ({reason_of(error)}); {KNOWN}") from error


def _suffix(path: Path) -> tuple[str, bool]:
    """Return the suffix of a file that is read, and whether it is packed. Raises InvalidInput for any other."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    is_packed = suffixes[-1:] == [".gz"]
    suffix = "".join(suffixes[:-1][-1:] if is_packed else suffixes[-1:])
    if suffix not in (*PLAIN, *READERS):
        raise InvalidInput(f"{path}: {suffix or 'a name without a suffix'} is not read; {KNOWN}")
    return suffix, is_packed


def _plain_text(content: bytes) -> str:
    text = content.decode("utf-8-sig")
    if "\0" in text:
        raise ValueError("it holds zero bytes")
    return text


def _record_texts(path: Path, suffix: str) -> list[str]:
    """Return the texts of a file of records, read by the library with a cache beside the file, which is temporary."""
    datasets = _library(f"reading {suffix}")
    kind, options = READERS[suffix]
    if not path.stat().st_size:
        raise InvalidInput(f"it is empty; {KNOWN}")
    cache = str(path.with_name("cache"))
    try:
        builder = datasets.load_dataset_builder(kind, data_files=str(path), cache_dir=cache, **options)
        builder.download_and_prepare()
    except Exception as error:  # errors of pyarrow and pandas, wrapped in one of the library's
        reason = reason_of(error.__cause__ or error).replace(str(path.parent), "")
        raise InvalidInput(f"not readable as {suffix} ({reason}); {KNOWN}") from error
    if not builder.info.splits["train"].num_examples:
        raise InvalidInput(f"it has no records; {KNOWN}")
    return _texts(builder.as_dataset("train"))


def hub_documents(name: str, *, most: int | None = None, revision: str | None = None) -> list[str]:
    """Return the first `most` documents of a hub data set's training split, all of them where it is None.

    A set that has several configurations is named with one: `allenai/c4:en`. Raises Unavailable where it cannot be had.
    """
    datasets = _library("hub data sets")
    repository, _, configuration = name.partition(":")
    try:
        records = datasets.load_dataset(
            repository, configuration or None, split="train", streaming=most is not None, revision=revision
        )
        return _texts(records if most is None else datasets.Dataset.from_list(list(records.take(most))))
    except DilapError as error:
        raise type(error)(f"data set {name!r}: {error}") from error
    except Exception as error:  # the hub client raises many types
        raise Unavailable(f"data set {name!r} cannot be read: {reason_of(error)}") from error


def _library(purpose: str) -> Any:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise Unavailable(f"{purpose} needs the datasets package; run: pip install datasets") from None
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # whatever it logs, it raises as well
    datasets.disable_progress_bars()
    return datasets


def _texts(records: Any) -> list[str]:
    is_text = {name: _is_text(kind) for name, kind in records.features.items()}
    if answer := _answer_column(is_text):
        return [_instruction(row, answer) for row in records if None not in (row[_QUESTION], row[answer])]
    column = text_column(is_text)
    return [text for text in records[column] if text is not None]


def text_of(record: Mapping[str, Any]) -> str:
    """Return the text of one record, whose columns have no types: empty where there is none, or a null.

    Raises InvalidInput, naming all columns, where none can be told to be the text.
    """
    nulls = [name for name, value in record.items() if value is None]
    of_nulls = {name for name in nulls if name.strip().lower() in (*COLUMNS, _QUESTION, *_ANSWERS) or len(record) == 1}
    is_text = {name: isinstance(value, str) or name in of_nulls for name, value in record.items()}
    if answer := _answer_column(is_text):
        return "" if {_QUESTION, answer} & of_nulls else _instruction(record, answer)
    return record[text_column(is_text)] or ""


def _answer_column(is_text: Mapping[str, bool]) -> str:
    """Return the column of the answers of an instruction set; empty for any other set."""
    answers = [name for name in _ANSWERS if is_text.get(name)]
    is_set = is_text.get(_QUESTION) and answers and not any(is_text.get(name) for name in COLUMNS)
    return answers[0] if is_set else ""


def _instruction(row: Mapping[str, str | None], answer: str) -> str:
    """Return a question with its answer in the prompt of Stanford Alpaca."""
    given = row.get("input") or ""
    parts = [
        _PROMPT.format(paired=_PAIRED if given else ""),
        f"### Instruction:\n{row[_QUESTION]}",
        *([f"### Input:\n{given}"] if given else []),
        f"### Response:\n{row[answer]}",
    ]
    return "\n\n".join(parts)


def _is_text(kind: Any) -> bool:
    return getattr(kind, "dtype", None) in ("string", "large_string", "string_view")


def text_column(is_text: Mapping[str, bool]) -> str:
    """Return the column that holds the text. Raises InvalidInput, naming all columns, where none can be told to."""
    strings = [name for name, yes in is_text.items() if yes]
    for usual in COLUMNS:
        for name in strings:
            if name.strip().lower() == usual:
                return name
    if len(strings) == 1 and not set(strings[0]) & {";", "\t", "|"}:
        return strings[0]
    found = ", ".join(f"{name} (strings)" if yes else name for name, yes in is_text.items())
    raise InvalidInput(f"no column can be told to be the text, it has {found:.200}; {KNOWN}")
