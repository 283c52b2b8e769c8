"""Coalescing, with an upstream that does nothing until told: every interleaving here is a chosen one."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import pytest

from helium_proxy.errors import UpstreamFailed
from helium_proxy.reuse import Answer, Coalescer, Seat

KEY = b"k" * 20


async def settle() -> None:
    """Let every task that can run do so."""
    for _ in range(20):
        await asyncio.sleep(0)


class Call:
    """One upstream call, driven by the test."""

    def __init__(self, status: int = 200) -> None:
        self.status = status
        self.opened = 0
        self.closed = 0
        self.cancelled = False
        self._head: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue: asyncio.Queue[bytes | BaseException | None] = asyncio.Queue()

    async def open(self) -> Answer:
        self.opened += 1
        try:
            await self._head
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        return Answer(self.status, {"x-call": str(id(self))}, self._chunks(), self._close)

    def answer(self, *chunks: bytes, end: bool = False) -> None:
        """Let the head come, and these chunks."""
        if not self._head.done():
            self._head.set_result(None)
        for chunk in chunks:
            self._queue.put_nowait(chunk)
        if end:
            self._queue.put_nowait(None)

    def fail(self, error: BaseException) -> None:
        """Fail: before the head if it has not come, else in the body."""
        if self._head.done():
            self._queue.put_nowait(error)
        else:
            self._head.set_exception(error)

    async def _chunks(self) -> AsyncIterator[bytes]:
        try:
            while (item := await self._queue.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        except asyncio.CancelledError:
            self.cancelled = True
            raise

    def _close(self) -> None:
        self.closed += 1


async def served(seat: Seat) -> tuple[int, bytes]:
    async with seat:
        head = await seat.head()
        return head.status, b"".join([chunk async for chunk in seat])


def client(coalescer: Coalescer, call: Call, key: bytes = KEY) -> tuple[Seat, asyncio.Task[tuple[int, bytes]]]:
    seat = coalescer.join(key, call.open)
    return seat, asyncio.create_task(served(seat))


def assert_empty(coalescer: Coalescer) -> None:
    statistics = coalescer.statistics()
    assert (statistics.in_flight, statistics.seats) == (0, 0)
    assert not coalescer._flights
    assert not coalescer._tasks


async def test_equal_calls_become_one_and_others_do_not() -> None:
    coalescer = Coalescer()
    first, second, other = Call(), Call(), Call()
    leader, a = client(coalescer, first)
    follower, b = client(coalescer, second)
    _, c = client(coalescer, other, key=b"other")
    assert (leader.leads, follower.leads) == (True, False)
    await settle()
    first.answer(b"hello", end=True)
    other.answer(b"bye", end=True)
    assert await asyncio.gather(a, b, c) == [(200, b"hello"), (200, b"hello"), (200, b"bye")]
    assert (first.opened, second.opened, other.opened) == (1, 0, 1)
    assert (first.closed, first.cancelled) == (1, False)
    statistics = coalescer.statistics()
    assert (statistics.led, statistics.joined, statistics.aborted) == (2, 1, 0)
    await settle()
    assert_empty(coalescer)


async def test_a_late_follower_gets_the_stream_from_its_beginning_as_it_arrives() -> None:
    coalescer = Coalescer()
    call = Call()
    _, leader = client(coalescer, call)
    call.answer(b"1", b"2")
    await settle()
    async with coalescer.join(KEY, Call().open) as seat:
        assert (await seat.head()).status == 200
        assert [await anext(seat.reader), await anext(seat.reader)] == [b"1", b"2"]
        call.answer(b"3")
        assert await anext(seat.reader) == b"3"
    call.answer(end=True)
    assert await leader == (200, b"123")
    await settle()
    assert_empty(coalescer)


async def test_after_the_end_an_equal_call_is_a_new_one() -> None:
    coalescer = Coalescer()
    one, two = Call(), Call()
    _, a = client(coalescer, one)
    one.answer(b"1", end=True)
    await a
    await settle()
    seat, b = client(coalescer, two)
    assert seat.leads
    two.answer(b"2", end=True)
    assert await b == (200, b"2")


@pytest.mark.parametrize("when", ["before the head", "in the body"])
async def test_the_leaders_disconnect_never_kills_its_followers(when: str) -> None:
    coalescer = Coalescer()
    call = Call()
    _, leader = client(coalescer, call)
    _, follower = client(coalescer, Call())
    if when == "in the body":
        call.answer(b"1")
    await settle()
    leader.cancel()
    await settle()
    assert leader.cancelled()
    assert not call.cancelled
    call.answer(b"2", end=True)
    assert await follower == (200, b"12" if when == "in the body" else b"2")
    assert (call.opened, call.closed) == (1, 1)
    assert coalescer.statistics().aborted == 0
    await settle()
    assert_empty(coalescer)


@pytest.mark.parametrize("when", ["before it began", "before the head", "in the body"])
async def test_the_last_to_leave_aborts_the_call(when: str) -> None:
    coalescer = Coalescer()
    call = Call()
    _, leader = client(coalescer, call)
    _, follower = client(coalescer, Call())
    if when != "before it began":
        await settle()
    if when == "in the body":
        call.answer(b"1")
        await settle()
    follower.cancel()
    if when != "before it began":
        await settle()
        assert not call.cancelled
    leader.cancel()
    if when == "before it began":
        for seat in list(coalescer._flights[KEY].seats):
            seat.leave()
    await settle()
    assert call.opened == (0 if when == "before it began" else 1)
    assert call.cancelled is (when != "before it began")
    assert call.closed == (1 if when == "in the body" else 0)
    assert coalescer.statistics().aborted == 1
    assert_empty(coalescer)


async def test_who_comes_after_an_abort_starts_anew_even_while_it_is_still_ending() -> None:
    coalescer = Coalescer()
    dying, fresh = Call(), Call()
    seat, leader = client(coalescer, dying)
    await settle()
    seat.leave()
    newcomer, task = client(coalescer, fresh)
    assert newcomer.leads
    fresh.answer(b"x", end=True)
    assert await task == (200, b"x")
    with pytest.raises(UpstreamFailed, match="aborted"):
        await leader
    await settle()
    assert_empty(coalescer)


async def test_leaving_twice_is_leaving_once() -> None:
    coalescer = Coalescer()
    call = Call()
    seat = coalescer.join(KEY, call.open)
    _, other = client(coalescer, Call())
    seat.leave()
    seat.leave()
    call.answer(b"x", end=True)
    assert await other == (200, b"x")


# -- failure


async def test_a_failure_before_the_first_byte_promotes_one_follower() -> None:
    coalescer = Coalescer()
    calls = [Call() for _ in range(4)]
    seats, tasks = zip(*(client(coalescer, call) for call in calls), strict=True)
    await settle()
    calls[0].fail(UpstreamFailed("worker died"))
    await settle()
    assert [call.opened for call in calls] == [1, 1, 0, 0]
    assert [seat.leads for seat in seats] == [True, True, False, False]
    calls[1].answer(b"ok", end=True)
    with pytest.raises(UpstreamFailed, match="worker died"):
        await tasks[0]
    assert await asyncio.gather(*tasks[1:]) == [(200, b"ok")] * 3
    statistics = coalescer.statistics()
    assert (statistics.promoted, statistics.failed) == (1, 1)
    await settle()
    assert_empty(coalescer)


async def test_a_head_without_a_first_byte_is_a_failure_too() -> None:
    coalescer = Coalescer()
    one, two = Call(), Call()
    _, a = client(coalescer, one)
    _, b = client(coalescer, two)
    one.answer()
    one.fail(ConnectionError("lost"))
    await settle()
    two.answer(b"ok", end=True)
    with pytest.raises(ConnectionError):
        await a
    assert await b == (200, b"ok")
    assert one.closed == 1


async def test_a_second_failure_is_everyones() -> None:
    coalescer = Coalescer()
    calls = [Call() for _ in range(3)]
    _, tasks = zip(*(client(coalescer, call) for call in calls), strict=True)
    await settle()
    calls[0].fail(UpstreamFailed("first"))
    await settle()
    calls[1].fail(UpstreamFailed("second"))
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [str(result) for result in results] == ["first", "second", "second"]
    assert calls[2].opened == 0
    await settle()
    assert_empty(coalescer)


async def test_a_5xx_answer_is_the_leaders_alone() -> None:
    coalescer = Coalescer()
    one, two = Call(status=503), Call()
    _, a = client(coalescer, one)
    _, b = client(coalescer, two)
    one.answer(b"busy", end=True)
    await settle()
    two.answer(b"ok", end=True)
    assert await asyncio.gather(a, b) == [(503, b"busy"), (200, b"ok")]


async def test_a_400_is_everyones_answer() -> None:
    coalescer = Coalescer()
    call = Call(status=400)
    tasks = [client(coalescer, call)[1] for _ in range(3)]
    call.answer(b"bad", end=True)
    assert await asyncio.gather(*tasks) == [(400, b"bad")] * 3
    assert call.opened == 1


async def test_a_failure_after_the_first_byte_reaches_all_after_what_came() -> None:
    coalescer = Coalescer()
    call = Call()
    seats = [coalescer.join(KEY, call.open) for _ in range(2)]
    call.answer(b"1")
    call.fail(ConnectionError("lost"))
    for seat in seats:
        async with seat:
            assert (await seat.head()).status == 200
            assert await anext(seat.reader) == b"1"
            with pytest.raises(ConnectionError):
                await anext(seat.reader)
    assert call.opened == 1, "no second call once bytes were out"
    await settle()
    assert_empty(coalescer)


async def test_when_the_leader_left_and_the_call_then_fails_a_follower_tries() -> None:
    coalescer = Coalescer()
    one, two = Call(status=503), Call()
    seat = coalescer.join(KEY, one.open)
    _, follower = client(coalescer, two)
    await settle()
    seat.leave()
    one.answer(b"busy", end=True)
    await settle()
    assert one.closed == 1
    two.answer(b"ok", end=True)
    assert await follower == (200, b"ok")
    await settle()
    assert_empty(coalescer)


async def test_a_promoted_follower_that_leaves_leaves_the_rest_their_answer() -> None:
    coalescer = Coalescer()
    calls = [Call() for _ in range(3)]
    seats, tasks = zip(*(client(coalescer, call) for call in calls), strict=True)
    await settle()
    calls[0].fail(UpstreamFailed("first"))
    await settle()
    seats[1].leave()
    calls[1].answer(b"ok", end=True)
    assert await tasks[2] == (200, b"ok")
    await asyncio.gather(*tasks[:2], return_exceptions=True)
    await settle()
    assert_empty(coalescer)


async def test_a_stream_beyond_the_window_takes_no_late_followers() -> None:
    coalescer = Coalescer(window_bytes=10)
    call, fresh = Call(), Call()
    _, leader = client(coalescer, call)
    call.answer(b"x" * 8, b"y" * 8)
    await settle()
    seat, task = client(coalescer, fresh)
    assert seat.leads
    call.answer(end=True)
    fresh.answer(b"z", end=True)
    assert await leader == (200, b"x" * 8 + b"y" * 8)
    assert await task == (200, b"z")
    await settle()
    assert_empty(coalescer)


async def test_closing_aborts_what_is_in_flight_and_tells_who_waits() -> None:
    coalescer = Coalescer()
    call = Call()
    _, waiting = client(coalescer, call)
    await settle()
    await coalescer.aclose()
    assert call.cancelled
    with pytest.raises(UpstreamFailed, match="aborted"):
        await waiting
    assert_empty(coalescer)


async def test_an_upstream_that_fails_to_close_harms_nobody() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        try:
            yield b"x"
            await asyncio.Event().wait()
        finally:
            raise OSError("close failed")

    async def open() -> Answer:
        return Answer(200, {}, chunks())

    coalescer = Coalescer()
    async with coalescer.join(KEY, open) as seat:
        await seat.head()
        assert await anext(aiter(seat)) == b"x"
    await settle()
    assert_empty(coalescer)


async def test_what_nobody_reads_any_more_is_closed_even_if_closing_fails() -> None:
    """The leader left, its call then answers 503, a follower tries again: the 503's body is given up unread."""
    closed: list[str] = []
    ready = asyncio.Event()

    async def chunks() -> AsyncIterator[bytes]:
        try:
            yield b"busy"
            yield b"never read"
        finally:
            raise OSError("close failed")

    async def open() -> Answer:
        await ready.wait()
        return Answer(503, {}, chunks(), lambda: closed.append("busy"))

    coalescer = Coalescer()
    second = Call()
    leader = coalescer.join(KEY, open)
    _, follower = client(coalescer, second)
    await settle()
    leader.leave()
    ready.set()
    await settle()
    assert closed == ["busy"]
    second.answer(b"ok", end=True)
    assert await follower == (200, b"ok")
    await settle()
    assert_empty(coalescer)


@pytest.mark.parametrize("seed", range(30))
async def test_no_interleaving_leaks(seed: int) -> None:
    """Random joins, departures, answers and failures of a few keys: afterwards nothing is left, and every client
    that stayed has a whole answer or an error."""
    chance = random.Random(seed)
    coalescer = Coalescer(window_bytes=64)
    calls: list[Call] = []
    tasks: list[asyncio.Task[tuple[int, bytes]]] = []
    left: set[int] = set()
    for _ in range(60):
        match chance.randrange(5):
            case 0 | 1:
                calls.append(Call(status=chance.choice([200, 200, 200, 503])))
                tasks.append(client(coalescer, calls[-1], key=b"%d" % chance.randrange(3))[1])
            case 2 if tasks:
                victim = chance.randrange(len(tasks))
                left.add(victim)
                tasks[victim].cancel()
            case 3 if calls:
                chance.choice(calls).answer(b"x" * chance.randrange(40), end=chance.random() < 0.3)
            case 4 if calls:
                call = chance.choice(calls)
                if call._head.done() or call.opened:
                    call.fail(UpstreamFailed("chosen"))
        for _ in range(chance.randrange(6)):
            await asyncio.sleep(0)
    for call in calls:
        call.answer(b"end", end=True)
    async with asyncio.timeout(5):
        results = await asyncio.gather(*tasks, return_exceptions=True)
    for index, result in enumerate(results):
        if isinstance(result, BaseException):
            assert isinstance(result, UpstreamFailed) or (
                isinstance(result, asyncio.CancelledError) and index in left
            ), result
    await settle()
    assert_empty(coalescer)
    for call in calls:
        assert call.opened <= 1
        assert call.closed <= call.opened
