"""`HeliumConnector`: holds named prefixes in vLLM's KV cache, through its connector API.

No KV is transferred: all of the work is on the scheduler's side, where the connector is given the block pool. A pin
is one reference on each of its blocks, so vLLM neither evicts nor overwrites them, and prefix caching finds them.

When vLLM calls      the connector
request_finished     obeys the request's directive: its blocks are computed, hashed and not yet freed
get_num_new_matched  (a waiting request is about to be admitted) gives up pins that keep it from ever fitting at once,
                     others once it was first here `patience_s` ago
update_state_after   (it was admitted) notes which pins it used
build_connector_meta (every step) gives up expired pins
reset_prefix_cache   (of the pool) gives up all pins, when they are all that stands in the way

Not supported: hybrid KV caches (more than one group of layers) and models whose blocks cannot be reused as a prefix;
directives are answered with an error there, and the budget is 0. Nothing that a client sends raises in the engine.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.logger import init_logger
from vllm.v1.core.kv_cache_utils import get_block_hash

from .pins import BadDirective, Change, Directive, PinLedger, PinStatistics, parse_directive
from .stats import PinConnectorStats, PinPromMetrics
from .versions import check_version, vllm_version

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

logger = init_logger(f"vllm.{__name__}")  # below "vllm", so that vLLM's handler shows it

SETTINGS = {
    "budget_share": 0.3,  # of the KV cache's blocks
    "default_ttl_s": 300.0,
    "max_ttl_s": 3600.0,
    "patience_s": 5.0,  # how long pins may delay a waiting request that fits once running ones finish
    "allow_untested_version": False,
}


MAX_WAITING = 1024  # requests whose waiting is timed; there are more only when that many are overtaken


class HeliumMetadata(KVConnectorMetadata):
    """Nothing goes from the scheduler to the workers."""


NO_METADATA = HeliumMetadata()


class HeliumConnector(KVConnectorBase_V1, SupportsHMA):
    """Pins prefixes by directive. Settings (`SETTINGS`) come from ``kv_connector_extra_config``."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        self._settings = read_settings(self._kv_transfer_config.kv_connector_extra_config)
        check_version(vllm_version(), bool(self._settings["allow_untested_version"]))
        self._clock = time.monotonic
        self._max_tokens = vllm_config.model_config.max_model_len
        self._slots_ahead = slots_ahead(vllm_config)
        self._watermark = float(getattr(vllm_config.scheduler_config, "watermark", 0.0))  # share of the blocks
        # ---- mutable state, on the scheduler's side only ----
        self._pool: BlockPool | None = None
        self._pins = PinLedger(0)  # one reference is held in the pool on each block it holds
        self._waiting: dict[str, float] = {}  # request that was next while pins were held -> since when
        self._reported = -1  # version of the ledger that the metrics show
        self._told: PinStatistics | None = None  # and what it was

    def __repr__(self) -> str:
        return f"<HeliumConnector {self._role.name} {self._pins!r}>"

    # ---- the scheduler's side ----

    @property
    def requires_kv_delivery(self) -> bool:
        """Nothing is handed to another engine: a preempted request may simply resume."""
        return False

    def bind_gpu_block_pool(self, gpu_block_pool: BlockPool) -> None:
        self._pool = gpu_block_pool
        usable = gpu_block_pool.num_gpu_blocks - 1  # block 0 is vLLM's null block
        settings = self._settings
        budget = int(usable * settings["budget_share"])
        why_not = self._why_not()
        if why_not is not None:  # nothing can be pinned, and streams are not answered: the metrics must say so
            budget = 0
            logger.warning("Helium pins nothing here: %s", why_not)
        self._pins = PinLedger(budget, settings["default_ttl_s"], settings["max_ttl_s"])
        reset = gpu_block_pool.reset_prefix_cache

        def reset_prefix_cache() -> bool:
            self._yield_to_reset()
            return reset()

        # The pool refuses to reset while any block is held, and a reset must not find stale KV pinned afterwards.
        gpu_block_pool.reset_prefix_cache = reset_prefix_cache  # type: ignore[method-assign]
        logger.info("Helium pins at most %d of %d KV blocks", budget, usable)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        if self._pins.pinned_blocks:
            try:
                self._make_room(request, num_computed_tokens)
            except Exception:
                self._give_up_pinning("making room")
        return 0, False

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        self._waiting.pop(request.request_id, None)
        if len(self._pins):
            self._pins.use(request.block_hashes, self._clock())

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        if len(self._pins):
            self._apply(self._pins.expire(self._clock()))
        return NO_METADATA

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        self._waiting.pop(request.request_id, None)
        params = request.kv_transfer_params
        if not params or "helium" not in params:
            return False, None
        error = None
        try:
            self._obey(parse_directive(params["helium"]), request, block_ids)
        except BadDirective as refusal:
            error = str(refusal)
        except Exception as failure:
            self._give_up_pinning("obeying a directive")
            error = f"internal error: {type(failure).__name__}"
        report: dict[str, Any] = {
            "pinned_blocks": self._pins.pinned_blocks,
            "budget_blocks": self._pins.budget_blocks,
        }
        if error is not None:
            self._pins.refuse()
            report["error"] = error
        return False, {"helium": report}

    def get_kv_connector_stats(self) -> PinConnectorStats | None:
        if self._pool is None or self._reported == self._pins.version:
            return None
        self._reported = self._pins.version
        before, self._told = self._told, self._pins.statistics()
        return PinConnectorStats.since(before, self._told)

    def _why_not(self) -> str | None:
        """Why this engine's blocks cannot be pinned, if so."""
        if self._pool is None or not self._pool.enable_caching:
            return "prefix caching is off"
        if len(self._kv_cache_config.kv_cache_groups) != 1:
            return "hybrid KV caches cannot be pinned"
        return None

    def _obey(self, directive: Directive, request: Request, block_ids: tuple[list[int], ...]) -> None:
        now = self._clock()
        self._apply(self._pins.expire(now))
        if directive.action == "pin":
            blocks = self._prefix(directive, request, block_ids)
            tail = request.block_hashes[len(blocks) - 1]
            self._apply(
                self._pins.pin(directive.name, blocks, now, ttl_s=directive.ttl_s, worth=directive.worth, tail=tail)
            )
        elif directive.action == "renew":
            self._pins.renew(directive.name, now, ttl_s=directive.ttl_s, worth=directive.worth)
        elif directive.action == "unpin":
            self._apply(self._pins.unpin(directive.name))

    def _prefix(self, directive: Directive, request: Request, block_ids: tuple[list[int], ...]) -> list[int]:
        """Ids of the full blocks of the request's first tokens; raises `BadDirective` when they are not cached."""
        why_not = self._why_not()
        if why_not is not None:
            raise BadDirective(why_not)
        pool = self._pool
        assert pool is not None
        tokens = request.num_prompt_tokens
        if directive.tokens is not None:
            tokens = min(tokens, directive.tokens)
        count = tokens // pool.hash_block_size
        if not count:
            raise BadDirective(f"{tokens} tokens do not fill one block of {pool.hash_block_size}")
        blocks = block_ids[0][:count]
        if len(blocks) < count or len(request.block_hashes) < count:
            raise BadDirective("the request ended before its prefix was computed")
        for block, expected in zip(blocks, request.block_hashes, strict=False):
            stored = pool.blocks[block].block_hash
            if stored is None or get_block_hash(stored) != expected:
                raise BadDirective("the prefix's blocks are not in the prefix cache")
        return blocks

    def _make_room(self, request: Request, num_computed_tokens: int) -> None:
        """Give up pins that keep `request`, the next to be admitted, from the blocks it needs."""
        pool = self._pool
        assert pool is not None
        size, usable, now = pool.hash_block_size, pool.num_gpu_blocks - 1, self._clock()
        self._apply(self._pins.expire(now))
        needed = -(-min(request.num_tokens + self._slots_ahead, self._max_tokens) // size)
        if needed > usable - self._pins.pinned_blocks:
            # Even alone it might not fit; what it shares with a pin it need not get from it.
            shared = self._cached(request, num_computed_tokens // size)
            foreign = sum(block not in shared for block in self._pins.held_blocks())
            shortage = needed - (usable - foreign)
            self._apply(self._pins.relieve(shortage, lambda block: block not in shared))
        since = self._waiting.get(request.request_id)
        if since is None:
            if len(self._waiting) < MAX_WAITING:
                self._waiting[request.request_id] = now
        elif now - since >= self._settings["patience_s"]:
            self._waiting[request.request_id] = now
            hit = self._cached(request, num_computed_tokens // size)
            idle_hits = sum(pool.blocks[block].ref_cnt == 0 for block in hit)
            wanted = needed - len(hit) + idle_hits + int(self._watermark * pool.num_gpu_blocks)
            shortage = wanted - pool.get_num_free_blocks()
            self._apply(
                self._pins.relieve(shortage, lambda block: block not in hit and pool.blocks[block].ref_cnt == 1)
            )

    def _cached(self, request: Request, count: int) -> set[int]:
        """Ids of the blocks that the first `count` blocks of `request` will hit."""
        assert self._pool is not None
        found = (self._pool.get_cached_block(block_hash, [0]) for block_hash in request.block_hashes[:count])
        return {blocks[0].block_id for blocks in found if blocks}

    def _apply(self, change: Change) -> None:
        pool = self._pool
        if pool is None:
            return
        if change.hold:
            pool.touch([pool.blocks[block] for block in change.hold])
        if change.release:
            # Tails first: vLLM evicts in this order, and a head without its tail is still a prefix.
            pool.free_blocks([pool.blocks[block] for block in reversed(change.release)])

    def _yield_to_reset(self) -> None:
        pool = self._pool
        if pool is None or not self._pins.pinned_blocks:
            return
        idle = sum(pool.blocks[block].ref_cnt == 1 for block in self._pins.held_blocks())
        used = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
        if used == idle:
            self._apply(self._pins.clear())

    def _give_up_pinning(self, doing: str) -> None:
        """A bug of ours or a changed vLLM must cost pins, never requests."""
        logger.exception("Helium failed while %s; all pins are given up", doing)
        self._apply(self._pins.clear())

    # ---- the workers' side: nothing to do ----

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        return

    def wait_for_layer_load(self, layer_name: str) -> None:
        return

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        return

    def wait_for_save(self) -> None:
        return

    # ---- metrics ----

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> PinConnectorStats:
        return PinConnectorStats(dict(data or {}))  # a copy: `aggregate` changes it

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> PinPromMetrics:
        return PinPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)


def slots_ahead(vllm_config: VllmConfig) -> int:
    """Most KV slots that the scheduler demands for a waiting request beyond its tokens: for the drafts that it fills
    up a batch with, and for what the drafter writes ahead."""
    drafts = int(getattr(vllm_config, "num_speculative_tokens", 0))
    return drafts + int(getattr(vllm_config, "num_lookahead_tokens", drafts and drafts + 1))  # the most it can be


def read_settings(extra: dict[str, Any] | None) -> dict[str, Any]:
    """`SETTINGS` overridden by ``kv_connector_extra_config``; ``ValueError`` on an unknown key or a bad value."""
    settings: dict[str, Any] = dict(SETTINGS)
    for key, value in (extra or {}).items():
        if key not in SETTINGS:
            raise ValueError(f"HeliumConnector has no setting {key!r}; it has {', '.join(SETTINGS)}")
        if isinstance(SETTINGS[key], float) and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"HeliumConnector's {key} must be a number, not {value!r}")
        settings[key] = value
    if not 0.0 <= settings["budget_share"] < 1.0:
        raise ValueError(f"HeliumConnector's budget_share must be in [0, 1), not {settings['budget_share']!r}")
    return settings


if HeliumConnector.__name__ not in KVConnectorFactory._registry:
    # MultiConnector looks its children up by name when it unpacks their statistics.
    KVConnectorFactory.register_connector(HeliumConnector.__name__, "helium_proxy.vllm_plugin", "HeliumConnector")
