"""What a call must not cost: a second write for its head, work for the garbage collector."""

from __future__ import annotations

import asyncio
import gc
from typing import cast

from serving import Stack, until

from helium_proxy import metrics
from helium_proxy.gateway.http import Watch
from helium_proxy.gateway.protocol import _HeldHead
from helium_proxy.gateway.ticket import Ticket
from helium_proxy.reuse import Seat


class Wire:
    """A transport that notes what is written to it."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []
        self.closed = False

    def write(self, data: bytes) -> None:
        self.writes.append(data)

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed


def held(wire: Wire) -> _HeldHead:
    return _HeldHead(cast(asyncio.Transport, wire), asyncio.get_running_loop())


async def test_head_and_body_leave_in_one_write() -> None:
    wire = Wire()
    answer = held(wire)
    answer.write(b"head ")
    assert wire.writes == []
    answer.write(b"body")
    answer.write(b"more")
    await asyncio.sleep(0)
    assert wire.writes == [b"head body", b"more"]


async def test_a_head_whose_body_is_late_goes_ahead() -> None:
    wire = Wire()
    answer = held(wire)
    answer.write(b"head")
    await asyncio.sleep(0)
    assert wire.writes == [b"head"]
    answer.write(b"body")
    assert wire.writes == [b"head", b"body"]


async def test_closing_keeps_no_head_back() -> None:
    wire = Wire()
    answer = held(wire)
    answer.write(b"head")
    answer.close()
    assert wire.writes == [b"head"]
    assert wire.closed
    assert answer.is_closing()


async def test_answered_calls_leave_nothing_to_the_garbage_collector(stack: Stack) -> None:
    proxy = await stack.proxy(await stack.fake())
    await proxy.chat("first", temperature=0)
    gc.collect()
    gc.disable()
    try:
        for number in range(6):
            await proxy.chat(f"call {number}", temperature=number % 2, stream=number > 2)
        await until(lambda: proxy.services.in_flight == 0)
        await asyncio.sleep(0.05)
        left = [type(o).__name__ for o in gc.get_objects() if isinstance(o, Watch | Seat | Ticket)]
    finally:
        gc.enable()
    assert left == []


def test_a_removed_child_of_a_metric_starts_anew() -> None:
    metrics.UPSTREAM_SECONDS.labels("cost:1").observe(0.3)
    metrics.BREAKER_OPENS.labels("cost:1").inc()
    assert metrics.BREAKER_OPENS.labels("cost:1") is metrics.BREAKER_OPENS.labels("cost:1")
    metrics.forget_worker("cost:1")
    assert b"cost:1" not in metrics.render()[0]
    metrics.BREAKER_OPENS.labels("cost:1").inc(2)
    assert b'helium_breaker_opens_total{worker="cost:1"} 2.0' in metrics.render()[0]
    metrics.forget_worker("cost:1")


def test_values_fall_into_the_buckets_they_are_in_at_most() -> None:
    for value in (0.001, 0.0011, 0.005, 1_000.0):
        metrics.UPSTREAM_SECONDS.labels("cost:2").observe(value)
    lines = metrics.render()[0].decode().splitlines()
    counts = {
        line.split('le="')[1].split('"')[0]: line.split()[-1] for line in lines if 'le="' in line and "cost:2" in line
    }
    metrics.forget_worker("cost:2")
    assert (counts["0.001"], counts["0.005"], counts["300.0"], counts["+Inf"]) == ("1.0", "3.0", "3.0", "4.0")
