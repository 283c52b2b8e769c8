"""The arithmetic between measurements and published figures."""

from __future__ import annotations

import math
from typing import Any

import pytest

from benchmarks.campaign import order
from benchmarks.engines import parse_metrics
from benchmarks.harness import compare
from benchmarks.stats import Measurement, balance, best_peers, geometric_mean, quantile, rows, speedups
from benchmarks.systems import find, program, tag
from benchmarks.workloads import Call


def measurement(system: str, makespan: float, **fields: Any) -> Measurement:
    family = "helium" if system.startswith("helium") else "direct" if system == "rr" else "peer"
    values: dict[str, Any] = dict.fromkeys(
        ("run_p50", "run_p95", "call_p50", "call_p95", "computed_tokens", "generated_tokens", "cached_tokens"), 1.0
    )
    values |= {
        "shape": "debate",
        "repeat": 0,
        "phase": 0,
        "runs": 1,
        "calls": 6,
        "failed_calls": 0,
        "first_failure": None,
        "retries": 0,
    }
    values |= {"minimum_tokens": 1, "minimum_without_reuse": 1, "balance": 1.0, "preemptions": 0.0}
    values |= {"ttft_p50": None, "ttft_p95": None, "reused_calls": 0, "proxy_cpu": None}
    return Measurement(**(values | {"system": system, "family": family, "makespan": makespan} | fields))


def test_speedup_is_over_the_best_peer_of_each_shape() -> None:
    table = rows(
        [
            measurement("rr", 10.0),
            measurement("sglang", 8.0),
            measurement("helium", 4.0),
            measurement("rr", 6.0, shape="trading"),
            measurement("sglang", 9.0, shape="trading"),
            measurement("helium", 6.0, shape="trading"),
        ]
    )
    assert {key[0]: row.system for key, row in best_peers(table).items()} == {"debate": "sglang", "trading": "rr"}
    ours = speedups(table)["helium"]
    assert ours == {("debate", 0): 2.0, ("trading", 0): 1.0}
    assert geometric_mean(ours.values()) == pytest.approx(math.sqrt(2))


def test_a_system_that_failed_calls_is_neither_a_peer_nor_ahead() -> None:
    table = rows(
        [
            measurement("rr", 10.0),
            measurement("sglang", 1.0, failed_calls=2),
            measurement("helium", 5.0, failed_calls=1),
        ]
    )
    assert [row.system for row in best_peers(table).values()] == ["rr"]
    assert speedups(table) == {"rr": {("debate", 0): 1.0}}


def test_rows_take_medians_but_the_worst_of_what_must_not_happen() -> None:
    (row,) = rows([measurement("rr", span, preemptions=float(span == 9.0)) for span in (3.0, 9.0, 4.0)])
    assert (row.makespan, row.makespan_low, row.makespan_high, row.preemptions) == (4.0, 3.0, 9.0, 1.0)


def test_quantile_and_balance() -> None:
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([1.0, 2.0], 0.95) == pytest.approx(1.95)
    assert math.isnan(quantile([], 0.5))
    assert balance([30.0, 10.0]) == 1.5
    assert balance([0.0, 0.0]) == 1.0


def test_compare_counts_replies_that_are_not_directs() -> None:
    group = [measurement("helium", 1.0), measurement("rr", 1.0)]
    compare({"helium": {("r", "a"): "x", ("r", "b"): "y"}, "rr": {("r", "a"): "x", ("r", "b"): "z"}}, group)
    assert [(m.outputs_differ, m.outputs_compared) for m in group] == [(1, 2), (0, 2)]


def test_order_rotates() -> None:
    assert [order("abc", turn)[0] for turn in range(4)] == ["a", "b", "c", "a"]


def test_metrics_are_summed_over_labels() -> None:
    scrape = parse_metrics(
        'vllm:prompt_tokens_total{engine="0"} 100\nvllm:prompt_tokens_total{engine="1"} 50\n'
        "vllm:prompt_tokens_cached_total 30\nvllm:num_requests_running 2\nvllm:num_requests_waiting 1\n"
        'vllm:cache_config_info{block_size="128",num_gpu_blocks="96"} 1\n'
    )
    assert scrape.counters.computed_tokens == 120
    assert (scrape.in_flight, scrape.block_size, scrape.num_blocks) == (3, 128, 96)


def test_systems_say_who_is_calling_each_in_its_own_way() -> None:
    call = Call("debate", "run-1", "opponent_2", ("proposer_1",), (), 8)
    ours: dict[str, Any] = {}
    tag(ours, call)
    assert ours["helium"] == {
        "workflow": "debate",
        "run": "run-1",
        "node": "opponent_2",
        "parents": ["proposer_1"],
    }
    theirs: dict[str, Any] = {}
    program(theirs, call)
    assert theirs["vllm_xargs"]["agentic_context"] == '{"program_id":"run-1"}'


def test_a_setting_can_be_added_to_ours_only() -> None:
    assert find("helium+LOG_LEVEL=debug").env == {"HELIUM_LOG_LEVEL": "debug"}
    with pytest.raises(ValueError, match="takes no settings"):
        find("rr+LOG_LEVEL=debug")
    with pytest.raises(ValueError, match="no system"):
        find("nobody")
