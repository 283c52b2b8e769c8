from __future__ import annotations

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helium_proxy.reuse import cache_key, cacheable
from helium_proxy.reuse.key import IRRELEVANT

CHAT = "/v1/chat/completions"
BODY = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0, "max_tokens": 8}


def key(body: object = BODY, *, tenant: str = "t", model: str = "m", route: str = CHAT) -> bytes:
    assert isinstance(body, dict)
    return cache_key(tenant, model, route, body)


@pytest.mark.parametrize(
    ("route", "change", "expected"),
    [
        (CHAT, {}, True),
        (CHAT, {"temperature": 0.0}, True),
        (CHAT, {"temperature": None}, False),
        (CHAT, {"temperature": 0.1}, False),
        (CHAT, {"temperature": False}, False),
        (CHAT, {"temperature": "0"}, False),
        (CHAT, {"n": 1}, True),
        (CHAT, {"n": 2}, False),
        (CHAT, {"seed": 4}, True),
        (CHAT, {"kv_transfer_params": {"helium": {"pin": "x"}}}, True),
        (CHAT, {"kv_transfer_params": {"do_remote_decode": True}}, False),
        ("/v1/completions", {"messages": None, "prompt": "Hi"}, True),
        ("/v1/messages", {}, True),
        ("/v1/responses", {"input": "Hi"}, True),
        ("/v1/responses", {"store": True}, False),
        ("/v1/responses", {"store": False}, True),
        ("/v1/responses", {"previous_response_id": "resp_1"}, False),
        ("/v1/responses", {"background": True}, False),
        ("/v1/responses", {"tools": [{"type": "function", "name": "f"}]}, True),
        ("/v1/responses", {"tools": [{"type": "web_search"}]}, False),
        ("/v1/embeddings", {"temperature": None}, True),
        ("/tokenize", {"temperature": None}, False),
        ("/v1/score", {"temperature": None}, True),
        ("/v1/audio/speech", {}, False),
        ("/v1/models", {}, False),
    ],
)
def test_cacheable(route: str, change: dict[str, object], expected: bool) -> None:
    assert cacheable({**BODY, **change}, route) is expected


def test_temperature_must_be_said() -> None:
    assert not cacheable({k: v for k, v in BODY.items() if k != "temperature"}, CHAT)


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ({"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}, False),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}, True),
        ({"type": "image", "source": {"type": "url", "url": "http://example.org/a.png"}}, False),
        ({"type": "file", "file": {"file_id": "file-1"}}, False),
        ({"type": "text", "text": "see https://example.org"}, True),
    ],
)
def test_a_remote_file_may_change(part: dict[str, object], expected: bool) -> None:
    body = {**BODY, "messages": [{"role": "user", "content": [part]}]}
    assert cacheable(body, CHAT) is expected


@pytest.mark.parametrize("field", sorted(IRRELEVANT))
def test_irrelevant_fields_are_not_in_the_key(field: str) -> None:
    assert key({**BODY, field: "anything"}) == key()


@pytest.mark.parametrize(
    "same",
    [
        {"temperature": 0.0},
        {"max_tokens": 8.0},
        {"n": 1},
        {"n": None},
        {"store": None},
        {"stream": False},
        {"stream": None},
        {"kv_transfer_params": {"helium": {"pin": "a"}}},
        {"vllm_xargs": {"agentic_context": "{}"}},
        {"nvext": {"agent_hints": {"osl": 4}}},
    ],
)
def test_what_cannot_change_the_answer_does_not_change_the_key(same: dict[str, object]) -> None:
    assert key({**BODY, **same}) == key()


@pytest.mark.parametrize(
    "different",
    [
        {"temperature": 1},
        {"max_tokens": 9},
        {"n": 2},
        {"stream": True},
        {"store": False},
        {"top_p": 0.5},
        {"seed": 1},
        {"an_unknown_field": None},
        {"cache_salt": "s"},
        {"nvext": {"greed_sampling": True}},
        {"vllm_xargs": {"custom": 1}},
        {"logit_bias": {"1": 2}},
        {"messages": [{"role": "user", "content": "Hi "}]},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "user", "content": "Hi"}]},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"minimum": 0}}}]},
    ],
)
def test_what_can_change_the_answer_changes_the_key(different: dict[str, object]) -> None:
    assert key({**BODY, **different}) != key()


def test_numbers_of_a_tool_schema_are_text_to_the_model() -> None:
    whole, real = ({**BODY, "tools": [{"function": {"parameters": {"minimum": n}}}]} for n in (0, 0.0))
    assert key(whole) != key(real)
    assert key({**BODY, "logit_bias": {"1": 2}}) == key({**BODY, "logit_bias": {"1": 2.0}})


def test_tenant_model_and_route_are_apart_even_when_their_texts_run_together() -> None:
    keys = {
        key(),
        key(tenant="u"),
        key(model="n"),
        key(route="/v1/messages"),
        cache_key("a", "bc", CHAT, BODY),
        cache_key("ab", "c", CHAT, BODY),
        cache_key('a","b', "c", CHAT, BODY),
    }
    assert len(keys) == 7
    assert all(len(k) == 20 for k in keys)


def test_integers_beyond_64_bits_have_keys() -> None:
    assert key({**BODY, "seed": 1 << 80}) != key({**BODY, "seed": (1 << 80) + 1})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=6), JSON, max_size=5))
def test_the_order_of_a_body_s_own_fields_is_irrelevant(body: dict[str, object]) -> None:
    turned = dict(reversed(body.items()))
    before = orjson.dumps(body)
    assert key(body) == key(turned)
    assert orjson.dumps(body) == before, "the body is never changed"


@pytest.mark.parametrize("field", ["response_format", "tools", "chat_template_kwargs"])
def test_the_order_of_what_the_model_reads_or_writes_is_in_the_key(field: str) -> None:
    one = {"reason": {"type": "string"}, "answer": {"type": "string"}}
    other = dict(reversed(one.items()))
    assert key({**BODY, field: [{"properties": one}]}) != key({**BODY, field: [{"properties": other}]})


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/v1/rerank", {"query": "q", "documents": [{"content": [{"image_url": {"url": "http://cam/now.jpg"}}]}]}),
        ("/v1/score", {"data_1": {"content": [{"type": "image_url", "image_url": {"url": "http://x/a"}}]}}),
        (
            "/v1/responses",
            {"temperature": 0, "input": [{"output": [{"type": "input_image", "image_url": "http://x/a"}]}]},
        ),
    ],
)
def test_media_from_elsewhere_may_change_wherever_they_are(route: str, body: dict[str, object]) -> None:
    assert not cacheable({"model": "m", **body}, route)
    text = orjson.dumps(body).replace(b"http://", b"data:")
    assert cacheable({"model": "m", **orjson.loads(text)}, route)
