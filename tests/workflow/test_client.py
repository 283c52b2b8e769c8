"""Client help, and the code of docs/tagging.md run as it stands."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path

import httpx
import pytest
from frameworks.build_env import failure_of, python_of
from frameworks.server import Recorder, serving

from helium_proxy import client
from helium_proxy.workflow import WorkflowSettings, tags

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "tagging.md").read_text()
BLOCKS = re.findall(r"^```python ?(\w*)\n(.*?)^```", PAGE, re.M | re.S)
EXPECTED = {
    "trip-1": ("trip", ["plan", "book"], 1),
    "nightly-2025-03-11": ("nightly", None, 0),
    "day-1": ("trading", ["bull", "bear", "manager"], 2),
    "raw-1": ("raw", ["only"], 0),
    "article-1": ("article", ["write", "edit"], 1),
    "report-1": ("report", ["research", "write"], 1),
    "digest-1": ("digest", ["read", "digest"], 1),
}
"""Run → workflow, nodes, edges that each block of the page makes."""


@pytest.mark.parametrize(("framework", "code"), BLOCKS, ids=[re.search(r'[\w-]+-(?:1|11)"', b[1])[0] for b in BLOCKS])  # type: ignore[index]
def test_the_pages_code(framework: str, code: str) -> None:
    if framework and (reason := failure_of(framework)) is not None:
        pytest.skip(reason)
    python = str(python_of(framework)) if framework else sys.executable
    recorder = Recorder()
    with serving(recorder) as url:
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": os.environ.get("HOME", "/"),
            "PROXY": f"{url}/t/page/v1",
            "PYTHONPATH": str(ROOT),
            "OPENAI_AGENTS_DISABLE_TRACING": "1",
        }
        done = subprocess.run(
            [python, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False
        )
    assert done.returncode == 0, done.stderr
    [summary] = recorder.workflows.runs()
    workflow, nodes, edges = EXPECTED[summary["run"]]
    run = recorder.workflows.run(summary["run"])
    assert run is not None
    assert run["workflow"] == workflow
    assert nodes is None or [item["node"] for item in run["nodes"]] == nodes
    assert len(run["edges"]) == edges
    assert {edge["source"] for edge in run["edges"]} <= {"tag"}


def test_every_block_is_expected() -> None:
    assert len(BLOCKS) == len(EXPECTED)


def test_every_field_and_header_of_the_table_exists() -> None:
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| (`X-[\w-]+`(?:, `X-[\w-]+`)*) \|", PAGE, re.M)
    named = {name.strip("`") for fields, _ in rows for name in fields.split(", ")}
    sent = {name.strip("`").lower() for _, names in rows for name in names.split(", ")}
    assert named == set(tags.FIELDS)
    assert sent == set(tags.HEADERS)


def test_headers_nest_and_end() -> None:
    assert client.headers() == {}
    with client.workflow("w", priority=2) as run:
        assert len(run) == 32
        assert client.headers() == {"X-Helium-Workflow": "w", "X-Helium-Run": run, "X-Helium-Priority": "2"}
        with client.node("n", parents=["a", "b"], final=True, deadline_ms=500):
            assert client.headers() == {
                "X-Helium-Workflow": "w",
                "X-Helium-Run": run,
                "X-Helium-Node": "n",
                "X-Helium-Parents": "a,b",
                "X-Helium-Final": "true",
                "X-Helium-Deadline-Ms": "500",
                "X-Helium-Priority": "2",
            }
        assert "X-Helium-Node" not in client.headers()
    assert client.headers() == {}


def test_a_root_is_said_with_an_empty_header() -> None:
    with client.node("n", parents=[]):
        assert client.headers()["X-Helium-Parents"] == ""


def test_names_beyond_ascii_travel_in_baggage_and_arrive() -> None:
    with client.workflow("Händel", run="r"), client.node("größe", parents=["früher", "später"]):
        sent = {name.lower(): value for name, value in client.headers().items()}
        sent["baggage"].encode("ascii")
        read = tags.read({}, sent, WorkflowSettings(strict=True))
    assert (read.workflow, read.run, read.node, read.parents) == ("Händel", "r", "größe", ("früher", "später"))


@pytest.mark.parametrize("bad", ["", " ", "a,b", "a\nb", "x" * 129])
def test_bad_names_are_refused_where_they_are_given(bad: str) -> None:
    with pytest.raises(ValueError, match="1 to 128"), client.node(bad):
        pass


def test_set_final() -> None:
    with client.workflow("w", run="r"), client.node("n"):
        client.set_final()
        assert client.headers()["X-Helium-Final"] == "true"


def test_hooks_stamp_and_respect_what_is_there() -> None:
    seen: list[httpx.Headers] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers)
        return httpx.Response(200)

    with (
        client.http_client(transport=httpx.MockTransport(answer)) as http,
        client.workflow("wörk", run="r"),
        client.node("n"),
    ):
        http.get("http://x", headers={"X-Helium-Node": "own", "baggage": "user=1"})
    [sent] = seen
    assert sent["x-helium-node"] == "own"
    assert sent["baggage"] == "user=1,helium.workflow=w%C3%B6rk"


async def test_tasks_inherit_and_do_not_leak() -> None:
    async def one(number: int) -> str:
        with client.node(f"n{number}"):
            await asyncio.sleep(0)
            return client.headers()["X-Helium-Node"]

    with client.workflow("w", run="r"):
        names = await asyncio.gather(*(one(number) for number in range(5)))
    assert list(names) == [f"n{number}" for number in range(5)]
    assert client.headers() == {}
    seen: list[str] = []

    async def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers.get("x-helium-run", ""))
        return httpx.Response(200)

    async with client.async_http_client(transport=httpx.MockTransport(answer)) as http:
        with client.workflow("w", run="r2"):
            await http.get("http://x")
        await http.get("http://x")
    assert seen == ["r2", ""]


def test_threads_with_a_copied_context() -> None:
    with client.workflow("w", run="r"), ThreadPoolExecutor(1) as pool:
        assert pool.submit(copy_context().run, client.headers).result()["X-Helium-Run"] == "r"
        assert pool.submit(client.headers).result() == {}
