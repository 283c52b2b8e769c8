"""The dispatcher's state: calls that wait, workers and what they run. Plain data and its invariants; `policy.decide`
moves calls from the one to the other."""

from __future__ import annotations

import bisect
import math
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from helium_proxy.dispatch.rates import Rates
from helium_proxy.dispatch.settings import DispatchSettings
from helium_proxy.residency.index import Chain, WorkerResidency
from helium_proxy.types import Hints

Reason = Literal["only", "prefix", "balance", "plan", "idle", "round-robin", "least-loaded"]
"""Why a call went where it went: the only worker; where its prefix is; away from it, to balance; where the plan said;
to an idle worker though its prefix is elsewhere; or by an ablation's rule."""

_RUNS_REMEMBERED = 100_000
UNBOUNDED_BLOCKS = 1 << 20
"""The mirror's size for a worker whose KV capacity is not known."""


@dataclass(slots=True, eq=False)
class QueuedCall:
    """A call as the dispatcher sees it. Tokens, seconds on the monotonic clock."""

    id: str
    model: str
    tenant: str
    chain: Chain
    block_size: int
    """Tokens per block of `chain`."""
    prompt_tokens: int
    output_tokens: float
    """Expected."""
    arrived_at: float
    hints: Hints = field(default_factory=Hints)
    prefer: str | None = None
    """Where a submitted plan would have it."""
    exclude: frozenset[str] = frozenset()
    """Workers that failed it."""
    # -- the dispatcher's own notes
    rank: tuple[int, float, float, int] = (0, 0.0, 0.0, 0)
    hits: dict[str, tuple[int, int]] = field(default_factory=dict)
    """worker → (version of its residency, resident leading blocks)."""

    def __repr__(self) -> str:
        return f"<QueuedCall {self.id} {self.model} {self.prompt_tokens}+{self.output_tokens:.0f}>"


@dataclass(slots=True, eq=False)
class Assignment:
    """A decision: `call` goes to `worker`, which is believed to hold `cached_tokens` of its prompt."""

    call: QueuedCall
    worker: str
    cached_tokens: int
    reason: Reason
    engine_priority: int
    """For the engine's own queue; lower is earlier."""
    started_at: float
    work_s: float
    """Engine seconds it was counted as."""
    predicted_s: float
    """Expected duration on the worker."""


@dataclass(slots=True, eq=False)
class WorkerState:
    """What the dispatcher knows of one worker."""

    id: str
    models: frozenset[str]
    block_size: int | None
    capacity: int | None
    """KV blocks; None: not known."""
    open: bool = True
    epoch: int = 0
    # -- state
    residency: WorkerResidency = field(init=False)
    rates: Rates = field(default_factory=Rates)
    running: dict[str, Assignment] = field(default_factory=dict)
    backlog_s: float = 0.0
    """Sum of `work_s` of what runs."""
    version: int = 0
    """Increases when blocks may have become resident or been lost."""

    def __post_init__(self) -> None:
        self.residency = WorkerResidency(self.capacity or UNBOUNDED_BLOCKS)

    def __repr__(self) -> str:
        return f"<WorkerState {self.id} running={len(self.running)} backlog={self.backlog_s:.2f}s {self.residency!r}>"

    def hit(self, call: QueuedCall) -> int:
        """Leading blocks of `call` resident here, remembered until the residency changes."""
        known = call.hits.get(self.id)
        if known is not None and known[0] == self.version:
            return known[1]
        hit = self.residency.match(call.chain)
        call.hits[self.id] = (self.version, hit)
        return hit

    def anonymous_blocks(self, call: QueuedCall) -> int:
        """Blocks `call` needs beyond its chain: the prompt's tail and its output."""
        size = self.block_size or call.block_size
        tail = call.prompt_tokens - len(call.chain) * call.block_size
        return max(1, math.ceil((max(0, tail) + call.output_tokens) / size))

    def has_room(self, call: QueuedCall, settings: DispatchSettings) -> bool:
        """Whether the worker should run `call` now: within the share of KV meant for running calls, or idle."""
        running = len(self.running)
        if not settings.admission or running == 0:
            return running < settings.max_running
        if self.capacity is None:
            return running < settings.default_running
        if running >= settings.max_running:
            return False
        needed = len(call.chain) - self.residency.match_held(call.chain) + self.anonymous_blocks(call)
        return self.residency.used + needed <= settings.kv_share * self.capacity

    def admit(self, assignment: Assignment) -> None:
        call = assignment.call
        self.residency.admit(call.id, call.chain, self.anonymous_blocks(call))
        self.running[call.id] = assignment
        self.backlog_s += assignment.work_s
        self.version += 1
        self.rates.started(assignment.started_at)

    def release(self, call: str, extension: Chain = ()) -> Assignment | None:
        """The call no longer runs here; None when it was not known (the worker was cleared meanwhile)."""
        assignment = self.running.pop(call, None)
        if assignment is None:
            return None
        self.residency.finish(call, extension)
        self.backlog_s = max(0.0, self.backlog_s - assignment.work_s) if self.running else 0.0
        if extension:
            self.version += 1
        return assignment

    def clear(self) -> None:
        """The engine restarted: nothing is resident."""
        held = [a.call for a in self.running.values()]
        self.residency.clear()
        self.version += 1
        for call in held:
            self.residency.admit(call.id, (), self.anonymous_blocks(call))


class Queue:
    """Waiting calls of one model, in order of rank; tenants take turns by the work they have been given."""

    def __init__(self) -> None:
        # -- state
        self._tenants: dict[str, list[tuple[tuple[int, float, float, int], QueuedCall]]] = {}  # sorted by rank
        self._served: OrderedDict[str, float] = OrderedDict()  # tenant → engine seconds given, normalised
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        return f"<Queue {self._length} calls of {len(self._tenants)} tenants>"

    def push(self, call: QueuedCall) -> None:
        waiting = self._tenants.get(call.tenant)
        if waiting is None:
            waiting = self._tenants[call.tenant] = []
            # A tenant that comes (back) starts level with the least served of those waiting: no saved-up credit.
            floor = min((self._served.get(t, 0.0) for t in self._tenants if t != call.tenant), default=0.0)
            self._served[call.tenant] = max(self._served.get(call.tenant, 0.0), floor)
            while len(self._served) > 10_000:
                self._served.popitem(last=False)
        bisect.insort(waiting, (call.rank, call))
        self._length += 1

    def remove(self, call: QueuedCall) -> bool:
        waiting = self._tenants.get(call.tenant, [])
        at = bisect.bisect_left(waiting, (call.rank,))
        if at >= len(waiting) or waiting[at][1] is not call:
            return False
        del waiting[at]
        self._length -= 1
        if not waiting:
            del self._tenants[call.tenant]
        return True

    def charge(self, tenant: str, work_s: float) -> None:
        self._served[tenant] = self._served.get(tenant, 0.0) + work_s

    def head(self, count: int) -> list[QueuedCall]:
        """The first `count` calls: tenants in turn, the least served first; within one, by rank."""
        if len(self._tenants) == 1:
            (waiting,) = self._tenants.values()
            return [call for _, call in waiting[:count]]
        turns = deque(sorted(self._tenants, key=lambda t: self._served.get(t, 0.0)))
        positions = dict.fromkeys(turns, 0)
        head: list[QueuedCall] = []
        while turns and len(head) < count:
            tenant = turns.popleft()
            at = positions[tenant]
            head.append(self._tenants[tenant][at][1])
            positions[tenant] = at + 1
            if at + 1 < len(self._tenants[tenant]):
                turns.append(tenant)
        return head

    def __iter__(self) -> Iterator[QueuedCall]:
        for waiting in self._tenants.values():
            for _, call in waiting:
                yield call


class DispatchState:
    """Everything `decide` reads and writes."""

    def __init__(self, settings: DispatchSettings) -> None:
        self.settings = settings
        # -- state
        self.workers: dict[str, WorkerState] = {}
        self.queues: dict[str, Queue] = {}  # by model; an empty queue is removed
        self._run_started: OrderedDict[int, float] = OrderedDict()  # run_seq → its first arrival here
        self._sequence = 0
        self._turn = 0  # for round robin

    def __repr__(self) -> str:
        return f"<DispatchState {self.queued} queued, {len(self.workers)} workers>"

    @property
    def queued(self) -> int:
        return sum(len(q) for q in self.queues.values())

    def serving(self, model: str) -> list[WorkerState]:
        """Workers of `model`, open or not."""
        return [w for w in self.workers.values() if model in w.models]

    def enqueue(self, call: QueuedCall, now: float) -> None:
        call.rank = self._rank(call, now)
        queue = self.queues.get(call.model)
        if queue is None:
            queue = self.queues[call.model] = Queue()
        queue.push(call)

    def withdraw(self, call: QueuedCall) -> bool:
        """Takes a call out of the queue; False when it was no longer there."""
        queue = self.queues.get(call.model)
        if queue is None or not queue.remove(call):
            return False
        if not queue:
            del self.queues[call.model]
        return True

    def next_turn(self) -> int:
        self._turn += 1
        return self._turn

    def _rank(self, call: QueuedCall, now: float) -> tuple[int, float, float, int]:
        """(client's priority, virtual time, −remaining path, arrival): smaller is earlier.

        The virtual time of a call is when its run began, so that older runs finish first and the set of prefixes
        in use stays small. But no call may pass those that waited longer by more than the time the present queue
        takes to drain: a small run behind a large one waits at most about twice as long as it would in FIFO order.
        """
        self._sequence += 1
        hints = call.hints
        virtual, path = now, 0.0
        if self.settings.ordering == "run" and hints.run_seq:
            started = self._run_started.setdefault(hints.run_seq, now)
            while len(self._run_started) > _RUNS_REMEMBERED:
                self._run_started.popitem(last=False)
            virtual = max(started, now - self._drain_s(call.model))
            path = -(hints.path_output_tokens + 0.25 * hints.path_prompt_tokens)
            if hints.plan_rank is not None:
                path = float(hints.plan_rank)  # a submitted plan has weighed paths against prefixes already
        if hints.deadline_s is not None:
            duration = min(
                (w.rates.duration(call.prompt_tokens, call.output_tokens) for w in self.workers.values()), default=0
            )
            virtual = min(virtual, call.arrived_at + hints.deadline_s - duration - self._drain_s(call.model))
        return (hints.priority, virtual, path, self._sequence)

    def _drain_s(self, model: str) -> float:
        """About how long the present queue of `model` takes, in seconds (at least one)."""
        queue = self.queues.get(model)
        workers = [w for w in self.serving(model) if w.open]
        if not queue or not workers:
            return 1.0
        running = sum(len(w.running) for w in workers)
        mean = sum(w.backlog_s for w in workers) / running if running else 0.1
        return max(1.0, (len(queue) + running) * mean / len(workers))
