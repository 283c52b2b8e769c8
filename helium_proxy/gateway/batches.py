"""``/v1/files`` and ``/v1/batches``: OpenAI's Batch API over the planner.

POST   /v1/files                  upload (multipart: file, purpose=batch)
GET    /v1/files                  the tenant's files (?limit=, ?after=, ?purpose=)
GET    /v1/files/{id}             one of them; /content: what is in it
DELETE /v1/files/{id}
POST   /v1/batches                start a batch over an uploaded file
GET    /v1/batches                the tenant's batches (?limit=, ?after=)
GET    /v1/batches/{id}           one of them
POST   /v1/batches/{id}/cancel
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Any

import orjson
from fastapi import APIRouter
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import Response

from helium_proxy.errors import InvalidRequest
from helium_proxy.gateway.http import read_body
from helium_proxy.planner.batch import Batches

_FORM_BYTES = 65_536
"""What a request may hold beside a file."""
_FORM_FIELDS = 16


async def body_of(request: Request, limit: int) -> bytes:
    """Raises `BodyTooLarge` or `ClientGone`."""
    return await read_body(dict(request.headers), request.receive, limit)


def parse_json(data: bytes) -> Any:
    """Raises `InvalidRequest`."""
    if not data:
        raise InvalidRequest("the body is empty")
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from None


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    data = orjson.dumps(content, option=orjson.OPT_NON_STR_KEYS)
    return Response(data, status, media_type="application/json", headers=headers)


async def _form_of(request: Request, limit: int) -> FormData:
    """A multipart form of one file and a few fields, of `limit` bytes in all, to be closed. Raises `InvalidRequest`,
    `BodyTooLarge` and `ClientGone`."""
    body = await body_of(request, limit)

    async def stream() -> AsyncGenerator[bytes]:
        yield body

    parser = MultiPartParser(request.headers, stream(), max_files=1, max_fields=_FORM_FIELDS)
    parser.spool_max_size = limit  # in memory, where the body is already
    try:
        return await parser.parse()
    except MultiPartException as error:
        raise InvalidRequest(f"not a multipart form: {error.message}") from None


def _page(request: Request, items: list[dict[str, Any]]) -> dict[str, Any]:
    """OpenAI's list with `limit` and `after`."""
    limit = request.query_params.get("limit", "100")
    if not (limit.isascii() and limit.isdigit() and 1 <= int(limit[:9]) <= 10_000):
        raise InvalidRequest("'limit' is a number from 1 to 10000", param="limit")
    after = request.query_params.get("after")
    start = next((i + 1 for i, item in enumerate(items) if item["id"] == after), 0) if after else 0
    shown = items[start : start + int(limit)]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": start + len(shown) < len(items),
    }


def batch_routes(batches: Batches, tenant_of: Callable[[Request], str], check_open: Callable[[], None]) -> APIRouter:
    """`check_open` raises when no new work is taken."""
    router = APIRouter()
    files, settings = batches.files, batches.files.settings

    @router.post("/v1/files")
    async def upload(request: Request) -> Response:
        tenant = tenant_of(request)
        kind = request.headers.get("content-type", "")
        if not kind.startswith("multipart/form-data"):
            raise InvalidRequest("upload as multipart/form-data with 'file' and 'purpose'")
        form = await _form_of(request, settings.max_file_bytes + _FORM_BYTES)
        try:
            file = form.get("file")
            if not isinstance(file, UploadFile):
                raise InvalidRequest("'file' is missing", param="file")
            if form.get("purpose") != "batch":
                raise InvalidRequest("'purpose' must be batch", param="purpose")
            content = await file.read()
        finally:
            await form.close()
        stored = await files.put(tenant, file.filename or "upload.jsonl", "batch", content)
        return json_response(stored.view())

    @router.get("/v1/files")
    async def list_files(request: Request) -> Response:
        found = [file.view() for file in files.mine(tenant_of(request))]
        purpose = request.query_params.get("purpose")
        return json_response(_page(request, [file for file in found if purpose in (None, file["purpose"])]))

    @router.get("/v1/files/{id_}")
    async def retrieve_file(request: Request, id_: str) -> Response:
        return json_response(files.get(tenant_of(request), id_).view())

    @router.get("/v1/files/{id_}/content")
    async def file_content(request: Request, id_: str) -> Response:
        content = await files.content(tenant_of(request), id_)
        return Response(content, media_type="application/octet-stream")

    @router.delete("/v1/files/{id_}")
    async def delete_file(request: Request, id_: str) -> Response:
        files.delete(tenant_of(request), id_)
        return json_response({"id": id_, "object": "file", "deleted": True})

    @router.post("/v1/batches")
    async def create(request: Request) -> Response:
        tenant = tenant_of(request)
        check_open()
        return json_response(batches.create(tenant, parse_json(await body_of(request, _FORM_BYTES))).view())

    @router.get("/v1/batches")
    async def list_batches(request: Request) -> Response:
        return json_response(_page(request, [batch.view() for batch in batches.mine(tenant_of(request))]))

    @router.get("/v1/batches/{id_}")
    async def retrieve(request: Request, id_: str) -> Response:
        return json_response(batches.get(tenant_of(request), id_).view())

    @router.post("/v1/batches/{id_}/cancel")
    async def cancel(request: Request, id_: str) -> Response:
        batch = batches.get(tenant_of(request), id_)
        await batches.cancel(batch)
        return json_response(batch.view())

    return router
