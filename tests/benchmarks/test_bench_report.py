"""The report: every section renders from result files, and says so where there is none."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import campaigns, report, simulate, systems
from benchmarks.campaign import Campaign, save
from benchmarks.engines import EngineOptions
from benchmarks.workingset import working_set
from benchmarks.workloads import SIZES, WORKLOADS
from helium_proxy.dispatch.settings import DispatchSettings
from tests.benchmarks.test_bench_stats import measurement

pytest.importorskip("matplotlib")


def result(*measurements: Any) -> dict[str, Any]:
    options = {"time_scale": 1.0, "profile": "cpu-tiny"}
    campaign = {"engines": "embedded:2", "options": options, "repeats": 3, "kv_divisor": None}
    about = {"campaign": campaign, "prompt_sizes": {"static": 1, "context": 1, "question": 1, "output": 1}}
    about |= {"num_blocks": 96, "block_size": 32, "cpu": "a CPU", "cores": 2, "date": "2026-01-01T", "commit": "abc"}
    return {"about": about, "notes": [], "measurements": [m.to_json() for m in measurements]}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(report, "PLOTS", tmp_path)
    return tmp_path


def test_figures_come_from_the_result_file(folder: Path) -> None:
    measured = [measurement("rr", 12.5), measurement("helium", 10.0), measurement("helium", 14.0, shape="iterative")]
    measured.append(measurement("rr", 7.0, shape="iterative"))
    text = report.render({"vllm": result(*measured)})
    assert "geometric mean **0.79 ×**" in text
    assert "least 0.50 × (iterative), most 1.25 × (debate)" in text
    assert "No gain (within 2% of the best peer, or behind it): iterative (helium: 0.50 × over rr)." in text
    for plot in re.findall(r"\(benchmarks/([^)]+)\)", text):
        assert (folder / plot).read_text().startswith("<?xml")


def test_a_campaign_of_an_earlier_day_is_kept_and_compared(folder: Path, tmp_path: Path) -> None:
    old = result(measurement("rr", 10.0, computed_tokens=200), measurement("helium", 10.0, computed_tokens=100))
    new = result(measurement("rr", 10.0, computed_tokens=206), measurement("helium", 8.0, computed_tokens=150))
    old["about"]["date"], new["about"]["date"] = "2026-01-01T03:04:05", "2026-01-02T03:04:05"
    for campaign in (old, new, new):
        save(campaign, "vllm", tmp_path)
    before = tmp_path / "before" / "vllm.json"
    assert json.loads(before.read_text()) == old
    assert json.loads((tmp_path / "vllm.json").read_text()) == new

    text = report.render({"vllm": new, "before/vllm": old})
    assert "vllm 2026-01-01 03:04 (commit `abc`)" in text
    assert (
        "prompt tokens 1 of 1 are within 5% of what they were, of ours, whose code has changed since, 0 of 1" in text
    )
    assert "the largest change is +50% (helium on debate)" in text
    assert "geometric mean of all: 1.00 × then, 1.25 × now" in text
    old["about"]["campaign"]["engines"] = "vllm:2"
    assert "Measured again" not in report.render({"vllm": new, "before/vllm": old})


def test_waiting_in_a_stream_is_compared_with_first_in_first_out(folder: Path) -> None:
    waits = {"helium": 3.0, "helium-no-ordering": 2.0}
    measured = [
        measurement(system, 9.0, shape="stream", tenants={"single": {"run_p50": 1.0, "run_p95": wait}})
        for system, wait in waits.items()
    ]
    assert "helium's is 1.50 × that of first in, first out" in report.render({"starvation": result(*measured)})


def test_what_each_part_is_worth_is_relative_to_round_robin(folder: Path) -> None:
    seconds = {("debate", "rr"): 8.0, ("debate", "helium"): 4.0, ("trading", "rr"): 9.0, ("trading", "helium"): 1.125}
    points = [
        {"shape": shape, "system": system, "makespan": took, "computed_tokens": 150, "fewest_tokens": 100}
        for (shape, system), took in seconds.items()
    ]
    base = {"workers": 8, "runs": 1, "shape": "trading", "sizes": "P1"}
    text = report.render({"simulate": {"base": base, "shapes": points}})
    assert "| helium | 2.00 ×, 1.50 | 8.00 ×, 1.50 | 4.00 × |" in text


def test_predictions_are_counted_with_events_and_without(folder: Path) -> None:
    counts = {("helium", "debate"): 9, ("helium", "trading"): 10, ("helium-no-events", "debate"): 8}
    measured = [
        measurement(system, 1.0, shape=shape, predicted_calls=10, predicted_within_block=within)
        for (system, shape), within in counts.items()
    ]
    text = report.render({"predictions": result(*measured)})
    assert "| debate | 90.0% of 10 | 80.0% of 10 |" in text
    assert "| trading | 100.0% of 10 | – |" in text
    assert "| all | 95.0% of 20 | 80.0% of 10 |" in text


def test_lookahead_is_judged_by_the_calls_that_follow_others(folder: Path) -> None:
    firsts = {"helium": (0.2, 0.4, 0.3), "helium-no-lookahead": (0.6, 0.9, 0.5)}
    measured = [
        measurement(system, 1.0, shape="debate_think", ttft_p50=9.0, ttft_follows_p50=first, call_p95=2.0)
        for system, seen in firsts.items()
        for first in seen
    ]
    assert "| debate think | 0.600 | 0.300 | 2.00 × | 2.00 | 2.00 (+0%) |" in report.render(
        {"lookahead": result(*measured)}
    )


def test_the_embedded_engine_s_error_is_against_the_fastest_real_run(folder: Path) -> None:
    fitted = {"engine": {"vllm": "1.2"}, "fitted_to": {"decode": {"error": -0.04}}}
    row = {"calls": 30, "measured_s": [12.0, 10.0, 15.0], "simulated_s": 9.0, "shipped_s": 8.0, "error": -0.1}
    row |= {"computed_tokens": [1300.0, 1200.0, 1400.0], "simulated_tokens": 1250}
    replay = {"about": result()["about"], "shapes": {"debate": row}}
    text = report.render({"calibration": fitted, "replay": replay})
    assert "| debate | 30 | 10.00; 15.00 | 9.00 | -10% | -20% | 1,200 | 1,250 |" in text


def test_a_gpu_s_section_names_card_and_engine(folder: Path) -> None:
    found = result(measurement("rr", 2.0), measurement("helium", 1.0), measurement("helium", 3.0))
    found["about"]["campaign"]["engines"] = "http://127.0.0.1:1,http://127.0.0.1:2"
    found["about"] |= {"gpus": "0,0", "cards": ["NVIDIA H200"], "model": "qwen3-8b", "engine_versions": ["vllm 1.2"]}
    text = report.render({"gpu": found})
    assert "Engines: 2 × vllm 1.2 (qwen3-8b) sharing NVIDIA H200, each with" in text
    assert "1–2 interleaved repeats" in text
    found["about"]["mps"] = True
    row = {"measured_s": 0.5, "simulated_s": 0.6, "error": 0.2}
    about = {**found["about"], "profile": "h100-8b", "date": "2026-01-02T03:04:05"}
    text = report.render({"gpu": found, "gpu_rates": {"about": about, "rows": {"1 × (512 + 64)": row}}})
    assert "with an equal part each (MPS) of NVIDIA H200" in text
    assert "| 1 × (512 + 64) | 0.500 | 0.600 | +20% |" in text


def test_the_simulator_turns_off_what_the_served_systems_do() -> None:
    usual = DispatchSettings(max_queue=1 << 30)
    changed = {
        name: {key for key, value in settings if value != getattr(usual, key)}
        for name, settings in simulate.WITHOUT.items()
    }
    assert changed == {
        "helium-no-placement": {"placement"},
        "helium-no-ordering": {"ordering"},
        "helium-no-admission": {"admission"},
        "helium-no-places": {"keep_places"},
        "helium-no-working-sets": {"working_sets"},
    }


def test_what_was_not_measured_is_said(folder: Path) -> None:
    text = report.render({})
    assert "**Not run.**" in text
    assert text.count("Not measured in this run.") >= 5


def test_campaigns_name_what_exists() -> None:
    for campaign in [*campaigns.CAMPAIGNS.values(), *campaigns.quick().values()]:
        assert set(campaign.shapes) <= set(WORKLOADS)
        assert campaign.sizes in SIZES
        for name in campaign.systems:
            systems.find(name)


def test_kv_can_be_sized_to_the_batch() -> None:
    size = working_set(WORKLOADS["debate"], SIZES["tiny"], 4, 16)
    assert working_set(WORKLOADS["debate"], SIZES["tiny"], 8, 16) > 1.5 * size
    assert Campaign("embedded:2", EngineOptions(), ("debate",), ("rr",), "tiny", scale=0.5).batch("debate") == 16
