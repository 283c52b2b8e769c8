from __future__ import annotations

import asyncio

import pytest

from helium_proxy.errors import UpstreamFailed
from helium_proxy.reuse.shared import Reader, SharedStream


async def settle() -> None:
    """Let every task that can run do so."""
    for _ in range(20):
        await asyncio.sleep(0)


async def read_all(reader: Reader) -> bytes:
    return b"".join([chunk async for chunk in reader])


async def test_readers_see_everything_from_the_beginning_whenever_they_come() -> None:
    stream = SharedStream(1000)
    early = asyncio.create_task(read_all(stream.reader()))
    await stream.write(b"one ")
    await settle()
    middle = asyncio.create_task(read_all(stream.reader()))
    await stream.write(b"")
    await stream.write(b"two")
    stream.end()
    late = asyncio.create_task(read_all(stream.reader()))
    assert await asyncio.gather(early, middle, late) == [b"one two"] * 3


async def test_chunks_arrive_as_they_are_written() -> None:
    stream = SharedStream(1000)
    reader = stream.reader()
    first = asyncio.create_task(anext(reader))
    await settle()
    assert not first.done()
    await stream.write(b"a")
    assert await first == b"a"


async def test_an_error_comes_after_what_was_written() -> None:
    stream = SharedStream(1000)
    reader = stream.reader()
    await stream.write(b"a")
    stream.end(UpstreamFailed("broke"))
    stream.end()
    assert await anext(reader) == b"a"
    for _ in range(2):
        with pytest.raises(UpstreamFailed, match="broke"):
            await anext(reader)


async def test_memory_is_bounded_and_the_writer_waits_for_its_only_reader() -> None:
    stream = SharedStream(100)
    reader = stream.reader()

    async def write() -> None:
        for _ in range(50):
            await stream.write(b"x" * 10)
        stream.end()

    writer = asyncio.create_task(write())
    await settle()
    assert not writer.done()
    assert stream.buffered <= 110
    total = 0
    async for chunk in reader:
        total += len(chunk)
        await settle()
        assert stream.buffered <= 110
    assert total == 500
    assert not stream.whole
    await writer


async def test_a_late_reader_cannot_come_once_the_beginning_is_gone() -> None:
    stream = SharedStream(10)
    reader = asyncio.create_task(read_all(stream.reader()))
    for _ in range(5):
        await stream.write(b"x" * 10)
    assert not stream.whole
    with pytest.raises(AssertionError):
        stream.reader()
    stream.end()
    await reader


async def test_a_stalled_reader_is_cut_off_only_when_it_holds_up_another() -> None:
    stream = SharedStream(100)
    stalled = stream.reader()
    lively = stream.reader()

    async def write() -> None:
        for _ in range(50):
            await stream.write(b"x" * 10)
        stream.end()

    writer = asyncio.create_task(write())
    await settle()
    assert not stalled.cut, "nobody waits for more yet"
    assert len(await read_all(lively)) == 500
    assert stalled.cut
    with pytest.raises(UpstreamFailed, match="too slowly"):
        await anext(stalled)
    await writer


async def test_a_reader_that_leaves_frees_the_writer() -> None:
    stream = SharedStream(10)
    reader = stream.reader()
    writer = asyncio.create_task(stream.write(b"x" * 20))
    await settle()
    assert not writer.done()
    reader.leave()
    await settle()
    assert writer.done()
    assert stream.buffered == 0


async def test_a_cancelled_reader_takes_none_of_the_others_with_it() -> None:
    stream = SharedStream(1000)
    readers = [asyncio.create_task(read_all(stream.reader())) for _ in range(3)]
    await settle()
    readers[0].cancel()
    await settle()
    await stream.write(b"a")
    stream.end()
    assert await asyncio.gather(*readers[1:]) == [b"a", b"a"]
    assert readers[0].cancelled()
