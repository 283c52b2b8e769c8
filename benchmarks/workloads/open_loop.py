"""Open-loop arrivals: debates that start whether or not the earlier ones have ended, Poisson or in bursts."""

from __future__ import annotations

import random

from . import debate
from .base import Workload, document_inputs

RATE = 1.5
"""Runs per second at a time scale of 1."""
BURST = 8


def poisson(batch: int, seed: int) -> list[float]:
    rng = random.Random(f"{seed}/poisson")
    offsets, now = [], 0.0
    for _ in range(batch):
        offsets.append(now)
        now += rng.expovariate(RATE)
    return offsets


def bursts(batch: int, seed: int) -> list[float]:
    """The same rate on average, eight runs at a time; in a small batch a third of them, so that there are several."""
    burst = max(1, min(BURST, batch // 3))
    return [(index // burst) * burst / RATE for index in range(batch)]


POISSON = Workload(
    "open_poisson", debate.program, document_inputs, calls_per_run=6, batch=32, arrivals=poisson, planned=False
)
BURSTS = Workload(
    "open_bursts", debate.program, document_inputs, calls_per_run=6, batch=32, arrivals=bursts, planned=False
)
