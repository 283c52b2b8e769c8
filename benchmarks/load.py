"""Load on one server: closed-loop requests by wrk (a bare protocol where there is none), and paced streams."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from .stats import quantile

PATH = "/v1/chat/completions"
_WORDS = "word " * 780  # a body of 4 kB with the rest


@dataclass(frozen=True, slots=True)
class Load:
    """What a closed-loop load saw."""

    requests: int
    errors: int
    """Responses that are not 2xx, and broken connections."""
    seconds: float
    p50_ms: float
    p99_ms: float

    @property
    def rate(self) -> float:
        """Good responses a second."""
        return (self.requests - self.errors) / self.seconds


def body(number: int | str, tagged: bool, stream: bool = False, nonce: str = "") -> str:
    """One 4 kB chat request, unlike every other in its first words, so that no cache can answer it.

    `number` may be ``%d``, for a template."""
    tags = ""
    if tagged:
        run = f'"run":"r{nonce}{number}","node":"only","parents":[]'
        tags = f',"helium":{{"workflow":"overhead",{run}}}'
    streaming = ',"stream":true' if stream else ""
    content = f"{nonce} {number} {_WORDS}"
    return (
        f'{{"model":"demo","messages":[{{"role":"user","content":"{content}"}}],'
        f'"max_tokens":16,"temperature":0{streaming}{tags}}}'
    )


_SCRIPT = """
local n = 0
local template = [=[%s]=]
local headers = {["content-type"] = "application/json"}
request = function()
  n = n + 1
  return wrk.format("POST", "%s", headers, (string.gsub(template, "%%%%d", n)))
end
done = function(summary, latency, requests)
  local e = summary.errors
  io.write(string.format("JSON{\\"requests\\":%%d,\\"errors\\":%%d,\\"us\\":%%d,\\"p50\\":%%f,\\"p99\\":%%f}\\n",
    summary.requests, e.connect + e.read + e.write + e.status + e.timeout, summary.duration,
    latency:percentile(50), latency:percentile(99)))
end
"""


async def closed_loop(port: int, *, connections: int, seconds: float, tagged: bool, nonce: str) -> Load:
    """As many requests as `connections` clients get answered in `seconds`.

    Raises:
        RuntimeError: wrk failed.
    """
    if shutil.which("wrk") is None:
        return await _own_load(port, connections, seconds, tagged, nonce)
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(_SCRIPT % (body("%d", tagged, nonce=nonce), PATH))
        script.flush()
        process = await asyncio.create_subprocess_exec(
            *("wrk", "-t1", f"-c{connections}", f"-d{seconds:g}s", "--timeout", "30s", "-s", script.name),
            f"http://127.0.0.1:{port}",
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output = (await process.communicate())[0].decode()
    found = re.search(r"JSON(\{.*\})", output)
    if found is None:
        raise RuntimeError(f"wrk failed: {output}")
    seen = json.loads(found[1])
    return Load(seen["requests"], seen["errors"], seen["us"] / 1e6, seen["p50"] / 1e3, seen["p99"] / 1e3)


async def _own_load(port: int, connections: int, seconds: float, tagged: bool, nonce: str) -> Load:
    latencies: list[float] = []
    errors = 0
    end = time.perf_counter() + seconds

    async def one(client: int) -> None:
        nonlocal errors
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        number = 0
        while time.perf_counter() < end:
            number += 1
            began = time.perf_counter()
            writer.write(_request(body(number, tagged, nonce=f"{nonce}{client}")))
            head = await reader.readuntil(b"\r\n\r\n")
            found = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
            await reader.readexactly(int(found[1]) if found else 0)
            latencies.append(1e3 * (time.perf_counter() - began))
            errors += not head.startswith(b"HTTP/1.1 2")
        writer.close()

    began = time.perf_counter()
    await asyncio.gather(*(one(client) for client in range(connections)))
    took = time.perf_counter() - began
    return Load(len(latencies), errors, took, quantile(latencies, 0.5), quantile(latencies, 0.99))


def _request(payload: str) -> bytes:
    data = payload.encode()
    return (
        f"POST {PATH} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        f"content-length: {len(data)}\r\n\r\n"
    ).encode() + data


_STAMP = re.compile(rb'"content": ?"(\d{9,})"')


class _StreamClient(asyncio.Protocol):
    """Sends one streaming request and notes how old every chunk is when its bytes arrive."""

    def __init__(self, payload: bytes, ages_ns: list[int], ended: asyncio.Future[None]) -> None:
        self._payload = payload
        self._ages = ages_ns
        self._ended = ended
        self._tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        transport.write(self._payload)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        now = time.monotonic_ns()
        text = self._tail + data
        end = 0
        for found in _STAMP.finditer(text):
            self._ages.append(now - int(found[1]))
            end = found.end()
        self._tail = text[end:][-400:]
        if b"[DONE]" in self._tail:
            self._finish()

    def connection_lost(self, exc: Exception | None) -> None:
        self._finish()

    def _finish(self) -> None:
        if not self._ended.done():
            self._ended.set_result(None)
        self._transport.close()


async def streams(port: int, *, count: int, tagged: bool, nonce: str) -> tuple[float, float, int]:
    """Read `count` streams at once: each chunk's age on arrival, p50 and p99 in ms, and how many chunks came."""
    loop = asyncio.get_running_loop()
    ages: list[int] = []
    ends: list[asyncio.Future[None]] = []
    for number in range(count):
        ended = loop.create_future()
        payload = _request(body(number, tagged, stream=True, nonce=nonce))
        await loop.create_connection(
            lambda payload=payload, ended=ended: _StreamClient(payload, ages, ended),  # type: ignore[misc]
            "127.0.0.1",
            port,
        )
        ends.append(ended)
        await asyncio.sleep(0.3 / count)  # spread over the chunks' period
    await asyncio.wait(ends, timeout=60)
    millis = [age / 1e6 for age in ages]
    return quantile(millis, 0.5), quantile(millis, 0.99), len(millis)


def resident_mib(pid: int) -> float:
    """Resident memory of one process; 0 where there is no /proc."""
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        return 0.0
    found = re.search(r"VmRSS:\s+(\d+) kB", status.read_text())
    return int(found[1]) / 1024 if found else 0.0
