"""onnx's checker and shape inference have a word in every file that is written."""

from pathlib import Path
from typing import Any

import pytest
from standins.models import tiny_model

from dilap.core.errors import VerificationFailed

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnx_ir", reason="onnx_ir is not installed: nothing can be exported to ONNX")

from dilap.core.precisions import Mix  # noqa: E402
from dilap.export.onnx.onnxruntime import MODEL, _write_model  # noqa: E402
from dilap.export.onnx.valid import require_valid  # noqa: E402
from dilap.export.onnx.weights import ProbeWeights  # noqa: E402
from dilap.models.anatomy import architecture_of, stand_in_numerics  # noqa: E402


def saved(path: Path, **changes: Any) -> Path:
    """A sum of two inputs, with some things changed."""
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    shapes = {"a": [2, 3], "b": [2, 3], "c": [2, 3]} | changes.get("shapes", {})
    a, b, c = (helper.make_tensor_value_info(name, kind, shape) for name, shape in shapes.items())
    node = helper.make_node(changes.get("operator", "Add"), ["a", "b"], ["c"], domain=changes.get("domain", ""))
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([node], "sum", [a, b], [c]), opset_imports=opsets)
    onnx.save(model, path)
    return path


def test_a_valid_file_passes(tmp_path: Path) -> None:
    require_valid(saved(tmp_path / "a.onnx"))


def test_an_operator_of_onnx_runtimes_own_passes(tmp_path: Path) -> None:
    require_valid(saved(tmp_path / "a.onnx", operator="GroupQueryAttention", domain="com.microsoft"))


@pytest.mark.parametrize(
    "damage",
    [{"operator": "Sum2"}, {"shapes": {"b": [5, 3]}}, {"shapes": {"c": [2, 4]}}],
    ids=["operator", "inputs", "output"],
)
def test_a_contradiction_is_named(damage: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(VerificationFailed, match=r"a\.onnx is not valid ONNX: "):
        require_valid(saved(tmp_path / "a.onnx", **damage))


@pytest.mark.parametrize("precision", ["f32", "int4"])
def test_what_the_exporter_writes_is_checked(precision: str, tmp_path: Path) -> None:
    """A file whose graph is damaged after it was written is found by the same check."""
    architecture = architecture_of(tiny_model("llama"))
    _write_model(tmp_path, architecture, stand_in_numerics(architecture), ProbeWeights(0), Mix(precision=precision))
    model = onnx.load(tmp_path / MODEL, load_external_data=False)
    del model.graph.node[len(model.graph.node) // 2]
    onnx.save(model, tmp_path / MODEL)
    with pytest.raises(VerificationFailed, match="is not valid ONNX"):
        require_valid(tmp_path / MODEL)
