"""The scheduler's shortcuts change nothing: step by step it does what vLLM's loop, written out, does."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st

from helium_proxy.engine import EngineConfig, Profile, Request, Scheduler

from .reference import Ref, Reference

UNIT = Profile("unit", step_s=1.0)
SIZE = 4


@st.composite
def worlds(draw: st.DrawFn) -> tuple[EngineConfig, list[tuple[int, int, int, tuple[int, ...], int]]]:
    """A small engine and requests (arrival step, prompt, output, hashes, priority) that share prefixes."""
    blocks = draw(st.integers(8, 24))
    seqs = draw(st.integers(1, 6))
    config = EngineConfig(
        profile=UNIT,
        block_size=SIZE,
        num_blocks=blocks + 1,
        max_num_seqs=seqs,
        max_num_batched_tokens=draw(st.integers(max(seqs, 3), 40)),
        policy=draw(st.sampled_from(("fcfs", "priority"))),
    )
    requests = []
    for i in range(draw(st.integers(1, 14))):
        prompt = draw(st.integers(1, min(30, SIZE * blocks - 2)))
        output = draw(st.integers(1, min(20, SIZE * blocks - prompt)))
        shared = draw(st.integers(0, 5))
        family = draw(st.integers(0, 2))
        full = (prompt + output) // SIZE
        hashes = tuple(family * 100 + j if j < shared else 10_000 * (i + 1) + j for j in range(full))
        requests.append((draw(st.integers(0, 25)), prompt, output, hashes, draw(st.integers(0, 3))))
    return config, sorted(requests, key=lambda r: r[0])


def order(scheduler: Scheduler) -> list[int]:
    """The hashes in the order in which they would be evicted."""
    pool = scheduler.pool
    pool._compact()
    return [h for b in pool._queue if (h := pool._hash[b]) is not None]


@settings(max_examples=100, deadline=None)
@given(worlds())
def test_every_step_equals_the_reference(world: tuple[EngineConfig, list]) -> None:  # type: ignore[type-arg]
    config, arrivals = world
    ours = Scheduler(config)
    theirs = Reference(config.blocks, SIZE, config.seqs, config.batched_tokens, config.policy)
    requests = {}
    refs = {}
    pending = list(enumerate(arrivals))
    step = 0
    while True:
        while pending and pending[0][1][0] <= step:
            i, (at, prompt, output, hashes, priority) = pending.pop(0)
            requests[str(i)] = Request(str(i), prompt, output, hashes, priority=priority)
            ours.add(requests[str(i)], float(at))
            refs[str(i)] = Ref(str(i), prompt, output, hashes, priority, float(at), i)
            theirs.add(refs[str(i)])
        expected = theirs.step()
        end = ours.start(float(step), 1)
        assert (end is None) == (expected is None)
        if expected is not None:
            result = ours.finish()
            assert (result.prefill_tokens, result.decoding, [r.id for r in result.finished]) == expected
        assert ours.counters.preemptions == theirs.preemptions
        assert ours.pool.free == len(theirs.free)
        assert order(ours) == [h for b in theirs.free if (h := theirs.hash_of[b]) is not None]
        step += 1
        if expected is None and not pending:
            break
    for id, request in requests.items():
        assert request.state == "finished"
        assert request.cached_tokens == refs[id].cached
    assert ours.pool.free == ours.pool.capacity


JOINED = EngineConfig(profile=UNIT, block_size=SIZE, num_blocks=14, max_num_seqs=3, max_num_batched_tokens=23)


@settings(max_examples=60, deadline=None)
@given(worlds())
@example((JOINED, [(0, 1, 8, (0, 1), 0), (4, 16, 3, (7, 8, 9, 10), 0), (5, 29, 1, (0, 1, 2, 3, 4, 5, 6), 0)]))
def test_runs_of_steps_equal_single_steps(world: tuple[EngineConfig, list]) -> None:  # type: ignore[type-arg]
    config, arrivals = world  # arrivals never fall on the end of a step: what is first then is open

    def finished_at(most: int) -> dict[str, tuple[float | None, float | None, int, int]]:
        scheduler = Scheduler(config)
        pending = [
            (at + 0.01 * i, Request(str(i), prompt, output, hashes, priority=priority))
            for i, (at, prompt, output, hashes, priority) in enumerate(arrivals)
        ]
        requests = [r for _, r in pending]
        now = 0.0
        end: float | None = None
        while pending or end is not None:
            if pending and (end is None or pending[0][0] < end):
                now, request = pending.pop(0)
                scheduler.add(request, now)
                end = scheduler.start(now, most) if end is None else scheduler.cut(now)
                continue
            assert end is not None
            scheduler.finish()
            end = scheduler.start(end, most)
        return {r.id: (r.first_token_at, r.finished_at, r.cached_tokens, r.preemptions) for r in requests}

    assert finished_at(1 << 30) == finished_at(1)
