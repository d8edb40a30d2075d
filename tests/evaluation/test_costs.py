"""Operations, bytes and memory: closed forms against torch's own counter, files and a running model."""

from pathlib import Path

import pytest
import torch
from standins.models import FAMILIES, pruned_model, tiny_model, tiny_tokenizer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, PreTrainedModel

from dilap import backends, export
from dilap.core.errors import InvalidInput
from dilap.core.workload import Workload
from dilap.evaluation import costs
from dilap.evaluation.subject import Subject, open_subject
from dilap.models.anatomy import architecture_of, decoder_layers
from dilap.profilers.devices import device as devices
from dilap.profilers.protocol import Protocol

KEPT: dict[str, tuple[int, ...]] = {"layers.0.kv_groups": (1,), "layers.1.channels": tuple(range(32))}
TOKENS = 24


def non_matrix_flops(model: PreTrainedModel) -> int:
    """What the closed form counts for norms and biases, which torch's counter leaves out."""
    vectors = (p for layer in decoder_layers(model) for p in layer.parameters() if p.dim() == 1)
    return 2 * sum(p.numel() for p in vectors)


@torch.no_grad()
def counted(model: PreTrainedModel, num_tokens: int, *, context: int = 0) -> int:
    cache = DynamicCache()
    if context:
        model(input_ids=torch.ones(1, context, dtype=torch.long), past_key_values=cache, use_cache=True)
    # as plain products: torch counts no fused attention of the CPU
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        tokens = torch.ones(1, num_tokens, dtype=torch.long)
        model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "opt"])
def test_decode_flops_are_those_that_torch_counts(family: str) -> None:
    model = pruned_model(family, KEPT)
    found = architecture_of(model).decode_flops(context=TOKENS + 1)  # the new token sees itself too
    assert counted(model, 1, context=TOKENS) == found - non_matrix_flops(model)


def test_prefill_flops_are_those_that_torch_counts() -> None:
    model = pruned_model("llama", KEPT)
    architecture = architecture_of(model)
    heads = sum(layer.num_heads for layer in architecture.layers)
    masked = 4 * heads * architecture.head_dim * (TOKENS * (TOKENS - 1) // 2)  # what plain products compute for nothing
    expected = architecture.prefill_flops(prompt_tokens=TOKENS) - TOKENS * non_matrix_flops(model)
    assert counted(model, TOKENS) == expected + masked


def test_a_token_moves_the_weights_and_the_cache() -> None:
    architecture = architecture_of(tiny_model("llama"))
    matrices = (
        architecture.num_parameters - architecture.vocab_size * architecture.hidden_size - architecture.hidden_size
    )
    cache_row = sum(2 * layer.num_kv_heads * architecture.head_dim for layer in architecture.layers)
    found = architecture.decode_bytes(context=10, precision="f16", cache_bits=16)
    assert found == 2 * matrices + 2 * 11 * cache_row


def test_parts_are_counted_by_the_bits_of_their_own_precision() -> None:
    architecture = architecture_of(tiny_model("llama"))
    parts = {"layers.1.ffn": "q8_0", "head": "f32", "embedding": "f32"}
    head = architecture.vocab_size * architecture.hidden_size
    more = 2 * head - architecture.ffn_parameters(architecture.layers[1]) * 7.5 / 8  # 32 and 8.5 bits in place of 16
    plain, mixed = (
        architecture.decode_bytes(context=10, precision="f16", precisions=one, cache_bits=16) for one in ({}, parts)
    )
    assert mixed == plain + more
    plain, mixed = (
        architecture.prefill_bytes(prompt_tokens=3, precision="f16", precisions=one, cache_bits=16)
        for one in ({}, parts)
    )
    assert mixed == plain + more + 2 * 3 * architecture.hidden_size


def test_an_artifact_moves_about_what_its_file_holds(tmp_path: Path) -> None:
    subject = gguf(tmp_path, tiny_model("llama", tie_word_embeddings=True, vocab_size=300))
    found = costs.count(subject, Workload(precision="f32", context=1)).decode.bytes_moved
    assert subject.num_bytes is not None
    assert found == pytest.approx(subject.num_bytes, rel=0.1)  # the file has its vocabulary too


def test_an_artifact_is_scored_in_its_own_precision_alone(tmp_path: Path) -> None:
    gguf(tmp_path, tiny_model("llama")).reader.close()
    with pytest.raises(InvalidInput, match="is an artifact, which has its own precisions"):
        open_subject(str(tmp_path / "out"), precision="f16")


def gguf(folder: Path, model: PreTrainedModel) -> Subject:
    if reason := backends.get("llamacpp").unavailable():
        pytest.skip(reason)
    tiny_tokenizer(folder / "words")
    exporter = export.get("llamacpp")
    exporter.export(model, tokenizer=folder / "words", precision="f32", plan_digest="", out=folder / "out")
    return open_subject(str(folder / "out"))


def test_a_running_artifact_is_measured_in_both_phases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    brief = Protocol(
        min_rounds=1, max_rounds=1, max_seconds=1, lead_in_seconds=0, warm_up_seconds=0, warm_up_cap_seconds=0.1
    )
    monkeypatch.setattr("dilap.evaluation.costs.FINAL", brief)
    subject = gguf(tmp_path, tiny_model("llama"))
    subject.reader.close()
    counted = costs.count(subject, Workload(precision="f32", context=16, prompt_tokens=16))
    found = costs.measure(counted, subject, devices.get("host_cpu"))
    for phase in (found.decode, found.prefill):
        assert phase.measurement is not None
        assert phase.measurement.workload == phase.workload
        assert phase.average_memory_bytes is not None
        assert phase.peak_memory_bytes is not None
        assert 0 < phase.average_memory_bytes <= phase.peak_memory_bytes


def test_a_checkpoint_is_counted_alone(checkpoint: Path) -> None:
    subject = open_subject(str(checkpoint))
    counted = costs.count(subject, Workload(precision="f32"))
    assert costs.measure(counted, subject, devices.get("host_cpu")) == counted
    assert counted.file_bytes == (checkpoint / "model.safetensors").stat().st_size
