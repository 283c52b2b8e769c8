"""What vLLM's scheduling does to callers, case by case, on an engine whose every step takes one second."""

from __future__ import annotations

import pytest

from helium_proxy.engine import EngineConfig, Profile, Request, Scheduler, StepResult

UNIT = Profile("unit", step_s=1.0)
SIZE = 4


def make(blocks: int = 32, **settings: object) -> Scheduler:
    settings = {"max_num_seqs": 8, "max_num_batched_tokens": 64, **settings}
    return Scheduler(EngineConfig(profile=UNIT, block_size=SIZE, num_blocks=blocks + 1, **settings))  # type: ignore[arg-type]


def request(
    id: str, prompt: int, output: int = 1, *, prefix: int = 0, family: str = "f", priority: int = 0
) -> Request:
    """A request whose first `prefix` tokens are those of its `family`; the rest is its own."""
    own = (prompt + output) // SIZE - prefix // SIZE
    hashes = [hash((family, i)) for i in range(prefix // SIZE)] + [hash((id, i)) for i in range(own)]
    return Request(id, prompt, output, hashes, priority=priority)


def step(scheduler: Scheduler, now: float, most: int = 1) -> StepResult:
    assert scheduler.start(now, most) is not None
    return scheduler.finish()


def drain(scheduler: Scheduler, now: float = 0.0) -> float:
    while (end := scheduler.start(now)) is not None:
        scheduler.finish()
        now = end
    return now


def test_a_prefix_being_prefilled_is_shared_in_the_same_step() -> None:
    s = make()
    a, b = request("a", 18, 4, prefix=16), request("b", 17, 4, prefix=16)
    s.add(a, 0.0)
    s.add(b, 0.0)
    assert step(s, 0.0).prefill_tokens == 18 + 1
    assert (a.cached_tokens, b.cached_tokens) == (0, 16)
    assert a.blocks[:4] == b.blocks[:4]


def test_an_exact_multiple_recomputes_its_last_block() -> None:
    s = make()
    for id, prompt, cached in (("a", 16, 0), ("b", 16, 12), ("c", 17, 16)):
        r = request(id, prompt, prefix=16)
        s.add(r, 0.0)
        drain(s)
        assert r.cached_tokens == cached


def test_a_tail_shorter_than_a_block_is_never_cached() -> None:
    s = make()
    s.add(Request("a", 7, 1, (1, 2)), 0.0)
    drain(s)
    again = Request("b", 7, 1, (1, 2))
    s.add(again, 0.0)
    drain(s)
    assert again.cached_tokens == 4


def test_replies_are_cached_but_for_their_last_token() -> None:
    s = make()
    s.add(Request("a", 4, 9, (1, 2, 3)), 0.0)  # 13 tokens; the KV of the last is never computed
    drain(s)
    follow = Request("b", 14, 1, (1, 2, 3))
    s.add(follow, 0.0)
    drain(s)
    assert follow.cached_tokens == 12
    s = make()
    s.add(Request("a", 4, 8, (1, 2, 3)), 0.0)  # now the third block lacks that very token
    drain(s)
    follow = Request("b", 14, 1, (1, 2, 3))
    s.add(follow, 0.0)
    drain(s)
    assert follow.cached_tokens == 8


def test_tails_are_evicted_before_heads_and_old_requests_before_new() -> None:
    s = make(blocks=8)
    for id in ("a", "b"):
        s.add(request(id, 16, prefix=16, family=id), 0.0)
        drain(s)
    s.add(request("x", 8), 0.0)  # takes two blocks: the tail of a
    drain(s)
    for id, cached in (("a", 8), ("b", 12)):
        again = request(id + "2", 17, prefix=16, family=id)
        assert len(s.pool.lookup(again.hashes, 4)) * SIZE == cached + (4 if id == "b" else 0)


def test_a_hit_makes_a_prefix_young_again() -> None:
    s = make(blocks=8)
    for id in ("a", "b", "a"):
        s.add(request(f"{id}{s.counters.steps}", 17, prefix=12, family=id), 0.0)
        drain(s)
    s.add(request("x", 16), 0.0)
    drain(s)
    assert len(s.pool.lookup(request("p", 16, prefix=12, family="a").hashes, 3)) == 3
    assert len(s.pool.lookup(request("q", 16, prefix=12, family="b").hashes, 3)) < 3


def test_chunked_prefill_keeps_to_the_token_budget_and_decoding_goes_first() -> None:
    s = make(max_num_batched_tokens=10)
    s.add(request("a", 3, 9), 0.0)
    s.add(request("b", 20, 2), 0.0)
    first = step(s, 0.0)
    assert (first.prefill_tokens, first.decoding) == (10, 0)  # a's 3, and 7 of b
    second = step(s, 1.0)
    assert (second.prefill_tokens, second.decoding) == (9, 1)
    third = step(s, 2.0)
    assert (third.prefill_tokens, third.decoding, [r.id for r in third.first]) == (4, 1, ["b"])
    assert [r.id for r in step(s, 3.0).finished] == ["b"]


def test_no_more_sequences_than_max_num_seqs() -> None:
    s = make(max_num_seqs=2)
    for id in "abc":
        s.add(request(id, 4, 3), 0.0)
    step(s, 0.0)
    assert (s.statistics().running, s.statistics().waiting) == (2, 1)
    assert drain(s, 1.0) == 6.0


def test_a_waiting_request_that_does_not_fit_blocks_those_behind_it() -> None:
    s = make(blocks=8)
    s.add(request("a", 20, 8), 0.0)
    step(s, 0.0)
    s.add(request("big", 20), 1.0)
    s.add(request("small", 2), 1.5)
    result = step(s, 2.0)
    assert result.prefill_tokens == 0
    assert s.statistics().waiting == 2


@pytest.mark.parametrize(("policy", "first"), [("fcfs", "early"), ("priority", "urgent")])
def test_the_policy_orders_what_waits(policy: str, first: str) -> None:
    s = make(max_num_seqs=1, policy=policy)
    s.add(request("early", 4, priority=5), 0.0)
    s.add(request("urgent", 4, priority=-1), 1.0)
    assert [r.id for r in step(s, 2.0).finished] == [first]


@pytest.mark.parametrize(("policy", "victim"), [("fcfs", "b"), ("priority", "a")])
def test_without_blocks_a_request_is_preempted_and_recomputed(policy: str, victim: str) -> None:
    s = make(blocks=4, policy=policy)
    a, b = request("a", 7, 8, priority=1), request("b", 7, 8)
    s.add(a, 0.0)
    s.add(b, 0.5)
    drain(s, 1.0)
    lost = {"a": a, "b": b}[victim]
    kept = b if lost is a else a
    assert (lost.preemptions, kept.preemptions) == (1, 0)
    assert (lost.state, s.generated(lost)) == ("finished", 8)
    assert lost.finished_at is not None
    assert kept.finished_at is not None
    assert lost.finished_at > kept.finished_at
    assert s.counters.generation_tokens == 16
    assert s.counters.computed_tokens > 14
    assert s.counters.prompt_tokens == 14
    assert s.pool.free == s.pool.capacity


def test_abort_frees_blocks_at_the_end_of_the_step() -> None:
    s = make()
    s.add(request("a", 12, 50), 0.0)
    s.add(request("w", 12, 2), 0.0)
    assert s.start(0.0) is not None
    assert s.abort("a")
    assert s.pool.free < s.pool.capacity
    s.finish()
    assert s.statistics().running == 1
    assert s.abort("w")
    assert s.idle
    assert s.pool.free == s.pool.capacity
    assert not s.abort("a")
    assert s.start(1.0) is None


@pytest.mark.parametrize(("at", "ticks"), [(10.0, 1), (15.4, 1), (15.6, 2), (23.4, 3), (1e9, 19)])
def test_a_run_of_steps_is_cut_at_the_step_in_progress(at: float, ticks: int) -> None:
    growing = Profile("growing", step_s=3.0, context_token_s=0.5)  # contexts of 5, 6, 7 ... tokens
    s = Scheduler(EngineConfig(profile=growing, block_size=SIZE, num_blocks=33))
    s.add(request("a", 4, 20), 0.0)
    step(s, 0.0)
    assert s.start(10.0) == pytest.approx(10.0 + 19 * 5.5 + 0.5 * (18 * 19 / 2))
    assert s.cut(at) == pytest.approx(10.0 + ticks * 5.5 + 0.5 * (ticks - 1) * ticks / 2)
    assert s.finish().ticks == ticks


def test_requests_that_can_never_run_are_refused() -> None:
    s = make(blocks=4)
    for bad in (Request("a", 0, 1), Request("b", 1, 0), Request("c", 16, 1)):
        with pytest.raises(ValueError, match="request"):
            s.add(bad, 0.0)
    s.add(Request("d", 15, 1), 0.0)
    with pytest.raises(ValueError, match="already"):
        s.add(Request("d", 15, 1), 0.0)


def test_prompt_logprobs_skip_the_cache() -> None:
    s = make()
    for id, read in (("a", True), ("b", False), ("c", True)):
        r = Request(id, 9, 1, (1, 2), read_cache=read)
        s.add(r, 0.0)
        drain(s)
        assert r.cached_tokens == (8 if id == "c" else 0)


def test_the_cache_can_only_be_reset_when_nothing_runs() -> None:
    s = make()
    s.add(request("a", 9, 3, prefix=8), 0.0)
    step(s, 0.0)
    assert not s.reset_prefix_cache()
    drain(s, 1.0)
    assert s.reset_prefix_cache()
    assert s.pool.statistics().cached == 0


def test_tables_stay_bounded_over_many_requests() -> None:
    s = make(blocks=16)
    for i in range(3000):
        s.add(request(str(i), 9, 40), float(i))
        s.start(float(i), 1)
        s.finish()
        s.abort(str(i))
    assert s.idle
    assert len(s._finishing) <= 128
    assert len(s.pool._queue) <= 2 * s.pool.capacity + 64
    assert s.pool.statistics().cached <= 16
    assert sum(map(len, s._due)) == 0
