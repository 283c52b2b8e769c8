"""How long one engine step takes, as a function of what was batched into it.

A step that prefills ``p`` tokens and decodes ``n`` sequences whose contexts sum to ``C`` tokens takes ::

    step_s + max(floor_s, prefill_token_s * p + decode_seq_s * n)        the matrix products
           + prefill_context_s * A + context_token_s * C                 attention, and reading the KV

where ``A`` sums, over the prefilled tokens, the context each attends to. `floor_s` is what the matrix products
cost however few tokens they carry: on a GPU, the time to read the weights once.

The GPU profiles are rooflines of published rates, not measurements:

- NVIDIA data sheets, dense bf16: H100 SXM 989 TFLOP/s, 3.35 TB/s, 80 GB; H200 SXM 989 TFLOP/s, 4.8 TB/s, 141 GB.
- Qwen3-8B's config.json: 8.19e9 parameters (16.4 GB in bf16); 36 layers, 8 KV heads of 128: 147,456 bytes of KV
  a token; 32 query heads of 128: 4 * 36 * 32 * 128 FLOP per (token, context token) pair.
- Assumed efficiency: 0.55 of peak FLOP/s in the matrix products, 0.35 in prefill attention, 0.80 of peak
  bandwidth; 1.0 ms a step for launches, sampling and scheduling. `gpu_memory_utilization` 0.9, 2 GB of activations.

`cpu-tiny` was fitted to measurements of the real engine; `docs/engine.md` gives them with the error that remains.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Profile:
    """Step-time coefficients (seconds) and the capacity an engine of this kind starts with by default."""

    name: str
    step_s: float = 0.0
    floor_s: float = 0.0
    prefill_token_s: float = 0.0
    prefill_context_s: float = 0.0
    decode_seq_s: float = 0.0
    context_token_s: float = 0.0
    kv_tokens: int = 1 << 20
    """KV capacity in tokens."""
    block_size: int = 16
    max_num_seqs: int = 1024
    max_num_batched_tokens: int = 8192

    def step(self, prefill: int, prefill_context: float, decode: int, context: int) -> float:
        """Seconds one step takes.

        `prefill_context` sums each prefilled token's context; `context` sums the decoding sequences' contexts.
        """
        linear = self.prefill_token_s * prefill + self.decode_seq_s * decode
        return (
            self.step_s
            + (linear if linear > self.floor_s else self.floor_s)
            + self.prefill_context_s * prefill_context
            + self.context_token_s * context
        )

    def alone(self, prompt_tokens: int = 512) -> tuple[float, float]:
        """What one call alone takes: seconds for each token of a prompt, and for a step that prefills nothing."""
        step = self.step(0, 0, 1, prompt_tokens)
        return (self.step(prompt_tokens, prompt_tokens**2 / 2, 0, 0) - step) / prompt_tokens, step


@dataclass(frozen=True, slots=True)
class Gpu:
    """Peak rates of one device."""

    flops: float
    bandwidth: float
    memory: float


@dataclass(frozen=True, slots=True)
class Model:
    """What a step must compute and read."""

    parameters: float
    kv_bytes: int
    """Bytes of KV a token."""
    attention_flops: int
    """FLOP for one token attending to one token of context."""
    weight_bytes: float = field(default=0.0)


H100 = Gpu(flops=989e12, bandwidth=3.35e12, memory=80e9)
H200 = Gpu(flops=989e12, bandwidth=4.80e12, memory=141e9)
QWEN3_8B = Model(8.19e9, 2 * 36 * 8 * 128 * 2, 4 * 36 * 32 * 128, 2 * 8.19e9)


def roofline(name: str, gpu: Gpu, model: Model) -> Profile:
    """The profile of `model` on `gpu` under the efficiencies stated above."""
    per_token = 2 * model.parameters / (0.55 * gpu.flops)
    return Profile(
        name,
        step_s=1e-3,
        floor_s=model.weight_bytes / (0.80 * gpu.bandwidth),
        prefill_token_s=per_token,
        prefill_context_s=model.attention_flops / (0.35 * gpu.flops),
        decode_seq_s=per_token,
        context_token_s=model.kv_bytes / (0.80 * gpu.bandwidth),
        kv_tokens=int((0.9 * gpu.memory - model.weight_bytes - 2e9) / model.kv_bytes),
    )


CPU_TINY = Profile(
    "cpu-tiny",
    step_s=11.67e-3,
    prefill_token_s=0.5453e-3,
    prefill_context_s=1.182e-7,
    decode_seq_s=0.4504e-3,
    context_token_s=8.571e-7,
    kv_tokens=65_536,
    block_size=128,
    max_num_seqs=128,
    max_num_batched_tokens=2048,
)

PROFILES: dict[str, Profile] = {
    p.name: p
    for p in (
        Profile("instant"),
        CPU_TINY,
        roofline("h100-8b", H100, QWEN3_8B),
        roofline("h200-8b", H200, QWEN3_8B),
    )
}
