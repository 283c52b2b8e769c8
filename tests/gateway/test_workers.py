"""Workers added and removed while calls are under way, several of several models, and what is told of them."""

from __future__ import annotations

import asyncio

import pytest
from serving import CHAT, Seen, Stack, answer, chat, until

from helium_proxy import metrics


async def test_workers_are_added_and_removed_at_run_time(stack: Stack) -> None:
    first, second = await stack.fake(), await stack.fake()
    proxy = await stack.proxy(first)
    added = await proxy.client.post("/helium/workers", json={"url": second.url + "/v1/"})
    assert added.status_code == 201
    name = added.json()["id"]
    assert name == second.url.removeprefix("http://")
    await proxy.up(2)
    gone = await proxy.client.delete(f"/helium/workers/{first.url.removeprefix('http://')}")
    assert gone.json()["state"] == "removed"
    for i in range(3):
        assert (await proxy.chat(str(i))).headers["x-helium-worker"] == name
    assert not first.seen
    listed = (await proxy.client.get("/helium/workers")).json()["workers"]
    assert [w["id"] for w in listed] == [name]
    assert (await proxy.client.delete(f"/helium/workers/{second.url}")).status_code == 200, "by URL, too"
    assert (await proxy.client.get("/ready")).status_code == 503
    assert (await proxy.client.delete(f"/helium/workers/{name}")).status_code == 404


async def test_adding_one_that_is_there_changes_its_key(stack: Stack) -> None:
    worker = await stack.fake()
    proxy = await stack.proxy(worker)
    again = await proxy.client.post("/helium/workers", json={"url": worker.url, "api_key": "sk-new"})
    assert again.status_code == 201
    assert "sk-new" not in again.text
    await proxy.chat()
    assert worker.seen[-1].headers["authorization"] == "Bearer sk-new"
    assert len(proxy.services.pool) == 1


async def test_bad_workers_are_refused(stack: Stack) -> None:
    proxy = await stack.proxy(engine={"count": 0}, pool={"max_workers": 1})
    for body in (
        {},
        {"url": "ftp://x"},
        {"url": 7},
        {"url": "http://x:99999"},
        {"url": "http://"},
        {"url": "http://x", "uurl": 1},
        [],
        "http://x",
    ):
        response = await proxy.client.post("/helium/workers", json=body)
        assert response.status_code == 400, body
        assert response.json()["error"]["type"] == "invalid_request_error"
    assert (await proxy.client.post("/helium/workers", content=b"{")).status_code == 400
    assert (await proxy.client.post("/helium/workers", json={"url": "http://127.0.0.1:9"})).status_code == 201
    assert (await proxy.client.post("/helium/workers", json={"url": "http://127.0.0.1:8"})).status_code == 400


async def test_removal_waits_for_the_calls_it_has(stack: Stack) -> None:
    release = asyncio.Event()

    async def wait(seen: Seen) -> None:
        await release.wait()
        await seen.json(seen.completion())

    worker = await stack.fake(always=wait)
    proxy = await stack.proxy(worker)
    call = asyncio.create_task(proxy.chat())
    await until(lambda: worker.inside == 1)
    (watched,) = proxy.services.pool.all()
    removal = asyncio.create_task(proxy.client.delete(f"/helium/workers/{watched.id}"))
    await until(lambda: watched.state == "draining")
    assert not removal.done()
    release.set()
    assert (await call).status_code == 200
    assert (await removal).status_code == 200
    assert len(proxy.services.pool) == 0
    assert not proxy.services.dispatcher.state.workers


async def test_models_are_the_union_and_calls_go_where_theirs_is(stack: Stack) -> None:
    small, large, both = await stack.fake("small"), await stack.fake("large"), await stack.fake("small", "large")
    proxy = await stack.proxy(small, large, both)
    cards = (await proxy.client.get("/v1/models")).json()["data"]
    assert sorted(c["id"] for c in cards) == ["large", "small"]
    assert {c["max_model_len"] for c in cards} == {4096}
    assert (await proxy.client.get("/v1/models/large")).json()["id"] == "large"
    for model in ("small", "large"):
        for i in range(4):
            body = {**chat(str(i)), "model": model}
            assert (await proxy.client.post(CHAT, json=body)).json()["model"] in ("small", "large")
            await proxy.client.post("/tokenize", json={"model": model, "prompt": "x"})
    assert {s.body["model"] for s in small.seen} == {"small"}
    assert {s.body["model"] for s in large.seen} == {"large"}
    assert len(small.seen) + len(large.seen) + len(both.seen) == 16


async def test_a_call_that_names_no_model_of_several_is_the_engine_s_to_answer(stack: Stack) -> None:
    worker, other = await stack.fake("one"), await stack.fake("two")
    proxy = await stack.proxy(worker, other)
    await proxy.client.post(CHAT, json={"messages": []})
    assert len(worker.seen) + len(other.seen) == 1


async def test_models_that_a_worker_loads_later_are_noticed(stack: Stack) -> None:
    worker = await stack.fake("demo")
    proxy = await stack.proxy(worker, pool={"models_interval_s": 0.05, "health_interval_s": 0.05})
    worker.models = ("demo", "adapter")
    await until(lambda: proxy.services.pool.models() == {"demo", "adapter"})
    known = proxy.services.dispatcher.state.workers[worker.url.removeprefix("http://")]
    await until(lambda: known.models == {"demo", "adapter"})
    assert (await proxy.client.post(CHAT, json={**chat(), "model": "adapter"})).status_code == 200
    worker.models = ("adapter",)
    await until(lambda: known.models == {"adapter"})
    await until(lambda: proxy.services.pool.models() == {"adapter"})


async def test_a_restart_between_two_readings_is_noticed(stack: Stack) -> None:
    worker = await stack.fake()
    worker.prompt_tokens = 1000
    proxy = await stack.proxy(worker, pool={"metrics_interval_s": 0.02})
    (watched,) = proxy.services.pool.all()
    await until(lambda: watched.facts.prompt_tokens == 1000)
    epoch = watched.epoch
    worker.prompt_tokens = 10
    await until(lambda: watched.epoch == epoch + 1)


async def test_what_the_workers_route_tells(stack: Stack) -> None:
    engine = await stack.engine()
    proxy = await stack.proxy(engine)
    await proxy.chat("hello " * 50, max_tokens=2)
    await until(lambda: all(w.facts.num_blocks for w in proxy.services.pool))
    (told,) = (await proxy.client.get("/helium/workers")).json()["workers"]
    assert told["models"] == ["demo"]
    assert told["state"] == "up"
    assert told["breaker"] == "closed"
    assert told["engine"] == "helium"
    assert told["tokenizer"] == "exact"
    assert told["block_size"] == 16
    assert told["capacity_blocks"] == 4096
    assert told["running"] == 0
    assert told["resident_blocks"] > 0
    assert told["error"] is None


async def test_workers_that_come_and_go_leave_no_series_behind(stack: Stack) -> None:
    proxy = await stack.proxy(await stack.fake())
    for _ in range(3):
        passing = await stack.fake()
        name = passing.url.removeprefix("http://")
        await proxy.client.post("/helium/workers", json={"url": passing.url})
        await proxy.up(2)
        for i in range(4):
            await proxy.chat(str(i))
        await proxy.client.delete(f"/helium/workers/{name}")
        await asyncio.sleep(0)
        assert name not in (await proxy.client.get("/metrics")).text


async def test_a_worker_that_never_came_up_is_seen_to_be_down(stack: Stack) -> None:
    def shown(worker: str) -> dict[str, float]:
        samples = (s for family in metrics.WORKER_UP.collect() for s in family.samples)
        return {s.labels["model"]: s.value for s in samples if s.labels["worker"] == worker}

    worker = await stack.fake("one")
    worker.health = 503
    proxy = await stack.proxy(engine={"count": 0}, pool={"models_interval_s": 0.05, "health_interval_s": 0.05})
    added = await proxy.client.post("/helium/workers", json={"url": worker.url})
    name = added.json()["id"]
    assert shown(name) == {"": 0.0}
    worker.health = 200
    await until(lambda: shown(name) == {"one": 1.0})
    worker.models = ("two",)
    await until(lambda: shown(name) == {"two": 1.0})
    await proxy.client.delete(f"/helium/workers/{name}")
    assert shown(name) == {}


@pytest.mark.parametrize("mode", ["full", "passthrough"])
async def test_a_worker_that_restarts_with_another_model_fails_no_call_that_others_can_answer(
    stack: Stack, mode: str
) -> None:
    async def of_its_model(seen: Seen) -> None:
        if seen.body["model"] in seen.worker.models:
            await answer(seen)
        else:
            error = {
                "message": f"The model `{seen.body['model']}` does not exist.",
                "type": "NotFoundError",
                "param": "model",
                "code": 404,
            }
            await seen.json({"error": error}, 404)

    turncoat, worker = await stack.fake("alpha", always=of_its_model), await stack.fake("alpha", always=of_its_model)
    proxy = await stack.proxy(turncoat, worker, mode=mode)
    turncoat.models = ("beta",)
    answers = await asyncio.gather(*(proxy.client.post(CHAT, json={**chat(), "model": "alpha"}) for _ in range(8)))
    assert [a.status_code for a in answers] == [200] * 8
    await until(lambda: proxy.services.pool.models() == {"alpha", "beta"})


async def test_a_removal_that_another_has_taken_back_says_so(stack: Stack) -> None:
    async def hang(seen: Seen) -> None:
        await seen.gone()

    worker = await stack.fake(always=hang)
    proxy = await stack.proxy(worker)
    (watched,) = proxy.services.pool.all()
    call = asyncio.create_task(proxy.chat())
    await until(lambda: worker.seen)
    removal = asyncio.create_task(proxy.client.delete(f"/helium/workers/{watched.id}?drain_s=30"))
    await until(lambda: watched.state == "draining")
    await proxy.client.post("/helium/workers", json={"url": worker.url})
    call.cancel()
    assert (await removal).json()["state"] in ("starting", "up")


async def test_a_removal_takes_nothing_from_the_worker_that_has_come_in_its_place(stack: Stack) -> None:
    leave = asyncio.Event()

    async def slow(seen: Seen) -> None:
        await leave.wait()
        await answer(seen)

    worker = await stack.fake()
    proxy = await stack.proxy(worker)
    path = f"/helium/workers/{worker.url.removeprefix('http://')}"
    worker.then = [slow]
    call = asyncio.create_task(proxy.chat())
    await until(lambda: worker.inside)
    patient = asyncio.create_task(proxy.client.delete(path, params={"drain_s": 30}))
    await until(lambda: [w.state for w in proxy.services.pool] == ["draining"])
    assert (await proxy.client.delete(path, params={"drain_s": 0})).json()["state"] == "removed"
    assert (await proxy.client.post("/helium/workers", json={"url": worker.url})).status_code == 201
    await proxy.up(1)
    leave.set()
    assert (await call).status_code == 200
    assert (await patient).json()["state"] == "up", "another one, which stays"
    assert [w.state for w in proxy.services.pool] == ["up"]
    assert (await proxy.chat("again")).status_code == 200


async def test_a_call_that_outlives_its_worker_leaves_no_series_behind(stack: Stack) -> None:
    leave = asyncio.Event()

    async def slow(seen: Seen) -> None:
        await leave.wait()
        await answer(seen)

    worker, other = await stack.fake(), await stack.fake()
    proxy = await stack.proxy(worker, other)
    name = worker.url.removeprefix("http://")
    worker.always = other.always = slow
    calls = [asyncio.create_task(proxy.chat(str(i))) for i in range(4)]
    await until(lambda: worker.inside and other.inside)
    assert (await proxy.client.delete(f"/helium/workers/{name}", params={"drain_s": 0})).status_code == 200
    leave.set()
    assert [response.status_code for response in await asyncio.gather(*calls)] == [200] * 4
    exposition = metrics.render()[0].decode()
    assert f'worker="{other.url.removeprefix("http://")}"' in exposition
    assert f'worker="{name}"' not in exposition


async def test_pages_of_other_sites_change_nothing(stack: Stack) -> None:
    worker = await stack.fake()
    proxy = await stack.proxy(worker)
    name = worker.url.removeprefix("http://")
    own = {"origin": proxy.url}
    for foreign in ({"origin": "https://evil.example"}, {"origin": "null"}, {"origin": "http://127.0.0.1:1"}):
        added = await proxy.client.post("/helium/workers", json={"url": "http://evil:1"}, headers=foreign)
        assert (added.status_code, added.json()["error"]["code"]) == (403, "insufficient_permissions")
        for path in (f"workers/{name}", "cache", "runs/r"):
            assert (await proxy.client.delete(f"/helium/{path}", headers=foreign)).status_code == 403
        assert (await proxy.client.get("/helium/workers", headers=foreign)).status_code == 200
    assert (await proxy.client.delete("/helium/cache", headers=own)).status_code == 200
    behind = {"origin": "https://proxy.example", "x-forwarded-host": "proxy.example"}
    assert (await proxy.client.delete("/helium/cache", headers=behind)).status_code == 200
    assert (await proxy.client.delete("/helium/cache")).status_code == 200
