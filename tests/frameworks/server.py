"""A model server that frameworks are pointed at: it shows every call to `Workflows`, and answers by script.

The base URL's first path part is the tenant, the second a label that only the truth is told about:
``http://host/TENANT/LABEL/v1``. What the workflow room sees is an untagged call on ``/v1/…``.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import orjson
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from helium_proxy.types import CallRequest, Outcome
from helium_proxy.workflow import Workflows, WorkflowSettings, reply_of
from helium_proxy.workflow.prompt import text_of

from . import model


@dataclass(frozen=True)
class Seen:
    """One call as it was: where it truly belongs, and what was inferred."""

    call: str
    label: str
    role: str
    """With its occurrence within the label: ``Writer#2``."""
    tenant: str


@dataclass
class Recorder:
    """The app's state: what arrived, in order."""

    workflows: Workflows = field(default_factory=lambda: Workflows(WorkflowSettings()))
    seen: list[Seen] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    counts: dict[tuple[str, str], int] = field(default_factory=dict)
    ids: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/{tenant}/{label}/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/{tenant}/{label}/v1/responses", self.responses, methods=["POST"]),
                Route("/{tenant}/{label}/v1/models", self.models),
            ]
        )

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "gpt-4o-mini", "object": "model"}]})

    def _arrive(self, request: Request, route: str, body: Mapping[str, Any], texts: list[str]) -> str:
        tenant, label = request.path_params["tenant"], request.path_params["label"]
        call = f"chatcmpl-{next(self.ids):05}"
        role = model.role_of(texts)
        count = self.counts[(label, role)] = self.counts.get((label, role), 0) + 1
        headers = {key.lower(): value for key, value in request.headers.items()}
        self.workflows.arrive(
            CallRequest(call, tenant, route, str(body.get("model")), body, headers), time.monotonic()
        )
        self.seen.append(Seen(call, label, role if count == 1 else f"{role}#{count}", tenant))
        self.bodies.append({"label": label, "role": role, "body": body})
        return call

    def _finish(self, call: str, response: Mapping[str, Any]) -> None:
        reply = reply_of(response)
        self.workflows.finished(
            call,
            Outcome(
                "computed",
                reply_text=reply.text,
                reply_tool_calls=reply.tool_calls,
                reply_id=reply.id,
                prompt_tokens=100,
                output_tokens=10,
            ),
            time.monotonic(),
        )

    async def chat(self, request: Request) -> Response:
        body = orjson.loads(await request.body())
        texts = [text_of(message) for message in body["messages"]]
        call = self._arrive(request, "/v1/chat/completions", body, texts)
        await asyncio.sleep(0.02)  # parallel calls overlap, as they would
        said = model.answer(texts, [message["role"] for message in body["messages"]], body)
        message: dict[str, Any] = {"role": "assistant", "content": said.text or None}
        if said.tool:
            function = {"name": said.tool, "arguments": said.arguments}
            message["tool_calls"] = [{"id": f"call_{call[9:]}", "type": "function", "function": function}]
        reason = "tool_calls" if said.tool else "stop"
        usage = {"prompt_tokens": 100, "completion_tokens": said.tokens, "total_tokens": 100 + said.tokens}
        response = {
            "id": call,
            "object": "chat.completion",
            "created": 1_700_000_000,
            "model": body["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": reason, "logprobs": None}],
            "usage": usage,
        }
        self._finish(call, response)
        if body.get("stream"):
            return StreamingResponse(self._chunks(response), media_type="text/event-stream")
        return JSONResponse(response)

    async def _chunks(self, response: Mapping[str, Any]) -> AsyncIterator[bytes]:
        choice = response["choices"][0]
        head = {"id": response["id"], "object": "chat.completion.chunk", "created": 1, "model": response["model"]}
        delta = dict(choice["message"])
        if delta.get("tool_calls"):
            delta["tool_calls"] = [{"index": 0, **delta["tool_calls"][0]}]
        for part, reason in ((delta, None), ({}, choice["finish_reason"])):
            chunk = {**head, "choices": [{"index": 0, "delta": part, "finish_reason": reason}]}
            yield b"data: " + orjson.dumps(chunk) + b"\n\n"
        yield b"data: " + orjson.dumps({**head, "choices": [], "usage": response["usage"]}) + b"\n\n"
        yield b"data: [DONE]\n\n"

    async def responses(self, request: Request) -> Response:
        body = orjson.loads(await request.body())
        items = body["input"] if isinstance(body["input"], list) else [{"role": "user", "content": body["input"]}]
        texts = [body.get("instructions") or "", *(text_of(item) for item in items)]
        roles = ["tool" if item.get("type") == "function_call_output" else item.get("role", "") for item in items]
        call = self._arrive(request, "/v1/responses", body, texts)
        await asyncio.sleep(0.02)
        said = model.answer(texts, roles, body)
        if said.tool:
            name = {"name": said.tool, "arguments": said.arguments}
            output = {"type": "function_call", "id": f"fc_{call[9:]}", "call_id": f"call_{call[9:]}", **name}
        else:
            part = {"type": "output_text", "text": said.text, "annotations": [], "logprobs": []}
            output = {"type": "message", "id": f"msg_{call[9:]}", "role": "assistant", "content": [part]}
        usage = {
            "input_tokens": 100,
            "output_tokens": said.tokens,
            "total_tokens": 100 + said.tokens,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens_details": {"reasoning_tokens": 0},
        }
        response = {
            "id": f"resp_{call[9:]}",
            "object": "response",
            "created_at": 1_700_000_000,
            "status": "completed",
            "model": body["model"],
            "output": [{"status": "completed", **output}],
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": body.get("tools") or [],
            "usage": usage,
        }
        self._finish(call, response)
        return JSONResponse(response)


@contextmanager
def serving(recorder: Recorder) -> Any:
    """Serve `recorder` on a free port of this machine; yields the URL without tenant and label."""
    server = uvicorn.Server(uvicorn.Config(recorder.app(), port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        if time.monotonic() > deadline:
            raise RuntimeError("the recording server did not start")
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)
