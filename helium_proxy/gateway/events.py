"""Following the KV events of every worker that publishes them: its mirror then holds what the engine says."""

from __future__ import annotations

import asyncio
import contextlib

import orjson
import structlog

from helium_proxy.dispatch.state import DispatchState
from helium_proxy.residency.kv_book import BlockView, Event
from helium_proxy.residency.kv_events import EventSource, KvEventSubscriber, event_sources
from helium_proxy.residency.registry import Tokenizers
from helium_proxy.workers.upstream import SendFailed, UpstreamClient
from helium_proxy.workers.worker import Worker

log = structlog.get_logger(__name__)


class EventFeeds:
    """One subscription a worker, from its coming up to its restart or removal.

    A worker is followed if its prompts can be tokenized here exactly (else its blocks have no name in common with
    ours) and if it is one engine: of several ranks behind one URL nobody knows which will be given a call.

    Its mirror is what the events say while they say all: from the engine's first batch on, or since it emptied its
    cache. Else (the proxy came later than a replay reaches back, a gap could not be filled) blocks would be missing
    for good, and the mirror guesses, as without events.
    """

    def __init__(
        self,
        client: UpstreamClient,
        tokenizers: Tokenizers,
        state: DispatchState,
        *,
        enabled: bool,
    ) -> None:
        self._client = client
        self._tokenizers = tokenizers
        self._state = state
        self._enabled = enabled
        # -- state
        self._epochs: dict[str, int] = {}  # worker → epoch for which it was settled whether it is followed
        self._tasks: dict[str, asyncio.Task[None]] = {}  # of those that are

    def __repr__(self) -> str:
        return f"<EventFeeds of {sorted(self._tasks)}>"

    def followed(self, worker: str) -> bool:
        return worker in self._tasks

    async def follow(self, worker: Worker) -> None:
        """Starts to follow a worker that is up, if it can be and is not. Never raises."""
        if not self._enabled or self._epochs.get(worker.id) == worker.epoch:
            return
        epoch, model, size = worker.epoch, self._model(worker), worker.facts.block_size
        if model is None or size is None:
            return  # asked again at its next change
        self._epochs[worker.id] = epoch
        await self._stop(worker.id)
        try:
            sources = await self._sources(worker)
        except (SendFailed, ValueError) as error:
            log.info("no KV event sources", worker=worker.id, error=str(error))
            self._epochs.pop(worker.id, None)  # asked again at its next change
            return
        known = self._state.workers.get(worker.id)
        if len(sources) != 1 or known is None or self._epochs.get(worker.id) != epoch:
            return
        view = BlockView(model, size)
        told = False  # whether the mirror is what the events say

        def take(name: str, event: Event) -> None:
            nonlocal told
            change = view.apply(event)
            mirror = self._state.workers.get(name)
            if mirror is None:
                return
            mirror.version += 1
            was, told = told, subscriber.book.whole and view.fits
            if told and (change.cleared or not was):
                mirror.residency.follow(view.blocks)
            elif was and not told:
                mirror.residency.follow(None)
            if was != told:
                log.info("KV cache mirrored", worker=name, by="events" if told else "guessing")
            if told:
                mirror.residency.stored(change.stored)
                mirror.residency.dropped(change.dropped)

        subscriber = KvEventSubscriber(worker.id, sources[0], take)
        self._tasks[worker.id] = asyncio.create_task(subscriber.run(), name=f"KV events {worker.id}")
        log.info("KV events followed", worker=worker.id, endpoint=sources[0].endpoint)

    def tick(self) -> None:
        """Once a second."""
        for name in self._tasks:
            mirror = self._state.workers.get(name)
            if mirror is not None:
                mirror.residency.settle()

    async def gone(self, worker: Worker) -> None:
        self._epochs.pop(worker.id, None)
        await self._stop(worker.id)

    async def close(self) -> None:
        for worker in list(self._tasks):
            await self._stop(worker)

    async def _stop(self, worker: str) -> None:
        task = self._tasks.pop(worker, None)
        known = self._state.workers.get(worker)
        if known is not None:
            known.residency.follow(None)
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task

    def _model(self, worker: Worker) -> str | None:
        """The model whose chains the events are mapped to: the base model (adapters' events name the adapter). None
        where it has several names, under each of which the same blocks would have to be known."""
        bases = [m.id for m in worker.facts.models if not m.raw.get("parent")]
        return bases[0] if len(bases) == 1 and self._tokenizers.get(bases[0]) is not None else None

    async def _sources(self, worker: Worker) -> tuple[EventSource, ...]:
        upstream = await self._client.send(worker, "GET", "/kv_event_sources", headers={}, body=None, timeout_s=10.0)
        body = await upstream.read()
        return event_sources(orjson.loads(body), worker.spec.url) if upstream.status == 200 else ()
