"""The profiles: what was measured is what is simulated, and rooflines order devices as their data sheets do."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from benchmarks.calibrate import RATES, RESULT, simulated, workloads
from helium_proxy.engine import PROFILES, EngineConfig
from helium_proxy.engine.profile import CPU_TINY
from helium_proxy.errors import ConfigError

REPORT = json.loads(RESULT.read_text())


@pytest.mark.parametrize("rate", RATES)
def test_cpu_tiny_has_the_rates_that_were_fitted(rate: str) -> None:
    assert getattr(CPU_TINY, rate) == pytest.approx(REPORT["rates"][rate], rel=0.01)


@pytest.mark.parametrize("name", REPORT["judged_by"])
def test_makespans_are_within_15_percent_of_the_real_engine(name: str) -> None:
    config = EngineConfig(
        profile=CPU_TINY, num_blocks=REPORT["engine"]["blocks"], max_model_len=8192, policy="priority"
    )
    makespan = simulated(config, workloads(0)[name])
    assert makespan == pytest.approx(REPORT["judged_by"][name]["measured_s"], rel=0.15)
    assert makespan == pytest.approx(REPORT["judged_by"][name]["simulated_s"], rel=0.01)
    slower = replace(config, profile=replace(CPU_TINY, step_s=2 * CPU_TINY.step_s))
    assert simulated(slower, workloads(0)[name]) > 1.1 * makespan


def test_rooflines_follow_the_data_sheets() -> None:
    h100, h200 = PROFILES["h100-8b"], PROFILES["h200-8b"]
    alone = h100.step(0, 0.0, 1, 1000)
    assert 0.005 < alone < 0.010  # what an 8B model in bf16 takes a token on an H100
    assert h200.step(0, 0.0, 1, 1000) < alone
    assert h200.kv_tokens > 1.9 * h100.kv_tokens
    assert 20_000 < 8192 / h100.step(8192, 8192 * 4096.0, 0, 0) < 40_000  # prefill, tokens a second
    batch = [h100.step(0, 0.0, n, n * 1000) / n for n in (1, 8, 64, 256)]
    assert batch == sorted(batch, reverse=True)
    assert PROFILES["instant"].step(8192, 1e9, 1024, 10**6) == 0.0


@pytest.mark.parametrize(
    ("settings", "about"),
    [
        ({"profile": "h1000"}, "profile"),
        ({"block_size": 0}, "block_size"),
        ({"num_blocks": 1}, "num_blocks"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"max_num_seqs": 10, "max_num_batched_tokens": 9}, "max_num_batched_tokens"),
        ({"num_blocks": 10, "max_model_len": 1000}, "max_model_len"),
        ({"policy": "lifo"}, "policy"),
        ({"pin_budget": 1.5}, "pin_budget"),
        ({"time_scale": 0}, "time_scale"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(settings: dict[str, object], about: str) -> None:
    with pytest.raises(ConfigError, match=about):
        EngineConfig(**settings)  # type: ignore[arg-type]
