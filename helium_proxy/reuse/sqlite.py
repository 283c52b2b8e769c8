"""The prompt cache in one SQLite file: survives a restart, shared by the processes of one machine.

All statements run on one thread of its own, so the event loop never waits for the disk. Write-ahead logging lets
other processes read meanwhile. Reads note their use in memory and the next write saves it, so a hit writes nothing.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import msgspec
import structlog

from helium_proxy.errors import ConfigError
from helium_proxy.reuse.entry import Entry
from helium_proxy.reuse.prompt_cache import BackendStatistics, PurgeFilter

_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
    key BLOB PRIMARY KEY, tenant TEXT NOT NULL, model TEXT NOT NULL, workflow TEXT NOT NULL,
    created_at REAL NOT NULL, used_at REAL NOT NULL, size INTEGER NOT NULL, entry BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS answers_used ON answers (used_at, size);
CREATE INDEX IF NOT EXISTS answers_created ON answers (created_at);
"""
_USES_KEPT = 1024
_LOW_WATER = 0.9
"""Eviction goes down to this share of the bound, so that it does not run at every write."""

T = TypeVar("T")
log = structlog.get_logger(__name__)
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Entry).decode


class SqliteBackend:
    """A `Backend` over the file `path`, bounded in bytes (as accounted by `Entry.size`) and entries."""

    def __init__(self, path: Path, *, max_bytes: int, max_entries: int, ttl_s: float) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._max_entries = max_entries
        self._ttl_s = ttl_s
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="helium-cache")
        # State, touched by the one thread only: uses not yet saved (key → Unix time), and totals as of the last
        # write by this process (other processes' writes are seen at eviction).
        self._uses: dict[bytes, float] = {}
        self._entries = self._bytes = self._evictions = 0
        try:
            self._db = self._thread.submit(self._open).result()
        except (sqlite3.Error, OSError) as error:
            self._thread.shutdown()
            raise ConfigError(f"reuse.sqlite_path {path}: {error}", param="reuse.sqlite_path") from error

    def __repr__(self) -> str:
        return f"SqliteBackend({self._path.name}, {self._entries} entries, {self._bytes}/{self._max_bytes} B)"

    async def get(self, key: bytes, now: float) -> Entry | None:
        return await self._run(lambda: self._get(key, now))

    async def set(self, key: bytes, entry: Entry) -> None:
        await self._run(lambda: self._set(key, entry))

    async def purge(self, which: PurgeFilter) -> int:
        asked = [("tenant", which.tenant), ("model", which.model), ("workflow", which.workflow)]
        given = [(name, value) for name, value in asked if value is not None]
        where = " AND ".join(f"{name} = ?" for name, _ in given) or "TRUE"
        return await self._run(lambda: self._remove(where, [value for _, value in given]))

    async def close(self) -> None:
        await self._run(self._db.close)
        self._thread.shutdown(wait=False)

    def statistics(self) -> BackendStatistics:
        return BackendStatistics(self._entries, self._bytes, self._evictions)

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    # -- on the thread

    def _open(self) -> sqlite3.Connection:
        try:
            return self._connect()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):  # no permission, no such folder: the operator's to mend
                raise
            aside = self._path.with_suffix(self._path.suffix + ".corrupt")
            log.warning("prompt cache file is damaged; starting a new one", moved_to=aside.name, error=str(error))
            self._path.replace(aside)
            return self._connect()

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._path, timeout=1.0, check_same_thread=False)
        try:
            db.execute("PRAGMA auto_vacuum = INCREMENTAL")
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")  # a crash may lose the last answers, never the file
            if db.execute("PRAGMA user_version").fetchone()[0] not in (0, _SCHEMA_VERSION):
                db.execute("DROP TABLE IF EXISTS answers")
            db.executescript(_SCHEMA)
            db.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
            db.commit()
            self._count(db)
        except BaseException:
            db.close()
            raise
        return db

    def _get(self, key: bytes, now: float) -> Entry | None:
        row = self._db.execute(
            "SELECT entry FROM answers WHERE key = ? AND created_at >= ?", (key, now - self._ttl_s)
        ).fetchone()
        if row is None:
            return None
        if len(self._uses) < _USES_KEPT:
            self._uses[key] = now
        return _decode(row[0])

    def _set(self, key: bytes, entry: Entry) -> None:
        now = entry.created_at
        with self._db as db:
            if self._uses:
                db.executemany(
                    "UPDATE answers SET used_at = ? WHERE key = ?", [(at, k) for k, at in self._uses.items()]
                )
                self._uses.clear()
            old = db.execute("SELECT size FROM answers WHERE key = ?", (key,)).fetchone()
            row = (key, entry.tenant, entry.model, entry.workflow, now, now, entry.size, _encode(entry))
            db.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
            self._entries += old is None
            self._bytes += entry.size - (old[0] if old else 0)
            if self._bytes > self._max_bytes or self._entries > self._max_entries:
                self._evict(db, now)

    def _evict(self, db: sqlite3.Connection, now: float) -> None:
        """Expired answers first, then the least recently used, down to the low-water mark."""
        self._evictions += db.execute("DELETE FROM answers WHERE created_at < ?", (now - self._ttl_s,)).rowcount
        self._count(db)
        if self._bytes <= self._max_bytes and self._entries <= self._max_entries:
            return
        doomed: list[tuple[int]] = []
        for rowid, size in db.execute("SELECT rowid, size FROM answers ORDER BY used_at, rowid"):
            if self._bytes <= self._max_bytes * _LOW_WATER and self._entries <= self._max_entries * _LOW_WATER:
                break
            doomed.append((rowid,))
            self._bytes -= size
            self._entries -= 1
        db.executemany("DELETE FROM answers WHERE rowid = ?", doomed)
        self._evictions += len(doomed)

    def _remove(self, where: str, values: list[bytes] | list[str]) -> int:
        with self._db as db:
            removed = db.execute(f"DELETE FROM answers WHERE {where}", values).rowcount
        self._count(self._db)
        self._db.execute("PRAGMA incremental_vacuum").fetchall()  # give the pages back to the file system
        return removed

    def _count(self, db: sqlite3.Connection) -> None:
        self._entries, self._bytes = db.execute("SELECT COUNT(*), COALESCE(SUM(size), 0) FROM answers").fetchone()
