"""The official OpenAI client against the engine, and the other wire forms it speaks."""

from __future__ import annotations

import json

import pytest
from openai import AsyncOpenAI

from helium_proxy.engine.profile import Profile

from .conftest import Client, Serve

QUESTION = [{"role": "user", "content": "What is the price?"}]
PARAMETERS = {"type": "object", "properties": {"q": {"type": "string"}}, "required": ["q"]}


def openai(client: Client) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=client.url + "/v1", api_key="none", max_retries=0)


async def test_chat_whole_and_streamed(serve: Serve) -> None:
    async with serve() as client, openai(client) as api:
        args = {"model": "demo", "messages": QUESTION, "max_tokens": 20}
        whole = await api.chat.completions.create(**args, n=2, logprobs=True, top_logprobs=2)  # type: ignore[call-overload]
        assert whole.choices[0].message.content != whole.choices[1].message.content
        assert len(whole.choices[0].logprobs.content) == whole.usage.completion_tokens / 2
        assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 2
        stream = await api.chat.completions.create(**args, stream=True)  # type: ignore[call-overload]
        text = "".join([chunk.choices[0].delta.content async for chunk in stream])
        assert text == whole.choices[0].message.content


async def test_a_call_forced_by_name_ends_with_stop(serve: Serve) -> None:
    tools = [{"type": "function", "function": {"name": n, "parameters": PARAMETERS}} for n in ("a", "b")]
    body = {"messages": QUESTION, "tools": tools, "tool_choice": {"type": "function", "function": {"name": "b"}}}
    async with serve() as client:
        choice = (await client.post("/v1/chat/completions", body))[1]["choices"][0]
        assert choice["finish_reason"] == "stop"
        assert choice["message"]["tool_calls"][0]["function"]["name"] == "b"


async def test_tools_stay_in_the_prompt_when_none_may_be_called(serve: Serve) -> None:
    tools = [{"type": "function", "function": {"name": "a", "parameters": PARAMETERS}}]
    async with serve() as client:

        async def ask(**fields: object) -> tuple[int, object]:
            answer = (await client.post("/v1/chat/completions", {"messages": QUESTION, "max_tokens": 9, **fields}))[1]
            return answer["usage"]["prompt_tokens"], answer["choices"][0]["message"]["tool_calls"]

        plain, _ = await ask()
        auto, _ = await ask(tools=tools)
        none, calls = await ask(tools=tools, tool_choice="none")
        assert none == auto > plain
        assert calls == []


@pytest.mark.parametrize("stream", [False, True])
async def test_tools(serve: Serve, stream: bool) -> None:
    tools = [{"type": "function", "function": {"name": "search", "parameters": PARAMETERS}}]
    async with serve() as client, openai(client) as api:
        args = {"model": "demo", "messages": QUESTION, "tools": tools, "tool_choice": "required"}
        if stream:
            made = await api.chat.completions.create(**args, stream=True)  # type: ignore[call-overload]
            chunks = [c.choices[0] async for c in made]
            calls = [t for c in chunks for t in c.delta.tool_calls or []]
            reason = chunks[-1].finish_reason
        else:
            choice = (await api.chat.completions.create(**args)).choices[0]  # type: ignore[call-overload]
            calls, reason = choice.message.tool_calls, choice.finish_reason
        assert reason == "tool_calls"
        assert calls[0].function.name == "search"
        assert set(json.loads(calls[0].function.arguments)) == {"q"}
        function = {"name": "search", "arguments": calls[0].function.arguments}
        call = {"id": calls[0].id, "type": "function", "function": function}
        follow = [
            *QUESTION,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": calls[0].id, "content": "42"},
        ]
        answer = await api.chat.completions.create(model="demo", messages=follow, tools=tools)  # type: ignore[call-overload]
        assert answer.choices[0].message.content
        assert answer.usage.prompt_tokens_details.cached_tokens > 16


async def test_json_schema(serve: Serve) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": PARAMETERS}}
    async with serve() as client, openai(client) as api:
        answer = await api.chat.completions.create(model="demo", messages=QUESTION, response_format=form)  # type: ignore[call-overload]
        assert set(json.loads(answer.choices[0].message.content)) == {"q"}


async def test_responses_are_kept_and_continued(serve: Serve) -> None:
    async with serve() as client, openai(client) as api:
        first = await api.responses.create(model="demo", input="Tell me of gold. " * 5, instructions="Be brief.")
        assert first.status == "completed"
        assert (await api.responses.retrieve(first.id)).output_text == first.output_text != ""
        second = await api.responses.create(
            model="demo", input="And silver?", previous_response_id=first.id, instructions="Be brief."
        )
        assert second.usage is not None
        assert first.usage is not None
        assert second.usage.input_tokens > first.usage.total_tokens
        assert second.usage.input_tokens_details.cached_tokens > first.usage.input_tokens - 16
        short = await api.responses.create(model="demo", input="x", max_output_tokens=3)
        assert short.status == "incomplete"


async def test_responses_stream(serve: Serve) -> None:
    async with serve() as client, openai(client) as api:
        whole = await api.responses.create(model="demo", input="Tell me", max_output_tokens=12)
        made = await api.responses.create(model="demo", input="Tell me", max_output_tokens=12, stream=True)
        events = [e async for e in made]
        assert [e.sequence_number for e in events] == list(range(len(events)))
        assert events[0].type == "response.created"
        assert events[-1].type == "response.incomplete"
        assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
        tools = [{"type": "function", "name": "search", "parameters": PARAMETERS}]
        args = {"model": "demo", "input": "x", "tools": tools, "tool_choice": "required"}
        events = [e async for e in await api.responses.create(**args, stream=True)]  # type: ignore[call-overload]
        (item,) = events[-1].response.output
        assert (item.type, item.name) == ("function_call", "search")


async def test_background_responses_can_be_cancelled(serve: Serve) -> None:
    async with serve(profile=Profile("slow", step_s=0.05)) as client, openai(client) as api:
        body = {"ignore_eos": True}
        made = await api.responses.create(model="demo", input="x", background=True, extra_body=body)
        assert made.status == "queued"
        await client.until("vllm:num_requests_running", 1)
        assert (await api.responses.cancel(made.id)).status == "cancelled"
        await client.until("vllm:num_requests_running", 0)
        status, _ = await client.post("/v1/responses/resp_none/cancel", {})
        assert status == 404


async def test_errors_in_anthropics_form(serve: Serve) -> None:
    async with serve() as client:
        for change, status in (({"max_tokens": None}, 400), ({"model": "other"}, 404), ({"messages": []}, 400)):
            body = {"model": "demo", "messages": QUESTION, "max_tokens": 3, **change}
            got, answer = await client.post("/v1/messages", body)
            assert (got, answer["type"]) == (status, "error")
            assert set(answer["error"]) == {"type", "message"}


async def test_messages_in_anthropics_form(serve: Serve) -> None:
    async with serve() as client:
        body = {"model": "demo", "system": "Be brief. " * 9, "messages": QUESTION, "max_tokens": 11}
        _, count = await client.post("/v1/messages/count_tokens", body)
        _, whole = await client.post("/v1/messages", body)
        assert whole["usage"]["input_tokens"] == count["input_tokens"]
        assert whole["stop_reason"] == "max_tokens"
        async with client.session.post(client.url + "/v1/messages", json={**body, "stream": True}) as answer:
            lines = (await answer.text()).splitlines()
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
        assert [e["type"] for e in events if e["type"] != "content_block_delta"] == [
            "message_start", "content_block_start", "content_block_stop", "message_delta", "message_stop",
        ]  # fmt: skip
        text = "".join(e["delta"]["text"] for e in events if e["type"] == "content_block_delta")
        assert text == whole["content"][0]["text"]
        usage = events[0]["message"]["usage"]
        assert usage["cache_read_input_tokens"] > 0
        assert usage["input_tokens"] + usage["cache_read_input_tokens"] == count["input_tokens"]
        tools = [{"name": "search", "input_schema": PARAMETERS}]
        body |= {"max_tokens": 99, "tools": tools}
        _, called = await client.post("/v1/messages", {**body, "tool_choice": {"type": "any"}})
        assert called["stop_reason"] == "tool_use"
        assert set(called["content"][0]["input"]) == {"q"}
        result = {"type": "tool_result", "tool_use_id": called["content"][0]["id"], "content": "7"}
        turns = [
            *QUESTION,
            {"role": "assistant", "content": called["content"]},
            {"role": "user", "content": [result]},
        ]
        _, last = await client.post("/v1/messages", {**body, "messages": turns})
        assert last["content"][0]["type"] == "text"
