"""The engine's HTTP face: vLLM's routes on the embedded engine."""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import time
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from . import openai
from .config import EngineConfig
from .core import EmbeddedEngine
from .http import Aborted, ApiError, Call, token_list

Handler = Callable[[EmbeddedEngine, Call], Awaitable[None]]
VERSION = "0.32.0"
"""The vLLM version whose behaviour the engine follows, and reports."""


class Endpoint:
    """A route's ASGI app around a handler: reads the body, checks the model, turns errors into vLLM's form."""

    def __init__(self, engine: EmbeddedEngine, handler: Handler, *, load: list[int] | None = None) -> None:
        self._engine = engine
        self._handler = handler
        self._load = load  # one cell, shared by the generation routes: how many calls they are at

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = Call(scope, receive, send)
        if self._load is not None:
            self._load[0] += 1
        try:
            if scope["method"] not in ("GET", "HEAD", "DELETE"):
                await call.read()
                model = call.body.get("model")
                if model is not None and model != self._engine.config.model:
                    raise ApiError(404, f"The model `{model}` does not exist.", param="model")
            await self._handler(self._engine, call)
        except ApiError as error:
            if call.started:
                raise
            await call.json(error.body(), error.status)
        except Aborted:
            if call.started:
                raise  # the server closes a connection whose response is not complete
        finally:
            if self._load is not None:
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


async def health(engine: EmbeddedEngine, call: Call) -> None:
    await call.raw(b"", b"text/plain", 200 if engine.alive else 503)


async def version(engine: EmbeddedEngine, call: Call) -> None:
    await call.json({"version": VERSION})


async def metrics(engine: EmbeddedEngine, call: Call) -> None:
    await call.raw(engine.metrics.render(), CONTENT_TYPE_LATEST.encode())


async def reset_prefix_cache(engine: EmbeddedEngine, call: Call) -> None:
    done = engine.scheduler.reset_prefix_cache()
    await call.raw(b"", b"text/plain", 200 if done else 503)


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
    engine = EmbeddedEngine(config)
    load = [0]

    async def server_load(engine: EmbeddedEngine, call: Call) -> None:
        await call.json({"server_load": load[0]})

    generate: dict[str, Handler] = {
        "/v1/chat/completions": openai.chat,
        "/v1/completions": openai.completions,
    }
    post: dict[str, Handler] = {
        "/tokenize": tokenize,
        "/detokenize": detokenize,
        "/reset_prefix_cache": reset_prefix_cache,
    }
    get: dict[str, Handler] = {
        "/v1/models": models,
        "/health": health,
        "/load": server_load,
        "/version": version,
        "/metrics": metrics,
    }
    routes = [Route(p, Endpoint(engine, h, load=load), methods=["POST"]) for p, h in generate.items()]
    routes += [Route(p, Endpoint(engine, h), methods=["POST"]) for p, h in post.items()]
    routes += [Route(p, Endpoint(engine, h), methods=["GET"]) for p, h in get.items()]

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[dict[str, Any]]:
        async with engine:
            yield {"engine": engine}

    app: ASGIApp = Starlette(routes=routes, lifespan=lifespan)
    return app if engine.config.api_key is None else _Authenticated(app, engine.config.api_key)


def run_engine(config: EngineConfig, host: str = "127.0.0.1", port: int = 8100) -> None:
    """Serve one engine until SIGTERM or SIGINT."""
    uvicorn.run(create_app(config), host=host, port=port, log_level="warning", access_log=False)
