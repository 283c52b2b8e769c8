"""A real engine's stream, folded, is the answer without `stream`; and our replay of that reads alike."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

import pytest
from engines import EngineClient

from helium_proxy.reuse import StreamAssembler, as_sse, make_entry

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Tell me of the sea."}]
GREEDY = {"model": "demo", "temperature": 0, "ignore_eos": True, "max_tokens": 12}

REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, {**GREEDY, "messages": MESSAGES}),
    "chat, logprobs": (CHAT, {**GREEDY, "messages": MESSAGES, "logprobs": True, "top_logprobs": 2}),
    "chat, token ids": (CHAT, {**GREEDY, "messages": MESSAGES, "return_token_ids": True}),
    "completions": ("/v1/completions", {**GREEDY, "prompt": ["One", "Two"]}),
    "completions, logprobs": ("/v1/completions", {**GREEDY, "prompt": "One", "logprobs": 2}),
    "responses": (
        "/v1/responses",
        {"model": "demo", "temperature": 0, "input": "Tell me of the sea.", "max_output_tokens": 12},
    ),
    "messages": ("/v1/messages", {"model": "demo", "temperature": 0, "max_tokens": 12, "messages": MESSAGES}),
}

# What differs between any two runs of one request, or is null in one form and absent in the other.
OWN = {"id", "created", "created_at", "request_id", "metrics", "system_fingerprint", "prompt_tokens_details"}
OWN |= {"input_tokens_details", "cache_read_input_tokens", "cache_creation_input_tokens", "input_tokens"}


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if k not in OWN and v not in (None, [], {})}
    return [plain(item) for item in value] if isinstance(value, list) else value


def streamed(engine: EngineClient, route: str, body: dict[str, Any]) -> bytes:
    body = {**body, "stream": True}
    if route in (CHAT, "/v1/completions"):
        body["stream_options"] = {"include_usage": True}
    request = urllib.request.Request(
        f"{engine.url}{route}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return bytes(answer.read())


def folded(route: str, stream: bytes) -> dict[str, Any]:
    assembler = StreamAssembler(route)
    assembler.feed(stream)
    answer = assembler.result()
    assert answer is not None, (assembler, stream[-400:])
    return answer


@pytest.mark.vllm
@pytest.mark.parametrize("name", REQUESTS)
def test_a_stream_folds_into_the_answer_without_stream(vllm_engines: list[EngineClient], name: str) -> None:
    route, body = REQUESTS[name]
    whole = vllm_engines[0].post(route, body)
    stream = streamed(vllm_engines[0], route, body)
    live = folded(route, stream)
    assert plain(live) == plain(whole)

    entry = make_entry(whole, route=route, tenant="t", model="demo", now=0.0)
    assert entry is not None, whole
    replay = b"".join(as_sse(entry, "new", 0.0, include_usage=True))
    assert plain(folded(route, replay)) == plain(whole)
    kinds = [line for line in stream.split(b"\n") if line.startswith(b"event: ")]
    told = [line for line in replay.split(b"\n") if line.startswith(b"event: ")]
    assert set(told) == set(kinds), "the same kinds of events"
