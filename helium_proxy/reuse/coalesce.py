"""Equal calls in flight become one: common subgraph elimination (arXiv 2603.16104), across live requests.

Everyone who asks takes a `Seat`; the first is the *leader* and its `open` makes the upstream call. The call runs in a
task that belongs to nobody's request: a leader that disconnects leaves its followers their answer, and only when the
last seat is left is the call cancelled (which aborts it at the engine). A follower gets the answer from its beginning
as it arrives. A call that fails before its first byte promotes one follower to try again with its own `open`, the
others follow it; the leader keeps the failure.

Prior art: Go's singleflight (no streams, no departures) and the request collapsing of HTTP caches, where one failure
fails all. Not supported on purpose: coalescing across replicas.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import structlog

from helium_proxy.errors import UpstreamFailed
from helium_proxy.reuse.shared import Reader, SharedStream

_WORTH_A_RETRY = frozenset({408, 429, 500, 502, 503, 504})


log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Answer:
    """An upstream answer whose head has arrived. `content` is its body, or the chunks of a body that is still coming.
    `close` is called once, when it was read or is given up."""

    status: int
    headers: Mapping[str, str]
    content: bytes | AsyncIterator[bytes]
    close: Callable[[], None] | None = None


@dataclass(frozen=True, slots=True)
class Head:
    """Status and headers of an answer (names as upstream sent them)."""

    status: int
    headers: Mapping[str, str]
    body: bytes | None = None
    """All of it, if it came at once: then there are no chunks to read."""


Open = Callable[[], Awaitable[Answer]]
"""Makes the upstream call. It outlives the request it was made for and may be cancelled at any await."""


@dataclass(frozen=True, slots=True)
class CoalesceStatistics:
    in_flight: int
    """Calls upstream now."""
    seats: int
    """Requests served by them."""
    led: int
    joined: int
    promoted: int
    aborted: int
    """Calls cancelled because nobody waited any more."""
    failed: int
    """Calls that failed before their first byte."""


class Coalescer:
    """The table of calls in flight. Use it from one event loop."""

    def __init__(self, window_bytes: int = 8 * 1024 * 1024, promotions: int = 1) -> None:
        self._window = window_bytes
        self._promotions = promotions
        # State. `_flights`: calls that may be joined, by key. `_tasks`: every pump that has not ended, with its
        # flight (a flight that can no longer be joined is in `_tasks` only).
        self._flights: dict[bytes, _Flight] = {}
        self._tasks: dict[asyncio.Task[None], _Flight] = {}
        self._led = self._joined = self._promoted = self._aborted = self._failed = 0

    def __repr__(self) -> str:
        return f"Coalescer({len(self._tasks)} in flight, {self._led} led, {self._joined} joined)"

    def join(self, key: bytes, open: Open) -> Seat:
        """Take a seat in the call of `key`, starting it if there is none. Use the seat as a context manager."""
        flight = self._flights.get(key)
        if flight is not None and flight.joinable:
            self._joined += 1
            return Seat(self, flight, open)
        self._led += 1
        return self._launch(key, open, self._promotions)

    def statistics(self) -> CoalesceStatistics:
        return CoalesceStatistics(
            in_flight=len(self._tasks),
            seats=sum(len(flight.seats) for flight in self._tasks.values()),
            led=self._led,
            joined=self._joined,
            promoted=self._promoted,
            aborted=self._aborted,
            failed=self._failed,
        )

    async def aclose(self) -> None:
        """Abort every call and wait until all are gone."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- the table: synchronous, no I/O

    def _launch(self, key: bytes, open: Open, promotions: int) -> Seat:
        flight = _Flight(key, promotions)
        seat = Seat(self, flight, open)
        self._start(flight, seat)
        return seat

    def _start(self, flight: _Flight, leader: Seat) -> None:
        flight.leader = leader
        leader.leads = True
        self._flights[flight.key] = flight
        flight.task = asyncio.create_task(self._pump(flight, leader.open), name="helium-coalesced-call")
        self._tasks[flight.task] = flight
        flight.task.add_done_callback(self._tasks.pop)

    def _leave(self, seat: Seat) -> None:
        flight = seat.flight
        if seat not in flight.seats:
            return
        flight.seats.remove(seat)
        seat.stop_reading()
        if not flight.seats and not flight.over:
            self._aborted += 1
            self._retire(flight)
            assert flight.task is not None
            flight.task.cancel()

    def _retire(self, flight: _Flight) -> None:
        if self._flights.get(flight.key) is flight:
            del self._flights[flight.key]

    def _promote(self, flight: _Flight) -> bool:
        """Move the followers of a failed call to a new one that the first of them leads. False: there is none to
        move, or the call was tried often enough."""
        followers = [seat for seat in flight.seats if seat is not flight.leader]
        if not followers or flight.promotions == 0:
            return False
        successor = _Flight(flight.key, flight.promotions - 1)
        flight.seats = [seat for seat in flight.seats if seat is flight.leader]
        for seat in followers:
            seat.move(successor)
        self._promoted += 1
        self._start(successor, followers[0])
        flight.settled.set()  # they wait on it, and will find themselves elsewhere
        return True

    # -- the call

    async def _pump(self, flight: _Flight, open: Open) -> None:
        answer: Answer | None = None
        try:
            try:
                answer = await open()
                content = answer.content
                first = content if isinstance(content, bytes) else await anext(content, b"")
            except Exception as error:
                self._failed += 1
                self._retire(flight)
                self._promote(flight)
                flight.finish(error)
                return
            if answer.status in _WORTH_A_RETRY:
                self._failed += 1
                self._retire(flight)
                self._promote(flight)
                if not flight.seats:  # the leader is gone and its followers try again
                    flight.finish(UpstreamFailed("nobody waits"))
                    return
            if isinstance(content, bytes):
                flight.head = Head(answer.status, answer.headers, content)
                flight.finish(None)
                return
            flight.head = Head(answer.status, answer.headers)
            stream = flight.begin_stream(self._window)
            flight.settled.set()
            try:
                await stream.write(first)
                async for chunk in content:
                    await stream.write(chunk)
            except Exception as error:
                flight.finish(error)
            else:
                flight.finish(None)
        except asyncio.CancelledError:
            flight.finish(UpstreamFailed("the call was aborted"))
            raise
        finally:
            self._retire(flight)
            flight.leader = None  # or the two hold each other until the garbage collector comes
            if answer is not None:
                await _close(answer)


class _Flight:
    """One upstream call and those who wait for it."""

    def __init__(self, key: bytes, promotions: int) -> None:
        self.key = key
        self.promotions = promotions
        # State. `settled` is set when `head` or `error` is known. `leader` may have left its seat already. `stream`
        # is there from the first byte on, if the answer comes in chunks.
        self.seats: list[Seat] = []
        self.stream: SharedStream | None = None
        self.leader: Seat | None = None
        self.task: asyncio.Task[None] | None = None
        self.settled = asyncio.Event()
        self.head: Head | None = None
        self.error: Exception | None = None
        self.over = False

    def finish(self, error: Exception | None) -> None:
        self.over = True
        if self.head is None:
            self.error = error
        if self.stream is not None:
            self.stream.end(error)
        self.settled.set()

    @property
    def joinable(self) -> bool:
        """Whether a newcomer would miss nothing."""
        return self.stream is None or self.stream.whole

    def begin_stream(self, window: int) -> SharedStream:
        """Everybody reads it from its beginning."""
        self.stream = SharedStream(window)
        for seat in self.seats:
            seat.reader = self.stream.reader()
        return self.stream


class Seat:
    """One request's place in a call: first `head`, then the chunks, from the beginning, unless the head has the body.

    ::

        async with coalescer.join(key, open) as seat:
            head = await seat.head()
            async for chunk in seat:
                ...
    """

    def __init__(self, coalescer: Coalescer, flight: _Flight, open: Open) -> None:
        self._coalescer = coalescer
        self.open = open
        # State. `leads` turns True on promotion; `flight` and `reader` change then.
        self.leads = False
        self.flight = flight
        self.reader: Reader | None = None
        self.move(flight)

    def __repr__(self) -> str:
        return f"Seat({'leader' if self.leads else 'follower'} of {self.flight.key.hex()[:8]})"

    async def head(self) -> Head:
        """Status and headers, once the first byte has come. Raises what the leader's `open` raised."""
        while True:
            flight = self.flight
            await flight.settled.wait()
            if self.flight is not flight:
                continue
            if flight.error is not None:
                raise flight.error
            assert flight.head is not None
            return flight.head

    def __aiter__(self) -> AsyncIterator[bytes]:
        assert self.reader is not None, "the head has not come, or has the body"
        return self.reader

    def leave(self) -> None:
        """Give up the seat; the last to leave aborts the call. Never suspends, may be called twice."""
        self._coalescer._leave(self)

    def move(self, flight: _Flight) -> None:
        self.stop_reading()
        self.flight = flight
        self.reader = flight.stream.reader() if flight.stream is not None else None
        flight.seats.append(self)

    def stop_reading(self) -> None:
        if self.reader is not None:
            self.reader.leave()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()


async def _close(answer: Answer) -> None:
    try:
        aclose = getattr(answer.content, "aclose", None)
        if aclose is not None:
            await aclose()
    except Exception as error:  # the answer is over either way
        log.warning("closing an upstream answer failed", error=repr(error))
    finally:
        if answer.close is not None:
            answer.close()
