"""A made-up device and a small architecture for tests that need no weights."""

from dataclasses import replace

from dilap.core.measurement import Fingerprint, Interval, Measurement
from dilap.core.shape import Architecture, LayerWidths
from dilap.core.workload import Workload
from dilap.evaluation.document import Costs, Evaluation, PhaseCosts, TaskFacts, TextQuality
from dilap.profilers.devices.doctor import TINY

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
    return replace(TINY, vocab_size=96, tied_embeddings=True, layers=layers)


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


TEXT_QUALITY = TextQuality(
    text="python-docs",
    text_sha256="s",
    tokens=512,
    reference="dense",
    reference_digest="d",
    kl=0.25,
    perplexity=30.0,
    top1=0.4,
    agreement=0.7,
    reference_perplexity=20.0,
    reference_top1=0.5,
)


def costs() -> Costs:
    """Decoding was measured, 1.00 to 1.29 ms; a prompt was not."""
    measurement = Measurement(
        artifact_sha256="0" * 64,
        workload=Workload(precision="f32"),
        fingerprint=FINGERPRINT,
        samples_ns=tuple(1_000_000 + 10_000 * step for step in range(30)),
        rounds=tuple(step // 3 for step in range(30)),
        peak_memory_bytes=1,
        load_seconds=0.1,
        started="2026-01-01T00:00:00+00:00",
        status="ok",
    )
    decode = PhaseCosts(
        workload=measurement.workload,
        flops=2_000_000_000,
        bytes_moved=40_000_000,
        measurement=measurement,
        average_memory_bytes=70_000_000,
        peak_memory_bytes=90_000_000,
    )
    prefill = PhaseCosts(
        workload=Workload(phase="prefill", precision="f32"), flops=3_000_000_000, bytes_moved=50_000_000
    )
    return Costs(parameters=12_000_000, file_bytes=25_000_000, decode=decode, prefill=prefill)


def exactly(share: float) -> Interval:
    """A share of a budget that is known without any error."""
    return Interval(value=share, low=share, high=share)
