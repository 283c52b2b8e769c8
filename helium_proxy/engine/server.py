"""The engine's HTTP face: vLLM's routes on the embedded engine."""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import time
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import orjson
import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from . import messages, openai, pooling
from .config import EngineConfig
from .core import EmbeddedEngine
from .faults import Faults
from .http import Aborted, ApiError, Call, token_list
from .publisher import Publisher
from .responses import Responses

Handler = Callable[[EmbeddedEngine, Call], Awaitable[None]]
VERSION = "0.32.0"
"""The vLLM version whose behaviour the engine follows, and reports."""


class Endpoint:
    """A route's ASGI app around a handler: reads the body, checks the model, turns errors into vLLM's form."""

    def __init__(self, engine: EmbeddedEngine, handler: Handler, load: list[int], faults: Faults | None) -> None:
        self._engine = engine
        self._handler = handler
        self._load = load  # one cell, shared by the routes that generate: how many calls they are at
        self._faults = faults  # None: not a route that generates

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = Call(scope, receive, send)
        if self._faults is not None:
            self._load[0] += 1
        try:
            if scope["method"] not in ("GET", "HEAD", "DELETE"):
                await call.read()
                model = call.body.get("model")
                if model is not None and model != self._engine.config.model:
                    raise ApiError(404, f"The model `{model}` does not exist.", param="model")
            if self._faults is not None:
                await self._faults.before(call)
            await self._handler(self._engine, call)
        except ApiError as error:
            if call.started:
                raise
            call.fault = None
            body = error.body()
            if scope["path"].startswith("/v1/messages"):
                body = {"type": "error", "error": {k: body["error"][k] for k in ("type", "message")}}
            await call.json(body, error.status)
        except Aborted:
            pass  # the server closes a connection whose response is not complete
        finally:
            if self._faults is not None:
                self._load[0] -= 1


async def models(engine: EmbeddedEngine, call: Call) -> None:
    name = engine.config.model
    card = {
        "id": name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "helium-engine",
        "root": name,
        "parent": None,
        "max_model_len": engine.config.context,
        "permission": [],
    }
    await call.json({"object": "list", "data": [card]})


async def tokenize(engine: EmbeddedEngine, call: Call) -> None:
    body = call.body
    if "messages" in body:
        tokens = openai.chat_prompt(engine, body).tokens
    elif isinstance(body.get("prompt"), str):
        tokens = engine.tokenizer.encode(body["prompt"])
    else:
        raise ApiError(400, "either prompt, a string, or messages must be given.", param="prompt")
    strings = [engine.tokenizer.piece(t) for t in tokens] if body.get("return_token_strs") else None
    await call.json(
        {
            "count": len(tokens),
            "max_model_len": engine.config.context,
            "tokens": tokens.tolist(),
            "token_strs": strings,
        }
    )


async def detokenize(engine: EmbeddedEngine, call: Call) -> None:
    tokens = call.body.get("tokens")
    ids = array("I") if tokens == [] else token_list(tokens)
    if ids is None:
        raise ApiError(400, "tokens must be a list of token ids.", param="tokens")
    await call.json({"prompt": engine.tokenizer.decode(ids)})


async def version(engine: EmbeddedEngine, call: Call) -> None:
    await call.json({"version": VERSION})


async def metrics(engine: EmbeddedEngine, call: Call) -> None:
    await call.raw(engine.metrics.render(), CONTENT_TYPE_LATEST.encode())


async def reset_prefix_cache(engine: EmbeddedEngine, call: Call) -> None:
    done = engine.scheduler.reset_prefix_cache()
    await call.raw(b"", b"text/plain", 200 if done else 503)


async def _no_such_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    body = ApiError(error.status_code, error.detail).body()
    return Response(orjson.dumps(body), error.status_code, media_type="application/json")


class _Authenticated:
    """vLLM's key check: only `/v1`, `/v2`, and a 401 whose `error` is a plain string."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._digest = hashlib.sha256(key.encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith(("/v1", "/v2")):
            call = Call(scope, receive, send)
            scheme, _, key = (call.header(b"authorization") or "").partition(" ")
            digest = hashlib.sha256(key.encode()).digest()
            if scheme.lower() != "bearer" or not secrets.compare_digest(digest, self._digest):
                await call.json({"error": "Unauthorized"}, 401)
                return
        await self._app(scope, receive, send)


def create_app(config: EngineConfig | None = None) -> ASGIApp:
    """The ASGI app of one engine, which lives from the app's start-up to its shutdown."""
    config = config or EngineConfig()
    publisher = Publisher(config) if config.kv_events is not None else None
    engine = EmbeddedEngine(config, publish=publisher.publish if publisher is not None else None)
    load = [0]
    faults = Faults()
    responses = Responses()

    async def health(engine: EmbeddedEngine, call: Call) -> None:
        well = engine.alive and faults.take("unhealthy") is None
        await call.raw(b"", b"text/plain", 200 if well else 503)

    async def server_load(engine: EmbeddedEngine, call: Call) -> None:
        await call.json({"server_load": load[0]})

    async def kv_event_sources(engine: EmbeddedEngine, call: Call) -> None:
        await call.json({} if publisher is None else {"0": publisher.describe()})

    generate: dict[str, Handler] = {
        "/v1/chat/completions": openai.chat,
        "/v1/completions": openai.completions,
        "/v1/responses": responses.create,
        "/v1/messages": messages.messages,
        "/v1/embeddings": pooling.embeddings,
        "/v1/rerank": pooling.rerank,
        "/rerank": pooling.rerank,
        "/v1/score": pooling.score,
        "/score": pooling.score,
    }
    other: list[tuple[str, str, Handler]] = [
        ("POST", "/v1/responses/{id}/cancel", responses.cancel),
        ("POST", "/v1/messages/count_tokens", messages.count_tokens),
        ("POST", "/tokenize", tokenize),
        ("POST", "/detokenize", detokenize),
        ("POST", "/reset_prefix_cache", reset_prefix_cache),
        ("POST", "/engine/faults", faults.handle),
        ("GET", "/engine/faults", faults.handle),
        ("DELETE", "/engine/faults", faults.handle),
        ("GET", "/v1/responses/{id}", responses.fetch),
        ("GET", "/v1/models", models),
        ("GET", "/health", health),
        ("GET", "/load", server_load),
        ("GET", "/version", version),
        ("GET", "/metrics", metrics),
        ("GET", "/kv_event_sources", kv_event_sources),
    ]
    routes = [
        Route(path, Endpoint(engine, handler, load, faults), methods=["POST"]) for path, handler in generate.items()
    ]
    routes += [Route(path, Endpoint(engine, handler, load, None), methods=[verb]) for verb, path, handler in other]

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[dict[str, Any]]:
        async with engine:
            yield {"engine": engine}
        if publisher is not None:
            publisher.close()

    app: ASGIApp = Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: _no_such_route})
    return app if engine.config.api_key is None else _Authenticated(app, engine.config.api_key)


def run_engine(config: EngineConfig, host: str = "127.0.0.1", port: int = 8100) -> None:
    """Serve one engine until SIGTERM or SIGINT; calls under way then have a second left, as vLLM drops them too."""
    uvicorn.run(
        create_app(config),
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=1,
    )
