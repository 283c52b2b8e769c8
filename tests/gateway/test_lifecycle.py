"""The process: start, signals, reload, an orderly end. A real one, on a port of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import httpx
import pytest
import yaml
from click.testing import CliRunner
from serving import CHAT, SLOW, FakeWorker, Seen, Stack, answer, chat, http_client, many_client, until

from helium_proxy.cli import main


class Process:
    """``helium-proxy serve`` as a child."""

    def __init__(self, child: asyncio.subprocess.Process) -> None:
        self.child = child
        self.url = ""
        self.log = ""

    async def started(self) -> None:
        assert self.child.stderr is not None
        while (found := re.search(r"(http://127\.0\.0\.1:\d+)/v1", self.log)) is None:
            line = await self.child.stderr.readline()
            assert line, f"it ended: {self.log}"
            self.log += line.decode()
        self.url = found[1]

    async def read_log(self) -> None:
        assert self.child.stderr is not None
        while line := await self.child.stderr.readline():
            self.log += line.decode()


@asynccontextmanager
async def serving(*arguments: str, **settings: object) -> AsyncIterator[Process]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HELIUM_")}
    environment |= {f"HELIUM_{k.upper()}": str(v) for k, v in settings.items()}
    command = [sys.executable, "-m", "helium_proxy.cli", "serve", "--port", "0", *arguments]
    child = await asyncio.create_subprocess_exec(*command, env=environment, stderr=asyncio.subprocess.PIPE)
    process = Process(child)
    try:
        await process.started()
        reader = asyncio.create_task(process.read_log())
        yield process
        if child.returncode is None:
            child.kill()
        await child.wait()
        await reader
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()


async def ready(url: str) -> bool:
    async with http_client(url) as client:
        return (await client.get("/ready")).status_code == 200


async def read_stream(client: aiohttp.ClientSession, url: str, i: int, begun: asyncio.Semaphore) -> bytes:
    body = chat(f"stream {i}", stream=True, max_tokens=100, ignore_eos=True)
    async with client.post(url + CHAT, json=body) as response:
        raw = await response.content.readany()
        begun.release()
        return raw + await response.content.read()


async def test_sigterm_lets_50_streams_finish(stack: Stack) -> None:
    """Readiness fails at once, then new calls are refused, those in flight finish, and the exit status is 0."""
    engine = await stack.engine(profile=SLOW, max_num_seqs=128)
    async with serving("--worker", engine.url, server__ready_grace_s=0.2, dispatch__admission="false") as process:
        await until(lambda: ready(process.url))
        begun = asyncio.Semaphore(0)
        async with many_client() as client, http_client(process.url) as other:
            streams = [asyncio.create_task(read_stream(client, process.url, i, begun)) for i in range(50)]
            for _ in range(50):
                await begun.acquire()
            process.child.send_signal(signal.SIGTERM)

            async def not_ready() -> bool:
                return (await other.get("/ready")).status_code == 503

            await until(not_ready)

            async def refused() -> bool:
                return (await other.post(CHAT, json=chat("new", max_tokens=1))).status_code == 503

            await until(refused)
            response = await other.post(CHAT, json=chat("new", max_tokens=1))
            assert response.json()["error"]["code"] == "draining"
            assert int(response.headers["retry-after"]) >= 1
            assert (await other.get("/health")).status_code == 200
            assert not all(s.done() for s in streams), "the streams were too short for this test"
            answers = await asyncio.gather(*streams)
        assert all(raw.endswith(b"data: [DONE]\n\n") for raw in answers)
        assert all(raw.count(b'"content":') >= 100 for raw in answers)
        assert await asyncio.wait_for(process.child.wait(), 10) == 0


async def test_the_drain_has_an_end(stack: Stack, tmp_path: Path) -> None:
    """A call that outlasts the deadline is cut, and what is to survive a restart is still written."""

    async def hang(seen: Seen) -> None:
        await seen.open_stream()
        await seen.delta("begun")
        await seen.gone()

    worker = await stack.fake(always=hang)
    store = tmp_path / "templates.db"
    limits = {"server__drain_s": 0.3, "server__ready_grace_s": 0, "store__path": store}
    async with serving("--worker", worker.url, **limits) as process:
        await until(lambda: ready(process.url))
        async with many_client() as client, client.post(process.url + CHAT, json=chat(stream=True)) as response:
            raw = await response.content.readany()
            process.child.send_signal(signal.SIGTERM)
            raw += await response.content.read()
        assert b"begun" in raw
        assert b'"code":"draining"' in raw
        assert raw.endswith(b"data: [DONE]\n\n")
        assert await asyncio.wait_for(process.child.wait(), 8) == 0
    assert "drain deadline passed" in process.log
    assert "Traceback" not in process.log
    assert store.exists()
    await until(lambda: worker.inside == 0)


async def test_sighup_takes_over_keys_and_workers(stack: Stack, tmp_path: Path) -> None:
    first, second = await stack.fake(), await stack.fake()
    keys, config = tmp_path / "keys.yaml", tmp_path / "helium.yaml"

    def write(worker: FakeWorker, key: str) -> None:
        keys.write_text(yaml.safe_dump([{"key": key, "tenant": "t"}]))
        config.write_text(yaml.safe_dump({"workers": [{"url": worker.url}], "auth": {"keys_file": str(keys)}}))

    write(first, "sk-old")
    async with serving("--config", str(config)) as process:
        await until(lambda: ready(process.url))
        async with http_client(process.url) as client:

            async def status(key: str) -> int:
                headers = {"Authorization": f"Bearer {key}"}
                return (await client.post(CHAT, json=chat(), headers=headers)).status_code

            assert (await status("sk-old"), await status("sk-new")) == (200, 401)
            write(second, "sk-new")
            process.child.send_signal(signal.SIGHUP)

            async def changed() -> bool:
                return (await status("sk-old"), await status("sk-new")) == (401, 200)

            await until(changed)

            async def moved() -> bool:
                before = len(second.seen)
                await status("sk-new")
                return len(second.seen) > before

            await until(moved)
            config.write_text("workerz: []")
            process.child.send_signal(signal.SIGHUP)
            await until(lambda: "did you mean workers" in process.log)
            write(second, "sk-lost")
            config.write_text(config.read_text() + "pool: {max_workers: 0}")
            process.child.send_signal(signal.SIGHUP)
            await until(lambda: "pool.max_workers" in process.log)
            write(second, "sk-lost")
            config.write_text(f"workers: {[f'http://w{i}:1' for i in range(1000)]}\nauth: {{keys_file: {keys}}}")
            process.child.send_signal(signal.SIGHUP)
            await until(lambda: "no more than" in process.log)
            keys.write_bytes(b"# cl\xe9s\n- {key: sk-secret, tenant: t}")
            process.child.send_signal(signal.SIGHUP)
            await until(lambda: "not UTF-8" in process.log)
            keys.write_text("- {key: sk-secret, tenant: t")
            process.child.send_signal(signal.SIGHUP)
            await until(lambda: "in line 1" in process.log)
            assert await status("sk-new") == 200, "a bad file changes nothing"
        process.child.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(process.child.wait(), 10) == 0
    assert "sk-" not in process.log


async def test_without_a_worker_embedded_engines_serve() -> None:
    async with serving(engine__count=1, engine__profile="instant") as process:
        await until(lambda: ready(process.url), within=20)
        async with http_client(process.url) as client:
            response = await client.post(CHAT, json=chat(max_tokens=3))
            assert response.status_code == 200
            assert response.json()["usage"]["completion_tokens"] == 3
        process.child.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.child.wait(), 10) == 0
    assert "their answers are made up" in process.log


def cli(*arguments: str, **environment: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, list(arguments), env=environment)
    return result.exit_code, result.output


def test_a_bad_setting_ends_it_with_a_clear_word(tmp_path: Path) -> None:
    config = tmp_path / "helium.yaml"
    config.write_text("server: {prot: 1}")
    status, said = cli("serve", "--config", str(config))
    assert status == 1
    assert "did you mean server.port?" in said


def test_a_bad_keys_file_ends_it_with_a_clear_word(tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text("- 7")
    status, said = cli("serve", "--port", "0", HELIUM_AUTH__KEYS_FILE=str(keys), HELIUM_ENGINE__COUNT="0")
    assert status == 1
    assert "auth.keys_file" in said
    assert "listen" not in said


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"reuse__backend": "sqlite", "reuse__sqlite_path": "{}/file/c.db"}, "reuse.sqlite_path"),
        ({"reuse__backend": "redis", "reuse__redis_url": "nonsense"}, "reuse.redis_url"),
        ({"plans__files_dir": "{}/file/folder"}, "cannot start: "),
        ({"pool__max_workers": "1", "workers": '["http://a:1", "http://b:1"]'}, "no more than 1 workers"),
    ],
)
async def test_a_setting_that_cannot_be_followed_ends_it_with_a_clear_word(
    tmp_path: Path, settings: dict[str, str], said: str
) -> None:
    (tmp_path / "file").touch()
    command = [sys.executable, "-m", "helium_proxy.cli", "serve", "--port", "0"]
    environment = {f"HELIUM_{k.upper()}": v.format(tmp_path) for k, v in settings.items()}
    environment = {**os.environ, "HELIUM_ENGINE__COUNT": "0", **environment}
    child = await asyncio.create_subprocess_exec(*command, env=environment, stderr=asyncio.subprocess.PIPE)
    _, printed = await child.communicate()
    assert child.returncode == 1
    *before, last = printed.decode().splitlines()
    assert last.startswith("Error: ")
    assert said in last
    assert all('"level": "info"' in line for line in before)


async def test_it_goes_on_and_ends_when_nobody_reads_its_log(stack: Stack) -> None:
    """As in ``helium-proxy serve 2>&1 | tee log`` when Ctrl-C ends tee first, or a terminal that is closed."""
    late = await stack.fake()
    port = late.server.port
    await late.server.kill()
    command = [sys.executable, "-m", "helium_proxy.cli", "serve", "--port", "0", "--worker", late.url]
    child = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    process = Process(child)
    await process.started()
    child._transport.get_pipe_transport(2).close()  # type: ignore[attr-defined]
    late.server = type(late.server)(late, port)
    await late.server.start()
    try:
        async with http_client(process.url) as client:
            assert (await client.post(CHAT, json=chat())).status_code == 200
        child.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(child.wait(), 20) == 0
    finally:
        if child.returncode is None:
            child.kill()
        await late.server.kill()


async def test_a_port_in_use_ends_it_with_a_clear_word(stack: Stack) -> None:
    port = str((await stack.fake()).server.port)
    command = [sys.executable, "-m", "helium_proxy.cli", "serve", "--port", port]
    environment = {**os.environ, "HELIUM_ENGINE__COUNT": "0"}
    child = await asyncio.create_subprocess_exec(*command, env=environment, stderr=asyncio.subprocess.PIPE)
    _, said = await child.communicate()
    assert child.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in said.decode()
    assert "Traceback" not in said.decode()


@pytest.mark.parametrize("command", ["", "serve", "demo", "engine", "workers", "runs", "version"])
def test_help_reads(command: str) -> None:
    status, said = cli(*filter(None, [command]), "--help")
    assert status == 0
    assert "Usage:" in said


def test_version() -> None:
    status, said = cli("version")
    assert status == 0
    assert said.startswith("helium-proxy ")


async def test_plans_end_with_the_proxy(stack: Stack) -> None:
    """While it drains, no job begins, and a job's calls in flight count as requests do."""
    opened = asyncio.Event()

    async def wait(seen: Seen) -> None:
        await opened.wait()
        await answer(seen)

    worker = await stack.fake(always=wait)
    proxy = await stack.proxy(worker)
    node = {"id": "a", "messages": [{"role": "user", "content": "{{inputs.q}}"}]}
    plan = {"workflow": "w", "model": "demo", "nodes": [node], "inputs": [{"q": "1"}]}
    job = (await proxy.client.post("/v1/workflows", json=plan)).json()
    await until(lambda: worker.seen)
    assert proxy.services.in_flight == 1
    proxy.services.draining = True
    for path, body in (("/v1/workflows", plan), ("/v1/batches", {})):
        refused = await proxy.client.post(path, json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining"), path
    opened.set()
    await until(lambda: proxy.services.in_flight == 0)
    done = (await proxy.client.get(f"/v1/workflows/{job['id']}", params={"wait_s": 5})).json()
    assert done["status"] == "completed"


async def test_embedded_engines_end_with_a_proxy_that_is_killed() -> None:
    async with serving(engine__count=2) as process, http_client(process.url) as client:
        workers = (await client.get("/helium/workers")).json()["workers"]
        await until(lambda: all_up(client), what="engines up")
        process.child.kill()

        async def gone() -> bool:
            for worker in workers:
                with contextlib.suppress(httpx.TransportError):
                    await client.get(f"{worker['url']}/health")
                    return False
            return True

        assert len(workers) == 2
        await until(gone, what="engines gone")


async def all_up(client: httpx.AsyncClient) -> bool:
    workers = (await client.get("/helium/workers")).json()["workers"]
    return all(worker["state"] == "up" for worker in workers)
