"""One answer as it arrives, read by many, each from its beginning and at its own pace.

Everything is kept until the window is full, so a late reader misses nothing. Beyond that, memory is bounded: what all
have read is dropped (late readers are then no longer possible), and the writer waits for the slowest, as it would for
its only one. A reader that is a whole window behind *while another has nothing left to read* is cut off: one stalled
client must not stall the rest.

A reader that has read everything need not be woken for the next chunk: if it said where chunks go (`Reader.push_to`),
the writer puts it there itself. That saves a turn of the loop and a switch of tasks for every chunk of a live stream.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from helium_proxy.errors import UpstreamFailed


class SharedStream:
    """A bounded broadcast buffer of byte chunks: one writer, many `Reader`s."""

    def __init__(self, window_bytes: int) -> None:
        self._window = window_bytes
        # State. `_chunks[i]` has index `_first + i`; `_bytes` is their sum. `_room` wakes the writer. `_error` is set
        # only when ended.
        self._chunks: deque[bytes] = deque()
        self._first = 0
        self._bytes = 0
        self._readers: set[Reader] = set()
        self._room = asyncio.Event()
        self._ended = False
        self._error: BaseException | None = None

    def __repr__(self) -> str:
        state = "ended" if self._ended else "open"
        return f"SharedStream({state}, {self._bytes} B, {len(self._readers)} readers)"

    @property
    def whole(self) -> bool:
        """Whether the buffer still holds the beginning: a new reader would miss nothing."""
        return self._first == 0

    @property
    def buffered(self) -> int:
        """Bytes held."""
        return self._bytes

    def reader(self) -> Reader:
        """A reader at the beginning. Only while `whole`."""
        assert self.whole, "the beginning is gone"
        reader = Reader(self)
        self._readers.add(reader)
        return reader

    async def write(self, chunk: bytes) -> None:
        """Append a chunk; returns when the buffer is within its window."""
        if not chunk:
            return
        self._chunks.append(chunk)
        self._bytes += len(chunk)
        for reader in tuple(self._readers):
            reader._offer(chunk)
        while self._bytes > self._window and not self._make_room():
            await self._room.wait()

    def end(self, error: BaseException | None = None) -> None:
        """No more chunks. With an error, readers meet it after the last one. Later calls do nothing."""
        if self._ended:
            return
        self._ended = True
        self._error = error
        for reader in self._readers:
            reader._wake()

    def _make_room(self) -> bool:
        """Drop what all have read; cut off who holds up the rest. True when the buffer is within its window."""
        while self._bytes > self._window:
            slowest = min((reader.position for reader in self._readers), default=self._first + len(self._chunks))
            if slowest > self._first:
                self._drop(slowest - self._first)
                continue
            end = self._first + len(self._chunks)
            if not any(reader.position == end for reader in self._readers):
                return False
            for reader in [r for r in self._readers if r.position == slowest]:
                reader.cut = True
                self._readers.discard(reader)
        return True

    def _drop(self, count: int) -> None:
        for _ in range(count):
            self._bytes -= len(self._chunks.popleft())
        self._first += count

    def _next(self, reader: Reader) -> bytes | None:
        """The reader's next chunk; None: it is still to come. Raises what ends the stream."""
        if reader.cut:
            raise UpstreamFailed("this client reads too slowly and fell behind the answer it shares")
        offset = reader.position - self._first
        if offset < len(self._chunks):
            chunk = self._chunks[offset]
            reader.position += 1
            if self._bytes > self._window:  # else the writer does not wait
                self._wake_writer()
            return chunk
        if self._ended:
            if self._error is not None:
                raise self._error
            raise StopAsyncIteration
        return None

    def _leave(self, reader: Reader) -> None:
        self._readers.discard(reader)
        self._wake_writer()

    def _wake_writer(self) -> None:
        """And leave the event clear for the next time it waits."""
        self._room.set()
        self._room.clear()


class Reader:
    """An async iterator over a `SharedStream`, from its first chunk. One task reads it."""

    def __init__(self, stream: SharedStream) -> None:
        self._stream = stream
        # State: index of the next chunk, and whether the stream went on without it. `_waiter` is there while all is
        # read and the task waits for more.
        self.position = 0
        self.cut = False
        self._push: Callable[[bytes], bool] | None = None
        self._waiter: asyncio.Future[None] | None = None

    def __repr__(self) -> str:
        return f"Reader(at {self.position} of {self._stream!r})"

    def __aiter__(self) -> Reader:
        return self

    async def __anext__(self) -> bytes:
        while (chunk := self._stream._next(self)) is None:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return chunk

    def push_to(self, push: Callable[[bytes], bool]) -> None:
        """From now on chunks that come while the reader waits are given to `push`, and only those that it does not
        take (False) are read. It must neither block nor raise."""
        self._push = push

    def leave(self) -> None:
        """Stop reading; the stream no longer waits for this reader."""
        self._stream._leave(self)

    def _offer(self, chunk: bytes) -> None:
        """A chunk was written. Who does not wait comes for it by itself."""
        if self._waiter is None:
            return
        if self._push is not None and self._push(chunk):
            self.position += 1
        else:
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None:
            if not self._waiter.done():
                self._waiter.set_result(None)
            self._waiter = None
