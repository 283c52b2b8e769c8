"""Whole workloads in virtual time, the real dispatcher in front of simulated engines."""

from __future__ import annotations

from statistics import geometric_mean

import pytest

from benchmarks.campaigns import CAMPAIGNS
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


def test_the_six_shapes_on_slow_engines() -> None:
    """Two engines of 96 blocks of 128 tokens, as the campaign on real ones has them."""
    config = EngineConfig(profile="cpu-tiny", block_size=128, num_blocks=96)
    campaign = CAMPAIGNS["vllm"]
    gains, shares = [], []
    for shape in campaign.shapes:
        sizes, batch = SIZES[campaign.sizes], campaign.batch(shape)
        rr, ours = (Simulation(s, 2, config).measure(WORKLOADS[shape], sizes, batch, 1) for s in ("rr", "helium"))
        gains.append(rr.makespan / ours.makespan)
        shares.append(ours.computed / ours.minimum)
    assert len(gains) == 6
    assert geometric_mean(gains) > 1.38
    assert min(gains) > 0.97
    assert max(shares) < 1.15
