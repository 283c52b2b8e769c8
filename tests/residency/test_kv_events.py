"""The subscriber against a real ZMQ publisher that speaks vLLM's format; `tests/vllm` has the real engine."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio

from helium_proxy.residency.kv_book import BlockView, Cleared, Event, Removed, Stored
from helium_proxy.residency.kv_events import EventSource, KvEventSubscriber, event_sources

BLOCK = 4
TOPIC = "kv-events"


@pytest.mark.parametrize(
    ("document", "url", "expected"),
    [
        ({}, "http://w:8000", ()),
        (None, "http://w:8000", ()),
        ({"detail": "Not Found"}, "http://w:8000", ()),
        (
            {"0": {"publisher": "zmq", "endpoint": "tcp://*:5501", "replay_endpoint": "tcp://*:5601", "topic": "t"}},
            "http://w:8000/v1",
            (EventSource(0, "tcp://w:5501", "tcp://w:5601", "t"),),
        ),
        (
            {"1": {"endpoint": "tcp://10.0.0.7:5502"}, "0": {"endpoint": "ipc:///run/kv", "replay_endpoint": None}},
            "http://w:8000",
            (EventSource(0, "ipc:///run/kv", None, ""), EventSource(1, "tcp://10.0.0.7:5502", None, "")),
        ),
        ({"0": {"endpoint": "tcp://[::]:5501"}}, "http://[::1]:80", (EventSource(0, "tcp://[::1]:5501", None, ""),)),
        ({"0": {"publisher": "null", "endpoint": "tcp://*:1"}, "x": 1, "2": 3}, "http://w", ()),
    ],
)
def test_discovery(document: Any, url: str, expected: tuple[EventSource, ...]) -> None:
    assert event_sources(document, url) == expected


class Publisher:
    """vLLM's `ZmqEventPublisher` without its thread: PUB, ROUTER and a replay buffer of `keep` batches."""

    def __init__(self, keep: int = 10_000) -> None:
        self._keep = keep
        self._context = zmq.asyncio.Context()
        self._buffer: list[tuple[int, bytes]] = []
        self._next = 0
        self.life = 0.0
        self.replays = 0
        self.mute = False
        self._server: asyncio.Task[None] | None = None

    async def bind(self, pub_port: int = 0, replay_port: int = 0) -> EventSource:
        self._pub = self._context.socket(zmq.PUB)
        self._router = self._context.socket(zmq.ROUTER)
        for socket, port in ((self._pub, pub_port), (self._router, replay_port)):
            socket.setsockopt(zmq.LINGER, 0)
            await _bind(socket, f"tcp://127.0.0.1:{port or '*'}")
        self._server = asyncio.create_task(self._serve())
        pub, router = (s.getsockopt_string(zmq.LAST_ENDPOINT) for s in (self._pub, self._router))
        return EventSource(0, pub, router, TOPIC)

    async def publish(self, *events: dict[str, Any], lost: bool = False) -> None:
        payload = msgspec.msgpack.encode([self.life + self._next, list(events), 0])
        number = self._next
        self._next += 1
        if not lost:
            await self._pub.send_multipart([TOPIC.encode(), number.to_bytes(8, "big"), payload])
        self._buffer = [*self._buffer, (number, payload)][-self._keep :]

    async def die(self) -> None:
        """Go away as a killed engine does."""
        assert self._server is not None
        self._server.cancel()
        await asyncio.gather(self._server, return_exceptions=True)
        self._pub.close(linger=0)
        self._router.close(linger=0)
        self._buffer, self._next, self.life = [], 0, self.life + 1000.0

    async def close(self) -> None:
        await self.die()
        self._context.destroy(linger=0)

    async def _serve(self) -> None:
        while True:
            client, empty, start = await self._router.recv_multipart()
            assert empty == b""
            self.replays += 1
            if self.mute:
                continue
            for number, payload in self._buffer:
                if number >= int.from_bytes(start, "big"):
                    frames = [client, b"", TOPIC.encode(), number.to_bytes(8, "big"), payload]
                    await self._router.send_multipart(frames)
            await self._router.send_multipart([client, b"", b"", (-1).to_bytes(8, "big", signed=True), b""])


async def _bind(socket: zmq.asyncio.Socket, address: str) -> None:
    """ZMQ frees a closed socket's port on a thread of its own, soon after."""
    async with asyncio.timeout(10):
        while True:
            try:
                socket.bind(address)
                return
            except zmq.ZMQError as error:
                if error.errno != zmq.EADDRINUSE:
                    raise
            await asyncio.sleep(0.001)


def stored(*hashes: int, parent: int | None = None) -> dict[str, Any]:
    return {
        "type": "BlockStored",
        "block_hashes": list(hashes),
        "parent_block_hash": parent,
        "token_ids": [h * 10 + i for h in hashes for i in range(BLOCK)],
        "block_size": BLOCK,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        "group_idx": 0,
    }


def removed(*hashes: int) -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": list(hashes), "medium": "GPU", "group_idx": 0}


class Listener:
    """What the subscriber reported, and a way to wait for it without sleeping."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()
        self.view = BlockView("m", BLOCK)

    def __call__(self, worker: str, event: Event) -> None:
        assert worker == "w1"
        self.events.append(event)
        self.view.apply(event)
        task = asyncio.ensure_future(self._notify())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20), self._changed:
            await self._changed.wait_for(condition)

    @property
    def hashes(self) -> list[int]:
        return [h for event in self.events if isinstance(event, Stored) for h in event.hashes if isinstance(h, int)]


@contextlib.asynccontextmanager
async def following(
    source: EventSource, listener: Listener | Callable[[str, Event], None], **how: Any
) -> AsyncIterator[KvEventSubscriber]:
    subscriber = KvEventSubscriber("w1", source, listener, **{"quiet_s": 0.05, "replay_timeout_s": 5, **how})
    task = asyncio.create_task(subscriber.run())
    try:
        yield subscriber
        assert not task.done(), "it follows until it is told to stop"
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@pytest.fixture
async def publisher() -> AsyncIterator[Publisher]:
    made = Publisher()
    yield made
    await made.close()


async def test_what_was_published_before_and_after_the_subscription(publisher: Publisher) -> None:
    source = await publisher.bind()
    await publisher.publish(stored(1, 2))
    await publisher.publish(stored(3, parent=2))
    listener = Listener()
    async with following(source, listener) as subscriber:
        await listener.until(lambda: len(listener.events) == 2)
        await publisher.publish(removed(3))
        await listener.until(lambda: listener.events[-1] == Removed((3,)))
        assert listener.hashes == [1, 2, 3]
        assert listener.view.resident_tokens([10, 11, 12, 13, 20, 21, 22, 23, 30, 31, 32, 33]) == 2
        assert subscriber.connected
    assert not subscriber.connected


async def test_a_lost_batch_is_replayed(publisher: Publisher) -> None:
    source = await publisher.bind()
    listener = Listener()
    async with following(source, listener, quiet_s=60) as subscriber:
        await publisher.publish(stored(1))
        await listener.until(lambda: listener.hashes == [1])
        for i in (2, 3, 4):
            await publisher.publish(stored(i), lost=True)
        await publisher.publish(stored(5))
        await listener.until(lambda: listener.hashes == [1, 2, 3, 4, 5])
        assert subscriber.book.statistics().gaps == 1
        assert not any(isinstance(event, Cleared) for event in listener.events)


async def test_a_batch_lost_at_the_end_is_found_when_it_is_quiet(publisher: Publisher) -> None:
    source = await publisher.bind()
    listener = Listener()
    async with following(source, listener):
        await publisher.publish(stored(1))
        await listener.until(lambda: listener.hashes == [1])
        await publisher.publish(stored(2), lost=True)
        await listener.until(lambda: listener.hashes == [1, 2])


async def test_an_engine_that_restarts_is_followed_into_its_new_life(publisher: Publisher) -> None:
    source = await publisher.bind()
    listener = Listener()
    async with following(source, listener) as subscriber:
        for i in range(3):
            await publisher.publish(stored(i))
        await listener.until(lambda: listener.hashes == [0, 1, 2])
        await publisher.die()
        await publisher.bind(
            int(source.endpoint.rsplit(":")[-1]), int((source.replay_endpoint or "").rsplit(":")[-1])
        )
        for i in range(70, 77):
            await publisher.publish(stored(i))
        await listener.until(lambda: listener.hashes[-1] == 76)
        assert listener.events[3] == Cleared("restart")
        assert listener.hashes == [0, 1, 2, *range(70, 77)]
        assert (0 in subscriber.book, 70 in subscriber.book) == (False, True)


async def test_a_subscriber_may_be_there_before_the_engine(publisher: Publisher) -> None:
    source = await publisher.bind()
    await publisher.die()
    listener = Listener()
    async with following(source, listener):
        await publisher.bind(
            int(source.endpoint.rsplit(":")[-1]), int((source.replay_endpoint or "").rsplit(":")[-1])
        )
        await publisher.publish(stored(1))
        await listener.until(lambda: listener.hashes == [1])


async def test_a_replay_that_never_comes_does_not_stop_the_stream(publisher: Publisher) -> None:
    source = await publisher.bind()
    publisher.mute = True
    listener = Listener()
    async with following(source, listener, replay_timeout_s=0.05) as subscriber:
        while not subscriber.connected or publisher.replays == 0:
            await asyncio.sleep(0.001)
        await publisher.publish(stored(1))
        await listener.until(lambda: 1 in listener.hashes)
        await publisher.publish(stored(2), lost=True)
        await publisher.publish(stored(3))
        await listener.until(lambda: 3 in listener.hashes)
        assert Cleared("lost") in listener.events
        assert (1 in subscriber.book, 3 in subscriber.book) == (False, True)


async def test_a_listener_that_fails_does_not_stop_the_stream(publisher: Publisher) -> None:
    source = await publisher.bind()
    listener = Listener()

    def fails_once(worker: str, event: Event) -> None:
        first = not listener.events
        listener(worker, event)
        if first:
            raise RuntimeError("a bug in the index")

    async with following(source, fails_once):
        await publisher.publish(stored(1))
        await publisher.publish(stored(2))
        await listener.until(lambda: listener.hashes == [1, 2])


async def test_a_long_history_leaves_the_loop_its_turns(publisher: Publisher) -> None:
    source = await publisher.bind()
    for i in range(2000):
        await publisher.publish(stored(i, parent=i - 1 if i else None), lost=True)
    listener = Listener()
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += bool(listener.events)

    busy = asyncio.create_task(others())
    async with following(source, listener):
        await listener.until(lambda: len(listener.events) == 2000)
    busy.cancel()
    assert turns >= 15
    assert len(listener.view) == 2000
