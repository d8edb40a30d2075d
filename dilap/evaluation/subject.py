"""What is scored: a checkpoint in torch, an artifact through its runtime, or the artifact of a run."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from dilap.backends import Reader
from dilap.backends.readers import open_reader
from dilap.core.artifact import Artifact, HowToRun
from dilap.core.codec import decode, file_sha256, read_json
from dilap.core.documents import value_at
from dilap.core.errors import InvalidInput, Mismatch
from dilap.core.shape import Architecture
from dilap.evaluation.tokenizers import GgufTokenizer, HuggingFaceTokenizer, TextTokenizer
from dilap.evaluation.torch_reader import TorchReader
from dilap.models.anatomy import architecture_of
from dilap.models.compute_device import AUTO
from dilap.models.load import checkpoint_of, load

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model that is open to be scored. `backend` is `torch` or a runtime; `digest` is that of its weights or file.

    `path` is the artifact's file, None for a checkpoint. `architecture` is None for a GGUF file that DiLAP did not
    write. `precisions` has those of the parts of an artifact that differ from `precision`. `run` says how an artifact
    was run when it was measured, None where it was not.
    """

    name: str
    backend: str
    precision: str
    digest: str
    plan_digest: str
    num_bytes: int | None
    path: Path | None
    architecture: Architecture | None
    reader: Reader
    words: TextTokenizer
    precisions: Mapping[str, str] = field(default_factory=dict)
    run: HowToRun | None = None


def open_subject(
    name: str,
    *,
    backend: str | None = None,
    precision: str | None = None,
    merge_adapter: str | None = None,
    vocabulary: str | None = None,
    threads: int = 1,
    compute: str = AUTO,
) -> Subject:
    """Open a run's or an artifact's folder, a GGUF file (in llama.cpp), or what `dilap.models.load` loads (in torch).

    `backend="torch"` takes a run's checkpoint instead of its artifact; `precision` (f32, bf16, f16), `merge_adapter`,
    `vocabulary` and `compute` are for torch alone. Raises InvalidInput, Unavailable, Unsupported, and Mismatch where a
    file is not the one that its sidecar describes.
    """
    path = Path(name)
    is_run = (path / "result.json").is_file()
    if merge_adapter is not None and is_artifact(name, backend):
        raise InvalidInput(f"{name} is an artifact, which no adapter can be merged into: score it with --backend torch")
    if vocabulary is not None and is_artifact(name, backend):
        raise InvalidInput(f"{name} is an artifact, whose vocabulary cannot be cut: score it with --backend torch")
    if precision is not None and is_artifact(name, backend):
        raise InvalidInput(f"{name} is an artifact, which has its own precisions: score it with --backend torch")
    if is_run and backend == "torch":
        checkpoint = str(path / "checkpoint")
        return replace(_of_model(checkpoint, precision, merge_adapter, vocabulary, compute), name=name)
    if is_run:
        return replace(_of_run(path, backend, threads), name=name)
    if backend != "torch" and (path / "artifact.json").is_file():
        return _of_artifact(name, path, backend, threads)
    if backend not in (None, "torch", "llamacpp") or (backend == "llamacpp" and path.suffix != ".gguf"):
        raise InvalidInput(f"{name} is no artifact of {backend}: export it first with dilap-export --backend {backend}")
    if path.suffix == ".gguf" and path.is_file() and backend != "torch":
        has_sidecar = path.with_name("artifact.json").is_file()
        return _of_artifact(name, path.parent, backend, threads) if has_sidecar else _of_gguf(name, path, threads)
    return _of_model(name, precision, merge_adapter, vocabulary, compute)


def is_artifact(name: str, backend: str | None) -> bool:
    """Return whether `open_subject` opens an artifact in its runtime, and no model in torch."""
    path = Path(name)
    is_one = (path / "result.json").is_file() or (path / "artifact.json").is_file()
    return backend != "torch" and (is_one or (path.suffix == ".gguf" and path.is_file()))


def _of_run(run: Path, backend: str | None, threads: int) -> Subject:
    if not (run / "artifact").is_dir():
        raise InvalidInput(f"{run} has no artifact, {why_no_artifact(run)}")
    subject = _of_artifact(str(run), run / "artifact", backend, threads)
    claimed = value_at(read_json(run / "result.json"), "pruned", "artifact", "sha256")
    if subject.digest != claimed:
        raise Mismatch(f"{run}: its artifact is of another model than its result.json (the sha256 differs)")
    return subject


def why_no_artifact(run: Path) -> str:
    """Say why a run has no artifact, and what to do instead."""
    if is_sparse_run(run):
        return "zeros inside matrices are saved as a checkpoint: score that with --backend torch"
    return "dilap-compare drops it unless --keep-models is given, and so does whoever needs the room: make it again"


def is_sparse_run(run: Path) -> bool:
    """Return whether a folder is that of a run with --pattern."""
    result = run / "result.json"
    return result.is_file() and read_json(result).get("type") == "SparseResult"


def _of_artifact(name: str, folder: Path, backend: str | None, threads: int) -> Subject:
    sidecar = folder / "artifact.json"
    artifact = decode(Artifact, read_json(sidecar), source=str(sidecar))
    if backend not in (None, artifact.backend):
        raise InvalidInput(f"{name} is an artifact of {artifact.backend}, not of {backend}")
    architecture = artifact.decoder
    require_unchanged(folder, artifact)
    path = folder / artifact.path
    words: TextTokenizer = GgufTokenizer(path) if artifact.format == "gguf" else HuggingFaceTokenizer.read(folder)
    return Subject(
        name=name,
        backend=artifact.backend,
        precision=artifact.precision,
        precisions=artifact.precisions,
        digest=artifact.sha256,
        plan_digest=artifact.plan_digest,
        num_bytes=artifact.num_bytes,
        path=path,
        architecture=architecture,
        reader=open_reader(artifact.backend, path, threads=threads),
        words=words,
        run=artifact.run,
    )


def require_unchanged(folder: Path, artifact: Artifact) -> None:
    """Raise InvalidInput for a missing file, Mismatch where a file is not the one that the sidecar describes."""
    for file, digest in {artifact.path: artifact.sha256, **artifact.companions}.items():
        if not (folder / file).is_file():
            raise InvalidInput(f"{folder / file}: no such file, but {folder / 'artifact.json'} names it")
        if file_sha256(folder / file) != digest:
            raise Mismatch(
                f"{folder / file} is of another model than {folder / 'artifact.json'} describes (its sha256 differs)"
            )


def _of_gguf(name: str, path: Path, threads: int) -> Subject:
    return Subject(
        name=name,
        backend="llamacpp",
        precision="as in the file",
        digest=file_sha256(path),
        plan_digest="",
        num_bytes=path.stat().st_size,
        path=path,
        architecture=None,
        reader=open_reader("llamacpp", path, threads=threads),
        words=GgufTokenizer(path),
    )


def _of_model(
    name: str, precision: str | None, merge_adapter: str | None, vocabulary: str | None, compute: str
) -> Subject:
    source = load(name, merge_adapter=merge_adapter, vocabulary=vocabulary, compute=compute)
    if precision is not None:
        source.model.to(DTYPES[precision])
    names = {dtype: name for name, dtype in DTYPES.items()}
    place = source.tokenizer_path if source.embedded is None else checkpoint_of(Path(name))
    files = [place] if place.is_file() else place.glob("*.safetensors")
    return Subject(
        name=name,
        backend="torch",
        precision=names.get(source.model.dtype, str(source.model.dtype)),
        digest=source.digest,
        plan_digest=getattr(source.model.config, "dilap_plan", ""),
        num_bytes=sum(file.stat().st_size for file in files) or None,
        path=None,
        architecture=architecture_of(source.model),
        reader=TorchReader(source.model),
        words=HuggingFaceTokenizer(source.tokenizer),
    )
