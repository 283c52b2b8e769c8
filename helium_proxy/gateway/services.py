"""What the gateway works with, put together once at start."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from helium_proxy.config import Settings
from helium_proxy.dispatch.dispatcher import Dispatcher
from helium_proxy.gateway.ahead import Ahead
from helium_proxy.gateway.auth import Keyring
from helium_proxy.gateway.events import EventFeeds
from helium_proxy.gateway.http import Watches
from helium_proxy.gateway.tracing import NullTracer, Tracer
from helium_proxy.planner.estimate import Estimator
from helium_proxy.residency.registry import Tokenizers
from helium_proxy.reuse import Coalescer, PromptCache
from helium_proxy.workers.pool import Pool
from helium_proxy.workers.upstream import UpstreamClient
from helium_proxy.workflow import Workflows


class Background:
    """Tasks nobody waits for, held so that they are not collected, and cancelled at the end."""

    def __init__(self) -> None:
        # -- state
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@dataclass(slots=True)
class Services:
    """One of each."""

    settings: Settings
    clock: Callable[[], float]
    """Monotonic seconds."""
    wall: Callable[[], float]
    """Unix seconds."""
    client: UpstreamClient
    pool: Pool
    dispatcher: Dispatcher
    tokenizers: Tokenizers
    estimator: Estimator
    workflows: Workflows
    cache: PromptCache | None
    coalescer: Coalescer | None
    keyring: Keyring
    background: Background
    events: EventFeeds
    ahead: Ahead
    tracer: Tracer = field(default_factory=NullTracer)
    # -- state
    closers: list[Callable[[], Awaitable[None]]] = field(default_factory=list)
    """Called first when the application ends."""
    in_flight: int = 0
    """Requests being answered."""
    stopping: bool = False
    """Asked to end: `/ready` fails, calls are still taken."""
    draining: bool = False
    """New calls are refused, those in flight are finished."""
    watches: Watches = field(default_factory=Watches)
    owners: dict[str, str] = field(default_factory=dict)
    """Stored response id → the worker that has it; bounded by `note_owner`."""
    tenants: dict[str, dict[str, str]] = field(default_factory=dict)
    """Tenant → ids of its responses; each bounded likewise, so that none can have another's forgotten."""
    ids: dict[str, str] = field(default_factory=dict)
    """Request ids that clients chose, the newest; bounded likewise."""
    aliases: dict[str, str] = field(default_factory=dict)
    """Id a client was given for a reused response → the id its worker stored it under; bounded likewise."""

    def unique(self, given: str) -> str:
        """`given` the first time, something of its own thereafter: clients pass one trace id on with many calls, and
        a response's id must name one call."""
        if given in self.ids:
            given = f"{given}-{os.urandom(6).hex()}"
        _remember(self.ids, given, "")
        return given

    def note_owner(self, response: str, worker: str) -> None:
        _remember(self.owners, response, worker)

    def note_tenant(self, response: str, tenant: str) -> None:
        _remember(self.tenants.setdefault(tenant, {}), response, "")

    def may_see(self, response: str, tenant: str) -> bool:
        """Whether a stored response is the tenant's (or was made before this process, and nobody knows)."""
        return response in self.tenants.get(tenant, ()) or not any(response in ids for ids in self.tenants.values())

    def note_alias(self, given: str, stored: str) -> None:
        if given != stored:
            _remember(self.aliases, given, self.aliases.get(stored, stored))


def _remember(table: dict[str, str], key: str, value: str) -> None:
    table.pop(key, None)
    table[key] = value
    while len(table) > 100_000:
        del table[next(iter(table))]
