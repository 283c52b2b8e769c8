"""The prompt cache in Redis (or a server that speaks its protocol), shared by all replicas.

One hash per answer under the namespace, with a time to live; Redis' own ``maxmemory`` policy bounds the size. Every
look-up has a deadline, so that a Redis that hangs costs `timeout_s` and a miss; `PromptCache` then leaves it alone.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable
from typing import Any, cast

import msgspec

from helium_proxy.errors import ConfigError
from helium_proxy.reuse.entry import Entry
from helium_proxy.reuse.prompt_cache import BackendStatistics, PurgeFilter

_CONNECTIONS = 32
_SCAN_BATCH = 500
_PURGE_STEP_S = 5.0
"""Deadline of each step of a purge; an operator waits for it, not a call."""

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Entry).decode


class RedisBackend:
    """A `Backend` over one Redis. `client` replaces the connection that `url` names (tests)."""

    def __init__(
        self, url: str, *, namespace: str, ttl_s: float, timeout_s: float, client: Any | None = None
    ) -> None:
        self._prefix = f"{namespace}:answer:1:"
        self._ttl_ms = max(1, round(ttl_s * 1000))
        self._ttl_s = ttl_s
        self._timeout_s = timeout_s
        # State: the client's connection pool, nothing else.
        self._redis: Any = client if client is not None else _connect(url, timeout_s)

    def __repr__(self) -> str:
        return f"RedisBackend({self._prefix}*)"

    async def get(self, key: bytes, now: float) -> Entry | None:
        async with asyncio.timeout(self._timeout_s):
            raw = await cast(Awaitable[bytes | None], self._redis.hget(self._name(key), "entry"))
        if raw is None:
            return None
        entry = _decode(raw)
        return entry if entry.age(now) <= self._ttl_s else None

    async def set(self, key: bytes, entry: Entry) -> None:
        fields = {
            "entry": _encode(entry),
            "tenant": entry.tenant,
            "model": entry.model,
            "workflow": entry.workflow,
        }
        async with asyncio.timeout(self._timeout_s):
            pipe = self._redis.pipeline(transaction=True)
            pipe.hset(self._name(key), mapping=fields)
            pipe.pexpire(self._name(key), self._ttl_ms)
            await pipe.execute()

    async def purge(self, which: PurgeFilter) -> int:
        wanted = (which.tenant, which.model, which.workflow)
        removed, cursor = 0, 0
        pattern = re.sub(r"([*?\[\]\\])", r"\\\1", self._prefix) + "*"
        while True:
            async with asyncio.timeout(_PURGE_STEP_S):
                cursor, names = await self._redis.scan(cursor, match=pattern, count=_SCAN_BATCH)
                if names and any(value is not None for value in wanted):
                    names = await self._matching(names, wanted)
                if names:
                    removed += await self._redis.unlink(*names)
            if cursor == 0:
                return removed

    async def close(self) -> None:
        await self._redis.aclose()

    def statistics(self) -> BackendStatistics:
        return BackendStatistics(entries=None, bytes=None, evictions=0)

    async def _matching(self, names: list[bytes], wanted: tuple[str | None, ...]) -> list[bytes]:
        pipe = self._redis.pipeline(transaction=False)
        for name in names:
            pipe.hmget(name, "tenant", "model", "workflow")
        fields = await pipe.execute()
        return [
            name
            for name, values in zip(names, fields, strict=True)
            if all(
                asked is None or (value is not None and value.decode() == asked)
                for asked, value in zip(wanted, values, strict=True)
            )
        ]

    def _name(self, key: bytes) -> str:
        return self._prefix + key.hex()


def _connect(url: str, timeout_s: float) -> Any:
    try:
        from redis.asyncio import BlockingConnectionPool, Redis
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff
    except ImportError as error:
        raise ConfigError(
            "reuse.backend: redis needs the redis extra: pip install '.[redis]'", param="reuse.backend"
        ) from error
    try:
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=_CONNECTIONS,
            timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            socket_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),
        )
    except ValueError as error:
        raise ConfigError(f"reuse.redis_url: {error}", param="reuse.redis_url") from error
    return Redis(connection_pool=pool)
