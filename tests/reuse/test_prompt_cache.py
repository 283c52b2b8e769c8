from __future__ import annotations

import asyncio
import shutil
import sqlite3
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import fakeredis
import orjson
import pytest
from pydantic import SecretStr, ValidationError

from helium_proxy.errors import ConfigError
from helium_proxy.reuse import Backend, Entry, PromptCache, ReuseSettings, build_cache, make_entry
from helium_proxy.reuse.prompt_cache import BackendStatistics, MemoryBackend, PurgeFilter
from helium_proxy.reuse.redis import RedisBackend
from helium_proxy.reuse.sqlite import SqliteBackend

CHAT = "/v1/chat/completions"


def entry(
    text: str = "yes", *, model: str = "m", workflow: str = "w", tenant: str = "t", now: float = 1000.0
) -> Entry:
    answer = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 900,
        "model": model,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9},
    }
    made = make_entry(answer, route=CHAT, tenant=tenant, model=model, workflow=workflow, now=now)
    assert made is not None
    return made


Make = Callable[[], Backend]


@pytest.fixture(params=["memory", "sqlite", "redis"])
async def backend(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Backend]:
    made: Backend
    match request.param:
        case "memory":
            made = MemoryBackend(max_bytes=10**6, max_entries=100, ttl_s=60)
        case "sqlite":
            made = SqliteBackend(tmp_path / "c.db", max_bytes=10**6, max_entries=100, ttl_s=60)
        case _:
            client = fakeredis.FakeAsyncRedis()
            made = RedisBackend("", namespace="n[*]", ttl_s=60, timeout_s=5, client=client)
    yield made
    await made.close()


async def test_keeps_and_returns_an_equal_entry(backend: Backend) -> None:
    await backend.set(b"\x00k", entry())
    assert await backend.get(b"\x00k", 1001) == entry()
    assert await backend.get(b"other", 1001) is None


async def test_an_old_entry_is_absent(backend: Backend) -> None:
    await backend.set(b"k", entry(now=1000))
    assert await backend.get(b"k", 1060) is not None
    assert await backend.get(b"k", 1061) is None


async def test_set_replaces(backend: Backend) -> None:
    await backend.set(b"k", entry("old"))
    await backend.set(b"k", entry("new"))
    got = await backend.get(b"k", 1001)
    assert got is not None
    assert b"new" in got.body
    assert backend.statistics().entries in (1, None)


@pytest.mark.parametrize(
    ("which", "left"),
    [
        (PurgeFilter(), set()),
        (PurgeFilter(model="m2"), {b"a", b"b"}),
        (PurgeFilter(workflow="w2"), {b"a", b"c"}),
        (PurgeFilter(tenant="t2"), {b"a", b"b", b"c"}),
        (PurgeFilter(model="m", workflow="w2"), {b"a", b"c", b"d"}),
        (PurgeFilter(model="none"), {b"a", b"b", b"c", b"d"}),
    ],
)
async def test_purge(backend: Backend, which: PurgeFilter, left: set[bytes]) -> None:
    entries = {
        b"a": entry(),
        b"b": entry(workflow="w2"),
        b"c": entry(model="m2"),
        b"d": entry(model="m2", workflow="w2", tenant="t2"),
    }
    for key, value in entries.items():
        await backend.set(key, value)
    assert await backend.purge(which) == len(entries) - len(left)
    assert {key for key in entries if await backend.get(key, 1001)} == left


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
async def test_bounded_in_bytes_and_the_least_recently_used_go_first(kind: str, tmp_path: Path) -> None:
    size = entry().size
    made: Backend = (
        MemoryBackend(max_bytes=size * 10, max_entries=100, ttl_s=10**6)
        if kind == "memory"
        else SqliteBackend(tmp_path / "c.db", max_bytes=size * 10, max_entries=100, ttl_s=10**6)
    )
    for i in range(100):
        await made.set(b"%d" % i, entry(now=1000 + i))
        assert await made.get(b"0", 1000 + i + 0.5) is not None, "in use all along"
        held = made.statistics()
        assert held.bytes is not None
        assert held.bytes <= size * 10
    assert await made.get(b"98", 1100) is not None
    assert await made.get(b"1", 1100) is None
    assert made.statistics().evictions >= 90
    await made.close()


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
async def test_bounded_in_entries(kind: str, tmp_path: Path) -> None:
    made: Backend = (
        MemoryBackend(max_bytes=10**9, max_entries=10, ttl_s=10**6)
        if kind == "memory"
        else SqliteBackend(tmp_path / "c.db", max_bytes=10**9, max_entries=10, ttl_s=10**6)
    )
    for i in range(30):
        await made.set(b"%d" % i, entry(now=1000 + i))
        assert (made.statistics().entries or 0) <= 10
    await made.close()


async def test_memory_takes_nothing_larger_than_itself() -> None:
    made = MemoryBackend(max_bytes=600, max_entries=10, ttl_s=60)
    await made.set(b"k", entry("x" * 1000))
    assert made.statistics() == BackendStatistics(0, 0, 0)


# -- SQLite's own


async def test_sqlite_survives_a_restart(tmp_path: Path) -> None:
    first = SqliteBackend(tmp_path / "c.db", max_bytes=10**6, max_entries=10, ttl_s=60)
    await first.set(b"k", entry())
    await first.close()
    second = SqliteBackend(tmp_path / "c.db", max_bytes=10**6, max_entries=10, ttl_s=60)
    assert await second.get(b"k", 1001) == entry()
    assert second.statistics().entries == 1
    await second.close()


async def test_two_processes_share_one_sqlite_file(tmp_path: Path) -> None:
    one, two = (SqliteBackend(tmp_path / "c.db", max_bytes=10**6, max_entries=10, ttl_s=60) for _ in range(2))
    await one.set(b"k", entry("one"))
    await two.set(b"l", entry("two"))
    assert await two.get(b"k", 1001) is not None
    assert await one.get(b"l", 1001) is not None
    await one.close()
    await two.close()


async def test_a_damaged_sqlite_file_is_moved_aside(tmp_path: Path) -> None:
    path = tmp_path / "c.db"
    path.write_bytes(b"this is no database" * 100)
    made = SqliteBackend(path, max_bytes=10**6, max_entries=10, ttl_s=60)
    await made.set(b"k", entry())
    assert await made.get(b"k", 1001) == entry()
    assert (tmp_path / "c.db.corrupt").exists()
    await made.close()


async def test_an_older_schema_starts_empty(tmp_path: Path) -> None:
    path = tmp_path / "c.db"
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE answers (something TEXT)")
    db.execute("PRAGMA user_version = 99")
    db.commit()
    db.close()
    made = SqliteBackend(path, max_bytes=10**6, max_entries=10, ttl_s=60)
    await made.set(b"k", entry())
    assert made.statistics().entries == 1
    await made.close()


def test_a_path_that_cannot_be_opened_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sqlite_path"):
        SqliteBackend(tmp_path / "no" / "folder" / "c.db", max_bytes=1, max_entries=1, ttl_s=1)


# -- Redis' own


async def test_redis_expires_and_keeps_to_its_namespace() -> None:
    client = fakeredis.FakeAsyncRedis()
    made = RedisBackend("", namespace="helium", ttl_s=60, timeout_s=5, client=client)
    await client.set("someone else's", "1")
    await made.set(b"k", entry())
    names = set(await client.keys("*"))
    assert names == {b"someone else's", b"helium:answer:1:6b"}
    assert 59_000 < await client.pttl("helium:answer:1:6b") <= 60_000
    assert await made.purge(PurgeFilter()) == 1
    assert await client.keys("*") == [b"someone else's"]
    await made.close()


async def test_a_real_redis(tmp_path: Path, unused_tcp_port_factory: Callable[[], int]) -> None:
    if (server := shutil.which("redis-server")) is None:
        pytest.skip("no redis-server here")
    port = unused_tcp_port_factory()
    process = await asyncio.create_subprocess_exec(
        *(server, "--port", str(port), "--save", "", "--dir", str(tmp_path), "--bind", "127.0.0.1"),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(20):
            while b"Ready to accept" not in await process.stdout.readline():
                pass
        settings = ReuseSettings(
            backend="redis", redis_url=SecretStr(f"redis://127.0.0.1:{port}/0"), redis_timeout_s=5
        )
        cache = build_cache(settings)
        assert cache is not None
        for i in range(20):
            assert await cache.put(b"%d" % i, entry(workflow=f"w{i % 2}"))
        assert await cache.get(b"3", 1001) == entry(workflow="w1")
        assert await cache.purge(workflow="w0") == 10
        assert await cache.get(b"2", 1001) is None
        assert await cache.purge() == 10
        process.kill()
        await process.wait()
        assert await cache.get(b"3", 1001) is None, "a Redis that died is a miss"
        assert cache.statistics().errors == 1
        await cache.close()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_a_redis_that_hangs_costs_its_timeout_and_a_miss() -> None:
    served: list[asyncio.Task[None] | None] = []

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served.append(asyncio.current_task())
        await reader.read()
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    settings = ReuseSettings(backend="redis", redis_url=SecretStr(f"redis://127.0.0.1:{port}"), redis_timeout_s=0.02)
    cache = build_cache(settings)
    assert cache is not None
    loop = asyncio.get_running_loop()
    begin = loop.time()
    for now in range(3):
        assert await cache.get(b"k", float(now)) is None
    assert loop.time() - begin < 2
    assert cache.statistics().resting
    begin = loop.time()
    for _ in range(100):
        assert await cache.get(b"k", 3.0) is None
    assert loop.time() - begin < 0.02, "resting: not even asked"
    await cache.close()
    server.close()
    await server.wait_closed()
    assert served, "it was reached"
    await asyncio.gather(*(task for task in served if task is not None))


# -- the policy over any backend


class Broken:
    """A backend that fails while `down`, and counts how often it is asked."""

    def __init__(self) -> None:
        self.down = True
        self.asked = 0

    async def get(self, key: bytes, now: float) -> Entry | None:
        return self._ask()

    async def set(self, key: bytes, entry: Entry) -> None:
        self._ask()

    async def purge(self, which: PurgeFilter) -> int:
        self._ask()
        return 0

    async def close(self) -> None:
        pass

    def statistics(self) -> BackendStatistics:
        return BackendStatistics(None, None, 0)

    def _ask(self) -> Entry | None:
        self.asked += 1
        if self.down:
            raise OSError("down")
        return entry()


async def test_a_failing_backend_is_a_miss_then_rests_then_is_tried_again() -> None:
    backend = Broken()
    cache = PromptCache(backend)
    for _ in range(10):
        assert await cache.get(b"k", 1000.0) is None
    assert backend.asked == 3
    assert not await cache.put(b"k", entry(now=1001.0))
    assert backend.asked == 3
    assert await cache.get(b"k", 1006.0) is None
    assert await cache.get(b"k", 1006.0) is None
    assert backend.asked == 4, "one attempt after the rest, and back to rest"
    backend.down = False
    assert await cache.get(b"k", 1012.0) is not None
    assert await cache.get(b"k", 1012.0) is not None
    statistics = cache.statistics()
    assert (statistics.errors, statistics.hits, statistics.misses, statistics.resting) == (4, 2, 12, False)


async def test_an_answer_that_could_not_be_kept_harms_nobody() -> None:
    backend = Broken()
    cache = PromptCache(backend)
    assert not await cache.put(b"k", entry())
    assert cache.peek(b"k", 1001) is None, "nothing is known without asking"
    backend.down = False
    assert await cache.put(b"k", entry())
    assert (cache.statistics().stores, cache.statistics().errors) == (1, 1)
    await cache.close()


async def test_a_purge_that_failed_does_not_look_done() -> None:
    cache = PromptCache(Broken())
    with pytest.raises(OSError, match="down"):
        await cache.purge()


async def test_max_age_and_counts() -> None:
    cache = PromptCache(MemoryBackend(max_bytes=10**6, max_entries=10, ttl_s=600))
    assert await cache.get(b"k", 1000) is None
    assert cache.peek(b"k", 1000) is None
    await cache.put(b"k", entry(now=1000))
    assert cache.peek(b"k", 1010) == entry(now=1000)
    assert cache.peek(b"k", 1010, max_age=9) is None
    assert await cache.get(b"k", 1010, max_age=10) is not None
    assert await cache.get(b"k", 1010, max_age=9) is None
    statistics = cache.statistics()
    assert (statistics.hits, statistics.misses, statistics.stale, statistics.stores) == (2, 1, 1, 1)
    assert (statistics.entries, statistics.bytes) == (1, entry().size)
    assert entry(now=1000).age(1010) == 10
    assert entry(now=1000).age(990) == 0, "a clock set back is no negative age"


async def test_a_large_answer_is_not_kept() -> None:
    cache = PromptCache(MemoryBackend(max_bytes=10**6, max_entries=10, ttl_s=600), max_entry_bytes=2000)
    assert not await cache.put(b"k", entry("x" * 2000))
    assert await cache.put(b"k", entry("x" * 1000))
    assert cache.statistics().refused == 1


@pytest.mark.parametrize(
    ("route", "answer"),
    [
        (CHAT, {"error": {"message": "no"}}),
        (CHAT, {"choices": []}),
        (CHAT, {"choices": [{"finish_reason": "abort"}]}),
        (CHAT, {"choices": [{"finish_reason": "stop"}, {"finish_reason": None}]}),
        ("/v1/responses", {"status": "failed"}),
        ("/v1/responses", {"status": "incomplete", "incomplete_details": {"reason": "content_filter"}}),
        ("/v1/messages", {"type": "error", "error": {}}),
        ("/v1/messages", {"type": "message", "stop_reason": None}),
        ("/v1/embeddings", {"object": "error"}),
        ("/v1/models", {"data": []}),
    ],
)
def test_what_is_no_complete_answer_is_never_an_entry(route: str, answer: dict[str, object]) -> None:
    assert make_entry(answer, route=route, tenant="t", model="m", now=0) is None
    assert make_entry(orjson.dumps(answer), route=route, tenant="t", model="m", now=0) is None


@pytest.mark.parametrize("raw", [b"", b"[1]", b"oops", b'{"choices": ['])
def test_what_is_no_json_object_is_never_an_entry(raw: bytes) -> None:
    assert make_entry(raw, route=CHAT, tenant="t", model="m", now=0) is None


def test_settings() -> None:
    assert build_cache(ReuseSettings(enabled=False)) is None
    assert "MemoryBackend" in repr(build_cache(ReuseSettings()))
    with pytest.raises(ValidationError, match="redis_url is required"):
        ReuseSettings(backend="redis")
    with pytest.raises(ValidationError, match="Extra inputs"):
        ReuseSettings(sqlitepath="x")  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="redis_url"):
        build_cache(ReuseSettings(backend="redis", redis_url=SecretStr("http://nowhere")))
    assert all(field.description for field in ReuseSettings.model_fields.values())
