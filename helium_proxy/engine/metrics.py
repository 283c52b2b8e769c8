"""The engine's counts under vLLM's own names (0.32), in Prometheus text form."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from .request import Request, StepResult
from .scheduler import Scheduler

_LATENCY = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0)
_FIRST = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
)
_BETWEEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_TOKENS = tuple(float(1 << i) for i in range(15))

HISTOGRAMS: dict[str, tuple[str, tuple[float, ...]]] = {
    "vllm:time_to_first_token_seconds": ("Time to first token in seconds.", _FIRST),
    "vllm:inter_token_latency_seconds": ("Inter-token latency in seconds.", _BETWEEN),
    "vllm:e2e_request_latency_seconds": ("End to end request latency in seconds.", _LATENCY),
    "vllm:request_queue_time_seconds": ("Time a request waited.", _LATENCY),
    "vllm:request_prefill_time_seconds": ("Time a request prefilled.", _LATENCY),
    "vllm:request_decode_time_seconds": ("Time a request decoded.", _LATENCY),
    "vllm:request_inference_time_seconds": ("Time a request ran.", _LATENCY),
    "vllm:request_prompt_tokens": ("Prompt tokens of a request.", _TOKENS),
    "vllm:request_generation_tokens": ("Generated tokens of a request.", _TOKENS),
    "vllm:iteration_tokens_total": ("Tokens of an engine step.", _TOKENS),
}


class Histogram:
    """Counts by bucket; `observe` takes many equal values at once, as a run of decode steps brings them."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def __repr__(self) -> str:
        return f"<Histogram {sum(self._counts)} values>"

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self.sum += value * times

    def buckets(self) -> list[tuple[str, float]]:
        """(upper bound, cumulative count), in Prometheus's form."""
        out, total = [], 0
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            total += count
            out.append(("+Inf" if bound == float("inf") else repr(bound), float(total)))
        return out


class EngineMetrics:
    """Collects one scheduler's counters at scrape time; only histograms and finish reasons are kept here."""

    def __init__(self, scheduler: Scheduler) -> None:
        # -- all mutable state ------------------------------------------------------------------------------
        self._histograms = {name: Histogram(bounds) for name, (_, bounds) in HISTOGRAMS.items()}
        self._finished: Counter[str] = Counter({"stop": 0, "length": 0, "abort": 0, "error": 0, "repetition": 0})
        # ---------------------------------------------------------------------------------------------------
        self._scheduler = scheduler
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def __repr__(self) -> str:
        return f"<EngineMetrics {dict(self._finished)}>"

    def stepped(self, result: StepResult) -> None:
        """Record a step, or a run of them."""
        histograms = self._histograms
        tokens = result.prefill_tokens + result.decoding
        histograms["vllm:iteration_tokens_total"].observe(tokens, result.ticks)
        if result.decoding:
            each = (result.end - result.start) / result.ticks
            histograms["vllm:inter_token_latency_seconds"].observe(each, result.ticks * result.decoding)
        for request in result.first:
            histograms["vllm:time_to_first_token_seconds"].observe(result.end - request.arrival)

    def finished(self, request: Request, reason: str) -> None:
        """Record a request that ended."""
        self._finished["stop" if reason == "tool_calls" else reason] += 1
        scheduled, first, end = request.scheduled_at, request.first_token_at, request.finished_at
        if scheduled is None or first is None or end is None:
            return
        for name, value in (
            ("e2e_request_latency_seconds", end - request.arrival),
            ("request_queue_time_seconds", scheduled - request.arrival),
            ("request_prefill_time_seconds", first - scheduled),
            ("request_decode_time_seconds", end - first),
            ("request_inference_time_seconds", end - scheduled),
            ("request_prompt_tokens", request.prompt_tokens),
            ("request_generation_tokens", request.output_tokens),
        ):
            self._histograms["vllm:" + name].observe(value)

    def render(self) -> bytes:
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """prometheus_client's collector interface."""
        config = self._scheduler.config
        stats = self._scheduler.statistics()
        counters = stats.counters
        names, values = ["model_name", "engine"], [config.model, "0"]
        for name, text, value in (
            ("num_requests_running", "Requests in model execution batches.", stats.running),
            ("num_requests_waiting", "Requests waiting to be processed.", stats.waiting),
            ("kv_cache_usage_perc", "KV cache usage; 1 means 100 percent.", stats.usage),
            ("helium_pins", "Named prefixes pinned in the KV cache.", len(self._scheduler.pins)),
            ("helium_pinned_blocks", "KV cache blocks that pins hold.", stats.pinned_blocks),
            ("helium_pin_budget_blocks", "Most KV cache blocks that pins may hold.", self._scheduler.pins.budget),
        ):
            gauge = GaugeMetricFamily("vllm:" + name, text, labels=names)
            gauge.add_metric(values, value)
            yield gauge
        info = {
            "block_size": config.block,
            "num_gpu_blocks": config.blocks,
            "kv_cache_size_tokens": config.kv_tokens,
            "enable_prefix_caching": True,
        }
        gauge = GaugeMetricFamily("vllm:cache_config_info", "The cache's configuration.", labels=[*info, "engine"])
        gauge.add_metric([*map(str, info.values()), "0"], 1)
        yield gauge
        for name, text, count in (
            ("prefix_cache_queries", "Tokens looked up in the prefix cache.", counters.queries),
            ("prefix_cache_hits", "Tokens found in the prefix cache.", counters.hits),
            ("prompt_tokens", "Prefill tokens processed.", counters.prompt_tokens),
            ("prompt_tokens_cached", "Prompt tokens taken from the cache.", counters.cached_tokens),
            ("generation_tokens", "Generation tokens processed.", counters.generation_tokens),
            ("num_preemptions", "Preemptions.", counters.preemptions),
        ):
            counter = CounterMetricFamily("vllm:" + name, text, labels=names)
            counter.add_metric(values, count)
            yield counter
        for name, count in self._scheduler.pins.totals.items():
            counter = CounterMetricFamily(f"vllm:helium_pin_{name}", f"Pins: {name}.", labels=names)
            counter.add_metric(values, count)
            yield counter
        counter = CounterMetricFamily(
            "vllm:prompt_tokens_by_source", "Prompt tokens by source.", labels=[*names, "source"]
        )
        counter.add_metric([*values, "local_compute"], counters.prompt_tokens - counters.cached_tokens)
        counter.add_metric([*values, "local_cache_hit"], counters.cached_tokens)
        counter.add_metric([*values, "external_kv_transfer"], 0)
        yield counter
        counter = CounterMetricFamily(
            "vllm:request_success", "Requests finished, by reason.", labels=[*names, "finished_reason"]
        )
        for reason, total in self._finished.items():
            counter.add_metric([*values, reason], total)
        yield counter
        for name, (text, _) in HISTOGRAMS.items():
            family = HistogramMetricFamily(name, text, labels=names)
            histogram = self._histograms[name]
            family.add_metric(values, histogram.buckets(), histogram.sum)
            yield family
