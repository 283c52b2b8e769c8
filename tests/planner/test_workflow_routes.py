"""`/v1/workflows` as a client sees it."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest

from helium_proxy.errors import UpstreamFailed
from helium_proxy.gateway.workflows import event_stream
from tests.planner.fakes import FakePort

RAW = {
    "workflow": "map-reduce",
    "model": "m",
    "params": {"temperature": 0, "max_tokens": 8},
    "nodes": [
        {"id": "e0", "messages": [{"role": "user", "content": "first {{inputs.q}}"}]},
        {"id": "e1", "messages": [{"role": "user", "content": "second {{inputs.q}}"}]},
        {"id": "sum", "messages": [{"role": "user", "content": "{{nodes.e0}}+{{nodes.e1}}"}]},
    ],
    "inputs": [{"q": "x"}, {"q": "y"}],
}


def events_of(text: str) -> list[tuple[str, str, Any]]:
    """(id, event, data) of a whole stream."""
    found = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if fields:
            found.append((fields["id"], fields["event"], json.loads(fields["data"])))
    return found


async def test_submit_wait_and_read(sites: Any) -> None:
    site = sites()
    created = await site.client.post("/v1/workflows", json=RAW)
    assert created.status_code == 202
    job = created.json()
    assert job["status"] == "running"
    assert "results" not in job
    assert created.headers["location"] == f"/v1/workflows/{job['id']}"
    done = (await site.client.get(f"/v1/workflows/{job['id']}", params={"wait_s": 10})).json()
    assert done["status"] == "completed"
    assert done["results"][1] == {
        "input": 1,
        "status": "completed",
        "outputs": {"sum": "sum(e0(first y)+e1(second y))"},
    }
    assert done["inputs"] == {"completed": 2, "total": 2}
    assert done["usage"] == {
        "prompt_tokens": 60,
        "completion_tokens": 18,
        "total_tokens": 78,
        "prompt_tokens_details": {"cached_tokens": 24},
    }
    listed = (await site.client.get("/v1/workflows")).json()
    assert [one["id"] for one in listed["data"]] == [job["id"]]


async def test_results_appear_as_they_finish(sites: Any) -> None:
    site = sites(FakePort(hold=True))
    job = (await site.client.post("/v1/workflows", json=RAW)).json()
    url = f"/v1/workflows/{job['id']}"
    while site.port.running < 4:
        await asyncio.sleep(0)
    now = (await site.client.get(url)).json()
    assert now["operators"] == {"submitted": 6, "planned": 6, "running": 4, "waiting": 2}
    assert [row["status"] for row in now["results"]] == ["running", "running"]
    site.port.release()
    assert (await site.client.get(url, params={"wait_s": "10"})).json()["status"] == "completed"


async def test_events(sites: Any) -> None:
    site = sites()
    job = (await site.client.post("/v1/workflows", json=RAW)).json()
    stream = await site.client.get(f"/v1/workflows/{job['id']}/events")
    assert stream.headers["content-type"].startswith("text/event-stream")
    found = events_of(stream.text)
    assert [seq for seq, _, _ in found] == [str(i) for i in range(1, len(found) + 1)]
    assert next(data for _, name, data in found if name == "input")["outputs"]
    assert found[-1][1:] == ("job", {"state": "completed"})
    again = await site.client.get(f"/v1/workflows/{job['id']}/events", headers={"last-event-id": found[-3][0]})
    assert events_of(again.text) == found[-2:]
    beyond = await site.client.get(f"/v1/workflows/{job['id']}/events", headers={"last-event-id": "9" * 30})
    assert events_of(beyond.text) == []


async def test_a_reader_who_missed_events_gets_a_snapshot(sites: Any) -> None:
    site = sites(max_events=16)
    raw = {**RAW, "inputs": [{"q": str(i)} for i in range(20)]}
    job = (await site.client.post("/v1/workflows", json=raw)).json()
    await site.client.get(f"/v1/workflows/{job['id']}", params={"wait_s": 10})
    found = events_of((await site.client.get(f"/v1/workflows/{job['id']}/events")).text)
    assert [name for _, name, _ in found] == ["snapshot"]
    assert len(found[0][2]["results"]) == 20


async def test_event_stream_beats_while_nothing_happens(sites: Any) -> None:
    site = sites(FakePort(hold=True))
    job = site.deps.jobs.get("t", (await site.client.post("/v1/workflows", json=RAW)).json()["id"])
    while site.port.running < 4:
        await asyncio.sleep(0)
    stream = event_stream(job, job.run.event_seq, 0.001)
    assert await anext(stream) == b": still running\n\n"
    site.port.release()
    rest = [chunk async for chunk in stream]
    assert rest[-1].endswith(b'data: {"state":"completed"}\n\n')


async def test_delete_cancels(sites: Any) -> None:
    site = sites(FakePort(hold=True))
    job = (await site.client.post("/v1/workflows", json=RAW)).json()
    while site.port.running < 4:
        await asyncio.sleep(0)
    gone = (await site.client.delete(f"/v1/workflows/{job['id']}")).json()
    assert gone["status"] == "cancelled"
    assert site.port.running == 0
    assert (await site.client.get(f"/v1/workflows/{job['id']}")).json()["status"] == "cancelled"


async def test_explain_runs_nothing(sites: Any) -> None:
    site = sites()
    found = (await site.client.post("/v1/workflows/explain", json=RAW)).json()
    assert found["object"] == "workflow.plan"
    assert found["operators_planned"] == 6
    text = await site.client.post("/v1/workflows/explain", json=RAW, headers={"accept": "text/plain"})
    assert text.headers["content-type"].startswith("text/plain")
    assert text.text.startswith("Workflow map-reduce: 6 operators over 2 inputs")
    assert site.port.seen == []
    assert site.deps.jobs.statistics().jobs == 0


async def test_explain_analyze_runs_it(sites: Any) -> None:
    site = sites()
    found = await site.client.post("/v1/workflows/explain", params={"analyze": "true", "format": "text"}, json=RAW)
    assert "Actual: " in found.text
    assert "36 of 60 prompt tokens computed, 18 output tokens; 6 done" in found.text
    assert len(site.port.seen) == 6
    (job,) = site.deps.jobs.mine("t")
    again = (await site.client.get(f"/v1/workflows/{job.id}/explain")).json()
    assert again["actual"]["status"] == {"done": 6}


async def test_explain_analyze_counts_the_operators_that_failed(sites: Any) -> None:
    def fail(seen: Any) -> str:
        if seen.text == "first x":
            raise UpstreamFailed("out of order")
        return seen.text

    site = sites(FakePort(fail))
    plain = await site.client.post("/v1/workflows/explain", json=RAW)
    assert "x-helium-failed-operators" not in plain.headers
    found = await site.client.post("/v1/workflows/explain?analyze=1", json=RAW)
    assert found.headers["x-helium-failed-operators"] == "1"
    assert found.json()["actual"]["status"] == {"done": 4, "failed": 1, "skipped": 1}
    errors = {o["actual"]["status"]: o["actual"]["error"] for o in found.json()["operators"]}
    assert errors == {"done": None, "failed": "out of order", "skipped": "out of order"}


async def test_an_empty_body_is_called_empty(sites: Any) -> None:
    response = await sites().client.post("/v1/workflows")
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "the body is empty"


async def test_explain_analyze_has_a_deadline(sites: Any) -> None:
    site = sites(FakePort(hold=True), analyze_timeout_s=0.01)
    found = await site.client.post("/v1/workflows/explain", params={"analyze": 1}, json=RAW)
    assert found.status_code == 504
    (job,) = site.deps.jobs.mine("t")
    assert job.state == "cancelled"
    assert site.port.running == 0


@pytest.mark.parametrize("method", ["GET", "DELETE"])
async def test_a_tenant_cannot_reach_anothers_job(sites: Any, method: str) -> None:
    site = sites()
    job = (await site.client.post("/v1/workflows", json=RAW)).json()
    for suffix in ("", "/events", "/explain") if method == "GET" else ("",):
        response = await site.client.request(method, f"/v1/workflows/{job['id']}{suffix}", headers={"x-tenant": "u"})
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "not_found"


@pytest.mark.parametrize(
    ("path", "content", "status"),
    [
        ("/v1/workflows", b"{", 400),
        ("/v1/workflows", b"\xff", 400),
        ("/v1/workflows", b"[" * 2_000, 400),
        ("/v1/workflows", b"{}", 400),
        ("/v1/workflows", b'{"nodes": [{"id": "a", "prompt": "' + b"x" * 3_000 + b'"}]}', 413),
        ("/v1/workflows/explain?analyze=maybe", b"{}", 400),
        ("/v1/workflows/explain?format=xml", json.dumps(RAW).encode(), 400),
    ],
)
async def test_bad_requests(sites: Any, path: str, content: bytes, status: int) -> None:
    site = sites(max_body_bytes=2_048)
    response = await site.client.post(path, content=content)
    assert response.status_code == status
    assert response.json()["error"]["message"]


async def test_bad_queries(sites: Any) -> None:
    site = sites()
    job = (await site.client.post("/v1/workflows", json=RAW)).json()
    url = f"/v1/workflows/{job['id']}"
    for params in ({"wait_s": "x"}, {"wait_s": "-1"}, {"wait_s": "nan"}):
        assert (await site.client.get(url, params=params)).status_code == 400
    assert (await site.client.get(f"{url}/events", headers={"last-event-id": "x"})).status_code == 400
    assert (await site.client.get("/v1/workflows/wf_none")).status_code == 404
    site.client.headers.pop("x-tenant")
    assert (await site.client.get("/v1/workflows")).status_code == 401


async def test_a_million_nodes_are_refused_without_a_look_at_them(sites: Any) -> None:
    site = sites()
    content = b'{"model":"m","nodes":[' + b",".join([b'{"id":"a"}'] * 1_000_000) + b"]}"
    began = time.process_time()
    json.loads(content)
    read = time.process_time()
    response = await site.client.post("/v1/workflows", content=content)
    assert time.process_time() - read < 3 * (read - began)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "nodes"
