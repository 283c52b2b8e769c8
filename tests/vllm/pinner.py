"""Two engines with the pinning connector, and what the tests ask of them.

Each has 63 usable KV blocks of 32 tokens. The first has the connector as users load it; the second has it beside
another connector, through vLLM's MultiConnector, with half of the blocks as its budget and little patience.
"""

from __future__ import annotations

import http.client
import json
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines import PIN_CONNECTOR, VllmEngine

from helium_proxy.local import free_port

BLOCK = 32  # tokens
USABLE = 63  # blocks
BUDGET = 18  # 30% of them


@dataclass(frozen=True)
class Answer:
    cached: int  # prompt tokens found in the cache
    report: dict[str, Any] | None  # kv_transfer_params.helium of the response
    seconds: float
    text: str


def tokens(blocks: float, seed: int) -> list[int]:
    """A prompt of so many blocks that no other seed shares."""
    rng = random.Random(seed)
    return [rng.randrange(300, 8000) for _ in range(int(blocks * BLOCK))]


class Pinner:
    """What the tests ask of an engine with the connector."""

    def __init__(self, engine: VllmEngine) -> None:
        self.engine = engine

    def ask(self, prompt: Sequence[int], helium: Any = None, max_tokens: int = 1, **fields: Any) -> Answer:
        body = self.body(prompt, helium, max_tokens, **fields)
        started = time.monotonic()
        answer = self.engine.post("/v1/completions", body)
        seconds = time.monotonic() - started
        cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        report = (answer["kv_transfer_params"] or {}).get("helium")
        return Answer(cached, report, seconds, answer["choices"][0]["text"])

    def report(self) -> dict[str, Any]:
        report = self.ask([5, 6, 7], helium={}).report
        assert report is not None
        return report

    def directive(self, **helium: Any) -> dict[str, Any]:
        report = self.ask([5, 6, 7], helium=helium).report
        assert report is not None
        return report

    def pin(self, name: str, blocks: int, seed: int, **options: Any) -> dict[str, Any]:
        report = self.ask(tokens(blocks, seed), helium={"pin": name, **options}).report
        assert report is not None
        return report

    def flood(self, blocks: int, seed: int, at_once: int = 4) -> None:
        """Unrelated prompts that fill so many blocks, several at a time."""
        with ThreadPoolExecutor(at_once) as pool:
            list(pool.map(lambda i: self.ask(tokens(32, seed + i)), range(-(-blocks // 32))))

    def start(
        self, prompt: Sequence[int], max_tokens: int, helium: Any = None
    ) -> tuple[http.client.HTTPConnection, Any]:
        """Start a stream, and return when its first token is there: (connection, response); close it to cancel."""
        connection = http.client.HTTPConnection("127.0.0.1", self.engine.port, timeout=60)
        body = self.body(prompt, helium, max_tokens, stream=True)
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.readline().startswith(b"data: {")
        return connection, response

    def used_blocks(self) -> int:
        """Blocks in use after the engine's last step, by its own metric; call it when the engine is idle."""
        self.report()
        return round(self.engine.metric("vllm:kv_cache_usage_perc") * USABLE)

    def reset(self, query: str = "") -> bool:
        """Whether the engine's prefix cache was reset."""
        return bool(self.engine.post(f"/reset_prefix_cache{query}", {})["success"])

    def clear(self) -> None:
        wait_until(self.reset)  # blocks of the last request come back a step later
        assert self.report()["pinned_blocks"] == 0

    @staticmethod
    def body(prompt: Sequence[int], helium: Any, max_tokens: int, **fields: Any) -> dict[str, Any]:
        body = {"model": "demo", "prompt": list(prompt), "max_tokens": max_tokens, "temperature": 0}
        body |= {"ignore_eos": True, **fields}
        if helium is not None:
            body["kv_transfer_params"] = {"helium": helium}
        return body


def wait_until(condition: Any, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def pinning_pair(folder: Path) -> tuple[VllmEngine, VllmEngine]:
    """Both engines, not started; their logs and files go to `folder`."""
    pins = {**PIN_CONNECTOR, "kv_connector_extra_config": {"budget_share": 0.5, "patience_s": 0.5}}
    other = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(folder / "kv")},
    }
    both = {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_producer",  # one that serves as well
        "kv_connector_extra_config": {"connectors": [pins, other]},
    }
    first, second = (
        VllmEngine(
            free_port(),
            core=core,
            blocks=USABLE + 1,
            connector=connector,
            extra_args=["--block-size", str(BLOCK), "--max-model-len", "1536"],
            env={"VLLM_SERVER_DEV_MODE": "1"},
            log=folder / f"engine-{core}.log",
        )
        for core, connector in enumerate((PIN_CONNECTOR, both))
    )
    return first, second
