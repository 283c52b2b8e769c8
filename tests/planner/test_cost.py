"""The paper's formulas, the prefix cache and the forecast in seconds."""

from __future__ import annotations

from typing import Any

import pytest

from helium_proxy.planner.cost import (
    PlanWorker,
    PrefixLru,
    decode_usage,
    forecast,
    precedence_delay,
    token_usage,
)
from helium_proxy.planner.graph import expand
from helium_proxy.planner.plan import parse_plan
from helium_proxy.planner.settings import PlanSettings
from helium_proxy.planner.trie import TemplatedRadixTree, build_trie


def tree_of(*prompts: str, length: int = 10) -> TemplatedRadixTree:
    nodes = [{"id": f"n{i}", "prompt": prompt} for i, prompt in enumerate(prompts)]
    raw: dict[str, Any] = {"model": "m", "nodes": nodes, "params": {"max_tokens": length}}
    return build_trie(expand(parse_plan(raw), PlanSettings()), lambda text, model: len(text))


def test_formulas() -> None:
    assert decode_usage(64) == 64 * 65 / 2
    assert token_usage(64, 100, 1_000) == (64 * 100 + 2_080) / 1_000
    assert precedence_delay(64) == 64


def test_worker_checks_itself() -> None:
    assert PlanWorker("w").serves("anything")
    assert not PlanWorker("w", models=frozenset({"a"})).serves("b")
    with pytest.raises(AssertionError):
        PlanWorker("w", kv_tokens=0)


def test_prefix_cache_computes_only_what_is_not_resident() -> None:
    tree = tree_of("a" * 100 + "x", "a" * 100 + "y", "b" * 100)
    cache = PrefixLru(1_000)
    assert [cache.admit(tree, i) for i in (0, 1, 2, 0)] == [101, 1, 100, 0]
    assert cache.used == 100 + (1 + 10) * 2 + 110


def test_prefix_cache_evicts_the_least_recently_used_tail_first() -> None:
    tree = tree_of("a" * 100 + "x", "a" * 100 + "y", "b" * 100)
    cache = PrefixLru(215)
    cache.admit(tree, 0)
    cache.admit(tree, 2)  # 111 + 110 tokens: the oldest to go is the end of the first path, its output and "x"
    assert cache.used <= 215
    assert cache.admit(tree, 1) == 1, "the shared prefix is still there"
    assert cache.admit(tree, 2) == 0, "what went in its place are the outputs"
    assert PrefixLru(50).admit(tree, 0) == 101


def test_forecast_serialises_prefill_and_overlaps_decode() -> None:
    tree = tree_of("a" * 100, "b" * 100)
    worker = PlanWorker("w", prefill_tokens_s=100, decode_step_s=0.1)
    found = forecast(tree, [worker], [0, 1], {0: 0, 1: 0}, {0: (), 1: ()})
    assert found.started == {0: 0, 1: 1}
    assert found.finished == {0: 2, 1: 3}
    assert found.makespan_s == 3
    assert found.computed_tokens == 200


def test_forecast_waits_for_inputs_and_for_room() -> None:
    tree = tree_of("a" * 100, "b" * 100)
    worker = PlanWorker("w", prefill_tokens_s=100, decode_step_s=0.1, max_seqs=1)
    assert forecast(tree, [worker], [0, 1], {0: 0, 1: 0}, {0: (), 1: ()}).started[1] == 2
    two = [PlanWorker("w", prefill_tokens_s=100, decode_step_s=0.1), PlanWorker("v", prefill_tokens_s=100)]
    assert forecast(tree, two, [0, 1], {0: 0, 1: 1}, {0: (), 1: ()}).started[1] == 0
    assert forecast(tree, two, [0, 1], {0: 0, 1: 1}, {0: (), 1: (0,)}).started[1] == 2
    small = [PlanWorker("w", kv_tokens=150, prefill_tokens_s=100, decode_step_s=0.1)]
    assert forecast(tree, small, [0, 1], {0: 0, 1: 0}, {0: (), 1: ()}).started[1] == 2
