"""Whoever asked how, whoever led how: each gets the form it asked for."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest

from helium_proxy.reuse import StreamAssembler, StreamRenamer, changed, renamed_body
from helium_proxy.reuse.replay import events

from .answers import ANSWERS, CHAT, RESPONSES

EACH = pytest.mark.parametrize(("route", "answer"), ANSWERS.values(), ids=ANSWERS.keys())

USAGE = b',"usage":{"prompt_tokens":1,"total_tokens":1,"completion_tokens":0}}\n\n'


async def source(pieces: list[bytes], size: int = 9) -> AsyncIterator[bytes]:
    whole = b"".join(pieces)
    for start in range(0, len(whole), size):
        yield whole[start : start + size]


async def told(
    pieces: list[bytes], route: str, *, include_usage: bool = False, request: dict[str, Any] | None = None
) -> bytes:
    change = StreamRenamer(route, "mine", include_usage, request)
    return b"".join([out async for out in changed(source(pieces), change)])


def understood(route: str, stream: bytes) -> dict[str, Any] | None:
    assembler = StreamAssembler(route)
    assembler.feed(stream)
    return assembler.result()


@EACH
async def test_a_follower_has_its_own_id(route: str, answer: dict[str, Any]) -> None:
    out = await told(list(events(answer, route, True)), route, include_usage=True)
    assert understood(route, out) == {**answer, "id": "mine"}
    assert answer["id"].encode() not in out
    whole = renamed_body(orjson.dumps(answer), route, "mine")
    assert orjson.loads(whole) == {**answer, "id": "mine"}


async def test_usage_that_was_not_asked_for_is_left_out() -> None:
    _, answer = ANSWERS["chat"]
    out = await told(list(events(answer, CHAT, True)), CHAT)
    assert b"usage" not in out
    assert out.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("size", [1, 9, 10_000])
async def test_usage_that_is_told_whatever_was_asked_stays(size: int) -> None:
    """vLLM's --enable-force-include-usage: in every event, and once more at the end."""
    _, answer = ANSWERS["chat"]
    pieces = list(events(answer, CHAT, True))
    forced = [
        piece if b"[DONE]" in piece or b'"usage":{' in piece else piece.replace(b"\n\n", b"")[:-1] + USAGE
        for piece in pieces
    ]
    change = StreamRenamer(CHAT, None, include_usage=False)
    assert b"".join([out async for out in changed(source(forced, size), change)]) == b"".join(forced)


async def test_a_responses_follower_sees_its_own_metadata() -> None:
    _, answer = ANSWERS["responses"]
    asked = {"metadata": {"run": "two"}}
    streamed = await told(list(events(answer, RESPONSES, True)), RESPONSES, request=asked)
    for out in (streamed, renamed_body(orjson.dumps(answer), RESPONSES, "mine", asked)):
        assert b'"run":"two"' in out
        assert b'"run":"one"' not in out


async def test_a_stream_passes_event_by_event() -> None:
    _, answer = ANSWERS["chat"]
    pieces = list(events(answer, CHAT, True))

    async def one_by_one() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece
            heard.append(b"|")

    heard: list[bytes] = []
    async for out in changed(one_by_one(), StreamRenamer(CHAT, "mine", include_usage=True)):
        heard.append(out)  # noqa: PERF401 -- interleaved with the source's marks
    assert len(heard) == 2 * len(pieces)
    assert set(heard[1::2]) == {b"|"}, "nothing is held back until the next event"


@pytest.mark.parametrize("cut", [0, 7], ids=["between events", "in one"])
async def test_a_stream_that_breaks_off_keeps_what_was_whole(cut: int) -> None:
    """The event that finishes a choice waits for the usage event. Half of an event would swallow the error's."""
    _, answer = ANSWERS["chat"]
    *pieces, usage, _ = events(answer, CHAT, True)

    async def broken() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece
        if cut:
            yield usage[:cut]
        raise ConnectionError

    async def listen() -> None:
        async for chunk in changed(broken(), StreamRenamer(CHAT, None, include_usage=False)):
            heard.append(chunk)  # noqa: PERF401 -- what came before it broke

    heard: list[bytes] = []
    with pytest.raises(ConnectionError):
        await listen()
    assert b"".join(heard) == b"".join(pieces)


@EACH
async def test_a_broken_stream_is_never_told_as_a_whole_one(route: str, answer: dict[str, Any]) -> None:
    pieces = list(events(answer, route, True))[:-1]
    out = await told(pieces, route, include_usage=True)
    assert understood(route, out) is None


@pytest.mark.parametrize("body", [b"", b"oops", b"[1, 2]", b"\x00\x01", b'{"tokens":[1,2],"count":2}'])
def test_what_has_no_id_passes_unchanged(body: bytes) -> None:
    assert renamed_body(body, "/v1/embeddings", "mine") == body
