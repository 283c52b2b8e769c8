"""The Batch API as OpenAI's client sees it, and its bounds."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI

from helium_proxy.errors import NotFound, QueueFull
from helium_proxy.planner.batch import InvalidLines, parse_lines
from helium_proxy.planner.execute import CallResult
from helium_proxy.planner.files import FileStore
from helium_proxy.planner.settings import PlanSettings
from tests.planner.conftest import Wall
from tests.planner.fakes import FakePort

CHAT = "/v1/chat/completions"


def line(name: str, text: str = "hi", *, url: str = CHAT, **body: Any) -> dict[str, Any]:
    content = {"prompt": text} if url == "/v1/completions" else {"messages": [{"role": "user", "content": text}]}
    return {"custom_id": name, "method": "POST", "url": url, "body": {"model": "m", **content, **body}}


def jsonl(*lines: Any) -> bytes:
    return b"\n".join(json.dumps(one).encode() for one in lines) + b"\n"


async def upload(site: Any, content: bytes) -> str:
    response = await site.client.post(
        "/v1/files", files={"file": ("in.jsonl", content, "application/jsonl")}, data={"purpose": "batch"}
    )
    assert response.status_code == 200, response.text
    return str(response.json()["id"])


async def batch_of(site: Any, *lines: Any, endpoint: str = CHAT) -> dict[str, Any]:
    file = await upload(site, jsonl(*lines))
    response = await site.client.post(
        "/v1/batches", json={"input_file_id": file, "endpoint": endpoint, "completion_window": "24h"}
    )
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


async def ended(site: Any, batch: dict[str, Any]) -> dict[str, Any]:
    await site.deps.batches.get("t", batch["id"]).task
    found: dict[str, Any] = (await site.client.get(f"/v1/batches/{batch['id']}")).json()
    return found


async def lines_of(site: Any, file: str | None) -> list[dict[str, Any]]:
    content = (await site.client.get(f"/v1/files/{file}/content")).text
    return [json.loads(one) for one in content.splitlines()]


async def test_openai_client(sites: Any) -> None:
    site = sites()
    client = AsyncOpenAI(
        api_key="k",
        base_url="http://proxy/v1",
        http_client=httpx.AsyncClient(transport=httpx.ASGITransport(app=site.app), headers={"x-tenant": "t"}),
    )
    content = jsonl(line("a", "one", temperature=0), line("b", "two {{inputs.x}}"), line("c", "one", temperature=0))
    file = await client.files.create(file=("in.jsonl", content), purpose="batch")
    assert (file.bytes, file.filename, file.purpose) == (len(content), "in.jsonl", "batch")
    batch = await client.batches.create(
        input_file_id=file.id, endpoint=CHAT, completion_window="24h", metadata={"k": "v"}
    )
    assert batch.status == "validating"
    await site.deps.batches.get("t", batch.id).task
    batch = await client.batches.retrieve(batch.id)
    assert batch.status == "completed"
    assert batch.request_counts is not None
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (3, 3, 0)
    assert batch.metadata == {"k": "v"}
    assert batch.output_file_id is not None
    assert batch.error_file_id is None
    output = [json.loads(one) for one in (await client.files.content(batch.output_file_id)).text.splitlines()]
    assert [one["custom_id"] for one in output] == ["a", "b", "c"]
    texts = [one["response"]["body"]["choices"][0]["message"]["content"] for one in output]
    assert texts == ["request(one)", "request(two {{inputs.x}})", "request(one)"]
    assert len({one["response"]["body"]["id"] for one in output}) == 3, "every answer has an id of its own"
    assert len(site.port.seen) == 2, "equal deterministic requests are asked once"
    assert [one.id async for one in client.batches.list()] == [batch.id]
    assert {one.id async for one in client.files.list()} == {file.id, batch.output_file_id}
    deleted = await client.files.delete(file.id)
    assert deleted.deleted
    await client.close()


async def test_failures_go_to_the_error_file(sites: Any) -> None:
    def reply(seen: Any) -> Any:
        return CallResult(400, {"error": {"message": "bad"}}, "error") if seen.text == "no" else "ok"

    site = sites(FakePort(reply))
    batch = await ended(site, await batch_of(site, line("a", "yes"), line("b", "no")))
    assert batch["status"] == "completed"
    assert batch["request_counts"] == {"total": 2, "completed": 1, "failed": 1}
    (good,) = await lines_of(site, batch["output_file_id"])
    (bad,) = await lines_of(site, batch["error_file_id"])
    assert (good["custom_id"], bad["custom_id"]) == ("a", "b")
    assert bad["response"]["status_code"] == 400
    assert bad["response"]["body"] == {"error": {"message": "bad"}}


async def test_completions(sites: Any) -> None:
    site = sites()
    url = "/v1/completions"
    batch = await ended(site, await batch_of(site, line("a", "p", url=url, max_tokens=3), endpoint=url))
    assert batch["status"] == "completed"
    assert site.port.seen[0].body == {"model": "m", "prompt": "p", "max_tokens": 3}


async def test_cancel_keeps_what_was_answered(sites: Any) -> None:
    port = FakePort()
    held = asyncio.Event()

    async def call(body: dict[str, Any], **rest: Any) -> CallResult:
        if body["messages"][0]["content"] == "slow":
            await held.wait()
        return await FakePort.call(port, body, **rest)

    port.call = call  # type: ignore[method-assign]
    site = sites(port)
    batch = await batch_of(site, line("a", "quick"), line("b", "slow"))
    while (await site.client.get(f"/v1/batches/{batch['id']}")).json()["request_counts"]["completed"] < 1:
        await asyncio.sleep(0)
    cancelling = (await site.client.post(f"/v1/batches/{batch['id']}/cancel")).json()
    assert cancelling["status"] == "cancelling"
    done = await ended(site, batch)
    assert done["status"] == "cancelled"
    assert done["cancelled_at"] is not None
    assert [one["custom_id"] for one in await lines_of(site, done["output_file_id"])] == ["a"]
    (bad,) = await lines_of(site, done["error_file_id"])
    assert bad["error"]["code"] == "batch_cancelled"


async def test_cancel_while_validating(sites: Any) -> None:
    site = sites(FakePort(hold=True))
    batch = await batch_of(site, line("a"))
    assert (await site.client.post(f"/v1/batches/{batch['id']}/cancel")).json()["status"] == "cancelling"
    assert (await ended(site, batch))["status"] == "cancelled"
    again = await site.client.post(f"/v1/batches/{batch['id']}/cancel")
    assert again.json()["status"] == "cancelled"


async def test_an_invalid_file_fails_the_batch_and_names_the_lines(sites: Any) -> None:
    site = sites()
    batch = await ended(site, await batch_of(site, line("a"), {**line("b"), "url": "/v1/embeddings"}, line("a")))
    assert batch["status"] == "failed"
    errors = batch["errors"]["data"]
    assert [(one["line"], one["param"]) for one in errors] == [(2, "url"), (3, "custom_id")]
    assert site.port.seen == []


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no requests"),
        (b"\n\n", "no requests"),
        (b"{", "not JSON"),
        (b"[]", "JSON object"),
        (jsonl({**line("a"), "custom_id": 3}), "custom_id"),
        (jsonl({**line("a"), "method": "GET"}), "method"),
        (jsonl({**line("a"), "body": []}), "body"),
        (jsonl(line("a", model=None)), "model"),
        (jsonl(line("a", stream=True)), "stream"),
        (jsonl(line("a", messages="x")), "messages"),
        (jsonl(line("a", messages=[{"content": "x"}])), "messages"),
        (jsonl(*[line(str(i)) for i in range(6)]), "at most 5"),
    ],
)
def test_bad_lines(content: bytes, says: str) -> None:
    with pytest.raises(InvalidLines) as caught:
        parse_lines(content, CHAT, 5)
    assert says in caught.value.errors[0].message


def test_reported_lines_are_bounded() -> None:
    with pytest.raises(InvalidLines) as caught:
        parse_lines(b"{\n" * 1_000, CHAT, 5_000)
    assert len(caught.value.errors) == 100


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ([], None),
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"endpoint": CHAT, "completion_window": "1h"}, "completion_window"),
        ({"endpoint": CHAT, "metadata": {"a": 1}}, "metadata"),
        ({"endpoint": CHAT}, "input_file_id"),
    ],
)
async def test_bad_batches(sites: Any, body: Any, param: str | None) -> None:
    response = await sites().client.post("/v1/batches", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


async def test_bad_uploads_and_queries(sites: Any) -> None:
    site = sites(max_file_bytes=100)
    post, get = site.client.post, site.client.get
    assert (await post("/v1/files", content=b"x")).status_code == 400
    for kind in ("multipart/form-data", "multipart/form-data; boundary=x", 'multipart/form-data; boundary=""'):
        assert (await post("/v1/files", content=b"x", headers={"content-type": kind})).status_code == 400
    assert (await post("/v1/files", files={"file": b"x"}, data={"purpose": "vision"})).status_code == 400
    assert (await post("/v1/files", files={"other": b"x"}, data={"purpose": "batch"})).status_code == 400
    assert (await post("/v1/files", files={"file": b"x" * 101}, data={"purpose": "batch"})).status_code == 413
    assert (await post("/v1/files", files={"file": b"x" * 99_999}, data={"purpose": "batch"})).status_code == 413
    assert (await get("/v1/files", params={"limit": "0"})).status_code == 400
    assert (await get("/v1/batches", params={"limit": "many"})).status_code == 400
    missing = {"input_file_id": "file-none", "endpoint": CHAT, "completion_window": "24h"}
    assert (await post("/v1/batches", json=missing)).status_code == 404


async def test_tenants_are_apart(sites: Any) -> None:
    site = sites()
    batch = await batch_of(site, line("a"))
    done = await ended(site, batch)
    site.client.headers["x-tenant"] = "u"
    assert (await site.client.get(f"/v1/batches/{batch['id']}")).status_code == 404
    assert (await site.client.post(f"/v1/batches/{batch['id']}/cancel")).status_code == 404
    for file in (done["input_file_id"], done["output_file_id"]):
        assert (await site.client.get(f"/v1/files/{file}")).status_code == 404
        assert (await site.client.get(f"/v1/files/{file}/content")).status_code == 404
        assert (await site.client.delete(f"/v1/files/{file}")).status_code == 404
    assert (await site.client.get("/v1/files")).json()["data"] == []
    assert (await site.client.get("/v1/batches")).json()["data"] == []
    body = {"input_file_id": done["input_file_id"], "endpoint": CHAT, "completion_window": "24h"}
    assert (await site.client.post("/v1/batches", json=body)).status_code == 404


async def test_pages(sites: Any) -> None:
    site = sites()
    ids = [await upload(site, jsonl(line(str(i)))) for i in range(5)][::-1]
    first = (await site.client.get("/v1/files", params={"limit": 2})).json()
    assert [one["id"] for one in first["data"]] == ids[:2]
    assert first["has_more"]
    rest = (await site.client.get("/v1/files", params={"after": first["last_id"]})).json()
    assert [one["id"] for one in rest["data"]] == ids[2:]
    assert not rest["has_more"]


async def test_batches_are_bounded(sites: Any) -> None:
    site = sites(max_jobs=2, max_jobs_per_tenant=2)
    first, second = [await batch_of(site, line("a")) for _ in range(2)]
    await ended(site, first)
    await ended(site, second)
    third = await batch_of(site, line("a"))
    assert (await site.client.get(f"/v1/batches/{first['id']}")).status_code == 404
    await ended(site, third)


async def test_answers_always_have_room_and_without_room_nothing_is_begun(sites: Any) -> None:
    site = sites(FakePort(hold=True), max_files=2)
    batch = await batch_of(site, line("a"))
    while not site.port.running:
        await asyncio.sleep(0)
    await upload(site, b"the last that is taken")
    body = {"input_file_id": batch["input_file_id"], "endpoint": CHAT, "completion_window": "24h"}
    refused = await site.client.post("/v1/batches", json=body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
    site.port.release()
    done = await ended(site, batch)
    assert done["status"] == "completed"
    assert [one["custom_id"] for one in await lines_of(site, done["output_file_id"])] == ["a"]


async def test_close_ends_running_batches(sites: Any) -> None:
    site = sites(FakePort(hold=True))
    await batch_of(site, line("a"))
    while not site.port.running:
        await asyncio.sleep(0)
    await site.deps.close()
    assert site.port.running == 0


@pytest.mark.parametrize("content", [b"1\r\n--2\r\n\r\n", b"x" * 3_000_000, b""], ids=["marks", "large", "empty"])
async def test_an_upload_comes_back_as_it_was(sites: Any, content: bytes) -> None:
    site = sites(FakePort(), max_file_bytes=5_000_000)
    post = site.client.post
    sent = await post("/v1/files", files={"file": ("a.jsonl", content)}, data={"purpose": "batch"})
    assert (sent.status_code, sent.json()["bytes"], sent.json()["filename"]) == (200, len(content), "a.jsonl")
    assert (await site.client.get(f"/v1/files/{sent.json()['id']}/content")).content == content


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ({"files": {"file": b"x"}}, "'purpose' must be batch"),
        ({"files": {"other": b"x"}, "data": {"purpose": "batch"}}, "'file' is missing"),
        ({"files": [("file", b"x"), ("file", b"y")], "data": {"purpose": "batch"}}, "Too many files"),
        ({"files": {"file": b"x"}, "data": {f"field{i}": "x" for i in range(17)}}, "Too many fields"),
        (
            {"content": b"--x\r\n\r\n", "headers": {"content-type": "multipart/form-data; boundary=x"}},
            "not a multipart",
        ),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, "Missing boundary"),
    ],
)
async def test_a_form_that_is_none(sites: Any, form: dict[str, Any], said: str) -> None:
    answer = await sites(FakePort()).client.post("/v1/files", **form)
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]


@pytest.mark.parametrize("on_disk", [False, True])
async def test_files_are_bounded_and_expire(tmp_path: Path, on_disk: bool) -> None:
    wall = Wall()
    folder = tmp_path / "files" if on_disk else None
    store = FileStore(PlanSettings(max_files=3, max_files_bytes=100, file_ttl_s=10, files_dir=folder), wall)
    one = await store.put("t", "n", "batch", b"x" * 60)
    with pytest.raises(QueueFull):
        await store.put("t", "n", "batch", b"x" * 60)
    await store.put("t", "n", "batch", b"y")
    await store.put("t", "n", "batch", b"z")
    with pytest.raises(QueueFull):
        await store.put("t", "n", "batch", b"z")
    assert await store.content("t", one.id) == b"x" * 60
    wall.now += 10
    with pytest.raises(NotFound):
        store.get("t", one.id)
    assert store.statistics().files == 0
    assert folder is None or list(folder.iterdir()) == []


async def test_files_on_disk_survive_a_restart(tmp_path: Path) -> None:
    settings = PlanSettings(files_dir=tmp_path)
    store = FileStore(settings, Wall())
    kept = await store.put("t", "a", "batch", b"content")
    torn = await store.put("t", "b", "batch", b"content")
    (tmp_path / torn.id).write_bytes(b"con")
    (tmp_path / "file-odd.json").write_text("{")
    again = FileStore(settings, Wall())
    assert [file.id for file in again.mine("t")] == [kept.id]
    assert await again.content("t", kept.id) == b"content"
    (tmp_path / kept.id).unlink()
    with pytest.raises(NotFound):
        await again.content("t", kept.id)


async def test_results_may_be_larger_than_an_upload(sites: Any) -> None:
    site = sites(FakePort(lambda seen: "x" * 3_000), max_file_bytes=2_000)
    batch = await ended(site, await batch_of(site, *(line(str(i)) for i in range(4))))
    assert batch["status"] == "completed"
    assert len(await lines_of(site, batch["output_file_id"])) == 4
    found = site.deps.batches.get("t", batch["id"])
    assert (found.job, found.custom_ids) == (None, [])
