"""A made-up device and a small architecture for tests that need no weights."""

from dilap.evaluation.document import Evaluation, TaskFacts
from dilap.types import Architecture, Fingerprint, LayerWidths

FINGERPRINT = Fingerprint(
    device="host_cpu",
    machine="x86_64",
    processor="Test",
    num_cores=2,
    memory_bytes=8 << 30,
    last_level_cache_bytes=1 << 20,
    power_mode="performance",
    runtime="llamacpp",
    runtime_version="1",
    runtime_build="AVX2",
)
TINY_LAYER = LayerWidths(num_heads=4, num_kv_heads=2, num_channels=64)


def tiny_llama(*layers: LayerWidths) -> Architecture:
    """A llama of hidden size 64 with heads of 16."""
    return Architecture(
        family="llama",
        hidden_size=64,
        head_dim=16,
        vocab_size=96,
        tied_embeddings=True,
        ffn_matrices=3,
        norm_vectors=1,
        qkv_bias=False,
        out_bias=False,
        ffn_bias=False,
        qk_norm=False,
        num_positions=0,
        layers=layers,
    )


def evaluation(model: str, accuracy: float) -> Evaluation:
    """One task, one number."""
    facts = TaskFacts(num_fewshot=0, num_rows=10, data="d", data_sha256="s", choices={})
    return Evaluation(
        model=model,
        backend="torch",
        precision="f32",
        digest="d",
        plan_digest="",
        max_tokens=64,
        limit=None,
        num_fewshot=None,
        threads=1,
        versions={"dilap": "0"},
        tasks={"piqa": {"acc": accuracy, "acc_stderr": 0.01}},
        facts={"piqa": facts},
    )
