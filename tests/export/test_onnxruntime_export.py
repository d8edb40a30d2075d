"""The folder that the ONNX Runtime exporter writes, opened by every stock program that reads it."""

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from standins.models import FAMILIES, Kept, byte_level_tokenizer, pruned_model, tiny_model
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from dilap import backends, export
from dilap.core.artifact import Artifact
from dilap.core.codec import decode, file_sha256, read_json
from dilap.core.errors import InvalidInput, Unsupported, VerificationFailed
from dilap.models.anatomy import architecture_of

if reason := backends.get("onnxruntime").unavailable():
    pytest.skip(reason, allow_module_level=True)
onnx = pytest.importorskip("onnx", reason="onnx is not installed")
import onnxruntime  # noqa: E402

from dilap.backends.onnxruntime.file import OnnxFile  # noqa: E402
from dilap.export import hf_tokenizer  # noqa: E402
from dilap.export.onnx.onnxruntime import OnnxRuntimeExporter  # noqa: E402
from dilap.export.onnx.weights import ModelWeights  # noqa: E402
from dilap.models.text_samples import SAMPLES  # noqa: E402

PROMPT = (5, 17, 80, 3, 3, 41)
PRECISIONS = ("f32", "int8", "int4")
MIXED: Kept = {  # other heads, KV heads and channels in every layer; 33 channels fill no block
    "layers.0.kv_groups": (1,),
    "layers.1.channels": tuple(range(0, 80, 2)),
    "layers.2.channels": tuple(range(33)),
}
HOLES: Kept = {"layers.0.kv_groups": (), "layers.1.channels": (), "layers.2.kv_groups": (0,)}


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_level_tokenizer(tmp_path_factory.mktemp("words"))


def write(model: PreTrainedModel, words: Path, out: Path, precision: str = "f32") -> Artifact:
    return OnnxRuntimeExporter().export(model, tokenizer=words, precision=precision, plan_digest="plan", out=out)


@pytest.mark.parametrize("kept", [{}, MIXED, HOLES], ids=["dense", "mixed", "holes"])
@pytest.mark.parametrize("family", FAMILIES)
def test_f32_is_as_exact_as_f32_gets(family: str, kept: Kept, words: Path, tmp_path: Path) -> None:
    artifact = write(pruned_model(family, kept), words, tmp_path / "out")
    assert artifact.sqnr_db is not None
    assert artifact.sqnr_db > 110, f"{artifact.sqnr_db:.1f} dB"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_precision_costs_what_it_should(precision: str, family: str, words: Path, tmp_path: Path) -> None:
    artifact = write(pruned_model(family, MIXED), words, tmp_path / "out", precision)
    low, high = {"int8": (24, 45), "int4": (5, 25)}[precision]  # measured: 27 to 40, 7 to 21
    assert artifact.sqnr_db is not None
    assert low < artifact.sqnr_db < high, f"{artifact.sqnr_db:.1f} dB"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_stock_checker_accepts_the_file(precision: str, words: Path, tmp_path: Path) -> None:
    write(pruned_model("qwen3", MIXED), words, tmp_path / "out", precision)
    onnx.checker.check_model(tmp_path / "out" / "model.onnx")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kept", [MIXED, HOLES], ids=["mixed", "holes"])
@pytest.mark.parametrize("family", ["llama", "opt", "gemma2"])
def test_probe_has_the_graph_and_shapes_of_a_real_export(
    family: str, kept: Kept, precision: str, words: Path, tmp_path: Path
) -> None:
    model = pruned_model(family, kept, max_position_embeddings=4096)
    real = write(model, words, tmp_path / "real", precision)
    probe = OnnxRuntimeExporter().export_probe(
        architecture_of(model), precision=precision, seed=0, out=tmp_path / "probe"
    )
    assert graph_of(tmp_path / "probe") == graph_of(tmp_path / "real")
    assert probe.details["operators"] == real.details["operators"]


@pytest.mark.parametrize(
    ("family", "windows", "cap"),
    [("llama", [-1] * 7, 0.0), ("gemma2", [4096, -1] * 3 + [4096], 50.0), ("gemma3_text", [512] * 5 + [-1, 512], 0.0)],
)
def test_attention_of_a_probe_has_the_windows_and_the_cap_of_its_family(
    family: str, windows: list[int], cap: float, tmp_path: Path
) -> None:
    architecture = architecture_of(tiny_model(family, num_hidden_layers=7, layer_types=None))
    OnnxRuntimeExporter().export_probe(architecture, precision="f32", seed=0, out=tmp_path / "probe")
    graph = onnx.load(tmp_path / "probe" / "model.onnx", load_external_data=False).graph
    found = [
        {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
        for node in graph.node
        if node.op_type == "GroupQueryAttention"
    ]
    assert [(one["local_window_size"], one["softcap"]) for one in found] == [(window, cap) for window in windows]


def graph_of(folder: Path) -> tuple[list[tuple[str, list[str], list[str]]], dict[str, tuple[int, tuple[int, ...]]]]:
    """Nodes with their edges, and the initializers' types and shapes."""
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    nodes = [(node.op_type, list(node.input), list(node.output)) for node in graph.node]
    return nodes, {one.name: (one.data_type, tuple(one.dims)) for one in graph.initializer}


def test_folder_holds_what_stock_programs_look_for(words: Path, tmp_path: Path) -> None:
    write(tiny_model("llama"), words, tmp_path / "out", "int4")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "artifact.json",
        "config.json",
        "genai_config.json",
        "model.onnx",
        "model.onnx.data",
        "modeling_ort.py",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_genai_knows_every_end_token(words: Path, tmp_path: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    model = tiny_model("llama")
    model.generation_config.eos_token_id = [7, 9]
    write(model, words, tmp_path / "out")
    said = read_json(tmp_path / "out" / "genai_config.json")["model"]["eos_token_id"]
    assert said == [AutoTokenizer.from_pretrained(words).eos_token_id, 7, 9]
    genai.Model(str(tmp_path / "out"))


def test_genai_opens_a_model_without_an_end_token(words: Path, tmp_path: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    folder = tmp_path / "words"
    tokenizer = AutoTokenizer.from_pretrained(words)
    tokenizer.eos_token = tokenizer.bos_token = None
    tokenizer.save_pretrained(folder)
    model = tiny_model("llama")
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    write(model, folder, tmp_path / "out")
    genai.Model(str(tmp_path / "out"))


def test_weights_lie_in_the_data_file_alone(words: Path, tmp_path: Path) -> None:
    write(tiny_model("llama"), words, tmp_path / "out")
    assert (tmp_path / "out" / "model.onnx").stat().st_size < 100_000


def test_stock_config_and_tokenizer_load(words: Path, tmp_path: Path) -> None:
    write(tiny_model("llama"), words, tmp_path / "out")
    assert AutoConfig.from_pretrained(tmp_path / "out").hidden_size == 64
    saved, source = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "out", words))
    assert [saved(text)["input_ids"] for text in SAMPLES] == [source(text)["input_ids"] for text in SAMPLES]


def test_sidecar_describes_the_files(words: Path, tmp_path: Path) -> None:
    artifact = write(tiny_model("llama"), words, tmp_path / "out", "int8")
    path = tmp_path / "out" / "artifact.json"
    assert decode(Artifact, read_json(path), source=str(path)) == artifact
    model, data = (path.with_name(name) for name in ("model.onnx", "model.onnx.data"))
    assert (artifact.sha256, artifact.companions) == (file_sha256(model), {"model.onnx.data": file_sha256(data)})
    assert artifact.num_bytes == model.stat().st_size + data.stat().st_size


def test_digest_of_the_model_stands_for_its_weights(words: Path, tmp_path: Path) -> None:
    model = tiny_model("llama")
    first = write(model, words, tmp_path / "a")
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    second = write(model, words, tmp_path / "b")
    assert first.sha256 != second.sha256


def test_export_and_probe_are_the_same_twice(words: Path, tmp_path: Path) -> None:
    model = tiny_model("llama")
    exports = [write(model, words, tmp_path / f"export{i}", "int4").sha256 for i in range(2)]
    probes = [
        OnnxRuntimeExporter()
        .export_probe(architecture_of(model), precision="int4", seed=3, out=tmp_path / f"probe{i}")
        .sha256
        for i in range(2)
    ]
    assert (len(set(exports)), len(set(probes))) == (1, 1)


def test_a_wrong_layout_is_noticed_before_it_is_quantised(
    words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Misordered(ModelWeights):
        def values(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
            found = super().values(name, shape)
            return found[::-1].copy() if name.endswith("layers.1.self_attn.q_proj.weight") else found

    monkeypatch.setattr("dilap.export.onnx.onnxruntime.ModelWeights", Misordered)
    with pytest.raises(VerificationFailed, match=r"model\.onnx in f32 differs"):
        write(tiny_model("llama"), words, tmp_path / "out", "int4")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_weight_is_named_and_nothing_is_left(bad: float, words: Path, tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = bad
    with pytest.raises(InvalidInput, match=r"layers\.1\.mlp\.up_proj\.weight"):
        write(model, words, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_embedding_that_fills_no_blocks_is_refused(words: Path, tmp_path: Path) -> None:
    model = tiny_model("llama", hidden_size=72, head_dim=16)
    with pytest.raises(Unsupported, match="width of 32 n, got 72"):
        write(model, words, tmp_path / "out", "int8")


def test_unknown_precision_is_refused_with_the_known_ones(words: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="f32, int8, int4"):
        write(tiny_model("llama"), words, tmp_path / "out", "q4_0")


def test_tokenizer_larger_than_the_embedding_is_refused(words: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="tokenizer has 297 tokens, the model 280"):
        write(tiny_model("llama", vocab_size=280), words, tmp_path / "out")


def test_tokenizer_that_splits_otherwise_when_read_back_is_refused(words: Path, tmp_path: Path) -> None:
    tokenizer = hf_tokenizer.read_tokenizer(words, vocab_size=300)
    other = AutoTokenizer.from_pretrained(words, add_bos_token=True)
    tokenizer.save_pretrained = other.save_pretrained
    other.backend_tokenizer.model.dropout = None
    other.backend_tokenizer.pre_tokenizer = other.backend_tokenizer.pre_tokenizer.__class__(add_prefix_space=True)
    with pytest.raises(VerificationFailed, match="at token 0"):
        hf_tokenizer.save_tokenizer(tokenizer, tmp_path)


def test_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot load a tokenizer"):
        write(tiny_model("llama"), tmp_path, tmp_path / "out")


@pytest.mark.parametrize("kept", [{}, MIXED, HOLES], ids=["dense", "mixed", "holes"])
@pytest.mark.parametrize("family", FAMILIES)
def test_genai_generates_torchs_tokens(family: str, kept: Kept, words: Path, tmp_path: Path) -> None:
    model = pruned_model(family, kept)
    write(model, words, tmp_path / "out")
    got = genai_greedy(tmp_path / "out")
    assert got == torch_greedy(model, len(got))


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_genai_generates_the_tokens_that_the_file_itself_finds_likeliest(
    precision: str, words: Path, tmp_path: Path
) -> None:
    write(pruned_model("llama", MIXED), words, tmp_path / "out", precision)
    got = genai_greedy(tmp_path / "out")
    tokens, file = list(PROMPT), OnnxFile(tmp_path / "out" / "model.onnx")
    while len(tokens) < len(got):
        tokens.append(int(file.logits(tokens, incremental=False)[-1].argmax()))
    assert got == tokens


def genai_greedy(folder: Path) -> list[int]:
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    loaded = genai.Model(str(folder))
    params = genai.GeneratorParams(loaded)
    params.set_search_options(max_length=20)
    generator = genai.Generator(loaded, params)
    generator.append_tokens(np.array([PROMPT], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    tokens = [int(token) for token in generator.get_sequence(0)]
    assert len(tokens) > len(PROMPT)
    return tokens


def torch_greedy(model: PreTrainedModel, length: int) -> list[int]:
    tokens = list(PROMPT)
    with torch.no_grad():
        while len(tokens) < length:
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens


def test_genai_splits_text_as_the_source_does(words: Path, tmp_path: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    write(tiny_model("llama"), words, tmp_path / "out")
    theirs = genai.Tokenizer(genai.Model(str(tmp_path / "out")))
    source = AutoTokenizer.from_pretrained(words)
    for text in SAMPLES[:3]:
        assert theirs.encode(text).tolist() == source(text)["input_ids"]


@pytest.mark.parametrize("precision", ["f32", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_capabilities_hold_what_they_promise(family: str, precision: str, words: Path, tmp_path: Path) -> None:
    """Widths of its own in every layer, at the step of the precision, and each kind of hole."""
    capabilities = backends.get("onnxruntime").capabilities(architecture_of(tiny_model(family)), precision=precision)
    assert capabilities == replace(capabilities, unsupported=None, per_layer_widths=True, attention_removal=True)
    step = capabilities.ffn_multiple
    kept: Kept = {"layers.0.channels": tuple(range(step)), "layers.1.kv_groups": (), "layers.2.channels": ()}
    assert write(pruned_model(family, kept), words, tmp_path / "out", precision).sqnr_db is not None


class _StandIn:
    """What `modeling_ort` uses of optimum's class: it keeps the cache that its forward gets."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, *, session: onnxruntime.InferenceSession, use_io_binding: bool | None = None) -> None:
        self.session, self.use_io_binding = session, use_io_binding
        self.key_value_input_names = [one.name for one in session.get_inputs() if "past_key_values" in one.name]

    def forward(self, input_ids: torch.Tensor, attention_mask: object, past_key_values: object) -> object:
        return past_key_values


def test_folder_has_a_tokenizer_class_that_transformers_4_knows(words: Path, tmp_path: Path) -> None:
    write(tiny_model("llama"), words, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert found["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.parametrize("kept", [MIXED, HOLES], ids=["mixed", "holes"])
def test_class_for_optimum_makes_the_cache_that_the_file_asks_for(
    kept: Kept, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = write(pruned_model("llama", kept), words, tmp_path / "out")
    optimum = ModuleType("optimum.onnxruntime")
    optimum.ORTModelForCausalLM = _StandIn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "optimum.onnxruntime", optimum)
    names = runpy.run_path(str(tmp_path / "out/modeling_ort.py"))
    model = names["PrunedModelForCausalLM"](session=onnxruntime.InferenceSession(tmp_path / "out/model.onnx"))
    cache = model.forward(torch.zeros(2, 3, dtype=torch.int64))
    assert model.use_io_binding is False
    head_dim = artifact.decoder.head_dim
    heads = [layer.num_kv_heads for layer in artifact.decoder.layers if layer.num_kv_heads]
    assert [key.shape for key, _ in cache] == [(2, n, 0, head_dim) for n in heads]
    assert [value.shape for _, value in cache] == [(2, n, 0, head_dim) for n in heads]


def test_exporter_is_found_by_its_name() -> None:
    assert isinstance(export.get("onnxruntime"), OnnxRuntimeExporter)
