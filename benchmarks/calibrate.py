"""Fit the embedded engine's `cpu-tiny` profile to a real vLLM CPU engine, and measure the error that remains.

    python -m benchmarks.calibrate [--repeats 3] [--pool] [--url URL --blocks N]

runs small batches (prefills of several lengths, decodes in batches of several sizes, with short and long contexts)
on a real engine, fits the profile's five rates to their durations, and then compares makespans on workloads that the
fit has not seen: map-reduce, debate and chains of calls, with shared prefixes and a KV cache too small to hold all.
Prompts are token ids, so that both engines see the same blocks. It writes ``benchmarks/results/calibration.json`` and
the table in ``docs/engine.md``; the rates go into `engine.profile.CPU_TINY` by hand (a test compares them).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import heapq
import json
import os
import platform
import random
import statistics
import time
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp

from helium_proxy.engine import EngineConfig, Profile, Request, Scheduler, block_hashes
from helium_proxy.engine.profile import CPU_TINY
from helium_proxy.local import free_port

RESULT = Path(__file__).parent / "results" / "calibration.json"
PAGE = Path(__file__).parents[1] / "docs" / "engine.md"
BEGIN, END = "<!-- calibration: written by benchmarks/calibrate.py -->", "<!-- /calibration -->"
RATES = ("step_s", "prefill_token_s", "prefill_context_s", "decode_seq_s", "context_token_s")
VOCABULARY = 8000
SPACING_S = 0.001  # between the sends of one client
LIMIT = 8192


@dataclass(frozen=True, slots=True)
class Job:
    """A call: prompt tokens, output length, and the indices of the jobs it waits for."""

    prompt: list[int]
    output: int
    after: tuple[int, ...] = ()


def tokens(rng: random.Random, n: int) -> list[int]:
    return [rng.randrange(100, VOCABULARY) for _ in range(n)]


def micro(seed: int) -> dict[str, list[Job]]:
    """What the rates are fitted to."""
    rng = random.Random(seed)
    out = {f"prefill {n}": [Job(tokens(rng, n), 1)] for n in (32, 128, 384, 768, 1536)}
    for batch, context, output in ((1, 32, 32), (4, 32, 32), (12, 32, 32), (24, 32, 24), (6, 500, 32), (2, 1000, 32)):
        out[f"decode {batch} x {context}"] = [Job(tokens(rng, context), output) for _ in range(batch)]
    return out


def map_reduce(rng: random.Random, experts: int = 7, questions: int = 4) -> list[Job]:
    roles = [tokens(rng, 256) for _ in range(experts)]
    jobs: list[Job] = []
    for _ in range(questions):
        question = tokens(rng, 100)
        first = len(jobs)
        jobs += [Job(role + question, 24) for role in roles]
        replies = [t for _ in range(experts) for t in tokens(rng, 24)]
        jobs.append(Job(question + replies, 32, tuple(range(first, first + experts))))
    return jobs


def debate(rng: random.Random, agents: int = 3, rounds: int = 2, questions: int = 4) -> list[Job]:
    roles = [tokens(rng, 200) for _ in range(agents)]
    jobs: list[Job] = []
    for _ in range(questions):
        prompts = [role + tokens(rng, 90) for role in roles]
        before: tuple[int, ...] = ()
        for _ in range(rounds):
            first = len(jobs)
            jobs += [Job(list(prompt), 32, before) for prompt in prompts]
            before = tuple(range(first, first + agents))
            said = [t for _ in range(agents) for t in tokens(rng, 32)]
            prompts = [prompt + said for prompt in prompts]
    return jobs


def chains(rng: random.Random, count: int = 6, steps: int = 4) -> list[Job]:
    jobs: list[Job] = []
    for _ in range(count):
        prompt = tokens(rng, 150)
        for step in range(steps):
            jobs.append(Job(list(prompt), 24, (len(jobs) - 1,) if step else ()))
            prompt += tokens(rng, 60)
    return jobs


def workloads(seed: int) -> dict[str, list[Job]]:
    """What the fitted profile is judged by."""
    rng = random.Random(seed + 1)
    return {"map-reduce": map_reduce(rng), "debate": debate(rng), "chains": chains(rng)}


# -- the two ways to run ----------------------------------------------------------------------------------------


async def real(url: str, jobs: list[Job]) -> float:
    """Makespan in seconds on the engine at `url`."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=3)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(600)) as session:
        done = [asyncio.Event() for _ in jobs]

        async def call(i: int, job: Job) -> None:
            for j in job.after:
                await done[j].wait()
            body = {
                "model": "demo", "prompt": job.prompt, "max_tokens": job.output, "temperature": 0, "ignore_eos": True,
            }  # fmt: skip
            async with session.post(f"{url}/v1/completions", json=body) as answer:
                usage = (await answer.json())["usage"]
            assert usage["completion_tokens"] == job.output, usage
            done[i].set()

        start = time.perf_counter()
        await asyncio.gather(*(call(i, job) for i, job in enumerate(jobs)))
        return time.perf_counter() - start


def simulated(config: EngineConfig, jobs: list[Job], *, max_ticks: int = 1 << 40) -> float:
    """Makespan in seconds under virtual time."""
    return simulate(config, jobs, max_ticks=max_ticks)[0]


def simulate(config: EngineConfig, jobs: list[Job], *, max_ticks: int = 1 << 40) -> tuple[float, int]:
    """Makespan in seconds under virtual time, and prompt tokens computed."""
    scheduler = Scheduler(config)
    requests = [
        Request(str(i), len(j.prompt), j.output, block_hashes(array("I", j.prompt + [0] * j.output), config.block))
        for i, j in enumerate(jobs)
    ]
    left = [len(job.after) for job in jobs]
    followers: list[list[int]] = [[] for _ in jobs]
    for i, job in enumerate(jobs):
        for j in job.after:
            followers[j].append(i)
    ready = [i for i in range(len(jobs)) if not left[i]]
    arrivals = [(SPACING_S * k, i) for k, i in enumerate(ready)]
    heapq.heapify(arrivals)
    now, end = 0.0, None
    while arrivals or end is not None:
        if arrivals and (end is None or arrivals[0][0] <= end):
            at, i = heapq.heappop(arrivals)
            scheduler.add(requests[i], at)
            end = scheduler.start(at, max_ticks) if end is None else scheduler.cut(at)
            continue
        assert end is not None
        now = end
        result = scheduler.finish()
        started = 0
        for request in result.finished:
            for i in followers[int(request.id)]:
                left[i] -= 1
                if not left[i]:
                    started += 1
                    heapq.heappush(arrivals, (now + SPACING_S * started, i))
        end = scheduler.start(now, max_ticks)
    return now, scheduler.counters.prompt_tokens - scheduler.counters.cached_tokens


# -- the fit ----------------------------------------------------------------------------------------------------


def features(config: EngineConfig, jobs: list[Job]) -> list[float]:
    """By what each rate is multiplied in the duration of `jobs`: the sums over the steps taken."""
    sums = [0.0] * len(RATES)

    class Recorder(Profile):
        def step(self, prefill: int, prefill_context: float, decode: int, context: int) -> float:
            for i, value in enumerate((1, prefill, prefill_context, decode, context)):
                sums[i] += value
            return Profile.step(self, prefill, prefill_context, decode, context)

    recorder = Recorder(**asdict(config.timing))
    simulated(replace(config, profile=recorder), jobs, max_ticks=1)
    return sums


def solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Gaussian elimination with pivoting."""
    n = len(right)
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for i in range(n):
        pivot = max(range(i, n), key=lambda r: abs(rows[r][i]))
        rows[i], rows[pivot] = rows[pivot], rows[i]
        for r in range(n):
            if r != i:
                factor = rows[r][i] / rows[i][i]
                rows[r] = [a - factor * b for a, b in zip(rows[r], rows[i], strict=True)]
    return [rows[i][n] / rows[i][i] for i in range(n)]


def fit(rows: list[list[float]], seconds: list[float]) -> list[float]:
    """Least squares of the relative errors; a rate that would come out negative is 0."""
    keep = list(range(len(rows[0])))
    while True:
        scaled = [[row[i] / s for i in keep] for row, s in zip(rows, seconds, strict=True)]
        normal = [[sum(r[a] * r[b] for r in scaled) for b in range(len(keep))] for a in range(len(keep))]
        rates = solve(normal, [sum(r[a] for r in scaled) for a in range(len(keep))])
        worst = min(range(len(keep)), key=rates.__getitem__)
        if rates[worst] >= 0:
            return [rates[keep.index(i)] if i in keep else 0.0 for i in range(len(rows[0]))]
        del keep[worst]


@contextlib.contextmanager
def engine(url: str | None, blocks: int) -> Iterator[str]:
    if url is not None:
        yield url
        return
    from tests.vllm.engines import VllmEngine

    with VllmEngine(port=free_port(), core=0, blocks=blocks) as running:
        yield running.url


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--url", help="an engine that runs already; default: start one")
    parser.add_argument("--blocks", type=int, default=96, help="its KV blocks, of 128 tokens")
    parser.add_argument("--pool", action="store_true", help="keep the repeats of the last result beside the new ones")
    args = parser.parse_args()
    config = EngineConfig(
        profile=CPU_TINY, block_size=128, num_blocks=args.blocks, max_model_len=LIMIT, policy="priority"
    )
    last = json.loads(RESULT.read_text()) if args.pool else {"fitted_to": {}, "judged_by": {}, "runs": []}
    measured: dict[str, list[float]] = {}
    with engine(args.url, args.blocks) as url:
        asyncio.run(real(url, [Job(tokens(random.Random(0), 64), 8)]))  # warm
        for seed in range(args.repeats):
            for name, jobs in {**micro(100 * seed), **workloads(100 * seed)}.items():
                measured.setdefault(name, []).append(asyncio.run(real(url, jobs)))
                print(f"{name:20} {measured[name][-1]:8.3f} s", flush=True)
    alone = calibrate(config, measured)["max_abs_error_judged"]
    for name, row in {**last["fitted_to"], **last["judged_by"]}.items():
        measured[name] += row["repeats_s"]
    report = {**calibrate(config, measured), "runs": [*last["runs"], alone]}
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(report, indent=2) + "\n")
    document(report)
    print(json.dumps(report, indent=2))


def document(report: dict[str, Any]) -> None:
    """Put the errors into the page."""
    lines = [
        "| workload | measured, s (fastest of the repeats; slowest) | simulated, s | error |",
        "|---|---|---|---|",
    ]
    for kind in ("judged_by", "fitted_to"):
        for name, row in report[kind].items():
            label = f"**{name}**" if kind == "judged_by" else name
            measured = f"{row['measured_s']:.3f}; {max(row['repeats_s']):.3f}"
            lines.append(f"| {label} | {measured} | {row['simulated_s']:.3f} | {row['error']:+.1%} |")
    head, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text("\n".join((head + BEGIN, *lines, END + rest.partition(END)[2])))


def compare(
    config: EngineConfig, workload: dict[str, list[Job]], measured: dict[str, list[float]], of: dict[str, float]
) -> dict[str, dict[str, Any]]:
    """By batch: what was `measured` in each repeat, the one figure `of` these, and what the simulator says to it."""
    out = {}
    for name, jobs in workload.items():
        ours = simulated(config, jobs)
        out[name] = {
            "measured_s": round(of[name], 4),
            "repeats_s": [round(t, 4) for t in measured[name]],
            "simulated_s": round(ours, 4),
            "error": round(ours / of[name] - 1, 4),
        }
    return out


def calibrate(config: EngineConfig, measured: dict[str, list[float]]) -> dict[str, Any]:
    """The fit and its errors, from what was measured."""
    best = {name: min(times) for name, times in measured.items()}
    batches = micro(0)
    rates = fit([features(config, batches[name]) for name in batches], [best[name] for name in batches])
    profile = replace(
        CPU_TINY,
        floor_s=0.0,
        step_s=rates[0],
        prefill_token_s=rates[1],
        prefill_context_s=rates[2],
        decode_seq_s=rates[3],
        context_token_s=rates[4],
    )
    config = replace(config, profile=profile)

    fitted, judged = (compare(config, which, measured, best) for which in (batches, workloads(0)))
    return {
        "what": "embedded engine against a real vLLM CPU engine; measured_s is the fastest of the repeats",
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "engine": {"vllm": "0.32.0", "dtype": "float32", "block_size": 128, "blocks": config.blocks, "threads": 1},
        "rates": dict(zip(RATES, rates, strict=True)),
        "fitted_to": fitted,
        "judged_by": judged,
        "mean_abs_error_fitted": round(statistics.mean(abs(r["error"]) for r in fitted.values()), 4),
        "max_abs_error_judged": round(max(abs(r["error"]) for r in judged.values()), 4),
    }


if __name__ == "__main__":
    main()
