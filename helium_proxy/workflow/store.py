"""Where templates outlive a restart. `TemplateStore` is the interface; SQLite is the default."""

from __future__ import annotations

import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

_log = logging.getLogger(__name__)


class TemplateStore(Protocol):
    """Keeps one blob per template. `save` and `delete` must not block: they are called between requests."""

    def load(self) -> Iterator[tuple[str, bytes]]:
        """`(key, blob)` of everything stored, the most recently saved first."""

    def save(self, key: str, blob: bytes) -> None:
        """Keep `blob` under `key`, replacing what was there, some time soon."""

    def delete(self, key: str) -> None:
        """Forget `key`, some time soon."""

    def close(self) -> None:
        """Write what is still to be written, and stop."""


class MemoryTemplateStore:
    """A store that lasts as long as the object: for tests, and for several proxies in one process."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}

    def __repr__(self) -> str:
        return f"<MemoryTemplateStore {len(self.blobs)} templates>"

    def load(self) -> Iterator[tuple[str, bytes]]:
        yield from reversed(list(self.blobs.items()))

    def save(self, key: str, blob: bytes) -> None:
        self.blobs.pop(key, None)
        self.blobs[key] = blob

    def delete(self, key: str) -> None:
        self.blobs.pop(key, None)

    def close(self) -> None:
        pass


class SqliteTemplateStore:
    """One SQLite file, written by a thread of its own.

    Fails open: a file that cannot be opened, read or written costs the templates, is logged, and nothing else.
    """

    _MAX_QUEUE = 1_024

    def __init__(self, path: Path | str) -> None:
        self._path = Path(path)
        # Mutable state: writes not done yet; None ends the thread.
        self._queue: queue.Queue[tuple[str, bytes | None] | None] = queue.Queue(self._MAX_QUEUE)
        self._thread: threading.Thread | None = None
        self.errors = 0

    def __repr__(self) -> str:
        return f"<SqliteTemplateStore {self._path.name}, {self._queue.qsize()} writes queued>"

    def _connect(self) -> sqlite3.Connection:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        db = sqlite3.connect(self._path, timeout=5.0)
        try:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute(
                "CREATE TABLE IF NOT EXISTS templates "
                "(key TEXT PRIMARY KEY, blob BLOB NOT NULL, saved_at REAL NOT NULL)"
            )
        except sqlite3.Error:
            db.close()
            raise
        return db

    def load(self) -> Iterator[tuple[str, bytes]]:
        try:
            db = self._connect()
            try:
                rows = db.execute("SELECT key, blob FROM templates ORDER BY saved_at DESC").fetchall()
            finally:
                db.close()
        except (sqlite3.Error, OSError) as error:
            self.errors += 1
            _log.warning("templates cannot be read from %s: %s", self._path.name, error)
            return
        yield from ((str(key), bytes(blob)) for key, blob in rows)

    def save(self, key: str, blob: bytes) -> None:
        self._put(key, blob)

    def delete(self, key: str) -> None:
        self._put(key, None)

    def _put(self, key: str, blob: bytes | None) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._write, name="template-store", daemon=True)
            self._thread.start()
        try:
            self._queue.put_nowait((key, blob))
        except queue.Full:
            self.errors += 1

    def _write(self) -> None:
        db: sqlite3.Connection | None = None
        while (item := self._queue.get()) is not None:
            key, blob = item
            try:
                if db is None:
                    db = self._connect()
                with db:
                    if blob is None:
                        db.execute("DELETE FROM templates WHERE key = ?", (key,))
                    else:
                        db.execute("INSERT OR REPLACE INTO templates VALUES (?, ?, ?)", (key, blob, time.time()))
            except Exception as error:  # whatever it is, the next one is written all the same
                self.errors += 1
                _log.warning("template %r was not saved: %s", key, error)
        if db is not None:
            db.close()

    def close(self) -> None:
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(timeout=10.0)
            self._thread = None
