"""The cpu profile, its containers run as Docker would run them, and used."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from .containers import Stack, missing
from .load import Load

KEY = "sk-test"


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    if why := missing():
        pytest.skip(f"containers cannot be imitated: {why}")
    keys = f'[{{"key":"{KEY}","admin":true}}]'
    with Stack({"cpu"}, {"WORKERS": "2", "ENGINE_PROFILE": "instant", "HELIUM_AUTH__KEYS": keys}) as running:
        running.wait()
        yield running


@pytest.fixture
def load(stack: Stack) -> Load:
    return Load(f"http://{stack['helium-proxy-cpu-1'].address}:8000", headers={"Authorization": f"Bearer {KEY}"})


def test_it_is_the_services_of_the_profile(stack: Stack) -> None:
    assert [one.name for one in stack.containers] == ["helium-proxy-cpu-1", "helium-engine-1", "helium-engine-2"]
    assert not stack.skipped


async def test_a_workflow_runs_on_both_engines_found_by_name(stack: Stack, load: Load) -> None:
    await load.trading("first")
    async with load.client() as client:
        workers = (await client.get("/helium/workers")).json()["workers"]
        assert {worker["id"]: worker["state"] for worker in workers} == {
            "helium-engine-1:8000": "up",
            "helium-engine-2:8000": "up",
        }
        run = (await client.get("/helium/runs/first")).json()
    assert len(run["nodes"]) == 88
    assert {node["state"] for node in run["nodes"]} == {"done"}


async def test_the_page_is_public_and_its_data_is_not(load: Load) -> None:
    async with httpx.AsyncClient(base_url=load.base) as client:
        assert (await client.get("/helium/")).status_code == 200
        assert (await client.get("/helium/runs")).status_code == 401
        assert (await client.get("/v1/models")).status_code == 401


def test_processes_have_no_rights(stack: Stack) -> None:
    for container in stack.containers:
        status = Path(f"/proc/{container.pid}/status").read_text()
        facts = dict(line.split(":\t", 1) for line in status.splitlines())
        assert facts["Uid"].split() == ["10001"] * 4
        assert int(facts["CapEff"], 16) == int(facts["CapBnd"], 16) == 0
        assert facts["NoNewPrivs"] == "1"


def test_nothing_can_be_written_but_data_and_tmp(stack: Stack) -> None:
    proxy = stack["helium-proxy-cpu-1"]
    user = ["setpriv", "--reuid", "10001", "--regid", "10001", "--clear-groups"]
    enter = ["nsenter", "--target", str(proxy.pid), "--mount", "--root", *user]

    def touch(path: str) -> bool:
        return subprocess.run([*enter, "touch", path], capture_output=True, check=False).returncode == 0

    assert touch("/data/note")
    assert touch("/tmp/note")
    assert not any(map(touch, ("/note", "/etc/helium/helium.yaml", "/opt/helium/note", "/var/tmp/note")))


async def test_what_is_learnt_is_kept_in_the_volume_and_sigterm_ends_it_cleanly(stack: Stack, load: Load) -> None:
    await load.trading("second")
    proxy = stack["helium-proxy-cpu-1"]
    data = Path(f"/proc/{proxy.pid}/root/data/templates.db")
    assert data.stat().st_size > 0
    assert proxy.stop() == 0
