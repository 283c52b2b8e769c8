"""A real Prometheus, as compose starts it, scrapes the proxy and two engines under load: every panel's query,
recording rule and alert expression has an answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from .containers import Stack, missing
from .load import Load
from .scrape import Prometheus, fast_copy, unanswered


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    if why := missing():
        pytest.skip(f"containers cannot be imitated: {why}")
    folder = fast_copy(tmp_path_factory.mktemp("observed"))
    environ = {"WORKERS": "2", "ENGINE_PROFILE": "instant"}
    with Stack({"cpu", "observability"}, environ, {"prometheus": str(folder)}) as running:
        if "prometheus" in running.skipped:
            pytest.skip("prometheus is not installed (Debian: apt-get install prometheus)")
        assert running.skipped == ["grafana"], "Grafana is in no registry: its dashboards are tested as queries"
        running.wait()
        yield running


async def under_load(base: str) -> None:
    """Enough scrapes apart that rates have two points: three rounds of everything."""
    load = Load(base)
    for turn in range(3):
        await load.everything(name=f"run-{turn}")
        await asyncio.sleep(2)


def test_every_query_has_an_answer(stack: Stack) -> None:
    proxy = f"http://{stack['helium-proxy-cpu-1'].address}:8000"
    prometheus = Prometheus(f"http://{stack['helium-prometheus-1'].address}:9090")
    asyncio.run(under_load(proxy))
    prometheus.until("workflow:helium_run_makespan_seconds:p95_5m")
    asyncio.run(Load(proxy).everything(name="last"))
    end = time.monotonic() + 30
    while empty := unanswered(Prometheus(prometheus.base, at=time.time())):
        assert time.monotonic() < end, "\n".join(empty)
        time.sleep(1)  # scrapes and a rule evaluation
    assert prometheus.targets() == {
        "proxy:8000": "up",
        "helium-engine-1:8000": "up",
        "helium-engine-2:8000": "up",
    }
    alerts = prometheus.get("alerts")["alerts"]
    assert not [one["labels"]["alertname"] for one in alerts if one["state"] == "firing"]


def test_our_worker_label_is_vllms_instance(stack: Stack) -> None:
    prometheus = Prometheus(f"http://{stack['helium-prometheus-1'].address}:9090")
    joined = prometheus.query(
        "helium_worker_up * on (worker) "
        'label_replace(vllm:num_requests_running + 1, "worker", "$1", "instance", "(.*)")'
    )
    assert len(joined) == 2


def test_the_metrics_page_is_one_that_prometheus_accepts(stack: Stack, tmp_path: Path) -> None:
    text = httpx.get(f"http://{stack['helium-proxy-cpu-1'].address}:8000/metrics").text
    assert "# TYPE helium_calls_total counter" in text or "# TYPE helium_calls counter" in text
    assert 'node="bull"' in text
