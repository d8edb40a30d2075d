"""What runtimes can hold, as data: the rules, and each rule against the runtime that it is about."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
from standins.fabricated import TINY_LAYER, tiny_llama

from dilap import backends, export
from dilap.backends import require_loadable
from dilap.core.errors import Unsupported
from dilap.core.rules import Capabilities
from dilap.core.shape import Architecture, LayerWidths
from dilap.core.workload import Workload

NARROW = replace(TINY_LAYER, num_channels=32)
NO_ATTENTION = LayerWidths(num_heads=0, num_kv_heads=0, num_channels=64)
NO_FFN = replace(TINY_LAYER, num_channels=0)
FEW_SLOTS = replace(TINY_LAYER, num_heads=2)
FEW_GROUPS = replace(TINY_LAYER, num_heads=2, num_kv_heads=1)
LLAMA = tiny_llama(TINY_LAYER, TINY_LAYER)
OPT = replace(
    LLAMA,
    family="opt",
    ffn_matrices=2,
    norm_vectors=2,
    qkv_bias=True,
    out_bias=True,
    ffn_bias=True,
    ffn_out_bias=True,
    num_positions=66,
    layers=(replace(TINY_LAYER, num_kv_heads=4),) * 2,
)
STOCK = Capabilities(per_layer_widths=False, attention_removal=False, ffn_removal=False)
UNEQUAL = "and it needs equal widths in every layer"
REFUSALS = {
    "removed attention": (STOCK, NO_ATTENTION, "layers.1.kv_groups is removed, and it needs attention in every layer"),
    "removed FFN": (STOCK, NO_FFN, "layers.1.channels is removed, and it needs a feed-forward network in every layer"),
    "KV groups": (STOCK, FEW_GROUPS, f"layers.1.kv_groups keeps 1 where layer 0 keeps 2, {UNEQUAL}"),
    "query slots": (STOCK, FEW_SLOTS, f"layers.1.query_slots keeps 2 query heads where layer 0 keeps 4, {UNEQUAL}"),
    "channels": (STOCK, NARROW, f"layers.1.channels keeps 32 where layer 0 keeps 64, {UNEQUAL}"),
    "heads": (Capabilities(head_dim_multiple=32), TINY_LAYER, "head_dim is 16, and it needs a multiple of 32"),
    "hidden size": (Capabilities(hidden_multiple=48), TINY_LAYER, "hidden_size is 64, and it needs a multiple of 48"),
    "family": (Capabilities(unsupported="no such graph"), TINY_LAYER, "no such graph"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_a_refusal_names_the_group_and_the_rule(what: str) -> None:
    capabilities, second, expected = REFUSALS[what]
    assert capabilities.refusal(tiny_llama(TINY_LAYER, second)) == expected


@pytest.mark.parametrize("second", [NO_ATTENTION, NO_FFN, FEW_GROUPS, FEW_SLOTS, NARROW])
def test_without_rules_nothing_is_refused(second: LayerWidths) -> None:
    assert Capabilities().refusal(tiny_llama(TINY_LAYER, second)) is None


def test_equal_widths_other_than_the_dense_ones_are_held_by_stock_architectures() -> None:
    assert STOCK.refusal(tiny_llama(NARROW, NARROW)) is None


def test_the_error_names_runtime_and_precision() -> None:
    odd = replace(LLAMA, head_dim=24)
    with pytest.raises(Unsupported, match="onnxruntime cannot hold this model in int4: head_dim is 24, and it needs"):
        require_loadable(backends.get("onnxruntime"), odd, precision="int4")


def needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


def runs(backend: str, architecture: Architecture, precision: str, folder: Path) -> bool:
    """Whether the runtime itself takes a model of that shape."""
    try:
        artifact = export.get(backend).export_probe(architecture, precision=precision, seed=0, out=folder)
        session = backends.get(backend).load(folder / artifact.path, Workload(context=4, precision=precision))
    except Exception:
        return False
    session.sample()
    session.close()
    return True


@pytest.mark.parametrize("head_dim", [4, 8, 12, 16, 24, 48])
@pytest.mark.parametrize("dense", [LLAMA, OPT], ids=["llama", "opt"])
def test_onnxruntime_takes_the_heads_that_its_capabilities_say(
    dense: Architecture, head_dim: int, tmp_path: Path
) -> None:
    needs("onnxruntime")
    shape = replace(dense, head_dim=head_dim)
    refused = backends.get("onnxruntime").capabilities(shape, precision="f32").refusal(shape)
    assert runs("onnxruntime", shape, "f32", tmp_path / "probe") == (refused is None)


@pytest.mark.parametrize("hidden_size", [48, 64, 80, 96])
@pytest.mark.parametrize("precision", ["f32", "int8", "int4"])
def test_onnxruntime_takes_the_hidden_sizes_that_its_capabilities_say(
    precision: str, hidden_size: int, tmp_path: Path
) -> None:
    needs("onnxruntime")
    shape = replace(LLAMA, hidden_size=hidden_size)
    refused = backends.get("onnxruntime").capabilities(shape, precision=precision).refusal(shape)
    assert runs("onnxruntime", shape, precision, tmp_path / "probe") == (refused is None)


@pytest.mark.parametrize("precision", ["f32", "q4_0"])
@pytest.mark.parametrize(("head_dim", "hidden_size"), [(6, 64), (24, 64), (16, 36), (16, 100)])
def test_llamacpp_takes_any_head_and_hidden_size(
    head_dim: int, hidden_size: int, precision: str, tmp_path: Path
) -> None:
    needs("llama_cpp")
    shape = replace(LLAMA, head_dim=head_dim, hidden_size=hidden_size)
    assert backends.get("llamacpp").capabilities(shape, precision=precision).refusal(shape) is None
    assert runs("llamacpp", shape, precision, tmp_path / "probe")


@pytest.mark.parametrize("second", [NO_ATTENTION, NO_FFN, FEW_GROUPS, FEW_SLOTS, replace(TINY_LAYER, num_channels=20)])
@pytest.mark.parametrize(("backend", "package", "precision"), [
    ("llamacpp", "llama_cpp", "q4_0"),
    ("onnxruntime", "onnxruntime", "int4"),
])  # fmt: skip
def test_widths_of_their_own_and_missing_sublayers_are_held(
    backend: str, package: str, precision: str, second: LayerWidths, tmp_path: Path
) -> None:
    needs(package)
    shape = tiny_llama(TINY_LAYER, second)
    assert backends.get(backend).capabilities(shape, precision=precision).refusal(shape) is None
    assert runs(backend, shape, precision, tmp_path / "probe")
