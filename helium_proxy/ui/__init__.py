"""The page at ``/helium/``: static package assets, no build step, nothing fetched from outside.

The page is public and holds no data; it reads the operator's JSON routes, which ask for the API key. Assets are
served under a path that contains a digest of all of them, so that they may be cached for ever and a new version is
seen at the next load; only the page itself is revalidated.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from types import MappingProxyType

from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

__all__ = ["Assets", "assets", "ui_routes"]

SECURITY_HEADERS: Mapping[str, str] = MappingProxyType(
    {
        "Content-Security-Policy": (
            "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        ),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
    }
)
_FOREVER = "public, max-age=31536000, immutable"
_REVALIDATE = "no-cache"
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True, slots=True)
class Assets:
    """Every file of the page, read once."""

    files: Mapping[str, bytes]
    """Path below ``static/`` → content; ``index.html`` has the version filled in."""
    version: str
    """Digest over all paths and contents: 16 hex digits."""


@functools.cache
def assets() -> Assets:
    """The package's own assets."""
    files = dict(_read(resources.files(__name__) / "static"))
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path}\0{len(files[path])}\0".encode() + files[path])
    version = digest.hexdigest()[:16]
    files["index.html"] = files["index.html"].replace(b"{{version}}", version.encode())
    return Assets(MappingProxyType(files), version)


def _read(folder: Traversable, prefix: str = "") -> list[tuple[str, bytes]]:
    found: list[tuple[str, bytes]] = []
    for entry in folder.iterdir():
        if entry.is_dir():
            found += _read(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(tuple(_TYPES)):
            found.append((prefix + entry.name, entry.read_bytes()))
    return found


async def _index(request: Request) -> Response:
    return _serve(request, "index.html", _REVALIDATE)


async def _asset(request: Request) -> Response:
    """An asset; of another version's path, the current file, so that a page loaded during an update still works."""
    current = request.path_params["version"] == assets().version
    return _serve(request, request.path_params["path"], _FOREVER if current else _REVALIDATE)


async def _redirect(request: Request) -> Response:
    return RedirectResponse("helium/", status_code=308)


def _serve(request: Request, path: str, cache_control: str) -> Response:
    content = assets().files.get(path)
    if content is None:
        return PlainTextResponse("not found\n", status_code=404, headers=dict(SECURITY_HEADERS))
    etag = f'"{assets().version}"'
    headers = {**SECURITY_HEADERS, "ETag": etag, "Cache-Control": cache_control}
    seen = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
    if etag in seen:
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=_TYPES[path[path.rindex(".") :]], headers=headers)


def ui_routes() -> list[Route]:
    """The routes to mount at the root of the gateway: ``/helium/``, ``/helium/assets/…``; ``/``, ``/helium`` lead
    to the page."""
    return [
        Route("/", _redirect, include_in_schema=False),
        Route("/helium", _redirect, include_in_schema=False),
        Route("/helium/", _index, include_in_schema=False),
        Route("/helium/assets/{version}/{path:path}", _asset, include_in_schema=False),
    ]
