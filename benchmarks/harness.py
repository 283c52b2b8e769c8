"""Drive one batch through one system and measure it.

The order of things, per measurement: engines idle, prefix caches dropped; the system started; counters read; all
runs of the batch driven; engines idle again; counters read. Systems are interleaved and their order rotates from
repeat to repeat, so that drift of the machine hits all alike.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from urllib.parse import quote

import aiohttp
import orjson

from . import plans, systems
from .client import CallFailed, CallRecord, HttpCaller
from .engines import Counters, Engines
from .minimum import minimum_tokens
from .process import Server, cpu_seconds
from .stats import Measurement, balance, quantile
from .systems import System
from .workloads import Roles, Run, Sizes, Workload, Writer

Outputs = dict[tuple[str, str], str]
"""(run, node) -> reply."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What one measurement drives."""

    workload: Workload
    sizes: Sizes
    batch: int
    seed: int
    repeat: int
    time_scale: float = 1.0
    """Of think times and arrivals."""
    stream_every: int = 8
    warmup: int = 0
    """Runs of other inputs sent first; engines' caches are dropped after them."""
    decode_cost: float = 3.0
    """Work of one generated token in prompt tokens, for the balance."""


@dataclass
class Harness:
    """Measures systems on one set of engines."""

    engines: Engines
    session: aiohttp.ClientSession
    writer_scale: float = 1.2
    """Tokens per word of the engines' tokenizer; `learn` measures it."""
    # Mutable state: token ids of every prompt ever sent, by its messages as JSON, and of the reply to it.
    _tokens: dict[bytes, tuple[list[int], list[int]]] = field(default_factory=dict)

    async def learn(self) -> None:
        sample, words = Writer.sample()
        self.writer_scale = len(await self.engines.tokenize(self.session, prompt=sample)) / words

    async def measure(
        self, system: System, plan: Plan, progress: Callable[[int], None] = lambda done: None
    ) -> tuple[list[Measurement], Outputs]:
        """One measurement per phase, and every reply.

        Raises:
            StartFailed: the system did not come up.
        """
        await self.engines.reset(self.session)
        server: Server | None = None
        urls = self.engines.urls
        try:
            if system.command is not None:
                server, url = await systems.start(system, self.engines, self.session)
                urls = [url]
            if plan.warmup:
                await self._warm_up(system, plan, urls)
            return await self._phases(system, plan, urls, server, progress)
        finally:
            if server is not None:
                await asyncio.to_thread(server.stop, 1.0)

    async def _warm_up(self, system: System, plan: Plan, urls: Sequence[str]) -> None:
        writer = Writer(plan.seed + 1_000_003, self.writer_scale)
        inputs = plan.workload.make_inputs(writer, plan.sizes, plan.warmup)[0]
        async with HttpCaller(urls, self.engines.model, system.decorate) as caller:
            await self.drive(caller, plan, inputs, "warmup")
        await self.engines.reset(self.session)

    async def _phases(
        self,
        system: System,
        plan: Plan,
        urls: Sequence[str],
        server: Server | None,
        progress: Callable[[int], None],
    ) -> tuple[list[Measurement], Outputs]:
        measurements: list[Measurement] = []
        outputs: Outputs = {}
        seen: dict[bytes, int] = {}
        writer = Writer(plan.seed, self.writer_scale)
        inputs = plan.workload.make_inputs(writer, plan.sizes, plan.batch)
        for phase, runs in enumerate(inputs):
            before = await self.engines.wait_idle(self.session)
            cpu_before = cpu_seconds(server.pid) if server is not None else None
            name = f"{plan.workload.name}-{plan.seed}-{phase}"
            async with HttpCaller(
                urls, self.engines.model, system.decorate, stream_every=plan.stream_every
            ) as caller:
                ticker = asyncio.create_task(_tick(caller, progress))
                began = time.perf_counter()
                try:
                    if system.plan:
                        latencies = await plans.drive(
                            caller, plan.workload, plan.sizes, runs, writer=writer, name=name
                        )
                    else:
                        latencies = await self.drive(caller, plan, runs, name)
                except CallFailed as failure:
                    latencies = {}
                    caller.failures.append(str(failure))
                finally:
                    ticker.cancel()
                makespan = (caller.finished or time.perf_counter()) - began
            cpu_after = cpu_seconds(server.pid) if server is not None else None
            after = await self.engines.wait_idle(self.session)
            outputs |= {(record.run, record.node): record.reply for record in caller.records}
            fewest = await self._minimum(caller, seen)
            measured = _measurement(
                system,
                plan,
                phase,
                caller,
                latencies,
                makespan=makespan,
                deltas=[late - early for late, early in zip(after, before, strict=True)],
                fewest=fewest,
                proxy_cpu=None if cpu_after is None or cpu_before is None else cpu_after - cpu_before,
            )
            if server is not None and system.family == "helium":
                await self._predictions(urls[0], measured)
            measurements.append(measured)
        return measurements, outputs

    async def drive(
        self, caller: HttpCaller, plan: Plan, runs: Sequence[dict[str, str]], name: str
    ) -> dict[str, float]:
        """Run the batch; the runs' latencies by run id (failed runs are left out)."""
        workload = plan.workload
        roles: dict[str, Roles] = {}
        offsets = [0.0] * len(runs) if workload.arrivals is None else workload.arrivals(len(runs), plan.seed)
        latencies: dict[str, float] = {}

        async def one(index: int, inputs: dict[str, str]) -> None:
            tenant = inputs.get("tenant")
            flow = f"{workload.name}_{tenant}" if tenant else workload.name
            if flow not in roles:
                roles[flow] = Roles(flow, plan.sizes, Writer(0, self.writer_scale))
            run_id = f"{name}-{tenant}-{index}" if tenant else f"{name}-{index}"
            await asyncio.sleep(offsets[index] * plan.time_scale)
            began = time.perf_counter()
            run = Run(
                caller,
                flow,
                run_id,
                inputs=inputs,
                roles=roles[flow],
                time_scale=plan.time_scale,
                think_s=workload.think_s,
            )
            try:
                await workload.program_of(inputs)(run)
            except CallFailed:
                return
            latencies[run_id] = time.perf_counter() - began

        await asyncio.gather(*(one(index, inputs) for index, inputs in enumerate(runs)))
        return latencies

    async def _predictions(self, url: str, measured: Measurement) -> None:
        """Reads from the proxy how well it predicted what is cached, over the newest runs."""
        async with self.session.get(f"{url}/helium/runs", params={"limit": "1000"}) as response:
            response.raise_for_status()
            names = [run["run"] for run in (await response.json())["runs"]]
        for name in names[: measured.runs]:
            async with self.session.get(f"{url}/helium/runs/{quote(name, safe='')}") as response:
                if response.status != 200:
                    continue
                nodes = (await response.json())["nodes"]
            for node in nodes:
                predicted, cached = node["predicted_cached_tokens"], node["cached_tokens"]
                if node["fate"] == "computed" and predicted is not None and cached is not None:
                    measured.predicted_calls += 1
                    measured.predicted_within_block += abs(predicted - cached) <= self.engines.block_size

    async def _minimum(self, caller: HttpCaller, seen: dict[bytes, int]) -> tuple[int, int]:
        """The minimum for this phase's prompts, given those `seen` in earlier phases, with and without reuse of
        replies. `seen` is brought up to date."""
        gate = asyncio.Semaphore(8)

        async def ids(key: bytes) -> None:
            async with gate:
                messages = orjson.loads(key)
                prompt = await self.engines.tokenize(self.session, messages=messages, add_generation_prompt=True)
                reply = await self.engines.tokenize(
                    self.session, prompt=caller.replies.get(key) or " ", add_special_tokens=False
                )
                self._tokens[key] = (prompt, reply)

        await asyncio.gather(*(ids(key) for key in caller.prompts if key not in self._tokens))
        union = dict(seen)
        for key, times in caller.prompts.items():
            union[key] = union.get(key, 0) + times
        result = (
            self._fewest(union, True) - self._fewest(seen, True),
            self._fewest(union, False) - self._fewest(seen, False),
        )
        seen |= union
        return result

    def _fewest(self, counts: dict[bytes, int], reuse: bool) -> int:
        return minimum_tokens(
            ((self._tokens[key][0], times) for key, times in counts.items()),
            self.engines.block_size,
            reuse=reuse,
            outputs=[self._tokens[key][1] for key in counts],
        )


async def _tick(caller: HttpCaller, progress: Callable[[int], None]) -> None:
    while True:
        progress(len(caller.records))
        await asyncio.sleep(0.25)


def _measurement(
    system: System,
    plan: Plan,
    phase: int,
    caller: HttpCaller,
    latencies: dict[str, float],
    *,
    makespan: float,
    deltas: Sequence[Counters],
    fewest: tuple[int, int],
    proxy_cpu: float | None,
) -> Measurement:
    records = caller.records
    calls = [] if system.plan else [record.end - record.start for record in records]
    streamed = [
        (record.first_token - record.start, record.follows) for record in records if record.first_token is not None
    ]
    firsts, following = [first for first, _ in streamed], [first for first, follows in streamed if follows]
    runs = list(latencies.values())
    work = [delta.computed_tokens + plan.decode_cost * delta.generated_tokens for delta in deltas]
    return Measurement(
        shape=plan.workload.name,
        system=system.name,
        family=system.family,
        repeat=plan.repeat,
        phase=phase,
        runs=len(runs),
        calls=len(records),
        failed_calls=len(caller.failures),
        first_failure=caller.failures[0] if caller.failures else None,
        retries=sum(record.retries for record in records),
        makespan=makespan,
        run_p50=quantile(runs, 0.5),
        run_p95=quantile(runs, 0.95),
        call_p50=quantile(calls, 0.5) if calls else None,
        call_p95=quantile(calls, 0.95) if calls else None,
        ttft_p50=quantile(firsts, 0.5) if firsts else None,
        ttft_p95=quantile(firsts, 0.95) if firsts else None,
        ttft_follows_p50=quantile(following, 0.5) if following else None,
        computed_tokens=sum(delta.computed_tokens for delta in deltas),
        minimum_tokens=fewest[0],
        minimum_without_reuse=fewest[1],
        generated_tokens=sum(delta.generated_tokens for delta in deltas),
        cached_tokens=sum(delta.cached_tokens for delta in deltas),
        balance=balance(work),
        preemptions=sum(delta.preemptions for delta in deltas),
        reused_calls=sum(record.cache in ("hit", "coalesced") for record in records),
        proxy_cpu=proxy_cpu,
        tenants=_tenants(latencies),
    )


def _tenants(latencies: dict[str, float]) -> dict[str, dict[str, float]]:
    """Run latency by tenant, for mixed traffic, whose run ids are ``NAME-SEED-PHASE-TENANT-INDEX``."""
    groups: dict[str, list[float]] = {}
    for run, latency in latencies.items():
        parts = run.split("-")
        if len(parts) == 5:
            groups.setdefault(parts[3], []).append(latency)
    return {
        tenant: {"run_p50": quantile(values, 0.5), "run_p95": quantile(values, 0.95)}
        for tenant, values in groups.items()
    }


def compare(outputs: dict[str, Outputs], measurements: Sequence[Measurement]) -> None:
    """Fill in `outputs_differ` of one group (same shape, same repeat): each system's replies, call by call, against
    direct round robin's, or the first system's where that was not measured."""
    reference = "rr" if "rr" in outputs else next(iter(outputs))
    expected = outputs[reference]
    for measured in measurements:
        replies = outputs[measured.system]
        common = expected.keys() & replies.keys()
        measured.outputs_compared = len(common)
        measured.outputs_differ = sum(expected[key] != replies[key] for key in common)


__all__ = ["CallRecord", "Harness", "Outputs", "Plan", "compare"]
