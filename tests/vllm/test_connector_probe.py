"""The connector on vLLM's own classes without an engine: its cost when unused, its settings, its version gate."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import build_env
import pytest

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def probe(vllm_env: None) -> dict[str, Any]:
    done = subprocess.run(
        [str(build_env.venv_python()), str(Path(__file__).with_name("connector_probe.py"))],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(build_env.ROOT), "VLLM_LOGGING_LEVEL": "ERROR"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_unused_it_costs_microseconds_of_a_step_of_milliseconds(probe: dict[str, Any]) -> None:
    print(
        f"\n{probe['version']}: {probe['unused_us']:.2f} us a step unused, {probe['pinned_us']:.1f} us with 100 pins"
    )
    assert probe["unused_us"] < 20
    assert probe["pinned_us"] < 500


def test_blocks_are_held_and_given_back(probe: dict[str, Any]) -> None:
    assert (probe["held"], probe["leaked"]) == (1000, 0)


def test_requests_that_go_first_do_not_renew_the_pins_patience(probe: dict[str, Any]) -> None:
    assert probe["overtaken_waited_s"] == pytest.approx(5, abs=0.2)
    assert probe["remembered_after_aborts"] == 0
    assert probe["remembered_of_2000"] == 1024


def test_what_the_scheduler_demands_beyond_the_tokens_is_made_room_for(probe: dict[str, Any]) -> None:
    """Slots for speculative decoding, for which a request alone need not wait; the watermark, when others run."""
    assert probe["lookahead_waited_s"] == 0
    assert probe["watermark_waited_s"] == pytest.approx(5, abs=0.2)


def test_where_nothing_can_be_pinned_the_budget_is_nothing(probe: dict[str, Any]) -> None:
    assert probe["budgets"] == {"one group": 1200, "two groups": 0, "no caching": 0}


def test_counters_add_up_over_several_front_ends(probe: dict[str, Any]) -> None:
    """vLLM gives a step's statistics to one of them."""
    assert probe["front_ends"] == {"refused": 4, "logged": 4, "idle": True}


def test_settings_are_checked_at_the_start(probe: dict[str, Any]) -> None:
    assert "no setting 'budget'" in probe["unknown_setting"]
    assert "budget_share must be in [0, 1)" in probe["bad_setting"]


def test_an_untested_version_is_refused_with_the_way_out(probe: dict[str, Any]) -> None:
    assert "this is 0.99.0" in probe["unsupported"]
    assert "allow_untested_version" in probe["unsupported"]
    assert probe["allowed"] == ""
