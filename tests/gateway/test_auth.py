"""API keys: who may call, whose call it is, and that no key goes anywhere it should not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ValidationError
from serving import CHAT, Proxy, Stack, chat

from helium_proxy import metrics
from helium_proxy.config import AuthSettings
from helium_proxy.errors import ConfigError, Unauthorized
from helium_proxy.gateway.auth import Keyring

KEYS = [
    {"key": "sk-admin", "tenant": "ops", "admin": True},
    {"key": "sk-one", "tenant": "one"},
    {"key": "sk-two", "tenant": "two"},
]


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def test_calls_need_a_key(stack: Stack) -> None:
    worker = await stack.fake()
    proxy = await stack.proxy(worker, auth={"keys": KEYS})
    for headers in ({}, bearer("sk-none"), {"Authorization": "Basic c2s="}, {"x-api-key": "sk-on"}):
        for path in (CHAT, "/v1/other", "/tokenize"):
            response = await proxy.client.post(path, json=chat(), headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
        assert (await proxy.client.get("/v1/models", headers=headers)).status_code == 401
        assert (await proxy.client.get("/helium/runs", headers=headers)).status_code == 401
    assert not worker.seen
    for headers in (bearer("sk-one"), {"Authorization": "bearer sk-one"}, {"x-api-key": "sk-two"}):
        assert (await proxy.client.post(CHAT, json=chat(), headers=headers)).status_code == 200
        assert (await proxy.client.get("/v1/models", headers=headers)).status_code == 200
    for path in ("/health", "/ready", "/metrics", "/version"):
        assert (await proxy.client.get(path)).status_code == 200, "probes and scrapers have no key"


def test_no_key_is_nobodys_key(tmp_path: Path) -> None:
    """A variable that a template left empty must not let everybody in."""
    with pytest.raises(ValidationError):
        AuthSettings.model_validate({"keys": [{"key": ""}]})
    keyring = Keyring(AuthSettings.model_validate({"keys": [{"key": " "}]}))
    for headers in ({}, {"authorization": "Bearer "}, {"authorization": "Bearer  "}, {"x-api-key": " "}):
        with pytest.raises(Unauthorized):
            keyring.authenticate(headers)
    file = tmp_path / "keys.yaml"
    file.write_text("- {key: '', tenant: t}")
    with pytest.raises(ConfigError):
        Keyring(AuthSettings(keys_file=file))


async def test_an_operator_ends_any_tenants_run(stack: Stack) -> None:
    proxy = await stack.proxy(await stack.fake(), auth={"keys": KEYS})
    tags = {"run": "r", "workflow": "w", "node": "n"}
    for key in ("sk-one", "sk-two"):
        await proxy.client.post(CHAT, json=chat(helium=tags), headers=bearer(key))
    listed = (await proxy.client.get("/helium/runs", headers=bearer("sk-admin"))).json()["runs"]
    assert [(run["run"], run["tenant"]) for run in listed] == [("r", "two"), ("r", "one")]
    for key, status in (("sk-one", 200), ("sk-one", 404), ("sk-admin", 200), ("sk-two", 404)):
        assert (await proxy.client.delete("/helium/runs/r", headers=bearer(key))).status_code == status


async def test_the_client_s_key_reaches_no_worker_and_no_log(stack: Stack, capfd: pytest.CaptureFixture[str]) -> None:
    worker = await stack.fake()
    proxy = await stack.proxy(worker, auth={"keys": KEYS}, log={"level": "debug", "access": True})
    for path in (CHAT, "/v1/other"):
        for headers in (bearer("sk-one"), {"x-api-key": "sk-two"}, {**bearer("sk-one"), "Cookie": "session=sk-c"}):
            response = await proxy.client.post(path, json=chat(), headers=headers)
            assert response.status_code == 200
    await proxy.client.post(CHAT, json=chat(), headers=bearer("sk-wrong"))
    assert len(worker.seen) == 6
    for seen in worker.seen:
        assert not {"authorization", "x-api-key", "cookie"} & set(seen.headers)
        assert "sk-" not in str(seen.headers)
        assert b"sk-" not in seen.raw
    logged = "".join(capfd.readouterr())
    assert "worker added" in logged
    assert "sk-" not in logged
    assert b"sk-" not in metrics.render()[0]


async def test_workers_get_their_own_key(stack: Stack) -> None:
    worker = await stack.fake()
    proxy = await stack.proxy(wait=False, workers=[{"url": worker.url, "api_key": "sk-worker"}])
    await proxy.up(1)
    await proxy.chat(headers=bearer("sk-client"))
    await proxy.client.post("/v1/other", json={}, headers=bearer("sk-client"))
    assert [s.headers["authorization"] for s in worker.seen] == ["Bearer sk-worker"] * 2


async def test_an_engine_with_a_key(stack: Stack) -> None:
    engine = await stack.engine(api_key="sk-engine")
    proxy = await stack.proxy(wait=False, workers=[{"url": engine.url, "api_key": "sk-engine"}])
    await proxy.up(1)
    assert (await proxy.chat(max_tokens=2)).status_code == 200


async def test_only_operators_use_the_operator_s_routes(stack: Stack) -> None:
    proxy = await stack.proxy(await stack.fake(), auth={"keys": KEYS})

    async def status(method: str, path: str, key: str, **more: Any) -> int:
        return (await proxy.client.request(method, path, headers=bearer(key), **more)).status_code

    for method, path in (
        ("GET", "/helium/workers"),
        ("POST", "/helium/workers"),
        ("DELETE", "/helium/workers/127.0.0.1:1"),
        ("GET", "/helium/cache"),
        ("GET", "/helium/statistics"),
    ):
        assert await status(method, path, "sk-one", json={}) == 403, path
        assert await status(method, path, "sk-admin", json={}) in (200, 400, 404), path


async def test_a_lone_key_is_the_operator_s(stack: Stack) -> None:
    proxy = await stack.proxy(await stack.fake(), auth={"keys": [{"key": "sk-only"}]})
    assert (await proxy.client.get("/helium/workers", headers=bearer("sk-only"))).status_code == 200


async def runs(proxy: Proxy, key: str) -> set[str]:
    answer = await proxy.client.get("/helium/runs", headers=bearer(key))
    return {r["run"] for r in answer.json()["runs"]}


async def test_tenants_see_and_share_nothing_of_each_other(stack: Stack) -> None:
    worker = await stack.fake()
    proxy = await stack.proxy(worker, auth={"keys": KEYS})

    async def call(key: str, run: str) -> str:
        body = chat("the same", temperature=0, helium={"run": run, "workflow": "w", "node": "n"})
        response = await proxy.client.post(CHAT, json=body, headers=bearer(key))
        return str(response.headers["x-helium-cache"])

    assert await call("sk-one", "run-1") == "miss"
    assert await call("sk-two", "run-2") == "miss"
    assert await call("sk-one", "run-1b") == "hit"
    assert len(worker.seen) == 2
    assert await runs(proxy, "sk-one") == {"run-1", "run-1b"}
    assert await runs(proxy, "sk-two") == {"run-2"}
    assert await runs(proxy, "sk-admin") == {"run-1", "run-1b", "run-2"}
    assert (await proxy.client.get("/helium/runs/run-2", headers=bearer("sk-one"))).status_code == 404
    assert (await proxy.client.delete("/helium/cache", headers=bearer("sk-two"))).json() == {"purged": 1}
    assert await call("sk-one", "run-1c") == "hit"
    assert await call("sk-two", "run-2b") == "miss"


async def test_a_stored_response_is_its_tenant_s_alone(stack: Stack) -> None:
    proxy = await stack.proxy(await stack.engine(), auth={"keys": KEYS})
    body = {"model": "demo", "input": "hello", "max_output_tokens": 3}
    headers = {**bearer("sk-one"), "X-Request-Id": "easy-to-guess"}
    name = (await proxy.client.post("/v1/responses", json=body, headers=headers)).json()["id"]
    assert name == "resp_easy-to-guess"
    path = f"/v1/responses/{name}"
    assert (await proxy.client.get(path, headers=bearer("sk-one"))).status_code == 200
    for request in (
        proxy.client.get(path, headers=bearer("sk-two")),
        proxy.client.post(f"{path}/cancel", headers=bearer("sk-two")),
        proxy.client.post("/v1/responses", json={**body, "previous_response_id": name}, headers=bearer("sk-two")),
    ):
        response = await request
        assert response.status_code == 404
        assert name in response.json()["error"]["message"]
    taken = await proxy.client.post("/v1/responses", json={**body, "request_id": name}, headers=bearer("sk-two"))
    assert (taken.status_code, taken.json()["error"]["param"]) == (400, "request_id")
    assert (await proxy.client.get(path, headers=bearer("sk-one"))).status_code == 200


async def test_tenants_blocks_can_be_kept_apart(stack: Stack) -> None:
    worker = await stack.fake()
    proxy = await stack.proxy(worker, auth={"keys": KEYS, "salt_tenants": True})
    for key in ("sk-one", "sk-two"):
        await proxy.client.post(CHAT, json=chat(), headers=bearer(key))
    salts = [s.body["cache_salt"] for s in worker.seen]
    assert len(set(salts)) == 2
    for own in ("mine", salts[1]):
        await proxy.client.post(CHAT, json=chat(cache_salt=own), headers=bearer("sk-one"))
        salts.append(worker.seen[-1].body["cache_salt"])
    assert len(set(salts)) == 4, "a client cannot choose its way into another tenant's blocks"


async def test_routes_that_pass_keep_tenants_blocks_apart_too(stack: Stack) -> None:
    worker = await stack.fake(always=lambda seen: seen.json({}))
    proxy = await stack.proxy(worker, auth={"keys": KEYS, "salt_tenants": True})

    async def sent(key: str, path: str, content: bytes) -> bytes:
        headers = {**bearer(key), "content-type": "application/json"}
        assert (await proxy.client.post(path, content=content, headers=headers)).status_code == 200
        return worker.seen[-1].raw

    plain = b'{"model": "demo", "messages": [[]], "seed": 1e0 }'
    await sent("sk-one", CHAT, json.dumps(chat()).encode())
    salt = worker.seen[-1].body["cache_salt"]
    for path in (f"{CHAT}/batch", "/rerank", "/score", "/v2/rerank", "/pooling", "/classify", "/v1/systemone"):
        assert await sent("sk-one", path, plain) == plain[:-1] + b',"cache_salt":"' + salt.encode() + b'"}'
        for own in (f'"{salt}"', '"mine"', "null"):
            body = json.loads(await sent("sk-two", path, b'{"model": "demo", "cache_salt": %s}' % own.encode()))
            assert body["cache_salt"].startswith("3:two"), "a client cannot choose its way into another's blocks"
    assert json.loads(await sent("sk-one", f"{CHAT}/batch", b"{}"))["cache_salt"] == salt
    assert json.loads(await sent("sk-one", f"{CHAT}/batch", '{"a": "é"}'.encode("utf-16")))["cache_salt"] == salt
    assert json.loads(await sent("sk-one", f"{CHAT}/batch", b'{"cache_salt": 7}')) == {"cache_salt": 7}
    for other in (b"[1 ]", b'{"model" : "demo"}', b"oops", b""):
        assert await sent("sk-one", "/tokenize", other) == other
        assert await sent("sk-one", "/v1/unknown", other) == other


def test_keys_come_from_a_file_too(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text("- {key: sk-a, tenant: a}\n- {key: sk-b, tenant: b, admin: true}\n")
    ring = Keyring(AuthSettings(keys_file=file))
    assert ring.authenticate({"authorization": "Bearer sk-a"}).tenant == "a"
    assert not ring.authenticate({"authorization": "Bearer sk-a"}).admin
    assert ring.authenticate({"x-api-key": "sk-b"}).admin
    with pytest.raises(Unauthorized):
        ring.authenticate({})
    assert "sk-" not in repr(ring)


@pytest.mark.parametrize("text", ["- {key: sk-secret, tennant: a}", "sk-secret", "- [", "- {tenant: a}"])
def test_a_bad_keys_file_is_named_and_not_quoted(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match="keys_file") as raised:
        Keyring(AuthSettings(keys_file=file))
    assert "sk-secret" not in str(raised.value)


def test_a_missing_keys_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="keys_file"):
        Keyring(AuthSettings(keys_file=tmp_path / "none.yaml"))


async def test_what_is_expected_of_a_run_is_its_tenant_s_own(stack: Stack) -> None:
    """Two tenants may use one run id, and each sees what its own template says of its own run."""
    proxy = await stack.proxy(await stack.engine(), auth={"keys": KEYS}, workflow={"template_refresh_s": 0})

    async def call(key: str, run: str, node: str, parents: list[str]) -> None:
        tags = {"workflow": "w", "run": run, "node": node, "parents": parents}
        body = chat(f"{node} of {run}", max_tokens=2, helium=tags)
        assert (await proxy.client.post(CHAT, json=body, headers=bearer(key))).status_code == 200

    for number in range(4):
        await call("sk-two", f"r{number}", "theirs", [])
        await call("sk-two", f"r{number}", "their-next", ["theirs"])
        await proxy.client.delete(f"/helium/runs/r{number}", headers=bearer("sk-two"))
    await call("sk-one", "team/1", "mine", [])
    await call("sk-two", "team/1", "theirs", [])
    found = {}
    for key in ("sk-one", "sk-two"):
        response = await proxy.client.get("/helium/runs/team%2F1", headers=bearer(key))
        found[key] = {call["node"] for call in response.json()["expected"]}
    assert found == {"sk-one": set(), "sk-two": {"their-next"}}


RESPONSES = "/v1/responses"


async def test_no_form_of_a_call_reaches_another_tenants_response(stack: Stack) -> None:
    engines = [await stack.engine(model="one"), await stack.engine(model="two")]
    proxy = await stack.proxy(*engines, auth={"keys": KEYS, "salt_tenants": True})

    async def post(key: str, body: bytes) -> httpx.Response:
        return await proxy.client.post(
            RESPONSES, content=body, headers={**bearer(key), "content-type": "application/json"}
        )

    made = await post("sk-one", json.dumps({"model": "one", "input": "mine"}).encode())
    stored = made.json()["id"]
    call = {"model": "one", "input": "go on", "previous_response_id": stored}
    unnamed = {k: v for k, v in call.items() if k != "model"}
    forms = [json.dumps(body).encode() for body in (call, unnamed, {**call, "model": None}, {**call, "model": ""})]
    forms += [json.dumps(call).encode(encoding) for encoding in ("utf-8-sig", "utf-16", "utf-16-le", "utf-32-be")]
    for form in forms:
        assert (await post("sk-two", form)).status_code == 404
        assert (await post("sk-one", form)).status_code in (200, 404), "an empty model is the engine's to refuse"
    refused = await post("sk-two", json.dumps({**call, "model": "none"}).encode())
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
    assert (await post("sk-two", b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}")).status_code == 400
    unnamed_too = await post("sk-one", b'{"input": "mine, too"}')
    assert unnamed_too.status_code == 200
    path = f"{RESPONSES}/{unnamed_too.json()['id']}"
    assert (await proxy.client.get(path, headers=bearer("sk-one"))).status_code == 200
    assert (await proxy.client.get(path, headers=bearer("sk-two"))).status_code == 404


async def test_no_tenant_has_anothers_responses_forgotten(stack: Stack) -> None:
    proxy = await stack.proxy(await stack.fake(), auth={"keys": KEYS})
    services = proxy.services
    services.note_tenant("resp_of_one", "one")
    for i in range(100_001):
        services.note_tenant(f"resp_{i}", "two")
    assert services.may_see("resp_of_one", "one")
    assert not services.may_see("resp_of_one", "two")
    assert not services.may_see("resp_5", "one")
    assert services.may_see("resp_0", "one"), "forgotten, within the bound of each tenant"
    assert len(services.tenants["two"]) == 100_000


@pytest.mark.parametrize("own", [None, "mine" * 30])
@pytest.mark.parametrize("tenant", ["team", "team/a", "a@b", "x" * 64])
async def test_every_call_of_a_tenant_is_salted_as_vllm_takes_it(stack: Stack, own: str | None, tenant: str) -> None:
    worker = await stack.fake()
    keys = [{"key": "sk-1", "tenant": tenant}, {"key": "sk-2", "tenant": "other"}]
    proxy = await stack.proxy(worker, auth={"keys": keys, "salt_tenants": True})
    salts = set()
    for key in ("sk-1", "sk-2"):
        answer = await proxy.chat(cache_salt=own, headers={"authorization": f"Bearer {key}"})
        assert answer.status_code == 200
        salts.add(worker.seen[-1].body["cache_salt"])
    assert len(salts) == 2
    assert all(0 < len(salt) <= 128 and not set(salt) & set("@/\\\0") for salt in salts)


async def test_a_client_has_no_say_in_what_engines_tell_of_their_caches(stack: Stack) -> None:
    worker = await stack.fake()
    proxy = await stack.proxy(worker)
    for xargs, left in (
        ({"kv_cache_report_mode": "full"}, None),
        ({"kv_cache_report_mode": "full", "a": 1}, {"a": 1}),
    ):
        assert (await proxy.chat(vllm_xargs=xargs)).status_code == 200
        assert worker.seen[-1].body.get("vllm_xargs") == left
