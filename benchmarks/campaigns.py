"""The campaigns whose results are published.

``full`` is meant to fit into half an hour on two cores and ``quick`` into five minutes; both are the same code. Real
engines are slow without a GPU, so that their KV and the prompts are scaled down together: a batch's working set stays
larger than what the engines hold.
"""

from __future__ import annotations

from dataclasses import replace

from .campaign import Campaign
from .engines import EngineOptions
from .workloads import PAPER_SHAPES

_VLLM = Campaign(
    engines="vllm:2",
    options=EngineOptions(blocks=96, block_size=128, kv_events=True),
    shapes=PAPER_SHAPES,
    systems=("rr", "sglang", "vllm-router", "helium"),
    sizes="small",
    scale=0.4,
)
"""Two real vLLM CPU engines. A token costs about 0.55 ms to prefill and, in a batch of ten, 1.6 ms to decode."""

_MODES = replace(
    _VLLM,
    systems=(
        "rr",
        "sglang-balanced",
        "vllm-router-kv",
        "vllm-router-program",
        "helium",
        "helium-untagged",
        "helium-plan",
    ),
    repeats=1,
)
"""The same shapes: the peers' other modes, and what tags and plans are worth."""

_COMPACT = replace(_VLLM, options=replace(_VLLM.options, block_size=32), sizes="compact", scale=0.25)
"""The same with blocks and prompts of a third of the tokens or so: faster, and more of the time is overhead."""

_H100 = replace(
    _VLLM,
    engines="embedded:8",
    options=EngineOptions(profile="h100-8b", block_size=16, kv_events=True, time_scale=0.25),
    sizes="P1",
    scale=1.0,
    batches=(
        ("map_reduce", 128),
        ("debate", 128),
        ("reflection", 160),
        ("iterative", 128),
        ("parallel_chains", 24),
        ("trading", 12),
    ),
    kv_divisor=6.0,
)
"""Eight embedded engines at a quarter of an H100's rates, so that two cores are enough for them, the proxy and the
client; their KV holds a sixth of the batch's working set."""

_TWO_DAY = replace(
    _VLLM,
    engines="embedded:2",
    options=EngineOptions(profile="cpu-tiny", blocks=96),
    shapes=("two_day",),
    systems=("rr", "sglang", "vllm-router", "helium", "helium-plan"),
    sizes="small",
    scale=0.5,
)

_AGENTS = replace(
    _TWO_DAY,
    shapes=("tool_loop", "tree_search", "retrieval", "mixed", "open_poisson", "open_bursts"),
    systems=("rr", "sglang", "vllm-router", "helium", "helium-untagged"),
    scale=0.5,
)

_ABLATION = replace(
    _COMPACT,
    shapes=("trading", "debate", "parallel_chains"),
    systems=(
        "rr",
        "helium",
        "helium-untagged",
        "helium-no-placement",
        "helium-no-ordering",
        "helium-no-admission",
        "helium-no-places",
        "helium-no-working-sets",
        "helium-no-templates",
        "helium-passthrough",
    ),
)

_STARVATION = replace(
    _TWO_DAY,
    shapes=("stream",),
    systems=("rr", "helium", "helium-no-ordering"),
    scale=0.5,
)
"""A small call in the stream of a large workflow: `helium-no-ordering` is first in, first out."""

_ONE_WORKER = replace(
    _TWO_DAY,
    engines="embedded:1",
    options=EngineOptions(profile="cpu-tiny", blocks=512),
    shapes=("retrieval",),
    systems=("rr", "helium", "helium-passthrough"),
    sizes="tiny",
    repeats=5,
)
"""Where there is nothing to gain: one worker that holds everything."""

_LOOKAHEAD = replace(
    _COMPACT,
    shapes=("iterative_think", "debate_think"),
    systems=("helium", "helium-no-lookahead"),
    options=EngineOptions(blocks=512, block_size=32, kv_events=True),
    sizes="replies",
    batches=(("iterative_think", 2), ("debate_think", 1)),
    repeats=5,
    stream_every=1,
    warmup=3,
)
"""The client thinks for half a second, every call is streamed, templates have been learned from three runs. Only what
the engine does not hold anyhow can be prefilled ahead (replies, where text is not cut into the tokens that were
generated; in a debate the others'), and only as much as idle engines prefill in that time: one debate at a time."""

_PREDICTIONS = replace(_COMPACT, systems=("helium", "helium-no-events"), repeats=1)
"""How well is known what the engines hold, from their KV events and from the index alone."""

CAMPAIGNS: dict[str, Campaign] = {
    "vllm": _VLLM,
    "modes": _MODES,
    "h100": _H100,
    "two_day": _TWO_DAY,
    "agents": _AGENTS,
    "ablation": _ABLATION,
    "starvation": _STARVATION,
    "one_worker": _ONE_WORKER,
    "lookahead": _LOOKAHEAD,
    "predictions": _PREDICTIONS,
}

FULL: dict[str, Campaign] = {
    "vllm": replace(_COMPACT, scale=0.15, repeats=1),
    "h100": replace(_H100, repeats=1, options=replace(_H100.options, time_scale=1.0)),
    "two_day": replace(_TWO_DAY, systems=("rr", "helium"), repeats=1),
    "one_worker": replace(_ONE_WORKER, repeats=2),
}
"""What ``--run full`` measures in half an hour; ``--run publish`` takes every campaign at its whole length."""


def quick() -> dict[str, Campaign]:
    """Embedded engines only, once, small batches, one of the two routers: here they place alike."""
    engines = {"engines": "embedded:2", "options": replace(_COMPACT.options, kv_events=False)}
    return {"quick": replace(_COMPACT, **engines, systems=("rr", "sglang", "helium"), scale=0.12, repeats=1)}
