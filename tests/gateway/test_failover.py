"""Workers that fail: calls go elsewhere before their first byte, within a budget; no healthy worker is ejected."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest
from serving import CHAT, SLOW, FakeWorker, Seen, Stack, answer, chat, http_client, many_client, until
from structlog.testing import capture_logs

from helium_proxy import metrics


async def die(seen: Seen) -> None:
    seen.die()
    await seen.gone()


async def fail(seen: Seen) -> None:
    await seen.json({"error": {"message": "no", "type": "InternalServerError", "param": None, "code": 500}}, 500)


async def ask(client: aiohttp.ClientSession, url: str, text: str) -> tuple[int, str]:
    async with client.post(url, json=chat(text, max_tokens=20, ignore_eos=True)) as response:
        await response.read()
        return response.status, response.headers.get("x-helium-worker", "")


async def test_an_engine_killed_under_200_calls_costs_none_of_them(stack: Stack) -> None:
    doomed, other = await stack.engine(profile=SLOW), await stack.engine(profile=SLOW)
    proxy = await stack.proxy(doomed, other, dispatch={"admission": False})  # all at once
    async with many_client() as client:
        calls = [asyncio.create_task(ask(client, proxy.url + CHAT, f"question {i}")) for i in range(200)]

        sick = next(w for w in proxy.services.pool if w.spec.url == doomed.url)
        await until(lambda: sick.inflight > 40)
        await doomed.server.kill()
        answers = await asyncio.gather(*calls)
    assert [status for status, _ in answers] == [200] * 200
    assert {worker for _, worker in answers} >= {other.url.removeprefix("http://")}
    await until(lambda: proxy.services.in_flight == 0)
    assert proxy.services.dispatcher.statistics().running == 0
    assert all(w.inflight == 0 for w in proxy.services.pool)
    await until(lambda: [w.state for w in proxy.services.pool] == ["down", "up"])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("temperature", [0, 1])
async def test_a_connection_lost_before_the_first_byte_is_made_up_for(
    stack: Stack, stream: bool, temperature: int
) -> None:
    workers = [await stack.fake(), await stack.fake()]
    proxy = await stack.proxy(*workers)
    for worker in workers:
        worker.then = [die]
    response = await proxy.chat(stream=stream, temperature=temperature)
    assert response.status_code == 200
    assert sum(len(w.seen) for w in workers) >= 2


async def test_a_body_that_breaks_off_is_asked_for_again(stack: Stack) -> None:
    async def half(seen: Seen) -> None:
        await seen.start(200, content_length="1000")
        await seen.write(b'{"id": "half')
        seen.die()
        await seen.gone()

    workers = [await stack.fake(), await stack.fake()]
    proxy = await stack.proxy(*workers)
    for worker in workers:
        worker.then = [half]
    assert (await proxy.chat()).status_code in (200, 502)
    workers[0].then, workers[1].then = [half], []
    responses = [await proxy.chat(str(i)) for i in range(4)]
    assert [r.status_code for r in responses] == [200] * 4


async def test_an_error_answer_is_asked_for_elsewhere(stack: Stack) -> None:
    bad, good = await stack.fake(always=fail), await stack.fake()
    proxy = await stack.proxy(bad, good)
    responses = [await proxy.chat(str(i)) for i in range(6)]
    assert [r.status_code for r in responses] == [200] * 6
    assert bad.seen, "the test is empty if the bad worker was never tried"


async def test_a_client_s_error_is_not_asked_for_elsewhere(stack: Stack) -> None:
    async def refuse(seen: Seen) -> None:
        await seen.json({"error": {"message": "bad", "type": "BadRequestError", "param": None, "code": 400}}, 400)

    workers = [await stack.fake(always=refuse), await stack.fake(always=refuse)]
    proxy = await stack.proxy(*workers)
    response = await proxy.chat()
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "bad"
    assert sum(len(w.seen) for w in workers) == 1


async def test_when_all_fail_the_engine_s_own_error_comes_back_and_retries_are_few(stack: Stack) -> None:
    workers = [await stack.fake(always=fail), await stack.fake(always=fail)]
    proxy = await stack.proxy(*workers, pool={"breaker_failures": 10_000, "retry_backoff_s": 0})
    responses = [await proxy.chat(str(i)) for i in range(60)]
    assert {r.status_code for r in responses} == {500}
    assert responses[0].json()["error"]["message"] == "no"
    sends = sum(len(w.seen) for w in workers)
    assert 60 < sends <= 60 + 12, "retries of error answers stay within a fifth of the calls"


async def test_stale_connections_open_no_breaker(stack: Stack) -> None:
    """An engine closes kept connections at will: a send that meets that is repeated, and counts for nothing."""
    known: set[tuple[str, int]] = set()
    stale = 0

    async def close_if_kept(seen: Seen) -> None:
        nonlocal stale
        if seen.client in known and stale < 12:
            stale += 1
            await die(seen)
        known.add(seen.client)
        await answer(seen)

    worker = await stack.fake(always=close_if_kept)
    proxy = await stack.proxy(worker)
    for i in range(40):
        assert (await proxy.chat(str(i))).status_code == 200
    assert stale == 12
    (watched,) = proxy.services.pool.all()
    assert watched.state == "up"
    assert watched.breaker.state(proxy.services.clock()) == "closed"
    assert proxy.services.dispatcher.statistics().running == 0


async def test_a_worker_that_only_fails_is_left_alone_until_it_is_well(stack: Stack) -> None:
    bad, good = await stack.fake(always=fail), await stack.fake()
    proxy = await stack.proxy(bad, good, pool={"breaker_cooldown_s": 0.2}, dispatch={"placement": "round-robin"})
    before = metrics.BREAKER_OPENS.labels(bad.url.removeprefix("http://"))._value.get()
    for i in range(30):
        assert (await proxy.chat(str(i))).status_code == 200
    sick = next(w for w in proxy.services.pool if w.spec.url == bad.url)
    assert metrics.BREAKER_OPENS.labels(sick.id)._value.get() == before + 1
    tried = len(bad.seen)
    assert tried < 15
    bad.always = answer
    await until(lambda: sick.breaker.state(proxy.services.clock()) == "half-open")

    async def tried_again() -> bool:
        assert (await proxy.chat("again")).status_code == 200
        return len(bad.seen) > tried

    await until(tried_again)
    await until(lambda: sick.breaker.state(proxy.services.clock()) == "closed")


async def test_a_worker_that_is_down_comes_back_by_itself(stack: Stack) -> None:
    worker = await stack.fake()
    proxy = await stack.proxy(worker, pool={"unhealthy_after": 1, "health_interval_s": 0.05})
    worker.health = 503
    (watched,) = proxy.services.pool.all()
    await until(lambda: watched.state == "down")
    assert (await proxy.client.get("/ready")).status_code == 503
    epoch = watched.epoch
    worker.health = 200
    assert (await proxy.chat()).status_code == 200, "the call waited for it"
    assert watched.epoch == epoch + 1, "its cache may be gone"


async def test_the_only_worker_is_waited_for(stack: Stack) -> None:
    """Refused, a call is sent again at once only where another worker is."""
    worker = FakeWorker()
    await worker.server.start()
    port = worker.server.port
    proxy = await stack.proxy(worker)
    await worker.server.kill()
    call = asyncio.create_task(proxy.chat())
    (watched,) = proxy.services.pool.all()
    await until(lambda: watched.state == "down")
    worker.server = type(worker.server)(worker, port)
    await worker.server.start()
    assert (await call).status_code == 200
    await worker.server.kill()


async def test_a_worker_that_does_not_come_up_is_told_of(stack: Stack) -> None:
    with capture_logs() as logged:
        proxy = await stack.proxy("http://127.0.0.1:1", wait=False)
        await until(lambda: any("has not come up" in line["event"] for line in logged))
        (watched,) = proxy.services.pool.all()
        await until(lambda: watched.failed_checks > 5)
    (line,) = (line for line in logged if "has not come up" in line["event"])
    assert line["log_level"] == "warning"
    assert "refused" in line["error"]


async def test_a_call_waits_for_the_first_worker(stack: Stack) -> None:
    """Start-up waits for nothing; calls that come early wait for a worker, not the other way round."""
    late = FakeWorker()
    await late.server.start()
    port = late.server.port
    await late.server.kill()
    proxy = await stack.proxy(f"http://127.0.0.1:{port}", wait=False)
    assert (await proxy.client.get("/ready")).status_code == 503
    call = asyncio.create_task(proxy.chat())
    await until(lambda: proxy.services.in_flight == 1)
    late.server = type(late.server)(late, port)
    await late.server.start()
    assert (await call).status_code == 200
    await late.server.kill()


async def test_no_worker_at_all_is_a_503_with_an_hour_to_come_back(stack: Stack) -> None:
    proxy = await stack.proxy(engine={"count": 0}, dispatch={"no_worker_wait_s": 0.05})
    response = await proxy.chat()
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "no_worker"
    assert int(response.headers["retry-after"]) >= 1
    assert (await proxy.client.get("/v1/models")).json() == {"object": "list", "data": []}


async def test_a_model_nobody_has_is_a_404(stack: Stack) -> None:
    proxy = await stack.proxy(await stack.fake("one"), await stack.fake("two"))
    response = await proxy.client.get("/v1/models/three")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


async def test_other_routes_try_another_worker_too(stack: Stack) -> None:
    workers = [await stack.fake(), await stack.fake()]
    proxy = await stack.proxy(*workers)
    await workers[0].server.kill()
    for _ in range(4):
        response = await proxy.client.post("/v1/some/route", json={"model": "demo"})
        assert response.status_code == 200
    await workers[1].server.kill()
    response = await proxy.client.post("/v1/some/route", json={"model": "demo"})
    assert response.status_code in (502, 503)
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


async def test_a_lost_probe_does_not_keep_the_breaker_open(stack: Stack) -> None:
    """The client whose call probes a half-open breaker leaves: the worker is probed again."""
    hanging = asyncio.Event()

    async def hang(seen: Seen) -> None:
        hanging.set()
        await seen.gone()

    worker = await stack.fake()
    proxy = await stack.proxy(worker, pool={"breaker_cooldown_s": 0.05, "breaker_failures": 2, "max_attempts": 1})
    worker.then = [fail, fail]
    for i in range(2):
        assert (await proxy.chat(str(i))).status_code == 500
    (watched,) = proxy.services.pool.all()
    assert watched.breaker.state(proxy.services.clock()) != "closed"
    worker.then = [hang]
    async with http_client(proxy.url) as client:
        probe = asyncio.create_task(client.post("/v1/chat/completions", json={"model": "demo", "messages": []}))
        await hanging.wait()
        probe.cancel()
    async with asyncio.timeout(3):
        assert (await proxy.chat("after")).status_code == 200
    assert watched.breaker.state(proxy.services.clock()) == "closed"


async def test_a_plan_s_call_that_gets_no_json_has_failed_upstream(stack: Stack) -> None:
    async def page(seen: Seen) -> None:
        await seen.start(502, "text/html")
        await seen.write(b"<html>Bad gateway</html>", more=False)

    proxy = await stack.proxy(await stack.fake(always=page), pool={"max_attempts": 1})
    node = {"id": "a", "messages": [{"role": "user", "content": "x"}]}
    plan = {"workflow": "w", "model": "demo", "nodes": [node]}
    job = (await proxy.client.post("/v1/workflows", json=plan)).json()
    done = (await proxy.client.get(f"/v1/workflows/{job['id']}", params={"wait_s": 5})).json()
    assert done["status"] == "failed"
    assert done["results"][0]["errors"]["a"]["code"] == "upstream_error"
    assert not proxy.services.workflows._pending
