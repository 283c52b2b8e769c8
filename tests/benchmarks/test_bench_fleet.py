"""The simulator: prefixes are shared exactly where text would be, and a fleet's account balances."""

from __future__ import annotations

import random

import pytest

from benchmarks.fleet import Fleet, Prefix, System, trace
from benchmarks.workloads import SIZES, WORKLOADS
from helium_proxy.engine import EngineConfig

SIZE = SIZES["tiny"]
CONFIG = EngineConfig(profile="h100-8b", num_blocks=257, block_size=16, max_model_len=4096, policy="priority")


def expand(pieces: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(key, index) for key, length in pieces for index in range(length)]


@pytest.mark.parametrize("seed", range(20))
def test_chains_are_equal_exactly_where_the_tokens_are(seed: int) -> None:
    rng = random.Random(seed)

    def chain(pieces: list[tuple[int, int]]) -> tuple[int, ...]:
        cut = rng.randint(0, len(pieces))
        return Prefix((), (), 0).extend(pieces[:cut], 8).extend(pieces[cut:], 8).hashes

    lengths = {key: rng.randint(1, 30) for key in range(4)}
    first = [(key, lengths[key]) for key in rng.choices(range(4), k=6)]
    second = first[: rng.randint(0, 6)] + [(key, lengths[key]) for key in rng.choices(range(4), k=4)]
    one, two = expand(first), expand(second)
    assert len(chain(first)) == len(one) // 8
    same = 0
    while same < min(len(one), len(two)) and one[same] == two[same]:
        same += 1
    shared = sum(a == b for a, b in zip(chain(first), chain(second), strict=False))
    assert shared == same // 8


def test_trace_has_the_programs_calls_and_edges() -> None:
    nodes = trace(WORKLOADS["trading"], SIZE)
    by_name = {node.name: node for node in nodes}
    assert len(nodes) == 88
    assert [nodes[p].name for p in by_name["bull"].parents] == [
        "market_report",
        "social_report",
        "news_report",
        "fundamentals_report",
    ]
    assert by_name["decision"].hints.path_calls == 0
    assert by_name["market_report"].hints.path_calls == 8, "bull, bear, manager, trader, three rounds, decision"
    assert len({node.prompt[1].key for node in nodes}) == 19, "roles"


SYSTEMS: tuple[System, ...] = ("rr", "helium")


@pytest.mark.parametrize("system", ["rr", "affinity", "helium"])
def test_every_call_is_done_and_nothing_is_computed_twice_without_need(system: System) -> None:
    graph = trace(WORKLOADS["debate"], SIZE)
    result = Fleet(system, 2, CONFIG).simulate(graph, 20)
    assert (result.calls, result.runs) == (120, 20)
    assert result.computed_tokens >= result.fewest_tokens
    assert 1.0 <= result.balance <= 2.0
    again = Fleet(system, 2, CONFIG).simulate(graph, 20)
    assert (again.makespan, again.computed_tokens) == (result.makespan, result.computed_tokens)


def test_one_engine_that_holds_everything_computes_the_fewest() -> None:
    graph = trace(WORKLOADS["iterative"], SIZE)
    roomy = EngineConfig(profile="h100-8b", num_blocks=20_000, block_size=16, max_model_len=4096)
    result = Fleet("rr", 1, roomy).simulate(graph, 10)
    assert result.computed_tokens == result.fewest_tokens


def test_a_closed_loop_never_has_more_runs_than_asked_for() -> None:
    graph = trace(WORKLOADS["debate"], SIZE)
    two, all_at_once = (Fleet("rr", 2, CONFIG).simulate(graph, 12, concurrent=c) for c in (2, None))
    assert two.calls == all_at_once.calls == 72
    assert two.run_p50 < all_at_once.run_p50
    assert two.makespan > all_at_once.makespan


def test_think_time_and_arrivals_pass() -> None:
    graph = trace(WORKLOADS["debate"], SIZE)
    base = Fleet("helium", 2, CONFIG).simulate(graph, 8)
    slow = Fleet("helium", 2, CONFIG).simulate(graph, 8, think_s=5.0)
    spread = Fleet("helium", 2, CONFIG).simulate(graph, 8, rate=0.5)
    assert slow.run_p50 > base.run_p50
    assert spread.makespan > base.makespan
    assert spread.run_p50 <= base.run_p50


def test_answers_that_lag_do_not_send_their_successors_elsewhere() -> None:
    """The answers of one batch arrive one by one. Whoever then takes the worker to be busy, or slow, sends the next
    calls of the runs away from their prefixes."""
    graph = trace(WORKLOADS["reflection"], SIZES["small"])
    config = EngineConfig(profile="cpu-tiny", num_blocks=96, block_size=128, max_model_len=8192, policy="priority")
    shares = []
    for seed in range(1, 6):
        result = Fleet("helium", 2, config).simulate(graph, 10, think_s=0.02, lag_s=0.1, seed=seed)
        shares.append(result.computed_tokens / result.fewest_tokens)
    assert sum(shares) / len(shares) < 1.12


def test_large_caches_run_at_large_batches() -> None:
    """Whatever the policy holds back for prefixes must be worth it: with room for a hundred calls, hardly any is."""
    graph = trace(WORKLOADS["trading"], SIZES["P1"])
    config = EngineConfig(profile="h100-8b", num_blocks=2_001, block_size=64, policy="priority")
    rr, ours = (
        Fleet(system, 8, config, count_fewest=False).simulate(graph, 140, concurrent=125) for system in SYSTEMS
    )
    assert ours.computed_tokens < 0.6 * rr.computed_tokens
    assert ours.makespan < 0.77 * rr.makespan
