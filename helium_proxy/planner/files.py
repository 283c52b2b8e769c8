"""Files of the Batch API: uploads and results, per tenant, bounded in size, number and time.

Contents lie in a folder (``files_dir``), each beside a small JSON file that describes it and lets a restarted process
find it again, or in memory when no folder is set.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson
import structlog

from helium_proxy.errors import BodyTooLarge, NotFound, QueueFull
from helium_proxy.planner.settings import PlanSettings

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class StoredFile:
    """Times in seconds since the epoch."""

    id: str
    tenant: str
    filename: str
    purpose: str
    bytes: int
    created_at: int
    expires_at: int

    def view(self) -> dict[str, Any]:
        """OpenAI's file object."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.bytes,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
        }


@dataclass(frozen=True, slots=True)
class FileStatistics:
    files: int
    bytes: int


class FileStore:
    """All files of all tenants."""

    def __init__(self, settings: PlanSettings, wall: Callable[[], float]) -> None:
        self.settings = settings
        self._wall = wall
        # All mutable state: files, oldest first; contents when in memory.
        self._files: OrderedDict[str, StoredFile] = OrderedDict()
        self._contents: dict[str, bytes] = {}
        self._folder = settings.files_dir
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._recover(self._folder)

    def __repr__(self) -> str:
        return f"<FileStore {self.statistics()}>"

    def statistics(self) -> FileStatistics:
        return FileStatistics(len(self._files), sum(file.bytes for file in self._files.values()))

    def _recover(self, folder: Path) -> None:
        found = []
        for described in folder.glob("file-*.json"):
            try:
                file = StoredFile(**orjson.loads(described.read_bytes()))
                whole = (folder / file.id).stat().st_size == file.bytes and described.stem == file.id
            except (OSError, ValueError, TypeError) as error:
                log.warning("files.unreadable", file=described.name, error=str(error))
                continue
            if whole:
                found.append(file)
        for file in sorted(found, key=lambda file: file.created_at):
            self._files[file.id] = file

    def expire(self) -> None:
        """Drop files whose time has passed."""
        now = self._wall()
        for id_ in [id_ for id_, file in self._files.items() if file.expires_at <= now]:
            self._drop(id_)

    def check_room(self, size: int = 0) -> None:
        """Raises `BodyTooLarge` and `QueueFull` where an upload of `size` bytes would be."""
        settings = self.settings
        if size > settings.max_file_bytes:
            raise BodyTooLarge(f"the file has {size:,} bytes: at most {settings.max_file_bytes:,} are taken")
        self.expire()
        now = self.statistics()
        if now.files >= settings.max_files or now.bytes + size > settings.max_files_bytes:
            raise QueueFull("no room for another file: delete some", retry_after=60)

    async def put(self, tenant: str, filename: str, purpose: str, content: bytes, *, own: bool = False) -> StoredFile:
        """Keep a file. One of our `own` has room always: a batch, whose results it holds, is not begun without
        (`check_room`). Raises `BodyTooLarge`, or `QueueFull` when no room is left."""
        if not own:
            self.check_room(len(content))
        created = int(self._wall())
        expires = created + max(1, int(self.settings.file_ttl_s))
        file = StoredFile(
            f"file-{secrets.token_hex(12)}", tenant, filename[:255], purpose, len(content), created, expires
        )
        self._files[file.id] = file  # before the write: it counts against the limits from now on
        try:
            if self._folder is None:
                self._contents[file.id] = content
            else:
                await asyncio.to_thread(_write, self._folder, file, content)
        except BaseException:
            self._drop(file.id)
            raise
        return file

    def get(self, tenant: str, id_: str) -> StoredFile:
        """Raises `NotFound`, also for another tenant's file."""
        self.expire()
        file = self._files.get(id_)
        if file is None or file.tenant != tenant:
            raise NotFound(f"no file {id_[:64]!r}", param="file_id")
        return file

    async def content(self, tenant: str, id_: str) -> bytes:
        file = self.get(tenant, id_)
        if self._folder is None:
            return self._contents[file.id]
        try:
            return await asyncio.to_thread((self._folder / file.id).read_bytes)
        except FileNotFoundError:
            self._drop(file.id)
            raise NotFound(f"no file {id_[:64]!r}", param="file_id") from None

    def mine(self, tenant: str) -> list[StoredFile]:
        """The tenant's files, newest first."""
        self.expire()
        return [file for file in reversed(self._files.values()) if file.tenant == tenant]

    def delete(self, tenant: str, id_: str) -> None:
        self._drop(self.get(tenant, id_).id)

    def _drop(self, id_: str) -> None:
        self._files.pop(id_, None)
        self._contents.pop(id_, None)
        if self._folder is not None:
            for path in (self._folder / f"{id_}.json", self._folder / id_):
                path.unlink(missing_ok=True)


def _write(folder: Path, file: StoredFile, content: bytes) -> None:
    """Content first, description last and whole: what has a description has its content."""
    (folder / file.id).write_bytes(content)
    described = folder / f".{file.id}.part"
    described.write_bytes(orjson.dumps(asdict(file)))
    os.replace(described, folder / f"{file.id}.json")
