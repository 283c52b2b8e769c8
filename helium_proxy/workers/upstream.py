"""Sending a request to a worker, over aiohttp.

Foreign exceptions are translated here: a send either returns an `Upstream` whose head has arrived, or raises
`SendFailed` with what is known about the failure (no answer had begun, so the call may go elsewhere).
"""

from __future__ import annotations

import io
import time
from collections.abc import AsyncIterator, Mapping
from functools import lru_cache
from typing import Literal

import aiohttp
import yarl

from helium_proxy.workers.settings import WorkersSettings
from helium_proxy.workers.worker import Worker

FailureKind = Literal["refused", "lost", "timeout"]

# Hop-by-hop headers (RFC 9110, 7.6.1), and those the sending side sets anew.
HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)


# Bodies are read here as they come: no worker may compress them because aiohttp says by default that it may.
_OURS = {"Accept-Encoding": "identity"}

_LARGE = 2**20
"""Bytes; bodies of more aiohttp wants as files, to write them in pieces."""
_STALE_TRIES = 3
"""Kept connections to try before giving up: each try removes a dead one from the pool."""
_STALE_AT_ONCE_S = 0.25
"""A send that fails later than this had reached a worker."""


@lru_cache(maxsize=1024)
def _url(url: str) -> yarl.URL:
    """Parsed once: a `URL` also remembers what is asked of its parts."""
    return yarl.URL(url, encoded=True)


class SendFailed(Exception):
    """A worker gave no answer. `kind`: ``refused`` (no connection could be opened), ``lost`` (an open one broke),
    ``timeout``."""

    def __init__(self, kind: FailureKind, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind = kind


class Upstream:
    """A worker's answer whose status and headers have arrived and whose body is still to be read."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.status = response.status
        self.headers = response.headers

    def __repr__(self) -> str:
        return f"<Upstream {self.status}>"

    async def read(self) -> bytes:
        """The whole body. Raises SendFailed when the connection breaks before its end."""
        try:
            return await self._response.read()
        except TimeoutError as error:  # first: aiohttp's is a ClientError, too
            raise SendFailed("timeout", "the worker fell silent") from error
        except (aiohttp.ClientError, ConnectionError) as error:
            raise SendFailed("lost", repr(error)) from error
        finally:
            self._response.release()

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it arrives. Raises SendFailed when the connection breaks before its end."""
        content = self._response.content
        try:
            while chunk := await content.readany():
                yield chunk
        except TimeoutError as error:  # first: aiohttp's is a ClientError, too
            raise SendFailed("timeout", "the worker fell silent") from error
        except (aiohttp.ClientError, ConnectionError) as error:
            raise SendFailed("lost", repr(error)) from error
        finally:
            self.close()

    def close(self) -> None:
        """Ends the exchange; one whose body is not finished is cut, which makes the engine abort the request."""
        if self._response.content.is_eof():
            self._response.release()
        else:
            self._response.close()


class UpstreamClient:
    """The pool of connections to all workers."""

    def __init__(self, settings: WorkersSettings) -> None:
        self._timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=settings.connect_timeout_s, sock_read=settings.read_timeout_s
        )
        # The engine closes idle connections first if we do not: hence the short keep-alive.
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=settings.keepalive_s, ttl_dns_cache=30),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            read_bufsize=2**18,
            max_line_size=65536,
            max_field_size=65536,
        )

    async def send(
        self,
        worker: Worker,
        method: str,
        path: str,
        *,
        headers: Mapping[str, str],
        body: bytes | None,
        timeout_s: float | None = None,
    ) -> Upstream:
        """Sends and waits for the head of the answer. `path` carries its query string.

        A kept connection that turns out to be closed is replaced by a fresh one at once: nothing was answered,
        and it says nothing about the worker.
        """
        limits = self._timeout if timeout_s is None else aiohttp.ClientTimeout(total=timeout_s)
        failure: SendFailed | None = None
        for _ in range(_STALE_TRIES):
            sent = time.monotonic()
            try:
                response = await self._session.request(
                    method,
                    _url(worker.spec.url + path),
                    data=io.BytesIO(body) if body is not None and len(body) > _LARGE else body,
                    headers={**headers, **_OURS, **worker.headers},
                    allow_redirects=False,
                    timeout=limits,
                )
                return Upstream(response)
            except (aiohttp.ClientConnectorError, aiohttp.ClientSSLError, aiohttp.ConnectionTimeoutError) as error:
                raise SendFailed("refused", str(error)) from error
            except TimeoutError as error:
                raise SendFailed("timeout", "no answer in time") from error
            except (aiohttp.ClientError, ConnectionError) as error:
                # A connection that was kept too long breaks as soon as it is used. (aiohttp can tell whether it was a
                # kept one, but only by tracing every request, which costs a fifth of the send.)
                if time.monotonic() - sent > _STALE_AT_ONCE_S:
                    raise SendFailed("lost", repr(error)) from error
                failure = SendFailed("lost", repr(error))
        assert failure is not None
        raise failure

    async def close(self) -> None:
        await self._session.close()
