"""A real Prometheus scrapes the proxy and two real vLLM engines under load: every dashboard query, recording rule and
alert expression has an answer with vLLM's own metric names."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from engines import EngineClient
from operate.load import Load
from operate.scrape import Prometheus, fast_copy, unanswered
from ui.live import free_port, proxy

pytestmark = pytest.mark.vllm


@contextlib.contextmanager
def prometheus(folder: Path, targets: dict[str, list[str]]) -> Iterator[Prometheus]:
    """Debian's Prometheus with our configuration; the jobs' targets are `targets`, everything else is compose's."""
    path = fast_copy(folder) / "prometheus.yml"
    config = yaml.safe_load(path.read_text())
    for job in config["scrape_configs"]:
        for discovery in ("static_configs", "dns_sd_configs", "relabel_configs"):
            job.pop(discovery, None)
        job["static_configs"] = [{"targets": targets[job["job_name"]]}]
    path.write_text(yaml.safe_dump(config))
    port = free_port()
    command = [
        "prometheus",
        f"--config.file={path}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        end = time.monotonic() + 30
        while time.monotonic() < end:
            assert process.poll() is None, (folder / "prometheus.log").read_text()
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"http://127.0.0.1:{port}/-/ready").status_code == 200:
                    break
            time.sleep(0.2)
        yield Prometheus(f"http://127.0.0.1:{port}")
    finally:
        process.terminate()
        process.wait(20)


async def under_load(base: str) -> None:
    """Small prompts: these engines prefill a few hundred tokens a second. Equal roles share a block of 128 tokens."""
    load = Load(base, words=25, output=4, traders=2, rounds=1)
    for turn in range(3):
        await load.everything(name=f"real-{turn}")
        await asyncio.sleep(2)


def test_every_query_has_an_answer_from_vllm(vllm_engines: list[EngineClient], tmp_path: Path) -> None:
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed (Debian: apt-get install prometheus)")
    urls = [engine.url for engine in vllm_engines]
    hosts = [url.removeprefix("http://") for url in urls]
    with (
        proxy(*urls) as base,
        prometheus(tmp_path, {"helium-proxy": [base.removeprefix("http://")], "vllm": hosts}) as asked,
    ):
        asyncio.run(under_load(base))
        asked.until("workflow:helium_run_makespan_seconds:p95_5m")
        time.sleep(4)  # three scrapes and a rule evaluation
        empty = unanswered(Prometheus(asked.base, at=time.time()))
        assert not empty, "\n".join(empty)
        assert set(asked.targets().values()) == {"up"}
        assert len(asked.query("helium_worker_up == 1")) == 2
        told = asked.query("sum(helium_actual_cached_tokens_total)")[0]
        seen = asked.query("sum(vllm:prompt_tokens_cached_total)")[0]
        assert 0 < told <= seen, "the engines served others before, but not less than they told us"
