"""Subscribing to a worker's KV events over ZMQ: discovery, connection, replay. What they mean is in `kv_book`.

A worker publishes on a PUB socket and answers replays on a ROUTER. PUB forgets what it sends to nobody, so a replay
is asked for after every (re)connection, after a gap, and now and then when it is quiet: a batch missed at the end of
a burst would otherwise stay unnoticed. A replay starts one batch *before* the missing ones, and that batch must be,
byte for byte, the one already known: an engine that restarted counts from 0 again, and may have counted past it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any
from urllib.parse import urlsplit

import structlog
import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from helium_proxy import metrics
from helium_proxy.residency.kv_book import Cleared, Event, EventBook, NeedReplay

OnEvent = Callable[[str, Event], None]
"""Called with the worker's id and each event, in order, in the event loop; must not block."""

_END = (-1).to_bytes(8, "big", signed=True)
_KINDS = {"Stored": "stored", "Removed": "removed", "Cleared": "cleared"}
_EVENTS_AT_ONCE = 128
"""Taken in before other tasks of the loop get their turn."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class EventSource:
    """Where one engine (data-parallel rank `rank` of a worker) publishes."""

    rank: int
    endpoint: str
    replay_endpoint: str | None
    topic: str


def event_sources(document: Any, worker_url: str) -> tuple[EventSource, ...]:
    """The sources that ``GET /kv_event_sources`` names: ``{"0": {"endpoint": "tcp://*:5557", …}, …}`` by rank, empty
    where events are off. A wildcard host is the worker's own. Entries that are not understood are left out."""
    host = urlsplit(worker_url).hostname or "127.0.0.1"
    found = []
    for rank, config in document.items() if isinstance(document, Mapping) else ():
        if not (str(rank).isdigit() and isinstance(config, Mapping)):
            continue
        endpoint, replay = config.get("endpoint"), config.get("replay_endpoint")
        if config.get("publisher", "zmq") != "zmq" or not isinstance(endpoint, str):
            continue
        found.append(
            EventSource(
                rank=int(rank),
                endpoint=_reachable(endpoint, host),
                replay_endpoint=_reachable(replay, host) if isinstance(replay, str) else None,
                topic=str(config.get("topic") or ""),
            )
        )
    return tuple(sorted(found, key=lambda source: source.rank))


def _reachable(endpoint: str, host: str) -> str:
    """`endpoint` as a client dials it: vLLM publishes the address it bound, wildcard and all."""
    if not endpoint.startswith("tcp://"):
        return endpoint
    bound, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    if bound in ("*", "0.0.0.0", "[::]", "::"):
        return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"
    return endpoint


class KvEventSubscriber:
    """Follows one `EventSource` for as long as `run` runs, through disconnections and restarts of the engine.

    Every event goes to `on_event`; an exception there is logged and the stream goes on. `book` says what is resident.
    """

    def __init__(
        self,
        worker_id: str,
        source: EventSource,
        on_event: OnEvent,
        *,
        replay_timeout_s: float = 2.0,
        quiet_s: float = 5.0,
    ) -> None:
        self._worker = worker_id
        self._source = source
        self._on_event = on_event
        self._replay_timeout_s = replay_timeout_s
        self._quiet_s = quiet_s
        # State: the book, and whether the subscription is connected.
        self.book = EventBook()
        self.connected = False

    def __repr__(self) -> str:
        state = "connected" if self.connected else "disconnected"
        return f"KvEventSubscriber({self._worker}, {self._source.endpoint}, {state}, {self.book!r})"

    async def run(self) -> None:
        """Follow the source until cancelled."""
        context = zmq.asyncio.Context()
        try:
            await self._follow(context)
        finally:
            self.connected = False
            context.destroy(linger=0)

    async def _follow(self, context: zmq.asyncio.Context) -> None:
        subscription = context.socket(zmq.SUB)
        subscription.set_hwm(100_000)  # as the publisher's; beyond it events are dropped, which shows as a gap
        subscription.setsockopt(zmq.RECONNECT_IVL, 100)
        subscription.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
        subscription.setsockopt(zmq.IPV6, 1)
        subscription.setsockopt(zmq.TCP_KEEPALIVE, 1)
        subscription.subscribe(self._source.topic.encode())
        monitor = subscription.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        subscription.connect(self._source.endpoint)
        poller = zmq.asyncio.Poller()
        poller.register(subscription, zmq.POLLIN)
        poller.register(monitor, zmq.POLLIN)
        try:
            while True:
                ready = dict(await poller.poll(self._quiet_s * 1000))
                if monitor in ready:
                    self.connected = await _is_connected(monitor)
                if (monitor in ready and self.connected) or (not ready and self.connected):
                    await self._replay(context, self.book.resync())
                if subscription in ready:
                    await self._drain(context, subscription)
        finally:
            subscription.disable_monitor()

    async def _drain(self, context: zmq.asyncio.Context, subscription: zmq.asyncio.Socket) -> None:
        for _ in range(_EVENTS_AT_ONCE):
            try:
                frames = await subscription.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            batch = _numbered(frames)
            if batch is None:
                continue
            result = self.book.live(*batch)
            if isinstance(result, NeedReplay):
                metrics.KV_GAPS.labels(self._worker).inc()
                await self._replay(context, result)
            else:
                self._emit(result)

    async def _replay(self, context: zmq.asyncio.Context, wanted: NeedReplay) -> None:
        """Ask, and ask again from the start when the book does not recognise the answer."""
        result: Iterator[Event] | NeedReplay = wanted
        while isinstance(result, NeedReplay):
            result = self.book.replayed(await self._ask(context, result.start))
        while some := list(islice(result, _EVENTS_AT_ONCE)):
            self._emit(some)
            await asyncio.sleep(0)

    async def _ask(self, context: zmq.asyncio.Context, start: int) -> list[tuple[int, bytes]] | None:
        """All batches from number `start` on that the engine still has; None when it does not answer in time."""
        if self._source.replay_endpoint is None:
            return None
        batches: list[tuple[int, bytes]] = []
        # A socket for each: what a slow engine answers after the deadline goes down with it.
        with context.socket(zmq.DEALER) as dealer:
            dealer.set_hwm(0)
            dealer.setsockopt(zmq.LINGER, 0)
            dealer.setsockopt(zmq.IPV6, 1)
            dealer.connect(self._source.replay_endpoint)
            try:
                await dealer.send_multipart([b"", start.to_bytes(8, "big")])
                while True:
                    async with asyncio.timeout(self._replay_timeout_s):
                        frames = await dealer.recv_multipart()
                    if len(frames) >= 2 and frames[-2] == _END:
                        return batches
                    batch = _numbered(frames)
                    if batch is not None:
                        batches.append(batch)
            except (TimeoutError, zmq.ZMQError) as error:
                log.warning("no replay of KV events", worker=self._worker, start=start, error=repr(error))
                return None

    def _emit(self, events: list[Event]) -> None:
        for event in events:
            metrics.KV_EVENTS.labels(self._worker, _KINDS[type(event).__name__]).inc()
            if isinstance(event, Cleared):
                log.info("KV cache view cleared", worker=self._worker, reason=event.reason)
            try:
                self._on_event(self._worker, event)
            except Exception as error:
                metrics.FAIL_OPEN.labels("kv_events").inc()
                log.error("a KV event was not taken in", worker=self._worker, error=repr(error))


async def _is_connected(monitor: zmq.asyncio.Socket) -> bool:
    """The state after all that the monitor has to say."""
    connected = False
    while await monitor.poll(0):
        message = await recv_monitor_message(monitor)
        connected = message["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED
    return connected


def _numbered(frames: list[bytes]) -> tuple[int, bytes] | None:
    """A batch's number and payload, from ``(…, topic, number, payload)``."""
    if len(frames) < 2 or len(frames[-2]) != 8:
        return None
    return int.from_bytes(frames[-2], "big"), frames[-1]
