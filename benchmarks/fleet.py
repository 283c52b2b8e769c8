"""A fleet in virtual time: the embedded engine's scheduler and the real `dispatch.policy.decide`, nothing in between.

Runs are abstract: a workload's program is traced once into a graph whose prompts are pieces with a length (a role,
an input, a reply, the words between); pieces that are equal in two prompts, from the beginning, are a shared prefix,
block by block, as text would be. No text, no tokenizer, no HTTP, no event loop: a million calls are affordable.
Hints (remaining path, last call) are what a learnt template would give. Replies have exactly their expected length,
unless a fleet is told that lengths are guessed. What a reply adds to an engine's cache is known when it ends, as KV
events tell it.
"""

from __future__ import annotations

import gc
import heapq
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

from helium_proxy.dispatch.policy import decide
from helium_proxy.dispatch.settings import DispatchSettings
from helium_proxy.dispatch.state import Assignment, DispatchState, QueuedCall
from helium_proxy.engine import EngineConfig, Request, Scheduler
from helium_proxy.types import Hints

from .abstract import Node, Piece, Prefix, trace
from .affinity import Affinity

System = Literal["helium", "rr", "affinity"]
"""`affinity`: as the peers' cache-aware policies decide."""

_MODEL = "demo"
_ENDING = -1


@dataclass(slots=True)
class _Run:
    """A run under way."""

    seq: int
    started: float
    graph: Sequence[Node]
    waiting: list[int]
    left: int


@dataclass(slots=True)
class Call:
    """One call under way."""

    run: _Run
    place: int
    prompt: Prefix
    whole: Prefix
    """Prompt and reply."""
    queued: QueuedCall | None = None
    assignment: Assignment | None = None
    worker: int = 0


@dataclass(frozen=True)
class FleetResult:
    """What a simulated fleet did. Virtual seconds and tokens, except `wall_s` and `decide_us`."""

    system: str
    workers: int
    runs: int
    calls: int
    makespan: float
    run_p50: float
    run_p95: float
    computed_tokens: int
    fewest_tokens: int
    balance: float
    preemptions: int
    wall_s: float
    decisions: int
    decide_us: float
    """CPU microseconds of `decide` per call, on average."""
    decide_p99_us: float
    """Of one `decide`, which may assign several calls."""


class Fleet:
    """`workers` engines behind one system."""

    def __init__(
        self,
        system: System,
        workers: int,
        config: EngineConfig,
        settings: DispatchSettings | None = None,
        *,
        count_fewest: bool = True,
        guess: float = 0.0,
    ) -> None:
        """`guess`: how far expected lengths of replies are off, as the standard deviation of their logarithm."""
        self._system = system
        self._block = config.block
        self._engines = [Scheduler(config) for _ in range(workers)]
        self._count_fewest = count_fewest
        self._guess = guess
        self._guesses = random.Random(0)
        # All mutable state: the clock; events (time, number, what to do); calls in the engines by id; the policy's
        # state; loads and trees of the other systems; what is measured.
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._steps: list[int] = [0] * workers
        """Number of the event that ends the engine's step; 0: it is idle; `_ENDING`: that event is being handled."""
        self._number = 0
        self._calls: dict[str, Call] = {}
        self._state = DispatchState(settings or DispatchSettings(max_queue=1 << 30))
        for index in range(workers):
            known = self._state.join(str(index), frozenset({_MODEL}), self._block, config.blocks - 1)
            known.rates.calibrated(*config.timing.alone())
        self._decide_due = False
        self._turn = 0
        self._affinity = Affinity(workers)
        self._leads: dict[str, tuple[Prefix, tuple[Piece, ...]]] = {}
        self._seen: set[int] = set()
        self._fewest = 0
        self._finished = 0
        self._latencies: list[float] = []
        self._decide_s: list[float] = []
        self._on_run_end: Callable[[], None] = lambda: None
        self._think: Callable[[], float] = lambda: 0.0
        self._lag: Callable[[], float] = lambda: 0.0

    def __repr__(self) -> str:
        return (
            f"<Fleet {self._system}, {len(self._engines)} engines, {self._finished} calls done at {self.now:.1f} s>"
        )

    # -- events

    def _at(self, when: float, action: Callable[[], None]) -> int:
        self._number += 1
        heapq.heappush(self._events, (when, self._number, action))
        return self._number

    def simulate(
        self,
        graph: Sequence[Node],
        runs: int,
        *,
        concurrent: int | None = None,
        rate: float | None = None,
        think_s: float = 0.0,
        lag_s: float = 0.0,
        seed: int = 1,
    ) -> FleetResult:
        """`runs` runs of `graph`: all at once, `concurrent` at a time, or at `rate` a second (Poisson).

        `think_s`: mean of the exponential pause of the client before each call that has parents. `lag_s`: mean of the
        exponential time that an answer needs from the engine's scheduler to the system, as API servers take their
        time."""
        rng = random.Random(seed)
        began = time.perf_counter()
        started = 0

        def begin() -> None:
            nonlocal started
            if started < runs:
                started += 1
                self._begin(graph, started)

        if think_s:
            self._think = lambda: rng.expovariate(1 / think_s)
        if lag_s:
            self._lag = lambda: rng.expovariate(1 / lag_s)
        if rate is not None:
            when = 0.0
            for _ in range(runs):
                self._at(when, begin)
                when += rng.expovariate(rate)
        else:
            self._on_run_end = begin
            for _ in range(min(runs, concurrent or runs)):
                begin()
        collects = gc.isenabled()
        gc.disable()  # there are millions of objects and no cycles: looking for some takes two fifths of the time
        try:
            self._run_events()
        finally:
            if collects:
                gc.enable()
        return self._result(len(self._engines), runs, time.perf_counter() - began)

    def _run_events(self) -> None:
        self._pump()
        events = self._events
        while events:
            when, number, action = heapq.heappop(events)
            self.now = when
            self._current = number
            action()
            while events and events[0][0] == when:
                _, self._current, action = heapq.heappop(events)
                action()
            self._pump()

    # -- runs

    def _begin(self, graph: Sequence[Node], seq: int) -> None:
        run = _Run(seq, self.now, graph, [len(node.parents) for node in graph], len(graph))
        for place, node in enumerate(graph):
            if not node.parents:
                self._arrive(run, place)

    def _prompt(self, seq: int, node: Node) -> Prefix:
        """Of `node` in run `seq`: what all runs have in common, which is made once, and the rest."""
        lead = self._leads.get(node.name)
        if lead is None:
            common = tuple(takewhile(lambda piece: not piece.own, node.prompt))
            prefix = Prefix((), (), 0).extend(((piece.key, piece.tokens) for piece in common), self._block)
            lead = self._leads[node.name] = prefix, node.prompt[len(common) :]
        prefix, rest = lead
        return prefix.extend([(_name(seq, piece), piece.tokens) for piece in rest], self._block)

    def _arrive(self, run: _Run, place: int) -> None:
        node = run.graph[place]
        prompt = self._prompt(run.seq, node)
        whole = prompt.extend(((_name(run.seq, node.output), node.output.tokens),), self._block)
        call = Call(run, place, prompt, whole)
        name = f"{run.seq}/{node.name}"
        self._calls[name] = call
        chain = prompt.hashes
        if self._count_fewest:
            self._fewest += node.prompt_tokens - len(chain) * self._block
            for block in reversed(chain):
                if block in self._seen:
                    break
                self._seen.add(block)
                self._fewest += self._block
        if self._system != "helium":
            self._send(name, call, self._pick(chain), 0)
            return
        call.queued = self._queued(name, run.seq, node, chain)
        self._state.enqueue(call.queued, self.now)
        self._decide_due = True

    def _queued(self, name: str, seq: int, node: Node, chain: tuple[int, ...]) -> QueuedCall:
        hints = node.hints
        return QueuedCall(
            name,
            _MODEL,
            "t",
            chain,
            self._block,
            node.prompt_tokens,
            node.output.tokens * (self._guesses.lognormvariate(0.0, self._guess) if self._guess else 1.0),
            self.now,
            group="workflow",
            node=node.name,
            hints=Hints(
                path_calls=hints.path_calls,
                path_output_tokens=hints.path_output_tokens,
                path_prompt_tokens=hints.path_prompt_tokens,
                last=hints.last,
                run_seq=seq,
            ),
        )

    def calls_of(self, graph: Sequence[Node], runs: int) -> list[QueuedCall]:
        """Every call of `runs` runs as the dispatcher would see it, run by run."""
        return [
            self._queued(f"{seq}/{node.name}", seq, node, self._prompt(seq, node).hashes)
            for seq in range(1, runs + 1)
            for node in graph
        ]

    def _pump(self) -> None:
        """Everything of this instant has happened: decide."""
        if not self._decide_due or not self._state.queues:
            self._decide_due = False
            return
        self._decide_due = False
        assignments: list[Assignment] = []
        more = True
        while more:
            began = time.thread_time()
            assignments += decide(self._state, self.now)
            self._decide_s.append(time.thread_time() - began)
            more = self._state.unfinished
        end = self._state.next_end()
        if end is not None and self._state.queues:
            self._at(max(end, self.now), self._wake)
        for assignment in assignments:
            call = self._calls[assignment.call.id]
            call.assignment = assignment
            self._send(assignment.call.id, call, int(assignment.worker), assignment.engine_priority)

    def _wake(self) -> None:
        self._decide_due = True

    def _pick(self, chain: Sequence[int]) -> int:
        if self._system == "rr":
            self._turn += 1
            return self._turn % len(self._engines)
        return self._affinity.pick(chain, [len(engine._live) for engine in self._engines])

    # -- engines

    def _send(self, name: str, call: Call, worker: int, priority: int) -> None:
        node = call.run.graph[call.place]
        call.worker = worker
        engine = self._engines[worker]
        request = Request(name, node.prompt_tokens, node.output.tokens, call.whole.hashes, priority=priority)
        engine.add(request, self.now)
        if self._steps[worker] > 0:
            self._steps[worker] = self._at(engine.cut(self.now), lambda: self._step_over(worker))
        elif not self._steps[worker]:
            self._step(worker)

    def _step(self, worker: int) -> None:
        end = self._engines[worker].start(self.now)
        self._steps[worker] = 0 if end is None else self._at(end, lambda: self._step_over(worker))

    def _step_over(self, worker: int) -> None:
        if self._steps[worker] != self._current:
            return  # the step was cut short meanwhile
        self._steps[worker] = _ENDING
        for request in self._engines[worker].finish().finished:
            lag = self._lag()
            if lag:
                self._at(self.now + lag, lambda request=request: self._done(request))  # type: ignore[misc]
            else:
                self._done(request)
        self._step(worker)

    def _done(self, request: Request) -> None:
        call = self._calls.pop(request.id)
        run, node = call.run, call.run.graph[call.place]
        self._finished += 1
        added = call.whole.hashes[len(call.prompt.hashes) :]
        if self._count_fewest:
            self._seen.update(added)
        if call.assignment is not None and call.queued is not None:
            self._release(call.assignment, call.queued, request, added, node.output.tokens)
        run.left -= 1
        if not run.left:
            self._latencies.append(self.now - run.started)
            self._on_run_end()
            return
        for child in node.children:
            run.waiting[child] -= 1
            if not run.waiting[child]:
                pause = self._think()
                if pause:
                    self._at(self.now + pause, lambda child=child: self._arrive(run, child))  # type: ignore[misc]
                else:
                    self._arrive(run, child)

    def _release(
        self, assignment: Assignment, queued: QueuedCall, request: Request, extension: Any, output_tokens: int
    ) -> None:
        """As `Dispatcher.release` does, and the KV events that say what is cached."""
        worker = self._state.workers[assignment.worker]
        self._state.release(assignment.worker, queued.id, self.now, extension)
        if request.cached_tokens + self._block <= assignment.cached_tokens:
            worker.residency.correct(queued.chain, request.cached_tokens // self._block)
            worker.version += 1
        computed = queued.prompt_tokens - request.cached_tokens
        self._state.measure(assignment, computed, output_tokens, self.now)
        self._decide_due = True

    def _result(self, workers: int, runs: int, wall_s: float) -> FleetResult:
        counters = [engine.counters for engine in self._engines]
        busy = [counter.busy_s for counter in counters]
        latencies = sorted(self._latencies)
        spent = sorted(self._decide_s)
        return FleetResult(
            system=self._system,
            workers=workers,
            runs=runs,
            calls=self._finished,
            makespan=self.now,
            run_p50=latencies[len(latencies) // 2],
            run_p95=latencies[int(0.95 * (len(latencies) - 1))],
            computed_tokens=sum(counter.computed_tokens for counter in counters),
            fewest_tokens=self._fewest,
            balance=max(busy) * len(busy) / sum(busy),
            preemptions=sum(counter.preemptions for counter in counters),
            wall_s=wall_s,
            decisions=len(spent),
            decide_us=1e6 * sum(spent) / max(1, self._finished),
            decide_p99_us=1e6 * spent[int(0.99 * (len(spent) - 1))] if spent else 0.0,
        )


def _name(seq: int, piece: Piece) -> int:
    """The key of what `piece` is in run `seq`."""
    return hash((seq, piece.key)) if piece.own else piece.key


__all__ = ["Fleet", "FleetResult", "Node", "Piece", "Prefix", "trace"]
