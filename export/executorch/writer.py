"""Export to ExecuTorch: `model.pte`, which its own LLM runner loads, with the tokenizer beside it."""

import collections
import functools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dilap.backends.child import opened
from dilap.backends.executorch.bindings import bindings
from dilap.backends.executorch.program import Program
from dilap.core.artifact import Artifact
from dilap.core.codec import encode, file_sha256, write_json, written_aside
from dilap.core.shape import Architecture
from dilap.export.executorch.header import GROUP_SIZE, Header, header_of
from dilap.export.executorch.tokenizer import read_tokenizer, save_tokenizer
from dilap.export.random_weights import RandomWeights
from dilap.export.source_model import described, tensor
from dilap.export.verify import verify_logits
from dilap.models.anatomy import architecture_of, exported_tensors, stand_in_numerics
from dilap.models.text_samples import SAMPLES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dilap.export.executorch.program import Values

NUM_TOKENS = 32  # half of what other formats are compared on, because one pass takes a run for every prefix
# Measured, in dB (f32, 8da4w, 8da4w against torch in the same types):
#   tiny random models of five families, the worst   120   4.8   134
#   SmolLM2-135M                                     110   6.9    20
#   SmolLM2-135M pruned at random, best of four      105   5.2    16
#   SmolLM2-135M pruned at random, worst of four      97  -0.8   3.6
#   SmolLM2-135M, query rows of one layer misordered       6.1
# A damaged model amplifies rounding, above all in 8da4w where it moves an activation across a step of its 8 bits: there
# the bound only tells a program from unrelated logits (-3). That the layout is right is shown by the exact tiny models.
SQNR_BOUNDS_DB = {"f32": 60.0, "8da4w": -2.5}


class ExecuTorchExporter:
    """Writes `model.pte`, the tokenizer's files and `artifact.json`."""

    backend = "executorch"

    def export(
        self, model: "PreTrainedModel", *, tokenizer: Path, precision: str, plan_digest: str, out: Path
    ) -> Artifact:
        """Write `model` into the folder `out`, verified, or leave nothing behind."""
        words = read_tokenizer(tokenizer, vocab_size=architecture_of(model).vocab_size)
        header = header_of(model, words, precision=precision)
        with written_aside(out) as folder:
            folder.mkdir()
            path = folder / "model.pte"
            _write(path, header, functools.partial(tensor, exported_tensors(model)))
            notes = tuple(save_tokenizer(words, folder))
            token_ids = words("\n".join(SAMPLES))["input_ids"][: min(NUM_TOKENS, header.max_context)]
            sqnr_db = min(
                _verify_method(path, method, model, token_ids, precision=precision) for method in ("forward", "score")
            )
            artifact = _describe(path, header, sqnr_db=sqnr_db)
            artifact = described(artifact, model, plan_digest=plan_digest, notes=notes)
            write_json(folder / "artifact.json", encode(artifact))
        return artifact

    def export_probe(self, architecture: Architecture, *, precision: str, seed: int, out: Path) -> Artifact:
        """Write a model of that shape with random weights and no tokenizer, for timing only."""
        header = Header(architecture=architecture, numerics=stand_in_numerics(architecture), precision=precision)
        random = RandomWeights(seed)

        def values(name: str, shape: tuple[int, ...]) -> torch.Tensor:
            return torch.from_numpy(random.weights(name, shape))

        with written_aside(out) as folder:
            folder.mkdir()
            path = folder / "model.pte"
            _write(path, header, values)
            artifact = _describe(path, header, sqnr_db=None)
            write_json(folder / "artifact.json", encode(artifact))
        return artifact


def _write(path: Path, header: Header, values: "Values") -> None:
    bindings()  # raises a one-line reason where ExecuTorch is not installed
    from dilap.export.executorch.program import build  # noqa: PLC0415 - needs ExecuTorch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # hundreds of deprecations between ExecuTorch, torchao and torch
        program = build(header, values)
    with path.open("wb") as file:
        program.write_to_file(file)


def _verify_method(
    path: Path, method: str, model: "PreTrainedModel", token_ids: Sequence[int], *, precision: str
) -> float:
    """Return the SQNR in dB of a method's logits. Raises VerificationFailed below the precision's bound."""
    with opened(Program, path, runtime="executorch", method=method) as file:
        name = f"{method} of {path.name} in {precision}"
        return verify_logits(model, file, token_ids, bound_db=SQNR_BOUNDS_DB[precision], name=name)


def _describe(path: Path, header: Header, *, sqnr_db: float | None) -> Artifact:
    """Return the sidecar, without a plan."""
    return Artifact(
        path=path.name,
        format="pte",
        backend=ExecuTorchExporter.backend,
        precision=header.precision,
        plan_digest="",
        architecture=header.architecture,
        sha256=file_sha256(path),
        num_bytes=path.stat().st_size,
        sqnr_db=sqnr_db,
        details={"max_context": header.max_context, "matrix_types": matrix_types(header)},
    )


def matrix_types(header: Header) -> dict[str, int]:
    """Return how many matrices have each type: the head, and rows that are no multiple of a group, have 8 bits."""
    model = header.architecture
    if header.precision == "f32":
        return {"f32": sum(4 * (w.num_heads > 0) + model.ffn_matrices * (w.num_channels > 0) for w in model.layers) + 1}
    columns = [model.hidden_size] * sum(3 * (w.num_heads > 0) for w in model.layers)
    columns += [w.num_heads * model.head_dim for w in model.layers if w.num_heads]
    columns += [model.hidden_size] * sum((model.ffn_matrices - 1) * (w.num_channels > 0) for w in model.layers)
    columns += [w.num_channels for w in model.layers if w.num_channels]
    counts = collections.Counter("int8" if width % GROUP_SIZE else "int4" for width in columns)
    counts["int8"] += 1
    return dict(sorted(counts.items()))
