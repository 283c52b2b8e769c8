"""The prompt cache: answers of deterministic calls, kept across runs (arXiv 2603.16104, cache substitution).

The policy (age, size, tenancy of a purge, failure) is here, the keeping in a `Backend`: memory by default, SQLite
for one replica that restarts, Redis for several. A backend that fails costs a miss, never an answer: its errors are
counted and swallowed, and after `_TRIP` of them in a row it is left alone for `_REST_S` seconds.

Not supported on purpose: revalidation (there is nothing to ask) and negative caching (errors are never kept).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Protocol

import structlog

from helium_proxy import metrics
from helium_proxy.reuse.entry import Entry
from helium_proxy.reuse.settings import ReuseSettings

_TRIP = 3
_REST_S = 5.0

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class PurgeFilter:
    """Which entries to drop: those that match every field that is set. All None: everything."""

    tenant: str | None = None
    model: str | None = None
    workflow: str | None = None

    def matches(self, entry: Entry) -> bool:
        return (
            self.tenant in (None, entry.tenant)
            and self.model in (None, entry.model)
            and self.workflow in (None, entry.workflow)
        )


@dataclass(frozen=True, slots=True)
class BackendStatistics:
    """A snapshot. None: the backend cannot tell cheaply."""

    entries: int | None
    bytes: int | None
    evictions: int


class Backend(Protocol):
    """Where entries are kept. Methods may raise anything but must not block the event loop.

    Keys are opaque bytes. `now` is Unix time in seconds, as in `Entry.created_at`; an entry older than the
    backend's time to live is as good as absent.
    """

    async def get(self, key: bytes, now: float) -> Entry | None: ...
    async def set(self, key: bytes, entry: Entry) -> None: ...
    async def purge(self, which: PurgeFilter) -> int: ...
    async def close(self) -> None: ...
    def statistics(self) -> BackendStatistics: ...


class MemoryBackend:
    """Entries in this process: least recently used out first, bounded in bytes and in number."""

    def __init__(self, *, max_bytes: int, max_entries: int, ttl_s: float) -> None:
        self._max_bytes = max_bytes
        self._max_entries = max_entries
        self._ttl_s = ttl_s
        # State. Keys in order of last use, oldest first; `_bytes` is the sum of the entries' sizes.
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()
        self._bytes = 0
        self._evictions = 0

    def __repr__(self) -> str:
        return f"MemoryBackend({len(self._entries)} entries, {self._bytes}/{self._max_bytes} B)"

    def peek(self, key: bytes, now: float) -> Entry | None:
        """`get` without suspending; counts as a use."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        if entry.age(now) > self._ttl_s:
            self._drop(key)
            return None
        self._entries.move_to_end(key)
        return entry

    async def get(self, key: bytes, now: float) -> Entry | None:
        return self.peek(key, now)

    async def set(self, key: bytes, entry: Entry) -> None:
        self._drop(key)
        if entry.size > self._max_bytes:
            return
        self._entries[key] = entry
        self._bytes += entry.size
        while self._bytes > self._max_bytes or len(self._entries) > self._max_entries:
            _, oldest = self._entries.popitem(last=False)
            self._bytes -= oldest.size
            self._evictions += 1

    async def purge(self, which: PurgeFilter) -> int:
        doomed = [key for key, entry in self._entries.items() if which.matches(entry)]
        for key in doomed:
            self._drop(key)
        return len(doomed)

    async def close(self) -> None:
        self._entries.clear()
        self._bytes = 0

    def statistics(self) -> BackendStatistics:
        return BackendStatistics(len(self._entries), self._bytes, self._evictions)

    def _drop(self, key: bytes) -> bool:
        entry = self._entries.pop(key, None)
        if entry is None:
            return False
        self._bytes -= entry.size
        return True


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    """Counts since start, and what is held now."""

    hits: int
    misses: int
    stale: int
    """Found, but older than the request's max-age: counted apart from misses."""
    stores: int
    refused: int
    """Not kept: larger than `max_entry_bytes`."""
    errors: int
    resting: bool
    """The backend failed repeatedly and is being left alone."""
    entries: int | None
    bytes: int | None
    evictions: int


class PromptCache:
    """What the gateway asks before it asks a worker. Every method is safe to call whatever the backend does."""

    def __init__(self, backend: Backend, *, max_entry_bytes: int = 1024 * 1024) -> None:
        self._backend = backend
        self._memory = backend if isinstance(backend, MemoryBackend) else None
        self._max_entry_bytes = max_entry_bytes
        # State. Counters; `_failures` in a row and, after too many, the time until which the backend rests.
        self._hits = self._misses = self._stale = self._stores = self._refused = self._errors = 0
        self._failures = 0
        self._rest_until = float("-inf")
        self._resting = False
        self._evictions_seen = 0

    def __repr__(self) -> str:
        return f"PromptCache({self._backend!r}, {self._hits} hits, {self._misses} misses)"

    def peek(self, key: bytes, now: float, max_age: float | None = None) -> Entry | None:
        """The entry if it can be had without suspending (memory backend); otherwise None, and `get` may know.

        A result counts as a hit; None counts as nothing.
        """
        if self._memory is None:
            return None
        entry = self._memory.peek(key, now)
        if entry is None or (max_age is not None and entry.age(now) > max_age):
            return None
        self._count_hit()
        return entry

    async def get(self, key: bytes, now: float, max_age: float | None = None) -> Entry | None:
        """The entry of `key`, no older than `max_age` seconds; None on a miss or when the backend fails."""
        if self._rests(now):
            self._misses += 1
            metrics.CACHE_REQUESTS.labels("error").inc()
            return None
        try:
            entry = await self._backend.get(key, now)
        except Exception as error:
            self._failed("get", error, now)
            self._misses += 1
            return None
        self._failures = 0
        if entry is None:
            self._misses += 1
            metrics.CACHE_REQUESTS.labels("miss").inc()
            return None
        if max_age is not None and entry.age(now) > max_age:
            self._stale += 1
            metrics.CACHE_REQUESTS.labels("stale").inc()
            return None
        self._count_hit()
        return entry

    async def put(self, key: bytes, entry: Entry) -> bool:
        """Keep `entry`; False when it is too large or the backend failed."""
        if entry.size > self._max_entry_bytes:
            self._refused += 1
            return False
        if self._rests(entry.created_at):
            return False
        try:
            await self._backend.set(key, entry)
        except Exception as error:
            self._failed("set", error, entry.created_at)
            return False
        self._failures = 0
        self._stores += 1
        return True

    async def purge(self, *, tenant: str | None = None, model: str | None = None, workflow: str | None = None) -> int:
        """Drop what matches all given; returns how many. Raises what the backend raises: a purge
        that failed must not look done."""
        return await self._backend.purge(PurgeFilter(tenant, model, workflow))

    async def close(self) -> None:
        await self._backend.close()

    def statistics(self) -> CacheStatistics:
        held = self._backend.statistics()
        return CacheStatistics(
            hits=self._hits,
            misses=self._misses,
            stale=self._stale,
            stores=self._stores,
            refused=self._refused,
            errors=self._errors,
            resting=self._resting,
            entries=held.entries,
            bytes=held.bytes,
            evictions=held.evictions,
        )

    def _count_hit(self) -> None:
        self._hits += 1
        metrics.CACHE_REQUESTS.labels("hit").inc()

    def _rests(self, now: float) -> bool:
        if self._resting and now >= self._rest_until:
            self._resting = False  # one attempt; `_failures` still stands, so one more failure rests it again
        return self._resting

    def _failed(self, operation: str, error: Exception, now: float) -> None:
        self._errors += 1
        self._failures += 1
        metrics.CACHE_REQUESTS.labels("error").inc()
        if self._failures >= _TRIP:
            self._resting = True
            self._rest_until = now + _REST_S
        log.warning("prompt cache failed", operation=operation, error=repr(error), resting=self._resting)

    def report(self) -> None:
        """Bring the metrics of what is held up to date; called every second or so."""
        held = self._backend.statistics()
        metrics.CACHE_ENTRIES.set(held.entries or 0)
        metrics.CACHE_BYTES.set(held.bytes or 0)
        metrics.CACHE_EVICTIONS.inc(held.evictions - self._evictions_seen)
        self._evictions_seen = held.evictions


def build_cache(settings: ReuseSettings) -> PromptCache | None:
    """The cache that `settings` ask for; None when it is off.

    Raises `ConfigError` when the SQLite file cannot be opened or the redis extra is not installed. A Redis that is
    down is no error: it costs misses until it is back.
    """
    if not settings.enabled:
        return None
    backend: Backend
    match settings.backend:
        case "memory":
            backend = MemoryBackend(max_bytes=settings.bytes, max_entries=settings.entries, ttl_s=settings.ttl_s)
        case "sqlite":
            from helium_proxy.reuse.sqlite import SqliteBackend

            backend = SqliteBackend(
                settings.sqlite_path,
                max_bytes=settings.bytes,
                max_entries=settings.entries,
                ttl_s=settings.ttl_s,
            )
        case "redis":
            from helium_proxy.reuse.redis import RedisBackend

            assert settings.redis_url is not None
            backend = RedisBackend(
                settings.redis_url.get_secret_value(),
                namespace=settings.redis_namespace,
                ttl_s=settings.ttl_s,
                timeout_s=settings.redis_timeout_s,
            )
    return PromptCache(backend, max_entry_bytes=settings.max_entry_bytes)
