"""The barest proxy in the same stack as ours (FastAPI, aiohttp, uvicorn): the yardstick of what a proxy must cost.

    python -m benchmarks.bare_proxy --port 9001 --upstream http://127.0.0.1:9000

It forwards bytes and looks at nothing but the upstream's content type.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import click
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse


def create_app(upstream: str) -> FastAPI:
    session: aiohttp.ClientSession

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        nonlocal session
        session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=3.0))
        yield
        await session.close()

    app = FastAPI(lifespan=lifespan)

    @app.get("/health")
    async def health() -> Response:
        return Response()

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        answer = await session.post(
            f"{upstream}/v1/chat/completions",
            data=await request.body(),
            headers={"content-type": "application/json"},
        )
        media = answer.content_type
        if media != "text/event-stream":
            return Response(await answer.read(), answer.status, media_type=media)

        async def relay() -> AsyncIterator[bytes]:
            async with answer:
                async for chunk in answer.content.iter_any():
                    yield chunk

        return StreamingResponse(relay(), answer.status, media_type=media)

    return app


@click.command()
@click.option("--port", required=True, type=int)
@click.option("--upstream", required=True)
def main(port: int, upstream: str) -> None:
    """Serve until killed."""
    uvicorn.run(create_app(upstream), host="127.0.0.1", port=port, access_log=False, log_level="warning")


if __name__ == "__main__":
    main()
