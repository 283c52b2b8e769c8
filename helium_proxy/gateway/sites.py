"""The workers as they are seen by what works ahead of need: their pins, whether they idle, and one prewarm each."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any

import structlog

from helium_proxy.config import DirectiveSettings
from helium_proxy.dispatch.state import DispatchState, WorkerState
from helium_proxy.residency.directives import PinBook
from helium_proxy.residency.index import Chain
from helium_proxy.workers.worker import Worker

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Prewarm:
    """One that is under way."""

    task: asyncio.Task[None]
    chain: Chain


@dataclass(slots=True)
class Site:
    """One worker."""

    pins: PinBook
    epoch: int
    filled: int = 0
    """Blocks that calls have filled there."""
    used: dict[str, int] = field(default_factory=dict)
    """prefix → `filled` when it was last used; the planned ones."""
    resident: set[str] = field(default_factory=set)
    """Planned prefixes that were resident at the last look."""
    later: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Planned prefix → before when it is not prefilled again, and how long that wait was."""
    prewarm: Prewarm | None = None


class Sites:
    """All of them, by worker id. `on_free` is called when a prewarm is over."""

    def __init__(self, settings: DirectiveSettings, state: DispatchState, on_free: Callable[[], None]) -> None:
        self._settings = settings
        self._state = state
        self._on_free = on_free
        # -- state
        self._sites: dict[str, Site] = {}

    def __repr__(self) -> str:
        return f"<Sites {sorted(self._sites)}>"

    def __len__(self) -> int:
        return len(self._sites)

    def __iter__(self) -> Iterator[Site]:
        return iter(self._sites.values())

    def get(self, worker: str) -> Site | None:
        return self._sites.get(worker)

    def of(self, worker: Worker) -> Site:
        """The worker's, made when there is none."""
        site = self._sites.get(worker.id)
        if site is None:
            site = self._sites[worker.id] = Site(PinBook(self._settings.pin_ttl_s), worker.epoch)
        elif site.epoch != worker.epoch:  # its mirror has been cleared by the dispatcher
            site.epoch = worker.epoch
            site.pins.clear()
            site.resident.clear()
            site.later.clear()
        return site

    def keep(self, workers: set[str]) -> None:
        """Forgets all others."""
        for gone in self._sites.keys() - workers:
            del self._sites[gone]

    def idle(self, worker: Worker, known: WorkerState) -> bool:
        """Whether work ahead of need would delay nobody. What runs and waits there is known from our own calls: the
        engine's count of waiting ones is a second old, and may be of a call that has long been answered."""
        if not known.open or len(known.running) > self._settings.busy_calls or worker.foreign_waiting:
            return False
        return not any(self._state.queues.get(model) for model in known.models)

    def start(self, site: Site, worker: Worker, chain: Chain, work: Coroutine[Any, Any, Any]) -> None:
        """One prewarm a worker at a time."""
        task = asyncio.create_task(work, name=f"prewarm {worker.id}")
        site.prewarm = prewarm = Prewarm(task, chain)

        def over(_: asyncio.Task[None]) -> None:
            if site.prewarm is prewarm:
                site.prewarm = None
            if not task.cancelled() and (error := task.exception()) is not None:
                log.warning("prewarm failed", worker=worker.id, error=repr(error))
            self._on_free()

        task.add_done_callback(over)

    async def close(self) -> None:
        tasks = [site.prewarm.task for site in self if site.prewarm is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def begins(chain: Chain, prefix: Chain) -> bool:
    """Whether `chain` begins with `prefix`: a block's hash covers everything before it."""
    return len(chain) >= len(prefix) and (not prefix or chain[len(prefix) - 1] == prefix[-1])
