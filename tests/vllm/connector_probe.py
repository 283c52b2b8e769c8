"""Exercises `HeliumConnector` on vLLM's own block pool, without an engine; run in vLLM's environment, prints JSON.

``unused_us``: what the connector costs the scheduler per step, with one request admitted and one finished in it,
when no directive was ever sent. ``pinned_us``: the same with 100 pins held.
"""

from __future__ import annotations

import json
import sys
import time
from types import SimpleNamespace
from typing import Any

import vllm
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.v1.core.block_pool import BlockPool

from helium_proxy.vllm_plugin import HeliumConnector

STEPS = 20_000


def connector(pool: BlockPool, **extra: Any) -> Any:
    transfer = KVTransferConfig(kv_connector="HeliumConnector", kv_role="kv_both", kv_connector_extra_config=extra)
    made = HeliumConnector(SimpleNamespace(kv_transfer_config=transfer), KVConnectorRole.SCHEDULER, None)
    made.bind_gpu_block_pool(pool)
    return made


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
    result["unknown_setting"] = message(budget=0.5)
    result["bad_setting"] = message(budget_share=1.5)
    vllm.__version__ = "0.99.0"
    result["unsupported"] = message()
    result["allowed"] = message(allow_untested_version=True)
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
