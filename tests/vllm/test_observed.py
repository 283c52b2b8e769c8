"""A real Prometheus scrapes the proxy and two real vLLM engines under load: every dashboard query, recording rule and
alert expression has an answer with vLLM's own metric names."""

from __future__ import annotations

import asyncio
import shutil
import time
from pathlib import Path

import pytest
from engines import EngineClient
from operate.load import Load
from operate.scrape import Prometheus, prometheus, unanswered
from ui.live import proxy

pytestmark = pytest.mark.vllm


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
