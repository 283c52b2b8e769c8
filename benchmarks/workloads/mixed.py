"""Mixed tenants: one floods the service with Map-Reduce, one runs tool loops, one sends small single questions.

`STREAM` is the test for starvation: Map-Reduce runs arrive without end, faster than they can be served, and now and
then one small call, whose wait is what matters.
"""

from __future__ import annotations

from . import map_reduce, tool_loop
from .base import Inputs, Run, Sizes, Workload, document_inputs, user
from .text import Writer


async def single(run: Run) -> str:
    return await run.ask("answer", [run.role("assistant"), user(run.inputs["question"])])


def make_inputs(writer: Writer, sizes: Sizes, batch: int) -> list[list[Inputs]]:
    """Half of the runs Map-Reduce, a quarter tool loops, a quarter single questions, interleaved."""
    floods = document_inputs(writer, sizes, batch)[0]
    loops = tool_loop.make_inputs(writer, sizes, batch)[0]
    runs: list[Inputs] = []
    for index in range(batch):
        tenant = ("flood", "loop", "flood", "single")[index % 4]
        runs.append((loops if tenant == "loop" else floods)[index] | {"tenant": tenant})
    return [runs]


def arrivals(batch: int, seed: int) -> list[float]:
    """The flood at once; everything else spread over the first seconds, into the flood."""
    return [0.0 if index % 2 == 0 else 0.5 + 0.25 * index for index in range(batch)]


def make_stream(writer: Writer, sizes: Sizes, batch: int) -> list[list[Inputs]]:
    """Every fourth run is a single small call."""
    runs = document_inputs(writer, sizes, batch)[0]
    return [[inputs | {"tenant": "single" if index % 4 == 3 else "flood"} for index, inputs in enumerate(runs)]]


def stream_arrivals(batch: int, seed: int) -> list[float]:
    """A run every 0.5 s at a time scale of 1, after a first burst of half of them."""
    return [max(0.0, 0.5 * (index - batch // 2)) for index in range(batch)]


STREAM = Workload(
    "stream",
    single,
    make_stream,
    calls_per_run=None,
    batch=32,
    arrivals=stream_arrivals,
    programs={"flood": map_reduce.program, "single": single},
    planned=False,
)

WORKLOAD = Workload(
    "mixed",
    single,
    make_inputs,
    calls_per_run=None,
    batch=24,
    arrivals=arrivals,
    programs={"flood": map_reduce.program, "loop": tool_loop.program, "single": single},
    planned=False,
)
