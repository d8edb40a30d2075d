"""The real llama.cpp on tiny models with random weights."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from standins.fabricated import TINY_LAYER, tiny_llama

from dilap import backends, export
from dilap.core.errors import InvalidInput, Unsupported
from dilap.core.shape import LayerWidths
from dilap.core.sqnr import kl_divergence
from dilap.core.workload import Workload

if reason := backends.get("llamacpp").unavailable():
    pytest.skip(reason, allow_module_level=True)

TINY = tiny_llama(
    TINY_LAYER,
    LayerWidths(num_heads=2, num_kv_heads=1, num_channels=32),
    LayerWidths(num_heads=0, num_kv_heads=0, num_channels=64),
    LayerWidths(num_heads=4, num_kv_heads=2, num_channels=0),
)
DECODE = Workload(precision="f32", context=16, prompt_tokens=8)
TOKENS = [5, 17, 80, 3, 3, 41, 0, 95]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny") / "model"
    artifact = export.get("llamacpp").export_probe(TINY, precision="f32", seed=1, out=out)
    return out / artifact.path


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_a_sample_is_a_positive_number_of_nanoseconds(model: Path, phase: str) -> None:
    workload = Workload(phase="decode" if phase == "decode" else "prefill", precision="f32", context=16)
    session = backends.get("llamacpp").load(model, workload)
    samples = [session.sample() for _ in range(20)]  # more than the cache has room for, were it not rolled back
    session.close()
    assert min(samples) > 0


def test_logits_token_by_token_equal_those_of_one_pass(model: Path) -> None:
    session = backends.get("llamacpp").load(model, DECODE)
    together = session.logits(TOKENS, incremental=False)
    one_by_one = session.logits(TOKENS, incremental=True)
    session.close()
    # f16 KV cache and another order of summation
    np.testing.assert_allclose(one_by_one, together, atol=5e-3 * float(np.abs(together).max()))


def test_logits_have_a_row_for_every_token(model: Path) -> None:
    session = backends.get("llamacpp").load(model, DECODE)
    logits = session.logits(TOKENS, incremental=False)
    session.close()
    assert logits.shape == (len(TOKENS), TINY.vocab_size)


def test_asking_for_logits_leaves_the_timed_context_alone(model: Path) -> None:
    session = backends.get("llamacpp").load(model, DECODE)
    session.logits(TOKENS * 8, incremental=False)  # longer than the timed context
    assert session.sample() > 0
    session.close()


def test_closing_twice_is_harmless(model: Path) -> None:
    session = backends.get("llamacpp").load(model, DECODE)
    session.close()
    session.close()


def test_a_truncated_file_is_refused_in_llama_cpps_own_words(model: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(model.read_bytes()[:-2000])
    with pytest.raises(InvalidInput, match=r"damaged\.gguf: llama\.cpp cannot load it: .*file bounds"):
        backends.get("llamacpp").load(damaged, DECODE)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(b"not a model")
    with pytest.raises(InvalidInput, match="does not begin with GGUF"):
        backends.get("llamacpp").load(other, DECODE)


def test_an_absent_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no such file"):
        backends.get("llamacpp").load(tmp_path / "absent.gguf", DECODE)


def test_batches_are_unsupported(model: Path) -> None:
    with pytest.raises(Unsupported, match="batch 2"):
        backends.get("llamacpp").load(model, Workload(batch=2))


def test_llama_may_have_widths_of_its_own_in_every_layer() -> None:
    capabilities = backends.get("llamacpp").capabilities(tiny_llama(), precision="f16")
    assert (capabilities.per_layer_widths, capabilities.attention_removal, capabilities.ffn_multiple) == (
        True,
        True,
        32,
    )


def test_qwen3_keeps_equal_widths_and_both_sublayers() -> None:
    capabilities = backends.get("llamacpp").capabilities(replace(tiny_llama(), qk_norm=True), precision="q8_0")
    offered = (capabilities.per_layer_widths, capabilities.attention_removal, capabilities.ffn_removal)
    assert offered == (False, False, False)


def test_smollm3_keeps_all_layers_too() -> None:
    capabilities = backends.get("llamacpp").capabilities(replace(tiny_llama(), family="smollm3"), precision="q8_0")
    offered = (capabilities.per_layer_widths, capabilities.attention_removal, capabilities.ffn_removal)
    assert (*offered, capabilities.layer_removal) == (False, False, False, False)


def test_opt_is_unsupported_with_the_reason() -> None:
    assert "no OPT architecture" in str(
        backends.get("llamacpp").capabilities(replace(tiny_llama(), num_positions=64), precision="f16").unsupported
    )


def test_an_unknown_precision_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidInput, match="q4_0"):
        backends.get("llamacpp").capabilities(tiny_llama(), precision="int3")


def test_the_build_names_its_instruction_sets() -> None:
    assert "CPU" in backends.get("llamacpp").build()


@pytest.mark.parametrize(
    ("switches", "nats"),
    [({"flash_attention": "off"}, 1e-6), ({"repack": "off"}, 1e-6), ({"kv_cache": "f32"}, 1e-6)],
)
def test_switches_change_next_to_nothing_of_the_model(model: Path, switches: dict[str, str], nats: float) -> None:
    plain, switched = (backends.get("llamacpp").load(model, replace(DECODE, switches=one)) for one in ({}, switches))
    tokens = list(range(12))
    expected, got = (session.logits(tokens, incremental=True) for session in (plain, switched))
    assert kl_divergence(expected, got) < nats
