"""Whoever asked how, whoever led how: each gets the form it asked for."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest

from helium_proxy.errors import UpstreamFailed
from helium_proxy.reuse import StreamAssembler, StreamRenamer, changed, gathered, retold
from helium_proxy.reuse.replay import events

from .answers import ANSWERS, CHAT, RESPONSES

EACH = pytest.mark.parametrize(("route", "answer"), ANSWERS.values(), ids=ANSWERS.keys())


async def source(pieces: list[bytes], size: int = 9) -> AsyncIterator[bytes]:
    whole = b"".join(pieces)
    for start in range(0, len(whole), size):
        yield whole[start : start + size]


async def told(
    pieces: list[bytes],
    route: str,
    *,
    from_stream: bool,
    to_stream: bool,
    include_usage: bool = False,
    request: dict[str, Any] | None = None,
) -> bytes:
    if from_stream and to_stream:
        change = StreamRenamer(route, "mine", include_usage, request)
        return b"".join([out async for out in changed(source(pieces), change)])
    if from_stream:
        return await gathered(source(pieces), route=route, new_id="mine", request=request)
    body, usage = b"".join(pieces), include_usage
    return b"".join(
        retold(body, route=route, to_stream=to_stream, new_id="mine", include_usage=usage, request=request)
    )


def understood(route: str, stream: bytes) -> dict[str, Any] | None:
    assembler = StreamAssembler(route)
    assembler.feed(stream)
    return assembler.result()


@EACH
@pytest.mark.parametrize("from_stream", [False, True])
@pytest.mark.parametrize("to_stream", [False, True])
async def test_every_combination(route: str, answer: dict[str, Any], from_stream: bool, to_stream: bool) -> None:
    original = list(events(answer, route, True)) if from_stream else [orjson.dumps(answer)]
    out = await told(original, route, from_stream=from_stream, to_stream=to_stream, include_usage=True)
    result = understood(route, out) if to_stream else orjson.loads(out)
    assert result == {**answer, "id": "mine"}
    assert answer["id"].encode() not in out


@pytest.mark.parametrize("from_stream", [False, True])
async def test_usage_that_was_not_asked_for_is_left_out(from_stream: bool) -> None:
    _, answer = ANSWERS["chat"]
    original = list(events(answer, CHAT, True)) if from_stream else [orjson.dumps(answer)]
    out = await told(original, CHAT, from_stream=from_stream, to_stream=True)
    assert b"usage" not in out
    assert out.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("from_stream", [False, True])
@pytest.mark.parametrize("to_stream", [False, True])
async def test_a_responses_follower_sees_its_own_metadata(from_stream: bool, to_stream: bool) -> None:
    _, answer = ANSWERS["responses"]
    original = list(events(answer, RESPONSES, True)) if from_stream else [orjson.dumps(answer)]
    asked = {"metadata": {"run": "two"}}
    out = await told(original, RESPONSES, from_stream=from_stream, to_stream=to_stream, request=asked)
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


@EACH
async def test_a_broken_stream_is_never_a_whole_body(route: str, answer: dict[str, Any]) -> None:
    pieces = list(events(answer, route, True))[:-1]
    with pytest.raises(UpstreamFailed, match="before its answer was complete"):
        await told(pieces, route, from_stream=True, to_stream=False)
    out = await told(pieces, route, from_stream=True, to_stream=True, include_usage=True)
    assert understood(route, out) is None, "nor is a streaming client led to believe so"


@pytest.mark.parametrize("body", [b"", b"oops", b"[]", b"{}", b'{"choices": [1]}'])
async def test_a_body_that_is_no_answer_becomes_no_stream(body: bytes) -> None:
    with pytest.raises(UpstreamFailed):
        await told([body], CHAT, from_stream=False, to_stream=True)


async def test_a_body_without_an_id_passes_unchanged() -> None:
    body = {"tokens": [1, 2], "count": 2}
    out = await told([orjson.dumps(body)], "/v1/embeddings", from_stream=False, to_stream=False)
    assert orjson.loads(out) == body
