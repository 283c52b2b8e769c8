"""Recorded calls, as the embedded engine's scheduler is to replay them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from benchmarks.harness import Harness
from benchmarks.replay import _jobs
from benchmarks.workloads import Call


async def test_calls_wait_for_their_parents_in_their_own_run() -> None:
    async def tokenize(session: object, **body: Any) -> list[int]:
        assert body["add_generation_prompt"]
        return [len(message["content"]) for message in body["messages"]]

    harness = cast(Harness, SimpleNamespace(session=None, engines=SimpleNamespace(tokenize=tokenize)))
    ask = [{"role": "user", "content": "four"}, {"role": "user", "content": "seven.."}]
    calls = [
        Call("w", "one", "a", (), tuple(ask), 8),
        Call("w", "two", "a", (), tuple(ask[:1]), 8),
        Call("w", "two", "b", ("a",), tuple(ask), 16),
        Call("w", "one", "b", ("a",), tuple(ask), 16),
    ]
    jobs = await _jobs(harness, calls)
    assert [job.after for job in jobs] == [(), (), (1,), (0,)]
    assert [job.output for job in jobs] == [8, 8, 16, 16]
    assert [job.prompt for job in jobs] == [[4, 7], [4], [4, 7], [4, 7]]
