"""Whole workloads in virtual time, the real dispatcher in front of simulated engines."""

from __future__ import annotations

import pytest

from benchmarks.virtual import Simulation
from benchmarks.workloads import SIZES, WORKLOADS
from helium_proxy.engine import EngineConfig


@pytest.mark.parametrize("system", ["rr", "affinity", "helium"])
@pytest.mark.parametrize("tagged", [True, False])
def test_a_batch_runs_to_its_end(system: str, tagged: bool) -> None:
    config = EngineConfig(profile="cpu-tiny", block_size=32, num_blocks=96)
    found = Simulation(system, 2, config, tagged=tagged).measure(WORKLOADS["debate"], SIZES["tiny"], 4, 1)
    assert found.makespan > 0
    assert found.computed > 0.9 * found.minimum  # (which leaves out that replies are cached as they are made)
