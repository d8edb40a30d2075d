"""Which model family runs in which runtime and precision: what backends declare, and a trial of every pair.

    tools/support_table              the tables of backends/README.md, after every pair was tried
    tools/support_table --declared   the same from the capabilities alone

A trial exports a tiny random model with as unequal widths as the pair is declared to hold, which compares it with
torch, and opens the result with the runtime's own loader. Where nothing is declared, the exporter must refuse. Image
networks and encoders of texts have a table of their own.
"""

import argparse
import importlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from dilap import backends, export
from dilap.cli.console import run
from dilap.core.artifact import Artifact
from dilap.core.codec import read_json
from dilap.core.errors import DilapError, Unsupported, VerificationFailed
from dilap.models.anatomy import architecture_of
from dilap.models.families import families
from dilap.models.network import random_examples
from tools import tiny_networks
from tools.tiny_models import byte_level_tokenizer, pruned_model, tiny_model

RUNTIMES = ("llamacpp", "onnxruntime", "executorch", "tensorrt")
# Of the groups that a model has. Networks of experts have those in place of channels.
_KEPT: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "any plan": {
        "layers.0.channels": tuple(range(32)),
        "layers.0.experts": (0, 2, 5),
        "layers.1.kv_groups": (0,),
        "layers.1.channels": (),
        "layers.1.experts": (),
        "layers.2.kv_groups": (),
    },
    "equal widths, whole layers": {
        **{f"layers.{layer}.channels": tuple(range(64)) for layer in (0, 1)},
        **{f"layers.{layer}.experts": (0, 2, 5) for layer in (0, 1)},
        "layers.2.kv_groups": (),
        "layers.2.channels": (),
        "layers.2.experts": (),
    },
    "equal widths, all layers": {f"layers.{layer}.channels": tuple(range(64)) for layer in range(4)},
}
# llama.cpp holds SmolLM3 only where the fourth layer is the first without rotary embedding.
_CHANGES: Mapping[str, Mapping[str, int]] = {
    "equal widths, all layers": {"num_hidden_layers": 4, "no_rope_layer_interval": 4}
}


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A model family in a precision of a runtime: which `plans` the runtime can hold, or "no" and the `reason`."""

    family: str
    backend: str
    precision: str
    plans: str
    reason: str = ""


def declared(family: str, backend: str, precision: str) -> Pair:
    """Return what the backend's capabilities say of the pair."""
    capabilities = backends.get(backend).capabilities(architecture_of(tiny_model(family)), precision=precision)
    equal = "equal widths, whole layers" if capabilities.layer_removal else "equal widths, all layers"
    held = "any plan" if capabilities.per_layer_widths else equal
    plans = "no" if capabilities.unsupported else held
    return Pair(family=family, backend=backend, precision=precision, plans=plans, reason=capabilities.unsupported or "")


def declared_pairs() -> list[Pair]:
    return [
        declared(family, backend, precision)
        for backend in RUNTIMES
        for precision in backends.get(backend).precisions()
        for family in families()
    ]


def declared_network(family: str, backend: str, precision: str) -> Pair:
    """Return what the backend declares of a family of image networks or of encoders of texts, which have any widths."""
    reason = None
    if family in tiny_networks.TEXTS:
        reason = backends.get(backend).network_capabilities(precision=precision).unsupported_texts
    plans = "any plan" if reason is None else "no"
    return Pair(family=family, backend=backend, precision=precision, plans=plans, reason=reason or "")


def declared_networks() -> list[Pair]:
    return [
        declared_network(family, backend, precision)
        for backend in RUNTIMES
        for precision in backends.get(backend).network_precisions()
        for family in (*tiny_networks.TEXTS, *tiny_networks.IMAGES)
    ]


def try_out_network(pair: Pair, folder: Path) -> None:
    """Export a tiny network and run it once with its runtime's own loader; see `try_out`."""
    model, input_ = tiny_networks.narrow_network(pair.family), tiny_networks.input_of(pair.family)
    examples = random_examples(model, input_.size, 4)

    def exported() -> Artifact:
        return export.get_network(pair.backend).export(
            model,
            input_=input_,
            precision=pair.precision,
            images=examples.numpy(),
            plan_digest="",
            out=folder / "out",
        )

    if pair.plans == "no":
        _require_refused(pair, exported)
    else:
        RUN[pair.backend](folder / "out", exported(), examples[:1])


def _require_refused(pair: Pair, exported: Callable[[], Artifact]) -> None:
    """Raise VerificationFailed where what is not declared is exported all the same."""
    try:
        exported()
    except Unsupported:
        return
    raise VerificationFailed(f"{pair.backend} {pair.precision} exports {pair.family}, which it says it cannot hold")


def try_out(pair: Pair, folder: Path) -> None:
    """Export a tiny model and open it. Raises VerificationFailed where the pair does not do what it declares.

    Whatever the exporter or the runtime raises comes through.
    """
    tokenizer = byte_level_tokenizer(folder / "tokenizer")
    exporter, out = export.get(pair.backend), folder / "out"
    if pair.plans == "no":
        given: dict[str, Any] = {"tokenizer": tokenizer, "precision": pair.precision, "plan_digest": "", "out": out}
        _require_refused(pair, lambda: exporter.export(tiny_model(pair.family), **given))
        return
    model = _pruned(pair)
    backends.require_loadable(backends.get(pair.backend), architecture_of(model), precision=pair.precision)
    artifact = exporter.export(model, tokenizer=tokenizer, precision=pair.precision, plan_digest="", out=out)
    OPEN[pair.backend](out, artifact)


def _pruned(pair: Pair) -> PreTrainedModel:
    """Return a tiny model of the family with as unequal widths as the pair holds."""
    changes = _CHANGES.get(pair.plans, {})
    blocks = architecture_of(tiny_model(pair.family, **changes)).blocks
    groups = {group.name for block in blocks for group in block.groups}
    kept = {name: units for name, units in _KEPT[pair.plans].items() if name in groups}
    return pruned_model(pair.family, kept, **changes)


def _open_llamacpp(folder: Path, artifact: Artifact) -> None:
    llama = importlib.import_module("llama_cpp").Llama(str(folder / artifact.path), n_ctx=16, verbose=False)
    llama.eval([1, 2, 3])
    llama.close()


def _open_onnxruntime(folder: Path, artifact: Artifact) -> None:  # noqa: ARG001 - GenAI takes the folder
    genai = importlib.import_module("onnxruntime_genai")
    model = genai.Model(str(folder))
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=8)
    generator = genai.Generator(model, params)
    generator.append_tokens(np.array([[1, 2, 3]], np.int32))
    generator.generate_next_token()


def _open_executorch(folder: Path, artifact: Artifact) -> None:
    importlib.import_module("executorch.extension.llm.custom_ops.custom_ops")
    importlib.import_module("executorch.kernels.quantized")
    runtime = importlib.import_module("executorch.runtime").Runtime.get()
    method: Any = runtime.load_program(folder / artifact.path).load_method("forward")
    method.execute((torch.tensor([[1, 2, 3]]), torch.tensor([0])))


def _open_tensorrt(folder: Path, artifact: Artifact) -> None:  # noqa: ARG001 - its report is the check
    """Check in the export's report that TensorRT for RTX has parsed the file and built engines of it."""
    targets = read_json(folder / "compile_report.json")["targets"]
    if not targets or not all(target["built"] for target in targets):
        raise VerificationFailed(f"TensorRT for RTX did not build it: {targets}")


OPEN: Mapping[str, Callable[[Path, Artifact], None]] = {
    "llamacpp": _open_llamacpp,
    "onnxruntime": _open_onnxruntime,
    "executorch": _open_executorch,
    "tensorrt": _open_tensorrt,
}


def _run_onnxruntime(folder: Path, artifact: Artifact, example: torch.Tensor) -> None:
    session = importlib.import_module("onnxruntime").InferenceSession(str(folder / artifact.path))
    names = [one.name for one in session.get_inputs()]
    session.run(None, {name: part.numpy() for name, part in zip(names, _arguments(example), strict=True)})


def _run_executorch(folder: Path, artifact: Artifact, example: torch.Tensor) -> None:
    importlib.import_module("executorch.kernels.quantized")
    runtime = importlib.import_module("executorch.runtime").Runtime.get()
    method: Any = runtime.load_program(folder / artifact.path).load_method("forward")
    method.execute(_arguments(example))


def _run_tensorrt(folder: Path, artifact: Artifact, example: torch.Tensor) -> None:  # noqa: ARG001 - without a GPU
    _open_tensorrt(folder, artifact)


def _arguments(example: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return what a file takes: a batch of images, or the arrays of a batch of texts."""
    return (example,) if example.is_floating_point() else example.unbind(1)


RUN: Mapping[str, Callable[[Path, Artifact, torch.Tensor], None]] = {
    "onnxruntime": _run_onnxruntime,
    "executorch": _run_executorch,
    "tensorrt": _run_tensorrt,
}


def table(pairs: Sequence[Pair]) -> str:
    """Return Markdown: a row for families that all runtimes hold alike, a column for a runtime; reasons below.

    Precisions of a runtime that hold different plans have columns of their own.
    """
    reasons = list(dict.fromkeys(pair.reason for pair in pairs if pair.reason))
    cells = {
        (pair.backend, pair.precision, pair.family): pair.plans
        + (f" ({1 + reasons.index(pair.reason)})" if pair.reason else "")
        for pair in pairs
    }
    names = list(dict.fromkeys(pair.family for pair in pairs))
    columns: dict[tuple[str, ...], list[str]] = {}
    for backend, precision in dict.fromkeys((pair.backend, pair.precision) for pair in pairs):
        column = (backend, *(cells[backend, precision, name] for name in names))
        columns.setdefault(column, []).append(f"`{precision}`")
    heads = [f"{column[0]}: {', '.join(precisions)}" for column, precisions in columns.items()]
    rows: dict[tuple[str, ...], list[str]] = {}
    for index, name in enumerate(names, start=1):
        rows.setdefault(tuple(column[index] for column in columns), []).append(name)
    lines = [f"| family | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    lines += [f"| {', '.join(alike)} | {' | '.join(row)} |" for row, alike in rows.items()]
    return "\n".join(lines + [""] * bool(reasons) + [f"({n}) {reason}" for n, reason in enumerate(reasons, start=1)])


def _main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--declared", action="store_true", help="without the trials")
    given = parser.parse_args()
    pairs, networks, failed = declared_pairs(), declared_networks(), []
    trials = [*((try_out, one) for one in pairs), *((try_out_network, one) for one in networks)]
    for trial, pair in [] if given.declared else tqdm(trials, unit="pair"):
        with tempfile.TemporaryDirectory() as folder:
            try:
                trial(pair, Path(folder))
            except (DilapError, ImportError, RuntimeError) as error:
                failed.append(f"{pair.backend} {pair.precision} {pair.family}: {error}")
    print(table(pairs))
    print()
    print(table(networks))
    for line in failed:
        print(f"not as declared: {line}")
    return 1 if failed else 0


if __name__ == "__main__":
    run(_main)
