"""Estimates against published speeds of language models: every one lies between the best and the worst.

Where a source does not say in which format the head is, that of the runtime's usual files is taken; INT4 with a scale
for 128 weights has 4.1 bits, and 4.5 are the nearest that DiLAP has. Left out are published speeds of NPUs and of
phones' GPUs, which are no targets; of networks of another kind than DiLAP's decoders (Qwen3.5, LFM2.5); of builds that
their authors call broken or slow by mistake (a prebuilt one without the processor's instructions, ollama's on a Jetson,
debug builds); prompts whose length, and speeds whose machine or format, is not told; and speculative decoding.
"""

from dataclasses import dataclass, replace

import pytest
from standins.fabricated import tiny_llama

from dilap.core.shape import Architecture, LayerWidths
from dilap.core.workload import Workload
from dilap.profilers.devices import device as devices
from dilap.profilers.devices.device import Device
from dilap.profilers.tables.roofline import reaches, roofline


def decoder(
    *, hidden: int, layers: int, heads: int, kv: int, head_dim: int, channels: int, vocabulary: int
) -> Architecture:
    width = LayerWidths(num_heads=heads, num_kv_heads=kv, num_channels=channels)
    shape = tiny_llama(*[width] * layers)
    return replace(shape, hidden_size=hidden, head_dim=head_dim, vocab_size=vocabulary)


QWEN, LLAMA3 = 151_936, 128_256  # tokens
MODELS = {
    "SmolLM2-135M": decoder(hidden=576, layers=30, heads=9, kv=3, head_dim=64, channels=1536, vocabulary=49_152),
    "Qwen3-0.6B": decoder(hidden=1024, layers=28, heads=16, kv=8, head_dim=128, channels=3072, vocabulary=QWEN),
    "Qwen3-1.7B": decoder(hidden=2048, layers=28, heads=16, kv=8, head_dim=128, channels=6144, vocabulary=QWEN),
    "Qwen3-4B": decoder(hidden=2560, layers=36, heads=32, kv=8, head_dim=128, channels=9728, vocabulary=QWEN),
    "Qwen3-8B": decoder(hidden=4096, layers=36, heads=32, kv=8, head_dim=128, channels=12_288, vocabulary=QWEN),
    "Qwen2.5-1.5B": decoder(hidden=1536, layers=28, heads=12, kv=2, head_dim=128, channels=8960, vocabulary=QWEN),
    "Llama-3.2-1B": decoder(hidden=2048, layers=16, heads=32, kv=8, head_dim=64, channels=8192, vocabulary=LLAMA3),
    "Llama-3.2-3B": decoder(hidden=3072, layers=28, heads=24, kv=8, head_dim=128, channels=8192, vocabulary=LLAMA3),
    "Llama-3-8B": decoder(hidden=4096, layers=32, heads=32, kv=8, head_dim=128, channels=14_336, vocabulary=LLAMA3),
    "Llama-2-7B": decoder(hidden=4096, layers=32, heads=32, kv=32, head_dim=128, channels=11_008, vocabulary=32_000),
    "Llama-2-13B": decoder(hidden=5120, layers=40, heads=40, kv=40, head_dim=128, channels=13_824, vocabulary=32_000),
}


# What these runtimes keep in 4 bits, tensor cores multiply in f16.
_F16 = replace(devices.get("jetson_gpu"), quantised_gain=1.0)


def gpu(bytes_per_second: float, tensor_cores: int, gigahertz: float) -> Device:
    flops = tensor_cores * 256 * 2 * gigahertz * 1e9
    return replace(_F16, bytes_per_second=bytes_per_second, flops_per_second=flops)


ORIN_NX = _F16
AGX_ORIN, ORIN_NANO_SUPER, ORIN_NANO = gpu(204.8e9, 64, 1.3), gpu(102e9, 32, 1.02), gpu(68e9, 32, 0.625)
ORIN_CPU, PHONE, LAPTOP = (devices.get(name) for name in ("jetson_cpu", "s23", "snapdragon_x"))
GALAXY_S22 = replace(PHONE, bytes_per_second=51.2e9)  # LPDDR5-6400 on 64 bits
# Snapdragon 8 Gen 3 (OnePlus 12, Galaxy S24): LPDDR5X-9600; an X4 at 3.3 GHz with four 128-bit pipes, five A720 at 3.1
# with two. Four times as many 8-bit operations.
GEN_3 = replace(PHONE, bytes_per_second=76.8e9, flops_per_second=354e9)


@dataclass(frozen=True, kw_only=True)
class Speed:
    """A published speed: tokens a second, of a prompt of so many tokens or, with 0, of decoding."""

    device: Device
    model: str
    body: str
    head: str
    rate: float
    prompt: int = 0

    def seconds(self) -> float:
        return (self.prompt or 1) / self.rate

    def estimates(self) -> list[float]:
        """The best, the likely and the worst."""
        work = (
            Workload(phase="prefill", prompt_tokens=self.prompt, precision=self.body)
            if self.prompt
            else Workload(context=128, precision=self.body)
        )
        found = []
        for reach in reaches(self.device):
            model = roofline(
                MODELS[self.model], work, self.device, cache_bits=16.0, precisions=[self.head], reach=reach
            )
            head = {} if self.head == self.body else {"head": self.head}
            found.append(model.predict(MODELS[self.model].layers, head))
        return found


def edge_llm(device: Device, model: str, rate: float, *, prompt: int = 0) -> Speed:
    """Of TensorRT-Edge-LLM: INT4 AWQ, the head in f16."""
    return Speed(device=device, model=model, body="q4_0", head="f16", rate=rate, prompt=prompt)


def llama_cpp(device: Device, model: str, rate: float, *, head: str = "q8_0") -> Speed:
    """Of llama.cpp in 4 bits; Q4_K_M and Q2_K files have larger heads."""
    return Speed(device=device, model=model, body="q4_0", head=head, rate=rate)


def executorch(device: Device, model: str, rate: float, *, head: str = "8da8w", prompt: int = 0) -> Speed:
    return Speed(device=device, model=model, body="8da4w", head=head, rate=rate, prompt=prompt)


SPEEDS = [
    # TensorRT-Edge-LLM's documentation 0.10.0, performance benchmarks
    edge_llm(AGX_ORIN, "Qwen3-0.6B", 186.4),
    edge_llm(AGX_ORIN, "Qwen3-1.7B", 98.6),
    edge_llm(AGX_ORIN, "Qwen3-4B", 53.1),
    edge_llm(AGX_ORIN, "Qwen3-8B", 32.5),
    edge_llm(ORIN_NX, "Qwen3-0.6B", 117.4),
    edge_llm(ORIN_NX, "Qwen3-1.7B", 60.4),
    edge_llm(ORIN_NX, "Qwen3-4B", 31.6),
    edge_llm(ORIN_NX, "Qwen3-8B", 19.0),
    edge_llm(ORIN_NANO, "Qwen3-0.6B", 72.8),
    edge_llm(ORIN_NANO, "Qwen3-1.7B", 37.4),
    edge_llm(ORIN_NX, "Qwen3-1.7B", 60.1),  # the text part of Qwen3-VL-2B, like the next
    edge_llm(ORIN_NANO, "Qwen3-1.7B", 36.9),
    edge_llm(AGX_ORIN, "Qwen3-0.6B", 4124, prompt=61),
    edge_llm(AGX_ORIN, "Qwen3-1.7B", 2995, prompt=61),
    edge_llm(AGX_ORIN, "Qwen3-4B", 1342, prompt=57),
    edge_llm(AGX_ORIN, "Qwen3-8B", 931, prompt=61),
    edge_llm(ORIN_NX, "Qwen3-1.7B", 2836, prompt=292),
    edge_llm(ORIN_NANO, "Qwen3-1.7B", 1532, prompt=292),
    # hokwangchoi.com, 2026-04: Cosmos-Reason2-2B in Edge-LLM, vLLM and llama.cpp
    edge_llm(ORIN_NANO_SUPER, "Qwen3-1.7B", 60),
    edge_llm(ORIN_NANO_SUPER, "Qwen3-1.7B", 56),
    llama_cpp(ORIN_NANO_SUPER, "Qwen3-1.7B", 38),
    llama_cpp(ORIN_NANO_SUPER, "SmolLM2-135M", 165),  # smolhub, 2026-06
    llama_cpp(ORIN_NANO_SUPER, "Qwen2.5-1.5B", 32.1),  # realizar, issue 120
    llama_cpp(AGX_ORIN, "Llama-2-7B", 22.5, head="q4_0"),  # holohub, issue 170, like the next
    llama_cpp(AGX_ORIN, "Llama-2-13B", 13.3, head="q4_0"),
    llama_cpp(ORIN_NANO_SUPER, "SmolLM2-135M", 139),  # yzma's BENCHMARKS.md: SmolLM-135M, which is shaped alike
    llama_cpp(ORIN_NANO_SUPER, "SmolLM2-135M", 135),  # through Vulkan
    llama_cpp(ORIN_CPU, "SmolLM2-135M", 58),
    llama_cpp(ORIN_CPU, "SmolLM2-135M", 69),
    # ExecuTorch's examples/models/llama/README.md, prompts of 64 tokens
    Speed(device=GEN_3, model="Llama-3.2-1B", body="bf16", head="bf16", rate=19.2),
    Speed(device=GEN_3, model="Llama-3.2-1B", body="bf16", head="bf16", rate=60.3, prompt=64),
    executorch(GEN_3, "Llama-3.2-1B", 50.2),
    executorch(GEN_3, "Llama-3.2-1B", 45.8),
    executorch(GEN_3, "Llama-3.2-1B", 260.5, prompt=64),
    executorch(GEN_3, "Llama-3.2-1B", 252.0, prompt=64),
    executorch(GEN_3, "Llama-3.2-3B", 19.7),
    executorch(GEN_3, "Llama-3.2-3B", 89.7, prompt=64),
    executorch(GALAXY_S22, "Llama-3-8B", 7.85, head="8da4w"),
    executorch(GEN_3, "Llama-3-8B", 10.91, head="8da4w"),
    executorch(GEN_3, "Llama-3.2-1B", 350, prompt=64),  # Arm and PyTorch, 2024-10
    llama_cpp(LAPTOP, "Llama-3.2-1B", 60),  # a model card of 2024; the X Elite has the memory of the X Plus
    llama_cpp(LAPTOP, "Llama-2-7B", 20, head="q4_0"),  # llama.cpp, pull request 7191: clang, and MSVC
    llama_cpp(LAPTOP, "Llama-2-7B", 10, head="q4_0"),
    llama_cpp(LAPTOP, "Llama-3-8B", 19, head="q4_0"),  # ollama, issue 5360
]


@pytest.mark.parametrize("speed", SPEEDS, ids=lambda one: f"{one.device.name}-{one.model}-{one.rate}-{one.prompt}")
def test_a_published_speed_lies_between_the_best_and_the_worst_estimate(speed: Speed) -> None:
    best, likely, worst = speed.estimates()
    assert best < likely < worst
    assert best <= speed.seconds() <= worst, f"{best * 1e3:.1f} to {worst * 1e3:.1f} ms, {speed.seconds() * 1e3:.1f}"


def test_likely_estimates_are_off_by_less_than_two_where_phones_and_laptops_decode() -> None:
    ratios = [
        one.estimates()[1] / one.seconds()
        for one in SPEEDS
        if not one.prompt and one.device.name in ("s23", "snapdragon_x")
    ]
    assert all(0.5 < ratio < 2 for ratio in ratios)


def test_no_phone_is_said_to_decode_a_small_model_in_a_millisecond() -> None:
    best, likely, _ = executorch(PHONE, "SmolLM2-135M", 1).estimates()
    assert best > 2.5e-3
    assert 5e-3 < likely < 12e-3
