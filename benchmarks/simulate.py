"""Sweeps past this machine's size, in virtual time: ``python -m benchmarks.simulate``.

One parameter at a time around a base point (8 engines at an H100's rates, Trading, prompt sizes P1, KV for a sixth
of what 64 runs touch), helium-proxy's policy against round robin and longest-prefix-first; the paper's six shapes
with one part of the policy off at a time; how the cost of deciding grows with queue and workers; and a fleet of 64
workers with 1,000 runs at a time.
"""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from statistics import median
from typing import Any

import click
from rich.console import Console

from helium_proxy.dispatch.policy import decide
from helium_proxy.dispatch.settings import DispatchSettings
from helium_proxy.dispatch.state import DispatchState
from helium_proxy.engine import EngineConfig

from .campaign import RESULTS, here_and_now, save
from .campaigns import CAMPAIGNS
from .fleet import Fleet, Node, System, trace
from .systems import ABLATIONS
from .workloads import SIZES, WORKLOADS, Run, Workload
from .workloads.base import document_inputs
from .workloads.map_reduce import with_experts

SYSTEMS: tuple[System, ...] = ("rr", "affinity", "helium")
_WORKERS = 8
_RUNS = 64
_BLOCK = 16


def config(blocks: int, block: int = _BLOCK) -> EngineConfig:
    """An engine at an H100's rates with `blocks` KV blocks."""
    longest = min(32_768, (blocks - 1) * block)
    return EngineConfig(
        profile="h100-8b", num_blocks=blocks, block_size=block, max_model_len=longest, policy="priority"
    )


def touched(graph: list[Node], runs: int) -> int:
    """Tokens that `runs` runs touch: distinct prompt tokens and replies."""
    probe = Fleet("rr", 1, config(1 << 20))
    result = probe.simulate(graph, runs)
    return result.fewest_tokens + runs * sum(node.output.tokens for node in graph)


def blocks_for(tokens: float, workers: int, block: int = _BLOCK) -> int:
    """KV blocks per worker so that all together hold `tokens`; never less than the longest prompts need."""
    return max(400, round(tokens / workers / block)) + 1


def fan_out(count: int) -> Workload:
    """Map-Reduce with `count` experts."""

    async def program(run: Run) -> str:
        return await with_experts(run, count)

    return Workload(f"map_reduce_{count}", program, document_inputs, calls_per_run=count + 1)


class Sweeps:
    """Collects points of (sweep, x, system)."""

    def __init__(self, console: Console, runs: int) -> None:
        self._console = console
        self._runs = runs
        self.points: list[dict[str, Any]] = []

    def measure(self, sweep: str, x: float, fleet: tuple[int, EngineConfig], graph: list[Node], **how: Any) -> None:
        """Every system at one point; `how` is given to `Fleet.simulate`."""
        for system in SYSTEMS:
            result = Fleet(system, *fleet).simulate(graph, **how)
            self.points.append({"sweep": sweep, "x": x, **asdict(result)})
            self._console.print(
                f"{sweep:10} {x:8g} {system:9} {result.makespan:8.2f} s  {result.calls:7} calls  "
                f"x{result.computed_tokens / max(1, result.fewest_tokens):.2f} min  busiest {result.balance:.2f}  "
                f"run p95 {result.run_p95:7.2f} s  preempted {result.preemptions:4}  "
                f"[dim]{result.wall_s:.1f} s, decide {result.decide_us:.0f} us a call"
            )

    def run_all(self) -> None:
        runs = self._runs
        trading = trace(WORKLOADS["trading"], SIZES["P1"])
        whole = touched(trading, runs)
        base = (_WORKERS, config(blocks_for(whole / 6, _WORKERS)))
        for workers in (1, 2, 4, 8, 16, 32, 64):
            batch = max(2, runs * workers // _WORKERS)
            self.measure("workers", workers, (workers, base[1]), trading, runs=batch)
        for divisor in (12, 6, 3, 1.5, 0.75):
            kv = config(blocks_for(whole / divisor, _WORKERS))
            self.measure("kv", 1 / divisor, (_WORKERS, kv), trading, runs=runs)
        for batch in (runs // 8, runs // 4, runs // 2, runs, runs * 2):
            self.measure("batch", batch, base, trading, runs=batch)
        for count in (2, 4, 8, 16, 32, 64):
            graph = trace(fan_out(count), SIZES["P1"])
            many = max(4, runs * 88 // (count + 1))
            kv = config(blocks_for(touched(graph, many) / 6, _WORKERS))
            self.measure("fan-out", count, (_WORKERS, kv), graph, runs=many)
        for think in (0.0, 0.1, 0.3, 1.0, 3.0):
            self.measure("think", think, base, trading, runs=runs, think_s=think)
        alone = Fleet("rr", *base).simulate(trading, runs)
        for load in (0.25, 0.5, 0.75, 0.9, 1.0):
            self.measure("arrivals", load, base, trading, runs=runs * 2, rate=load * runs / alone.makespan)


WITHOUT: dict[str, DispatchSettings] = {
    f"helium-{name}": DispatchSettings.model_validate(
        {"max_queue": 1 << 30} | {key.removeprefix("DISPATCH__").lower(): value for key, value in changed.items()}
    )
    for name, changed in ABLATIONS.items()
    if all(key.startswith("DISPATCH__") for key in changed)
}
"""The policy with one part turned off, by the name of the served system that has it off."""

_ROUNDS = 3
_LAG_S = 0.005
"""Mean time an answer needs from an engine's scheduler to the client, and the next call back."""


_CARD = 25_000
"""KV blocks of a card with 80 GB beside a model of 8B."""
_GUESS = 0.5
"""By which factor lengths of replies are off: e to the power of so much, up or down, for two thirds of them."""


def six_shapes(console: Console, blocks: int | None = None) -> list[dict[str, Any]]:
    """The six shapes in the batches of the campaign at an H100's rates: the other policies, ours, ours where lengths
    of replies are guessed, and ours without each of its parts. With `blocks` KV blocks per engine, by default with
    as many as hold a sixth of the working set."""
    points = []
    for shape, batch in CAMPAIGNS["h100"].batches:
        graph = trace(WORKLOADS[shape], SIZES["P1"])
        kv = config(blocks or blocks_for(touched(graph, batch) / 6, _WORKERS))
        variants: list[tuple[str, System, DispatchSettings | None, float]] = [(s, s, None, 0.0) for s in SYSTEMS]
        variants += [("helium-guessing", "helium", None, _GUESS)]
        variants += [(name, "helium", settings, 0.0) for name, settings in WITHOUT.items()]
        for name, system, settings, guess in variants:
            result = Fleet(system, _WORKERS, kv, settings, guess=guess).simulate(graph, batch, lag_s=_LAG_S)
            points.append({"shape": shape, **asdict(result), "system": name})
            console.print(
                f"{shape:16} {name:19} {result.makespan:8.2f} s  "
                f"x{result.computed_tokens / max(1, result.fewest_tokens):.2f} min  busiest {result.balance:.2f}  "
                f"preempted {result.preemptions:4}"
            )
    return points


def decide_cost(console: Console) -> list[dict[str, float]]:
    """CPU time of one `decide` with a given queue and number of busy workers, after one call has finished; arrivals
    keep the queue at its length. The quickest of `_ROUNDS` interleaved rounds, as neighbours only add to CPU time."""
    cases = [(16, queue) for queue in (10, 100, 1_000, 2_000, 5_000, 10_000)]
    cases += [(workers, 2_000) for workers in (1, 2, 4, 8, 32, 64)]
    graph = trace(WORKLOADS["trading"], SIZES["P1"])
    rounds = [[_decisions(graph, workers, queue) for workers, queue in cases] for _ in range(_ROUNDS)]
    points = []
    for (workers, queue), *measured in zip(cases, *rounds, strict=True):
        spent = sorted(min(measured, key=median))
        point = {
            "workers": workers,
            "queue": queue,
            "median_us": 1e6 * median(spent),
            "p99_us": 1e6 * spent[int(0.99 * (len(spent) - 1))],
        }
        points.append(point)
        console.print(
            f"decide: {workers:3} workers, {queue:6} queued: median {point['median_us']:.0f} us, "
            f"p99 {point['p99_us']:.0f} us of {len(spent)}"
        )
    return points


def _decisions(graph: list[Node], workers: int, queue: int) -> list[float]:
    """CPU seconds of each of some decisions."""
    state = DispatchState(DispatchSettings(max_queue=1 << 30))
    for index in range(workers):
        state.join(str(index), frozenset({"demo"}), _BLOCK, 4_000)
    waiting = iter(Fleet("helium", 1, config(4_001)).calls_of(graph, -(-(queue + workers * 500) // len(graph))))
    running: deque[tuple[str, str]] = deque()
    now = 0.0
    spent: list[float] = []
    filled = False
    while len(spent) < 200:
        for call in islice(waiting, queue - state.queued):
            state.enqueue(call, now)
        if state.queued < queue:
            break  # no calls left
        began = time.thread_time()
        assignments = decide(state, now)
        if filled:
            spent.append(time.thread_time() - began)
        running += [(assignment.worker, assignment.call.id) for assignment in assignments]
        if running and not state.unfinished and (state.queued == queue or not assignments):
            filled = True
            now += 0.05
            worker, name = running.popleft()
            state.release(worker, name, now)
    return spent


def fleet_of_64(console: Console, calls: int, limit_s: float) -> dict[str, Any]:
    """64 workers, 1,000 runs at a time: `calls` calls, or what a pilot says fits into `limit_s`."""
    block = 64
    graph = trace(WORKLOADS["trading"], SIZES["P1"])
    kv = config(2_001, block)
    results: dict[str, Any] = {}
    for system in ("rr", "helium"):
        pilot = Fleet(system, 64, kv, count_fewest=False).simulate(graph, 40, concurrent=40)
        affordable = int(limit_s / (pilot.wall_s / pilot.calls))
        runs = max(1_000, min(calls, affordable) // len(graph))
        result = Fleet(system, 64, kv, count_fewest=False).simulate(graph, runs, concurrent=1_000)
        results[system] = asdict(result)
        console.print(
            f"64 workers, 1,000 runs at a time, {system}: {result.calls:,} calls, {result.makespan:,.0f} s simulated "
            f"in {result.wall_s:.0f} s; run p95 {result.run_p95:.0f} s; decide {result.decide_us:.0f} us a call"
        )
    return results


PARTS = ("sweeps", "shapes", "decide", "fleet")


def run(console: Console, *, runs: int, calls: int, limit_s: float, parts: Sequence[str] = PARTS) -> dict[str, Any]:
    """The result file's content."""
    result: dict[str, Any] = {"about": dict.fromkeys(parts, here_and_now())}
    result |= {"base": {"workers": _WORKERS, "runs": runs, "shape": "trading", "sizes": "P1"}}
    if "sweeps" in parts:
        sweeps = Sweeps(console, runs)
        sweeps.run_all()
        result["points"] = sweeps.points
    if "shapes" in parts:
        result["shapes"] = six_shapes(console)
        result["cards"] = six_shapes(console, _CARD)
    if "decide" in parts:
        result["decide"] = decide_cost(console)
    if "fleet" in parts:
        result["fleet"] = fleet_of_64(console, calls, limit_s)
    return result


@click.command()
@click.option("--runs", default=_RUNS, help="Runs at the base point.")
@click.option("--calls", default=1_000_000, help="Of the large fleet.")
@click.option("--limit", default=600.0, help="Seconds for each system of the large fleet.")
@click.option("--parts", default=",".join(PARTS), help="Comma list.")
@click.option("--out", help="Name of the result file in benchmarks/results (default: not saved).")
def main(runs: int, calls: int, limit: float, parts: str, out: str | None) -> None:
    """Run the sweeps."""
    console = Console(width=None if sys.stdout.isatty() else 170, highlight=False)
    result = run(console, runs=runs, calls=calls, limit_s=limit, parts=parts.split(","))
    if out:
        path = RESULTS / f"{out}.json"
        old = json.loads(path.read_text()) if path.exists() else {}
        result["about"] = {**old.get("about", {}), **result["about"]}
        console.print(f"saved {save({**old, **result}, out)}")  # what was not measured now stays as it was


if __name__ == "__main__":
    main()
