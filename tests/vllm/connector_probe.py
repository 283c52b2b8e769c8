"""Exercises `HeliumConnector` on vLLM's own block pool, without an engine; run in vLLM's environment, prints JSON.

``unused_us``: what the connector costs the scheduler per step, with one request admitted and one finished in it,
when no directive was ever sent. ``pinned_us``: the same with 100 pins held. ``…_waited_s``: how long a request waits
for vLLM's KV cache manager to admit it beside pins (None: longer than 30 s).
"""

from __future__ import annotations

import json
import sys
import time
from types import SimpleNamespace
from typing import Any

import torch
import vllm
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import Counter, Gauge
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

from helium_proxy.vllm_plugin import HeliumConnector

STEPS = 20_000
SIZE = 16  # tokens of a block
MAX_LEN = 320


def cache_config(groups: int = 1, blocks: int = 21) -> KVCacheConfig:
    spec = FullAttentionSpec(block_size=SIZE, num_kv_heads=1, head_size=8, dtype=torch.float32)
    made = [KVCacheGroupSpec([f"layer{number}"], spec) for number in range(groups)]
    return KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=made)


def connector(
    pool: BlockPool, *, groups: int = 1, drafts: int = 0, lookahead: int = 0, watermark: float = 0.0, **extra: Any
) -> Any:
    config = SimpleNamespace(
        kv_transfer_config=KVTransferConfig(
            kv_connector="HeliumConnector", kv_role="kv_producer", kv_connector_extra_config=extra
        ),
        model_config=SimpleNamespace(max_model_len=MAX_LEN),
        scheduler_config=SimpleNamespace(watermark=watermark),
        num_speculative_tokens=drafts,
        num_lookahead_tokens=lookahead,
    )
    made = HeliumConnector(config, KVConnectorRole.SCHEDULER, cache_config(groups))
    made.bind_gpu_block_pool(pool)
    return made


class Engine:
    """vLLM's KV cache manager with 20 blocks, 6 of them pinned, and the connector, called as its scheduler does."""

    def __init__(self, *, lookahead: int = 0, watermark: float = 0.0) -> None:
        self.manager = KVCacheManager(
            cache_config(),
            max_model_len=MAX_LEN,
            scheduler_block_size=SIZE,
            hash_block_size=SIZE,
            watermark=watermark,
        )
        pool = self.manager.block_pool
        self.connector = connector(pool, drafts=lookahead, lookahead=lookahead, watermark=watermark)
        self.lookahead = lookahead
        self.running = 0
        held = [block.block_id for block in pool.get_new_blocks(6)]
        self.connector._clock = lambda: 0.0
        self.connector._apply(self.connector._pins.pin("a", held, 0.0, ttl_s=300))
        pool.free_blocks([pool.blocks[block] for block in held])

    def request(self, id: str, tokens: int) -> Request:
        hasher = get_request_block_hasher(SIZE, sha256)
        return Request(id, [hash((id, i)) % 9999 for i in range(tokens)], SamplingParams(), None, block_hasher=hasher)

    def admit(self, request: Request) -> bool:
        hit, computed = self.manager.get_computed_blocks(request)[:2]
        self.connector.get_num_new_matched_tokens(request, computed)
        blocks = self.manager.allocate_slots(
            request,
            request.num_tokens - computed,
            computed,
            hit,
            num_lookahead_tokens=self.lookahead,
            full_sequence_must_fit=True,
            has_scheduled_reqs=self.running > 0,
        )
        if blocks is None:
            return False
        self.connector.update_state_after_alloc(request, blocks, 0)
        self.running += 1
        return True

    def finish(self, request: Request) -> None:
        self.connector.request_finished(request, self.manager.get_block_ids(request.request_id)[0])
        self.manager.free(request)
        self.running -= 1

    def wait(self, request: Request, each_two_seconds: Any = None) -> float | None:
        """Try to admit it every 0.1 s; how long it took."""
        for step in range(300):
            self.connector._clock = lambda step=step: step / 10
            if each_two_seconds is not None and step % 20 == 0:
                each_two_seconds(step)
            if self.admit(request):
                return step / 10
        return None


def waits(result: dict[str, Any]) -> None:
    engine = Engine()
    assert engine.admit(engine.request("runs", 4 * SIZE))

    def tiny(step: int) -> None:
        first = engine.request(f"tiny{step}", 5)
        assert engine.admit(first)
        engine.finish(first)

    result["overtaken_waited_s"] = engine.wait(engine.request("waits", 12 * SIZE), tiny)

    engine = Engine(lookahead=3)
    result["lookahead_waited_s"] = engine.wait(engine.request("alone", 14 * SIZE - 1))

    engine = Engine(watermark=0.2)  # 4 blocks that stay free while others run
    assert engine.admit(engine.request("runs", 2 * SIZE))
    result["watermark_waited_s"] = engine.wait(engine.request("waits", 10 * SIZE))

    engine = Engine()
    assert engine.admit(engine.request("runs", 8 * SIZE))
    for number in range(9):
        aborted = engine.request(f"aborted{number}", 12 * SIZE)
        assert not engine.admit(aborted)
        engine.connector.request_finished(aborted, [])
    result["remembered_after_aborts"] = len(engine.connector._waiting)
    for number in range(2000):
        engine.admit(engine.request(f"live{number}", 12 * SIZE))
    result["remembered_of_2000"] = len(engine.connector._waiting)


class Metric:
    """Stands for a metric of prometheus_client in one front-end."""

    def __init__(self, values: dict[str, float], name: str, **_: Any) -> None:
        self.values, self.name = values, name

    def labels(self, *_: object) -> Metric:
        return self

    def set(self, value: float) -> None:
        self.values[self.name] = value

    def inc(self, value: float) -> None:
        self.values[self.name] = self.values.get(self.name, 0) + value


def front_ends(request: Any) -> dict[str, Any]:
    """Four directives are refused in three steps, whose statistics go to two front-ends in turn: what both show."""
    made = connector(BlockPool(8, True, SIZE))
    shown: list[dict[str, float]] = [{}, {}]
    ends = [
        HeliumConnector.build_prom_metrics(
            SimpleNamespace(kv_transfer_config=None),
            {kind: lambda values=values, **options: Metric(values, **options) for kind in (Gauge, Counter)}
            | {vllm.distributed.kv_transfer.kv_connector.v1.metrics.Histogram: None},
            ["engine"],
            {0: ["0"]},
        )
        for values in shown
    ]
    logged = HeliumConnector.build_kv_connector_stats()
    request.kv_transfer_params = {"helium": {"unpin": "nobody"}}
    for step, directives in enumerate((1, 2, 1)):
        for _ in range(directives):
            made.request_finished(request, [])
        data = made.get_kv_connector_stats().data
        ends[step % 2].observe(data)
        logged = logged.aggregate(HeliumConnector.build_kv_connector_stats(data))
    refused = "vllm:helium_pin_refusals"
    return {
        "refused": sum(values[refused] for values in shown),
        "logged": logged.reduce()["helium_refused"],
        "idle": made.get_kv_connector_stats() is None,
    }


def microseconds_per_step(made: Any, request: Any, blocks: list[int]) -> float:
    """Best of five, in microseconds."""
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(STEPS // 5):
            made.on_new_request(request)
            made.get_num_new_matched_tokens(request, 0)
            made.update_state_after_alloc(request, None, 0)
            made.build_connector_meta(None)
            made.request_finished(request, blocks)
            made.get_kv_connector_stats()
        best = min(best, (time.perf_counter() - started) / (STEPS // 5))
    return best * 1e6


def message(**extra: Any) -> str:
    try:
        connector(BlockPool(8, True, 16), **extra)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


def main() -> None:
    pool = BlockPool(4001, True, 16)
    blocks = list(range(1, 33))
    request = SimpleNamespace(
        request_id="r", num_tokens=520, num_prompt_tokens=512, block_hashes=[b"%d" % i for i in blocks]
    )
    request.kv_transfer_params = None
    made = connector(pool)
    result: dict[str, Any] = {"version": vllm.__version__, "unused_us": microseconds_per_step(made, request, blocks)}
    free = pool.get_num_free_blocks()
    for number in range(100):
        made._apply(
            made._pins.pin(f"p{number}", [100 + 10 * number + i for i in range(10)], 0.0, ttl_s=1e9, tail=b"x")
        )
    made._clock = lambda: 1.0
    result["pinned_us"] = microseconds_per_step(made, request, blocks)
    result["held"] = free - pool.get_num_free_blocks()
    made._apply(made._pins.clear())
    result["leaked"] = free - pool.get_num_free_blocks()
    result["budgets"] = {
        "one group": made._pins.budget_blocks,
        "two groups": connector(BlockPool(101, True, 16), groups=2)._pins.budget_blocks,
        "no caching": connector(BlockPool(101, False, 16))._pins.budget_blocks,
    }
    result["front_ends"] = front_ends(request)
    init_none_hash(sha256)
    waits(result)
    result["unknown_setting"] = message(budget=0.5)
    result["bad_setting"] = message(budget_share=1.5)
    vllm.__version__ = "0.99.0"
    result["unsupported"] = message()
    result["allowed"] = message(allow_untested_version=True)
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
