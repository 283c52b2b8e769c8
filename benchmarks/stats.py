"""From measurements to the figures that are published: medians with spread, ratios, geometric means."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any


@dataclass
class Measurement:
    """One batch of one shape through one system. Times in seconds, sizes in tokens."""

    shape: str
    system: str
    family: str
    repeat: int
    phase: int
    """Day of a workload of several; 0 otherwise."""
    runs: int
    calls: int
    failed_calls: int
    first_failure: str | None
    retries: int
    makespan: float
    run_p50: float
    run_p95: float
    call_p50: float | None
    """None for submitted plans, whose calls the client does not see."""
    call_p95: float | None
    ttft_p50: float | None
    """Of the streamed sample of calls; None for submitted plans."""
    ttft_p95: float | None
    computed_tokens: float
    """Prompt tokens the engines computed, from their own counters, prewarming included."""
    minimum_tokens: int
    """The fewest that any schedule must compute, equal calls answered once."""
    minimum_without_reuse: int
    generated_tokens: float
    cached_tokens: float
    balance: float
    """Busiest worker ÷ mean, in work: computed prompt tokens + `decode_cost` × generated tokens."""
    preemptions: float
    reused_calls: int
    """Calls that the proxy said it answered from its cache or joined to an equal one."""
    proxy_cpu: float | None
    """CPU seconds of the system's processes during the batch; None where it has none."""
    outputs_differ: int | None = None
    """Calls whose reply is not the reference system's; None until compared."""
    outputs_compared: int = 0
    predicted_calls: int = 0
    """Computed calls of which the proxy says what it had predicted to be cached; 0: not one of ours."""
    predicted_within_block: int = 0
    """Those of them where that was within one KV block of what the engine found cached."""
    ttft_follows_p50: float | None = None
    """As `ttft_p50`, of calls that have parents: of them something could be known beforehand."""
    tenants: dict[str, dict[str, float]] = field(default_factory=dict)
    """Per tenant of mixed traffic: run p50 and p95."""

    @property
    def over_minimum(self) -> float:
        """Prompt tokens computed ÷ fewest possible."""
        return self.computed_tokens / max(1, self.minimum_tokens)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile by linear interpolation; NaN of nothing."""
    if not values:
        return math.nan
    ordered = sorted(values)
    position = (len(ordered) - 1) * q
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def balance(work: Sequence[float]) -> float:
    """Busiest ÷ mean; 1 when nobody worked."""
    total = sum(work)
    return max(work) * len(work) / total if total > 0 else 1.0


def geometric_mean(values: Iterable[float]) -> float:
    """NaN of nothing."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


@dataclass(frozen=True, slots=True)
class Row:
    """A system's medians on one shape and phase."""

    shape: str
    phase: int
    system: str
    family: str
    repeats: int
    makespan: float
    makespan_low: float
    makespan_high: float
    run_p95: float
    call_p50: float | None
    call_p95: float | None
    ttft_p50: float | None
    over_minimum: float
    balance: float
    preemptions: float
    failed_calls: int
    outputs_differ: int | None
    reused_calls: float
    proxy_cpu: float | None


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None and not math.isnan(value)]
    return median(known) if known else None


def rows(measurements: Sequence[Measurement]) -> list[Row]:
    """One row per (shape, phase, system), in order of first appearance. Counts of what must not happen (failures,
    differing outputs, preemptions) are the largest over the repeats, everything else is the median."""
    groups: dict[tuple[str, int, str], list[Measurement]] = {}
    for measured in measurements:
        groups.setdefault((measured.shape, measured.phase, measured.system), []).append(measured)
    result = []
    for (shape, phase, system), group in groups.items():
        spans = [m.makespan for m in group]
        differing = [m.outputs_differ for m in group if m.outputs_differ is not None]
        result.append(
            Row(
                shape=shape,
                phase=phase,
                system=system,
                family=group[0].family,
                repeats=len(group),
                makespan=median(spans),
                makespan_low=min(spans),
                makespan_high=max(spans),
                run_p95=median(m.run_p95 for m in group),
                call_p50=_median(m.call_p50 for m in group),
                call_p95=_median(m.call_p95 for m in group),
                ttft_p50=_median(m.ttft_p50 for m in group),
                over_minimum=median(m.over_minimum for m in group),
                balance=median(m.balance for m in group),
                preemptions=max(m.preemptions for m in group),
                failed_calls=max(m.failed_calls for m in group),
                outputs_differ=max(differing) if differing else None,
                reused_calls=median(m.reused_calls for m in group),
                proxy_cpu=_median(m.proxy_cpu for m in group),
            )
        )
    return result


def best_peers(table: Sequence[Row]) -> dict[tuple[str, int], Row]:
    """Per (shape, phase) the fastest system that is not helium-proxy, direct round robin included. One that failed
    calls has not done the work and is not compared with."""
    best: dict[tuple[str, int], Row] = {}
    for row in table:
        key = (row.shape, row.phase)
        if row.family != "helium" and not row.failed_calls and (key not in best or row.makespan < best[key].makespan):
            best[key] = row
    return best


def speedups(table: Sequence[Row]) -> dict[str, dict[tuple[str, int], float]]:
    """system -> (shape, phase) -> the best peer's median makespan ÷ the system's; nothing where it failed calls."""
    best = best_peers(table)
    result: dict[str, dict[tuple[str, int], float]] = {}
    for row in table:
        key = (row.shape, row.phase)
        if key in best and not row.failed_calls:
            result.setdefault(row.system, {})[key] = best[key].makespan / row.makespan
    return result
