"""Workloads in virtual time: the real workflow room, estimator and dispatcher, in front of the embedded engine's
scheduler, on an event loop whose clock jumps to the next timer. No sockets, no waiting: minutes pass in seconds, and
the same seed gives the same result to the last digit.

What is not simulated: HTTP, the client's and the proxy's own CPU time.
"""

from __future__ import annotations

import asyncio
import random
import selectors
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from benchmarks.affinity import Affinity
from benchmarks.minimum import minimum_tokens
from benchmarks.workloads.base import Call, Roles, Run, Sizes, Workload
from benchmarks.workloads.text import Writer
from helium_proxy.dispatch.dispatcher import Dispatcher
from helium_proxy.dispatch.settings import DispatchSettings
from helium_proxy.dispatch.state import QueuedCall
from helium_proxy.engine import EngineConfig, Request, Scheduler, Tokenizer, block_hashes, render
from helium_proxy.residency.chain import token_chain
from helium_proxy.types import CallRequest, Outcome
from helium_proxy.workers.breaker import Breaker
from helium_proxy.workflow import Workflows, WorkflowSettings

_WORDS = (Path(__file__).parent / "workloads" / "words.txt").read_text().split()


class _NoSelector(selectors.SelectSelector):
    """Never waits: moves the loop's clock forward instead."""

    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("nothing is scheduled and everybody waits: a deadlock")
        self.loop.now += timeout
        return super().select(0) if self.loop.real_files else []


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop on virtual time."""

    def __init__(self) -> None:
        selector = _NoSelector()
        super().__init__(selector)
        selector.loop = self
        self.now = 0.0
        self.real_files = False

    def time(self) -> float:
        return self.now


class Engine:
    """An embedded engine's scheduler, driven by the loop's timers."""

    def __init__(self, name: str, config: EngineConfig, loop: VirtualLoop) -> None:
        self.name = name
        self.scheduler = Scheduler(config)
        self._loop = loop
        self._done: dict[str, asyncio.Future[Request]] = {}
        self._timer: asyncio.TimerHandle | None = None

    async def run(self, request: Request) -> Request:
        future: asyncio.Future[Request] = self._loop.create_future()
        self._done[request.id] = future
        now = self._loop.time()
        self.scheduler.add(request, now)
        if self._timer is None:
            self._step()
        else:
            self._timer.cancel()
            self._timer = self._loop.call_at(self.scheduler.cut(now), self._finish)
        return await future

    def _step(self) -> None:
        end = self.scheduler.start(self._loop.time())
        self._timer = None if end is None else self._loop.call_at(end, self._finish)

    def _finish(self) -> None:
        for request in self.scheduler.finish().finished:
            self._done.pop(request.id).set_result(request)
        self._step()


@dataclass
class Result:
    """What a simulated system took. Seconds of virtual time, tokens."""

    makespan: float
    computed: int
    minimum: int
    balance: float
    preemptions: int
    calls: int
    run_seconds: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        runs = sorted(self.run_seconds)
        half = runs[len(runs) // 2] if runs else 0
        return (
            f"{self.makespan:9.2f} s  {self.computed / self.minimum:5.2f} x min  balance {self.balance:4.2f}  "
            f"preempted {self.preemptions:4d}  run p50 {half:8.2f} s"
        )


class Simulation:
    """One system in front of `count` engines. `system`: ``helium``, ``rr``, ``affinity`` (longest prefix with a bound
    on imbalance, as the peers' cache-aware policies have it)."""

    def __init__(
        self,
        system: str,
        count: int,
        config: EngineConfig,
        *,
        settings: DispatchSettings | None = None,
        tagged: bool = True,
        workflow: WorkflowSettings | None = None,
        warm: Workflows | None = None,
    ) -> None:
        self.loop = VirtualLoop()
        self.system, self.tagged = system, tagged
        self.engines = [Engine(f"w{i}", config, self.loop) for i in range(count)]
        self.block = config.block
        self._tokenizer = Tokenizer()
        self._sequence = 0
        self._prompts: dict[bytes, tuple[array[int], int]] = {}
        self._flights: dict[bytes, asyncio.Future[str]] = {}
        self._answers: dict[bytes, str] = {}
        self._settings = settings or DispatchSettings()
        self.workflows = warm or Workflows(workflow or WorkflowSettings(), clock=self.loop.time, wall=self.loop.time)
        self.dispatcher = Dispatcher(self._settings, _NoPool(), clock=self.loop.time)  # type: ignore[arg-type]
        for engine in self.engines:
            known = self.dispatcher.state.join(engine.name, frozenset({"demo"}), self.block, config.blocks - 1)
            known.rates.calibrated(*config.timing.alone())
        self._turn = 0
        self._affinity = Affinity(count)
        self._loads = [0] * count

    # -- the system's ways with a call

    async def complete(self, call: Call) -> str:
        self._sequence += 1
        tokens = render(self._tokenizer, list(call.messages))
        key = tokens.tobytes() + call.max_tokens.to_bytes(4, "little")
        known = self._prompts.get(key)
        self._prompts[key] = (tokens, 1 if known is None else known[1] + 1)
        if self.system == "helium":
            return await self._helium(call, tokens, key)
        if self.system == "rr":
            self._turn += 1
            index = self._turn % len(self.engines)
        else:
            index = self._affinity.pick(token_chain(tokens, self.block), self._loads)
        self._loads[index] += 1
        await self._run(self.engines[index], f"c{self._sequence}", tokens, call)
        self._loads[index] -= 1
        return self._reply(tokens, call)

    async def _helium(self, call: Call, tokens: array[int], key: bytes) -> str:
        now = self.loop.time()
        body: dict[str, Any] = {"model": "demo", "messages": list(call.messages), "max_tokens": call.max_tokens}
        if self.tagged:
            body["helium"] = {
                "workflow": call.workflow,
                "run": call.run,
                "node": call.node,
                "parents": list(call.parents),
            }
        request = CallRequest(f"c{self._sequence}", "t", "/v1/chat/completions", "demo", body, {})
        arrival = self.workflows.arrive(request, now)
        answer = self._answers.get(key)
        if answer is None and key in self._flights:
            answer = await asyncio.shield(self._flights[key])
        if answer is not None:
            outcome = Outcome("hit", finished_at=self.loop.time(), reply_text=answer, prompt_tokens=len(tokens))
            self.workflows.finished(arrival.call, outcome, self.loop.time())
            return answer
        flight: asyncio.Future[str] = self.loop.create_future()
        self._flights[key] = flight
        queued = QueuedCall(
            request.id,
            "demo",
            "t",
            token_chain(tokens, self.block),
            self.block,
            len(tokens),
            float(call.max_tokens),
            now,
            hints=arrival.hints,
            group=arrival.template,
            share=arrival.share,
            node=call.node,
        )
        assignment = await self.dispatcher.acquire(queued)
        self.workflows.started(arrival.call, assignment.worker, self.loop.time())
        engine = self.engines[int(assignment.worker[1:])]
        done = await self._run(engine, request.id, tokens, call, priority=assignment.engine_priority)
        text = self._reply(tokens, call)
        extension = token_chain(tokens + self._tokenizer.encode(text), self.block)[len(queued.chain) :]
        self.dispatcher.release(
            assignment,
            ok=True,
            computed_tokens=len(tokens) - done.cached_tokens,
            output_tokens=call.max_tokens,
            extension=extension,
        )
        self.workflows.finished(
            arrival.call,
            Outcome(
                "computed",
                worker=assignment.worker,
                prompt_tokens=len(tokens),
                cached_tokens=done.cached_tokens,
                predicted_cached_tokens=assignment.cached_tokens,
                output_tokens=call.max_tokens,
                queued_at=now,
                finished_at=self.loop.time(),
                reply_text=text,
                reply_id=request.id,
            ),
            self.loop.time(),
        )
        self._answers[key] = text
        del self._flights[key]
        flight.set_result(text)
        return text

    async def _run(self, engine: Engine, name: str, tokens: array[int], call: Call, *, priority: int = 0) -> Request:
        text = self._reply(tokens, call)
        whole = tokens + self._tokenizer.encode(text)
        hashes = block_hashes(whole, self.block)
        return await engine.run(Request(name, len(tokens), call.max_tokens, hashes, priority=priority))

    def _reply(self, tokens: array[int], call: Call) -> str:
        """A reply of exactly `max_tokens` tokens that the prompt decides."""
        words = random.Random(xxhash.xxh3_64_intdigest(tokens.tobytes())).choices(_WORDS, k=call.max_tokens)
        return " ".join(words)

    # -- a batch

    def measure(self, workload: Workload, sizes: Sizes, batch: int, seed: int = 1) -> Result:
        """Runs the workload's batch, once; its result."""
        writer = Writer(seed, 1.0)
        result = Result(0, 0, 1, 1, 0, 0)
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_until_complete(self._batch(workload, sizes, writer, batch, result))
        finally:
            asyncio.set_event_loop(None)
            self.loop.close()
        counters = [e.scheduler.counters for e in self.engines]
        computed = [c.computed_tokens for c in counters]
        result.makespan = self.loop.time()
        result.computed = sum(computed)
        busy = [c.busy_s for c in counters]
        result.balance = max(busy) / (sum(busy) / len(busy)) if sum(busy) else 1
        result.preemptions = sum(c.preemptions for c in counters)
        result.calls = self._sequence
        result.minimum = minimum_tokens([(list(t), n) for t, n in self._prompts.values()], self.block)
        return result

    async def _batch(self, workload: Workload, sizes: Sizes, writer: Writer, batch: int, result: Result) -> None:
        roles = Roles(workload.name, sizes, writer)

        async def one(index: int, inputs: dict[str, str], start: float) -> None:
            await asyncio.sleep(start)
            began = self.loop.time()
            run = Run(self, workload.name, f"{workload.name}-{index}", inputs=inputs, roles=roles)
            await workload.program_of(inputs)(run)
            result.run_seconds.append(self.loop.time() - began)

        for phase, inputs in enumerate(workload.make_inputs(writer, sizes, batch)):
            starts = workload.arrivals(batch, 1) if workload.arrivals else [0.0] * len(inputs)
            await asyncio.gather(*(one(phase * 100_000 + i, given, starts[i]) for i, given in enumerate(inputs)))


class _NoPool:
    """The dispatcher's view of workers that are always up."""

    class _Up:
        epoch = 0

        def __init__(self) -> None:
            self.breaker = Breaker()

        def available(self, _now: float) -> bool:
            return True

    def __init__(self) -> None:
        self._up = self._Up()

    def get(self, _worker: str) -> Any:
        return self._up

    def all(self) -> list[Any]:
        return []
