"""What is logged of calls, and what is counted of requests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import structlog
from serving import CHAT, Stack, chat
from structlog.testing import capture_logs

from helium_proxy import logs, metrics


@pytest.fixture
def configured() -> None:
    """Logs as `serve` sets them up."""
    logs.configure("info", "json")
    structlog.configure(cache_logger_on_first_use=False)  # what is used now would stay as it is for other tests


@pytest.mark.usefixtures("configured")
async def test_a_line_a_call_with_its_run_and_worker(stack: Stack, capsys: pytest.CaptureFixture[str]) -> None:
    worker = await stack.fake()
    proxy = await stack.proxy(worker, log={"access": True})
    await proxy.chat(temperature=0, helium={"run": "r-1", "workflow": "w", "node": "n"})
    await proxy.client.post(CHAT, json=chat(temperature=0), headers={"x-request-id": "mine"})
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    first, second = (line for line in lines if line["event"] == "call")
    assert (first["run"], first["worker"], first["fate"]) == ("r-1", worker.url.removeprefix("http://"), "computed")
    assert first["status"] == 200
    assert first["prompt_tokens"] > 0
    assert (second["call"], second["fate"]) == ("mine", "hit")


async def test_no_line_a_call_unless_asked_for(stack: Stack) -> None:
    proxy = await stack.proxy(await stack.fake())
    with capture_logs() as logged:
        await proxy.chat()
    assert not any(line["event"] == "call" for line in logged)


async def test_every_request_is_counted_once(stack: Stack) -> None:
    proxy = await stack.proxy(await stack.fake())

    def counted() -> dict[tuple[str, ...], float]:
        return {labels: child._value.get() for labels, child in metrics.HTTP_REQUESTS._metrics.items()}

    for method, path, body, labels in (
        ("POST", CHAT, chat(), (CHAT, "200")),
        ("POST", "/v1/any/other", {}, ("other", "200")),
        ("GET", "/v1/models", None, ("other", "200")),
        ("GET", "/v1/models/none", None, ("other", "404")),
        ("POST", "/v1/workflows", {}, ("other", "400")),
        ("GET", "/helium/workers", None, ("operator", "200")),
    ):
        before = counted()
        await proxy.client.request(method, path, json=body)
        after = counted()
        changed = {key: value - before.get(key, 0) for key, value in after.items() if value != before.get(key, 0)}
        assert changed == {labels: 1}, path
    before = counted()
    for path in ("/health", "/ready", "/metrics"):
        await proxy.client.get(path)
    assert counted() == before


def test_gauges_of_processes_that_have_ended_are_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    monkeypatch.setattr(metrics.os, "getpid", lambda: 1)
    monkeypatch.setattr(metrics, "_alive", lambda pid: pid != 3)
    for pid in (1, 2, 3):
        (tmp_path / f"gauge_livesum_{pid}.db").touch()
        (tmp_path / f"counter_{pid}.db").touch()
    metrics.sweep()
    assert sorted(path.name for path in tmp_path.glob("gauge*")) == ["gauge_livesum_1.db", "gauge_livesum_2.db"]
    metrics.sweep(ending=True)
    assert [path.name for path in tmp_path.glob("gauge*")] == ["gauge_livesum_2.db"]
    assert len(list(tmp_path.glob("counter*"))) == 3
