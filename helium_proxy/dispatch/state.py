"""The dispatcher's state: calls that wait, workers and what they run. Plain data and its invariants; `policy.decide`
moves calls from the one to the other."""

from __future__ import annotations

import bisect
import heapq
import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from helium_proxy.dispatch.rates import Rates
from helium_proxy.dispatch.settings import DispatchSettings
from helium_proxy.residency.index import Chain, WorkerResidency
from helium_proxy.types import Hints

Reason = Literal[
    "only", "state", "prefix", "balance", "idle", "round-robin", "least-loaded"
]  # fmt: skip
"""Why a call went where it went: the only worker; the one with the state it continues; where its prefix is; away from
it, to balance; to an idle worker though its prefix is elsewhere; or by an ablation's rule."""

Rank = tuple[int, float, int, float, int]
"""See `DispatchState._rank`."""
GroupKey = tuple[str, str]
"""(tenant, workflow)."""

_RUNS_REMEMBERED = 100_000
_GROUPS_REMEMBERED = 10_000
_STEP_S = 0.01
"""A decode step's least duration, seconds: about the same on an accelerator (reading the weights) and a CPU."""
_LEAST_SHARE, _FIRST_SHARE = 0.4, 0.5
_RISE, _FALL = 0.02, 0.05
"""Of the share, per call: what is lost by too large a batch shows late, so growth is slow."""
_SMOOTH = 0.1
_TURNOVERS = 1
_UNSEEN_LOSS = 0.1
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
    group: str = ""
    """The workflow it belongs to: groups of a tenant take turns, so that a large one never starves a small one."""
    prefer: str | None = None
    """The worker that holds what it continues; none other can serve it."""
    suggestion: str | None = None
    """Where a submitted plan has placed it: a preference, given up where it costs more than its own prefill."""
    exact: bool = False
    """Whether `chain` is of the token ids that the engine computes with."""
    exclude: frozenset[str] = frozenset()
    """Workers that failed it."""
    # -- the dispatcher's own notes
    rank: Rank = (0, 0.0, 0, 0.0, 0)
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
    share: float = _FIRST_SHARE
    """Of the KV, what running calls may fill; see `_adapt`."""
    evicted_tokens: float = 0.0
    """Mean over recent calls: prompt tokens to compute that had been resident here and were evicted."""
    batch: float = 1.0
    """Mean number of calls running, as recent ones were admitted."""
    output: float = 0.0
    """Mean of their expected output tokens."""
    _turnover: int = 0
    """Blocks newly taken, until the cache has been filled `_TURNOVERS` times."""
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

    def needed_blocks(self, call: QueuedCall) -> int:
        """Blocks that running `call` takes from what is left: those no running call holds already."""
        return len(call.chain) - self.residency.match_held(call.chain) + self.anonymous_blocks(call)

    def saturated(self, settings: DispatchSettings) -> bool:
        """Whether no call at all would fit."""
        running = len(self.running)
        if not settings.admission or running == 0 or self.capacity is None:
            return running >= (settings.max_running if self.capacity or not running else settings.default_running)
        return running >= settings.max_running or self.residency.used >= self._limit(settings, self.capacity)

    def has_room(self, call: QueuedCall, settings: DispatchSettings) -> bool:
        """Whether the worker has room to run `call`: within the share of KV meant for running calls, or idle."""
        running = len(self.running)
        if not settings.admission or running == 0:
            return running < settings.max_running
        if self.capacity is None:
            return running < settings.default_running
        if running >= settings.max_running:
            return False
        return self.residency.used + self.needed_blocks(call) <= self._limit(settings, self.capacity)

    def _limit(self, settings: DispatchSettings, capacity: int) -> float:
        """Blocks that running calls may hold."""
        return min((settings.kv_share or self.share) * capacity, capacity - self.residency.pinned)

    def admit(self, assignment: Assignment) -> None:
        call = assignment.call
        self._adapt(call)
        self.residency.admit(call.id, call.chain, self.anonymous_blocks(call), exact=call.exact)
        self.running[call.id] = assignment
        self.backlog_s += assignment.work_s
        self.version += 1
        self.rates.started(assignment.started_at)

    def _adapt(self, call: QueuedCall) -> None:
        """Moves `share` to where the next call gains as much from a larger batch as it loses in prefixes.

        The decode steps of a call are shared by the batch: it pays output · step / batch for them. Against this
        stands the prefill of what had been resident and is gone. On an accelerator a step costs as much as hundreds
        of prefilled tokens, and the batch wins; on a CPU the prefixes do.
        """
        gone = self.residency.evicted(call.chain) * call.block_size
        self.evicted_tokens += _SMOOTH * (gone - self.evicted_tokens)
        self.batch += _SMOOTH * (len(self.running) + 1 - self.batch)
        self.output += _SMOOTH * (call.output_tokens - self.output)
        lost = self.evicted_tokens
        if self.capacity and self._turnover < _TURNOVERS * self.capacity:
            # What a batch evicts is missed only when the cache has been filled, and asked for what it held: until
            # then a tenth of each prompt is assumed to be lost.
            self._turnover += len(call.chain) - self.hit(call) + self.anonymous_blocks(call)
            lost = max(lost, _UNSEEN_LOSS * call.prompt_tokens)
        loss = self.rates.work(lost, 0)
        gain = self.output * _STEP_S / self.batch
        self.share = min(1.0, self.share + _RISE) if gain >= loss else max(_LEAST_SHARE, self.share - _FALL)

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
    """Waiting calls of one model. Tenants take turns, and each tenant's workflows within its turn, by the engine
    seconds they have been given; inside a workflow calls go by rank.

    Fair shares protect a small workflow beside a large one, and leave the order within one free to finish old runs
    first (which keeps the set of prefixes in use small).
    """

    def __init__(self) -> None:
        # -- state
        self._groups: dict[GroupKey, list[tuple[Rank, QueuedCall]]] = {}  # never empty lists, sorted by rank
        self._served: OrderedDict[str | GroupKey, float] = OrderedDict()  # tenant or group → engine seconds given
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        return f"<Queue {self._length} calls of {len(self._groups)} groups>"

    def push(self, call: QueuedCall) -> None:
        key = (call.tenant, call.group)
        waiting = self._groups.get(key)
        if waiting is None:
            self._enter(call.tenant, [t for t, _ in self._groups])
            self._enter(key, [k for k in self._groups if k[0] == call.tenant])
            waiting = self._groups[key] = []
        bisect.insort(waiting, (call.rank, call))
        self._length += 1

    def _enter(self, who: str | GroupKey, others: Sequence[str | GroupKey]) -> None:
        """Whoever comes (back) starts level with the least served of those waiting: no credit is saved up."""
        floor = min((self._served.get(o, 0.0) for o in others if o != who), default=0.0)
        self._served[who] = max(self._served.get(who, 0.0), floor)
        self._served.move_to_end(who)
        while len(self._served) > _GROUPS_REMEMBERED:
            self._served.popitem(last=False)

    def remove(self, call: QueuedCall) -> bool:
        key = (call.tenant, call.group)
        waiting = self._groups.get(key, [])
        at = bisect.bisect_left(waiting, (call.rank,))
        if at >= len(waiting) or waiting[at][1] is not call:
            return False
        del waiting[at]
        self._length -= 1
        if not waiting:
            del self._groups[key]
        return True

    def charge(self, call: QueuedCall, work_s: float) -> None:
        """`call` was given `work_s` engine seconds."""
        for who in (call.tenant, (call.tenant, call.group)):
            self._served[who] = self._served.get(who, 0.0) + work_s

    def head(self, count: int) -> list[QueuedCall]:
        """The first `count` calls in turn order; a client's priority goes before any turn."""
        if len(self._groups) == 1:
            (waiting,) = self._groups.values()
            return [call for _, call in waiting[:count]]
        served = self._served
        turns = [
            (waiting[0][0][0], served.get(key[0], 0.0), served.get(key, 0.0), key, 0)
            for key, waiting in self._groups.items()
        ]
        heapq.heapify(turns)
        head: list[QueuedCall] = []
        while turns and len(head) < count:
            _, tenant_s, group_s, key, at = heapq.heappop(turns)
            waiting = self._groups[key]
            call = waiting[at][1]
            head.append(call)
            if at + 1 < len(waiting):
                # As if it had been served: the exact charge depends on where it will go.
                step = max(1e-6, call.prompt_tokens * 1e-4 + call.output_tokens * 1e-3)
                entry = (waiting[at + 1][0][0], tenant_s + step, group_s + step, key, at + 1)
                heapq.heappush(turns, entry)
        return head

    def __iter__(self) -> Iterator[QueuedCall]:
        for waiting in self._groups.values():
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

    def _rank(self, call: QueuedCall, now: float) -> Rank:
        """(client's priority, virtual time, run, −remaining path, arrival): smaller is earlier.

        The virtual time is when the call's run began: older runs finish first, and the set of prefixes in use stays
        small. A deadline moves a call forward to the moment by which it must start.
        """
        self._sequence += 1
        hints = call.hints
        virtual, path = now, 0.0
        if self.settings.ordering == "run" and hints.run_seq:
            virtual = self._run_started.setdefault(hints.run_seq, now)
            while len(self._run_started) > _RUNS_REMEMBERED:
                self._run_started.popitem(last=False)
            path = -(hints.path_output_tokens + 0.25 * hints.path_prompt_tokens)
            if hints.plan_rank is not None:
                path = float(hints.plan_rank)  # a submitted plan has weighed paths against prefixes already
        if hints.deadline_s is not None:
            durations = [w.rates.duration(call.prompt_tokens, call.output_tokens) for w in self.serving(call.model)]
            latest = call.arrived_at + hints.deadline_s - 2 * min(durations, default=0.0)
            virtual = min(virtual, latest)
        return (hints.priority, virtual, hints.run_seq, path, self._sequence)
