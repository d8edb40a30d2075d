"""ExecuTorch programs of tiny models in the real runtime, and in ExecuTorch's own LLM runner."""

import importlib
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from standins.fabricated import tiny_llama
from standins.models import (
    FAMILIES,
    VOCAB_SIZE,
    byte_level_tokenizer,
    compensated_model,
    logits,
    plan_for,
    pruned_model,
    random_tokens,
    talking_model,
    tiny_model,
)
from tokenizers import Tokenizer, normalizers
from transformers import AutoTokenizer, PreTrainedModel

from dilap import backends, export
from dilap.backends import readers
from dilap.backends.executorch.tokenizer import ExecuTorchTokenizer
from dilap.core import codec
from dilap.core.artifact import Artifact
from dilap.core.codec import decode, file_sha256, read_json
from dilap.core.errors import InvalidInput, Unsupported, VerificationFailed
from dilap.core.precisions import Mix
from dilap.core.sqnr import sqnr_db
from dilap.core.workload import Workload
from dilap.export.executorch.header import Header, header_of
from dilap.export.executorch.tokenizer import save_tokenizer
from dilap.export.executorch.writer import matrix_types
from dilap.export.source_model import tensor
from dilap.models.anatomy import architecture_of, numerics_of
from dilap.models.cut import shrink_
from dilap.models.rounding import rounded
from dilap.profilers.instruments.agent import AgentClient, InstrumentBench, LocalConnection

if reason := backends.get("executorch").unavailable():
    pytest.skip(reason, allow_module_level=True)

# Tracing and lowering are ExecuTorch's and torch's own code: what they deprecate among themselves is not ours to mend.
pytestmark = [
    pytest.mark.filterwarnings("ignore:::torch"),
    pytest.mark.filterwarnings("ignore:::executorch"),
    pytest.mark.filterwarnings("ignore:::torchao"),
    pytest.mark.filterwarnings("ignore:::copyreg"),
]

Kept = dict[str, tuple[int, ...]]
CHANNELS = tuple(range(0, 96, 3))  # 32 of 96
# Every way of being unequal at once.
RAGGED: Kept = {
    "layers.0.kv_groups": (1,),
    "layers.0.channels": CHANNELS,
    "layers.1.query_slots": (0,),
    "layers.1.channels": (),
    "layers.2.kv_groups": (),
}
MISSING: Kept = {
    "layers.0.kv_groups": (),
    "layers.1.kv_groups": (),
    "layers.1.channels": (),
    "layers.2.channels": (),
}
# Of two layers, because lowering takes a second or two a shape. Llama shows that widths may differ in every way.
UNEQUAL: Kept = {
    "layers.0.kv_groups": (1,),
    "layers.0.channels": CHANNELS,
    "layers.1.kv_groups": (0,),
    "layers.1.channels": (),
}
ALONE: Kept = {name: units for name, units in UNEQUAL.items() if "layers.0" in name}
EXPORTED = [family for family in FAMILIES if family != "gemma2"]
GRAPHS = [family for family in EXPORTED if family not in ("llama", "mistral")]  # mistral has that of llama
CAPPED = {"gemma3_text": {"final_logit_softcapping": 5.0}}
DECODE = Workload(precision="f32", context=16, prompt_tokens=8)
PROMPT = "the quick brown fox"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_level_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def exported(model: PreTrainedModel, tokenizer: Path, out: Path, precision: str = "f32") -> Artifact:
    return export.get("executorch").export(model, tokenizer=tokenizer, precision=precision, plan_digest="plan", out=out)


@pytest.fixture(scope="module")
def dense(in_executorch: Path) -> Path:
    """The folder of a dense llama in f32."""
    return in_executorch / "artifact"


def four_bits_model(tokenizer: Path) -> PreTrainedModel:
    model = talking_model(tokenizer)
    return shrink_(model, plan_for(model, {"layers.0.channels": (), "layers.1.kv_groups": ()}))


@pytest.fixture(scope="module")
def four_bits(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a llama in 8da4w that lacks two sublayers."""
    out = tmp_path_factory.mktemp("four_bits") / "out"
    exported(four_bits_model(tokenizer), tokenizer, out, "8da4w")
    return out


def artifact_in(folder: Path) -> Artifact:
    return decode(Artifact, read_json(folder / "artifact.json"), source="artifact.json")


def assert_exact(artifact: Artifact) -> None:
    """The export verified itself against the 60 dB bound; here that it is as good as f32 gets."""
    assert artifact.sqnr_db is not None
    assert artifact.sqnr_db > 100, f"{artifact.sqnr_db:.1f} dB"


def test_a_dense_model_is_exact(dense: Path) -> None:
    assert_exact(artifact_in(dense))


@pytest.mark.parametrize("kept", [RAGGED, MISSING], ids=["unequal widths", "missing sublayers"])
def test_a_pruned_llama_is_exact(kept: Kept, tokenizer: Path, tmp_path: Path) -> None:
    assert_exact(exported(pruned_model("llama", kept), tokenizer, tmp_path / "out"))


@pytest.mark.parametrize("family", GRAPHS)
def test_a_pruned_model_of_a_family_is_exact(family: str, tokenizer: Path, tmp_path: Path) -> None:
    model = pruned_model(family, UNEQUAL, num_hidden_layers=2, **CAPPED.get(family, {}))
    assert_exact(exported(model, tokenizer, tmp_path / "out"))


def test_the_trial_of_the_support_table_opens_a_program(tmp_path: Path) -> None:
    tool: Any = importlib.import_module("tools.support_table")
    tool.try_out(tool.declared("llama", "executorch", "f32"), tmp_path)


def test_a_window_as_long_as_the_context_needs_no_mask(tokenizer: Path, tmp_path: Path) -> None:
    folders, one_layer = [tmp_path / "window", tmp_path / "none"], {"num_hidden_layers": 1, **CAPPED["gemma3_text"]}
    models = [pruned_model("gemma3_text", ALONE, sliding_window=length, **one_layer) for length in (127, 128)]
    masked, plain = (exported(model, tokenizer, out).num_bytes for model, out in zip(models, folders, strict=True))
    assert plain < masked


def test_soft_caps_of_scores_are_refused(tokenizer: Path, tmp_path: Path) -> None:
    model = tiny_model("gemma2")
    found = backends.get("executorch").capabilities(architecture_of(model), precision="f32")
    assert found.unsupported is not None
    with pytest.raises(Unsupported, match="no soft cap, as Gemma 2 needs it"):
        exported(model, tokenizer, tmp_path / "out")


@pytest.mark.parametrize("family", ["llama", "granite"])
def test_biases_of_output_projections_alone_are_exact(family: str, tokenizer: Path, tmp_path: Path) -> None:
    assert_exact(exported(compensated_model(family, ALONE, num_hidden_layers=1), tokenizer, tmp_path / "out"))


def test_four_bit_weights_cost_what_they_should(four_bits: Path) -> None:
    found = artifact_in(four_bits).sqnr_db
    assert found is not None
    assert 3 < found < 20, f"{found:.1f} dB"  # measured on the five families: 4.8 to 17


@torch.no_grad()
def quantised_(model: PreTrainedModel, mix: Mix) -> PreTrainedModel:
    """`model`, computing in torch with the weights and activations of a program in `mix`."""
    quantisation = importlib.import_module("dilap.export.executorch.quantisation")
    parts = Header(architecture=architecture_of(model), numerics=numerics_of(model), mix=mix)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())  # no longer tied
    table = model.get_input_embeddings().weight
    if parts.precision_of("embedding") == "8da4w":
        table.copy_(rounded(table, "8da4w"))
    else:
        rows, scales = quantisation.quantised_rows(table)
        table.copy_(rows * scales[:, None])
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear):
            kind = "attention" if "self_attn" in name else "ffn"
            precision = parts.precision_of(f"layers.{name.split('.')[2]}.{kind}" if "layers" in name else "head")
            if precision != "f32":
                quantisation.quantise_linear_(module, precision=precision)
    return model


def test_four_bit_weights_are_exact_against_torch_in_the_same_types(four_bits: Path, tokenizer: Path) -> None:
    tokens = random_tokens(1, 16)
    session = backends.get("executorch").load(four_bits / "model.pte", DECODE)
    found = session.logits(tokens[0].tolist(), incremental=True)
    session.close()
    expected = logits(quantised_(four_bits_model(tokenizer), Mix(precision="8da4w")), tokens)[0].numpy()
    assert sqnr_db(expected, found) > 60, f"{sqnr_db(expected, found):.1f} dB"  # measured 134; one rounding off: 30


NAMED = {"layers.0.attention": "f32", "layers.0.ffn": "8da8w", "head": "8da8w", "embedding": "8da4w"}


def mixed_model() -> PreTrainedModel:
    return tiny_model("llama", tie_word_embeddings=True, num_hidden_layers=2)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a llama whose parts have precisions of their own, with a tokenizer that normalises texts."""
    folder = tmp_path_factory.mktemp("mixed")
    export.get("executorch").export(
        mixed_model(),
        tokenizer=with_normal_form(folder / "words"),
        precision="8da4w",
        precisions=NAMED,
        plan_digest="",
        out=folder / "out",
    )
    return folder / "out"


def test_parts_in_precisions_of_their_own_are_exact_against_torch_in_the_same_types(mixed: Path) -> None:
    artifact = artifact_in(mixed)
    assert artifact.precisions == NAMED
    assert artifact.details["matrix_types"] == {"f32": 4, "int4": 7, "int8": 4}
    tokens = random_tokens(1, 16)
    session = backends.get("executorch").load(mixed / "model.pte", DECODE)
    found = session.logits(tokens[0].tolist(), incremental=True)
    session.close()
    expected = logits(quantised_(mixed_model(), Mix(precision="8da4w", precisions=NAMED)), tokens)[0].numpy()
    assert sqnr_db(expected, found) > 60, f"{sqnr_db(expected, found):.1f} dB"


def test_rows_that_no_group_divides_stay_in_eight_bits() -> None:
    model = pruned_model("llama", {"layers.0.channels": tuple(range(33))})
    header = Header(architecture=architecture_of(model), numerics=numerics_of(model), mix=Mix(precision="8da4w"))
    assert matrix_types(header) == {"int4": 20, "int8": 2}  # and the head


@pytest.mark.parametrize("folder", ["dense", "four_bits"])
def test_logits_token_by_token_equal_those_of_one_pass(folder: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(folder) / "model.pte"
    session = backends.get("executorch").load(path, DECODE)
    tokens = [5, 17, 80, 3, 3, 41, 0, 95]
    together, one_by_one = (session.logits(tokens, incremental=way) for way in (False, True))
    session.close()
    assert together.shape == (len(tokens), VOCAB_SIZE)
    # another order of summation; with 8-bit activations it may move one across a rounding boundary
    tolerance = 1e-5 if folder == "dense" else 5e-2
    np.testing.assert_allclose(one_by_one, together, atol=tolerance * float(np.abs(together).max()))


def test_a_reader_gives_in_several_runs_the_logits_of_prefixes(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dilap.export.executorch.header.SCORED_TOKENS", 8)
    monkeypatch.setattr("dilap.export.executorch.writer.NUM_TOKENS", 8)  # what the export verifies in one run
    model, tokens = tiny_model("llama", num_hidden_layers=1), random_tokens(1, 24)
    exported(model, tokenizer, tmp_path / "out")
    reader = readers.open_reader("executorch", tmp_path / "out" / "model.pte", threads=1)
    ids = tokens[0].tolist()
    first, rest = reader.read(ids[:3], start=0, num_rows=1), reader.read(ids[3:], start=3, num_rows=14)
    reader.close()
    sqnr = sqnr_db(logits(model, tokens)[0, [2, *range(10, 24)]].numpy(), np.concatenate([first, rest]))
    assert sqnr > 100, f"{sqnr:.1f} dB"


def test_a_program_without_a_method_for_scores_is_refused(dense: Path, tmp_path: Path) -> None:
    older = tmp_path / "older.pte"
    older.write_bytes((dense / "model.pte").read_bytes().replace(b"score", b"other"))
    with pytest.raises(InvalidInput, match=r"older\.pte: it has no method 'score'; an earlier DiLAP wrote it"):
        readers.open_reader("executorch", older, threads=1)


def contents(module: Any) -> dict[str, bytes]:
    """The constants that a delegate stores, by name."""
    stored = module.named_data_store_output
    return {name: stored.buffers[entry.buffer_index] for name, entry in stored.pte_data.items()}


def test_a_filled_template_is_what_lowering_that_block_gives() -> None:
    blocks = importlib.import_module("dilap.export.executorch.blocks")
    architecture = architecture_of(tiny_model("llama"))
    shape = blocks.BlockShape(
        kind="attention_out",
        precision="8da4w",
        norm_eps=1e-5,
        activation="silu",
        architecture=replace(architecture, family="", layers=(), tied_embeddings=False),
        widths=replace(architecture.layers[0], num_kv_heads=4, num_channels=0),
        max_tokens=128,
    )
    block = shape.build()
    block.out.weight = torch.nn.Parameter(torch.randn(64, 64, generator=torch.Generator().manual_seed(9)))
    block.quantise_()
    filled, fresh = blocks.template(shape).filled(block).module, blocks.lower(block).module
    assert filled.processed_bytes == fresh.processed_bytes
    assert contents(filled) == contents(fresh)


class Runner:
    """ExecuTorch's own text runner on an exported folder."""

    def __init__(self, folder: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.module = importlib.import_module("executorch.extension.llm.runner")
        self.runner = self.module.TextLLMRunner(str(folder / "model.pte"), str(folder / "tokenizer.json"))

    def greedy(self, prompt: str, *, count: int) -> str:
        pieces: list[str] = []
        config = self.module.GenerationConfig(echo=False, temperature=0.0, max_new_tokens=count)
        self.runner.generate(prompt, config, pieces.append)
        return "".join(pieces)


def test_executorchs_own_runner_generates_the_tokens_of_torch(dense: Path) -> None:
    words, model = AutoTokenizer.from_pretrained(dense), talking_model(dense)
    ids = words(PROMPT)["input_ids"]
    expected = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :]
    assert Runner(dense).greedy(PROMPT, count=12) == words.decode(expected)


def test_the_runner_loads_a_four_bit_program(four_bits: Path) -> None:
    assert Runner(four_bits).greedy(PROMPT, count=4)


def test_the_constant_methods_say_what_the_runner_asks(dense: Path) -> None:
    program = importlib.import_module("executorch.extension.pybindings.portable_lib")._load_program(
        str(dense / "model.pte")
    )
    names = {program.get_method_name(index) for index in range(program.num_methods())}
    found = {name: program.load_method(name)([]) for name in names - {"forward", "score"}}
    assert found == {
        "get_max_seq_len": [128],
        "get_max_context_len": [128],
        "get_n_layers": [3],
        "get_vocab_size": [VOCAB_SIZE],
        "get_bos_id": [0],
        "get_eos_ids": [0, 2],  # the tokenizer's and the generation config's
        "use_kv_cache": [True],
        "use_sdpa_with_kv_cache": [True],
        "enable_dynamic_shape": [True],
        "get_max_scored_len": [128],
    }


def test_the_sidecar_describes_the_file(dense: Path) -> None:
    artifact = artifact_in(dense)
    assert (artifact.sha256, artifact.plan_digest) == (file_sha256(dense / artifact.path), "plan")


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_a_sample_is_a_positive_number_of_nanoseconds(dense: Path, phase: str) -> None:
    workload = Workload(phase="decode" if phase == "decode" else "prefill", precision="f32", context=127)
    session = backends.get("executorch").load(dense / "model.pte", workload)
    samples = [session.sample() for _ in range(20)]  # more than the cache has room for, were they appended
    session.close()
    assert min(samples) > 0


def test_a_context_beyond_the_cache_is_unsupported(dense: Path) -> None:
    with pytest.raises(Unsupported, match="room for 128 tokens, decode at context 128"):
        backends.get("executorch").load(dense / "model.pte", Workload(precision="f32", context=128))


def test_threads_change_between_sessions_only(dense: Path) -> None:
    first = backends.get("executorch").load(dense / "model.pte", DECODE)
    with pytest.raises(Unsupported, match="models with 1 threads are open"):
        backends.get("executorch").load(dense / "model.pte", Workload(precision="f32", context=16, threads=2))
    first.close()
    backends.get("executorch").load(dense / "model.pte", Workload(precision="f32", context=16, threads=2)).close()


def test_batches_are_unsupported(dense: Path) -> None:
    with pytest.raises(Unsupported, match="batch 2"):
        backends.get("executorch").load(dense / "model.pte", Workload(batch=2))


@pytest.mark.parametrize("part", [0.3, 0.6, 0.95])
def test_a_truncated_file_is_refused(dense: Path, tmp_path: Path, part: float) -> None:
    whole = (dense / "model.pte").read_bytes()
    damaged = tmp_path / "damaged.pte"
    damaged.write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(InvalidInput, match=r"damaged\.pte: "):
        backends.get("executorch").load(damaged, DECODE)


def test_a_file_that_is_no_program_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.pte"
    other.write_bytes(b"not a program, but longer than a header would be" * 4)
    with pytest.raises(InvalidInput, match=r"other\.pte: ExecuTorch cannot load it"):
        backends.get("executorch").load(other, DECODE)


def test_an_absent_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no such file"):
        backends.get("executorch").load(tmp_path / "absent.pte", DECODE)


@pytest.mark.parametrize("folder", ["dense", "four_bits"])
def test_a_probe_has_the_size_of_a_real_export(
    folder: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = artifact_in(request.getfixturevalue(folder))
    monkeypatch.setattr("dilap.export.executorch.header.MAX_CONTEXT", real.details["max_context"])
    probe = export.get("executorch").export_probe(
        real.decoder, precision=real.precision, seed=0, out=tmp_path / "probe"
    )
    assert probe.details["matrix_types"] == real.details["matrix_types"]
    assert probe.num_bytes == pytest.approx(real.num_bytes, abs=4096)  # alignment


@pytest.fixture(scope="module")
def running() -> Iterator[AgentClient]:
    with AgentClient(LocalConnection(), backend="executorch", device="host_cpu") as client:
        yield client


def test_the_agent_times_a_program(running: AgentClient, dense: Path) -> None:
    path = dense / "model.pte"
    one = running.load(path, sha256=codec.file_sha256(path), workload=DECODE)
    samples = InstrumentBench(running, [one.handle]).sample(0, 5)
    assert min(samples) > 0


def test_the_agent_outlives_a_damaged_program(running: AgentClient, dense: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.pte"
    damaged.write_bytes((dense / "model.pte").read_bytes()[:-5000])
    with pytest.raises(InvalidInput, match=r"damaged\.pte"):
        running.load(damaged, sha256=codec.file_sha256(damaged), workload=DECODE)
    assert running.call("state")["state"]


def header(model: PreTrainedModel, precision: str = "f32") -> Any:
    words: Any = SimpleNamespace(bos_token_id=None, eos_token_id=0)
    return header_of(model, words, mix=Mix(precision=precision))


def test_a_sliding_window_bounds_the_context() -> None:
    assert header(tiny_model("mistral", sliding_window=96)).max_context == 96


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_scaled_rotary_frequencies_are_those_of_transformers(kind: str) -> None:
    scaling = {"rope_type": kind, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope = {"rope_theta": 5000.0, "original_max_position_embeddings": 32, **scaling}
    model = tiny_model("llama", rope_parameters=rope)
    rotary = header(model).numerics.layers[0].rotary
    assert rotary is not None
    assert rotary.frequencies == tuple(model.model.rotary_emb.inv_freq.tolist())


def test_unknown_rotary_scaling_is_refused() -> None:
    model = tiny_model("llama", rope_parameters={"rope_theta": 5000.0, "rope_type": "dynamic", "factor": 2.0})
    with pytest.raises(Unsupported, match="dynamic"):
        header(model)


def test_an_unknown_precision_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="q4_0"):
        exported(tiny_model("llama"), tokenizer, tmp_path / "out", "q4_0")


def test_groups_must_divide_the_hidden_size() -> None:
    with pytest.raises(Unsupported, match="hidden size that 32 divides, got 48"):
        header(tiny_model("llama", hidden_size=48), "8da4w")


def test_a_weight_that_is_not_finite_is_named() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    with pytest.raises(InvalidInput, match=r"layers\.1\.mlp\.up_proj\.weight"):
        tensor(model.state_dict(), "model.layers.1.mlp.up_proj.weight", (96, 64))


def test_a_failed_export_leaves_nothing(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dilap.export.executorch.writer.SQNR_BOUNDS_DB", {"f32": 1000.0})
    with pytest.raises(VerificationFailed, match=r"forward of model\.pte in f32 differs"):
        exported(tiny_model("llama", num_hidden_layers=1), tokenizer, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", EXPORTED)
@pytest.mark.parametrize("precision", ["f32", "8da4w"])
def test_every_family_may_have_widths_of_its_own_in_every_layer(family: str, precision: str) -> None:
    capabilities = backends.get("executorch").capabilities(architecture_of(tiny_model(family)), precision=precision)
    assert (capabilities.unsupported, capabilities.per_layer_widths, capabilities.ffn_multiple) == (None, True, 32)


def test_an_unknown_precision_of_the_runtime_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidInput, match="8da4w"):
        backends.get("executorch").capabilities(tiny_llama(), precision="int3")


def test_the_build_names_its_delegates() -> None:
    assert "XnnpackBackend" in backends.get("executorch").build()


def with_normal_form(folder: Path) -> Path:
    """A byte-level tokenizer that brings texts into the normal form NFC first."""
    words = Tokenizer.from_file(str(byte_level_tokenizer(folder) / "tokenizer.json"))
    words.normalizer = normalizers.NFC()
    words.save(str(folder / "tokenizer.json"))
    return folder


def test_a_normal_form_that_executorch_does_not_make_is_told(mixed: Path) -> None:
    """Its NFC makes an E of an É. As Qwen's tokenizers have it: the family is not refused for it."""
    (note,) = artifact_in(mixed).details["notes"]
    assert "ExecuTorch does not normalise texts as this tokenizer does" in note
    assert "combining" in note


def test_texts_in_normal_form_are_split_alike_in_executorch(tmp_path: Path) -> None:
    words = AutoTokenizer.from_pretrained(with_normal_form(tmp_path / "words"))
    (tmp_path / "out").mkdir()
    save_tokenizer(words, tmp_path / "out")
    saved = ExecuTorchTokenizer(tmp_path / "out" / "tokenizer.json")
    assert saved.tokens("Élève") == words("Élève")["input_ids"]
    assert saved.tokens("E\u0301") != words("E\u0301")["input_ids"]  # no longer E alone, and not yet É


def test_a_tokenizer_without_a_normal_form_has_no_note(tokenizer: Path, tmp_path: Path) -> None:
    assert save_tokenizer(AutoTokenizer.from_pretrained(tokenizer), tmp_path) == []
