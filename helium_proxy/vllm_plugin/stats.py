"""The pins in vLLM's own ``/metrics`` and log, through its connector statistics."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    Counter,
    Gauge,
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from .pins import PinStatistics

# Field of PinStatistics -> metric. Counters are sent as their growth: with several front-ends (--api-server-count)
# vLLM tells one of them at a time, so that none could see in totals what the others have counted.
GAUGES = {
    "pins": ("vllm:helium_pins", "Named prefixes pinned in the KV cache."),
    "pinned_blocks": ("vllm:helium_pinned_blocks", "KV cache blocks that pins hold."),
    "budget_blocks": ("vllm:helium_pin_budget_blocks", "Most KV cache blocks that pins may hold."),
}
COUNTERS = {
    "pinned": ("vllm:helium_pin_directives", "Pin directives obeyed."),
    "refused": ("vllm:helium_pin_refusals", "Directives refused: malformed, over the budget, no such pin."),
    "expired": ("vllm:helium_pin_expirations", "Pins whose time to live passed."),
    "evicted": ("vllm:helium_pin_evictions", "Pins given up for a request or a worthier pin."),
    "hits": ("vllm:helium_pin_hits", "Admitted requests whose prompt starts with a pinned prefix."),
}


@dataclass
class PinConnectorStats(KVConnectorStats):
    """`PinStatistics` as a plain dict, since it crosses processes: the gauges as they are, the counters' growth."""

    @classmethod
    def since(cls, before: PinStatistics | None, now: PinStatistics) -> PinConnectorStats:
        """What happened after `before` (None: ever)."""
        data = asdict(now)
        if before is not None:
            data |= {field: data[field] - getattr(before, field) for field in COUNTERS}
        return cls(data)

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        self.data |= {
            field: value + self.data.get(field, 0) if field in COUNTERS else value
            for field, value in other.data.items()
        }
        return self

    def reduce(self) -> dict[str, int | float]:
        return {f"helium_{name}": value for name, value in self.data.items()}

    def is_empty(self) -> bool:
        return not self.data


class PinPromMetrics(KVConnectorPromMetrics):
    """Registers the metrics and keeps one labelled child per engine."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._gauges = {
            field: self._per_engine(metric_types[Gauge], name, text, multiprocess_mode="mostrecent")
            for field, (name, text) in GAUGES.items()
        }
        self._counters = {
            field: self._per_engine(metric_types[Counter], name, text) for field, (name, text) in COUNTERS.items()
        }

    def _per_engine(self, metric_type: Any, name: str, text: str, **options: Any) -> dict[int, Any]:
        metric = metric_type(name=name, documentation=text, labelnames=self._labelnames, **options)
        return {engine: metric.labels(*values) for engine, values in self.per_engine_labelvalues.items()}

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for field, value in transfer_stats_data.items():
            if field in self._gauges:
                self._gauges[field][engine_idx].set(value)
            elif field in self._counters:
                self._counters[field][engine_idx].inc(value)
