"""Drive a batch as a submitted plan: one ``POST /v1/workflows``, then wait for its end."""

from __future__ import annotations

from collections.abc import Sequence

from .client import HttpCaller
from .workloads import Sizes, Workload


async def drive(
    caller: HttpCaller, workload: Workload, sizes: Sizes, url: str, runs: Sequence[dict[str, str]], *, name: str
) -> dict[str, float]:
    """Submit the batch and record every node's reply; the inputs' latencies by run id."""
    raise NotImplementedError
