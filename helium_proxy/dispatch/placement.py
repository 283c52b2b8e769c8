"""On which worker an arrived call would be done cheapest: the first step of `policy.decide`.

Workers differ in when they are done with what they have, and in how much of the call's prompt they hold or will hold
by then. Those that hold equally much are a group; within one, a worker that is busy for longer than another cannot
be much cheaper. So the workers are visited in the order in which they become free, and a group is given up as soon
as its bound says that no other of it can win: the cost of placing grows with the number of groups, not of workers.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from itertools import chain
from typing import NamedTuple

from helium_proxy.dispatch.calls import QueuedCall, Reason
from helium_proxy.dispatch.queue import Queue
from helium_proxy.dispatch.rates import DECODE_WEIGHT
from helium_proxy.dispatch.state import DispatchState, WorkerState

_WASTE = 2.0
"""A call's own cost counts twice against the wait for others: work not done is done for nobody else either."""
_MOVED = 20.0
"""What a call would leave behind, where the call that it extends ran, counts so many times: of no use to others it is
lost, while a shorter lane elsewhere is no lasting gain, since a worker whose lane is empty takes over from others."""


class _Group(NamedTuple):
    """Workers (a mask) that hold equally much of a prompt, in blocks: `resident`, or `shared` with calls in their
    lanes; and the least seconds that it takes any of them, counted as placing does."""

    workers: int
    resident: int
    shared: int
    cached: int
    """Leading blocks that need not be computed there: the more of both."""
    least_s: float


def until_done(queue: Queue, worker: WorkerState, now: float) -> float:
    """Seconds until `worker` is done with what it runs and what waits in its lane."""
    return worker.backlog_s(now) + queue.work(worker.id) * worker.rates.prefill_s


class Sites:
    """The workers of one model during one decision, in the order in which they will be done with what they have."""

    def __init__(self, state: DispatchState, queue: Queue, workers: list[WorkerState], now: float) -> None:
        self._state = state
        self._queue = queue
        self._workers = workers
        self._prefill_s = min(w.rates.prefill_s for w in workers)
        self._block_step = min(w.block_step for w in workers)
        self._bits = sum(w.residency.bit for w in workers)
        # -- state
        self._until = {w.id: until_done(queue, w, now) for w in workers}
        self._order = sorted((self._until[w.id], index, w) for index, w in enumerate(workers))

    def __repr__(self) -> str:
        return f"<Sites {len(self._workers)} workers>"

    def place(self, call: QueuedCall) -> None:
        """Moves `call`, which has not been placed, into the lane of the worker where it is done cheapest."""
        worker, call.reason, call.lane_work = self._choose(call)
        self._queue.place(call, worker.id, worker.residency.bit)
        index, until = self._workers.index(worker), self._until[worker.id]
        del self._order[bisect_left(self._order, (until, index))]
        self._until[worker.id] = until = until + call.lane_work * worker.rates.prefill_s
        insort(self._order, (until, index, worker))

    def _choose(self, call: QueuedCall) -> tuple[WorkerState, Reason, float]:
        """The worker for `call`, why, and what it costs there."""
        allowed, settings = self._workers, self._state.settings
        if call.exclude:
            allowed = [w for w in allowed if w.id not in call.exclude] or allowed
        reason: Reason = "balance"
        if call.prefer is not None and any(w.id == call.prefer for w in allowed):
            allowed, reason = [w for w in allowed if w.id == call.prefer], "state"
        elif len(allowed) == 1:
            reason = "only"
        elif settings.placement == "round-robin":
            allowed, reason = [allowed[self._state.next_turn() % len(allowed)]], "round-robin"
        elif settings.placement == "least-loaded":
            allowed, reason = [min(allowed, key=lambda w: (self._until[w.id], len(w.running)))], "least-loaded"
        bits = self._bits if allowed is self._workers else sum(w.residency.bit for w in allowed)
        worker, cost, is_longest = self._cheapest(call, bits)
        return worker, "prefix" if is_longest and reason == "balance" else reason, cost

    def _cheapest(self, call: QueuedCall, allowed: int) -> tuple[WorkerState, float, bool]:
        """Of the workers in the mask `allowed`; what `call` costs there; whether no other holds more of it."""
        groups = self._groups(call, allowed)
        best: WorkerState | None = None
        best_total, best_cost, best_cached = float("inf"), 0.0, 0
        left = allowed
        for wait, _, worker in self._visits(call, groups):
            bit = worker.residency.bit
            if not left & bit:
                continue
            if wait >= best_total:
                break  # the others are busy for longer than the best needs to be done with the call
            group = next(group for group in groups if group.workers & bit)
            if wait + group.least_s >= best_total:
                left &= ~group.workers  # the others of the group are busy for longer still
                continue
            left &= ~bit
            cached = group.cached
            held = max(worker.matches(call, group.resident)[1], group.shared)
            cost = worker.cost(call, cached, held)
            total = wait + _WASTE * cost * worker.rates.prefill_s
            if total < best_total:
                best, best_total, best_cost, best_cached = worker, total, cost, cached
        assert best is not None, "`allowed` is not empty"
        most = max(group.cached for group in groups)
        return best, best_cost, most > 0 and best_cached == most

    def _visits(self, call: QueuedCall, groups: list[_Group]) -> Iterable[tuple[float, int, WorkerState]]:
        """The workers by when they will be free, and one before them that `call` prefers to others: a submitted
        plan's, up to what the whole prompt costs, or that of the call it extends (`_MOVED`)."""
        name = call.suggestion or call.home
        until = self._until.get(name) if name is not None else None
        if name is None or until is None:
            return self._order
        worker = self._state.workers[name]
        tokens = float(call.prompt_tokens)
        if call.suggestion is None:
            bit = worker.residency.bit
            here = max((group.cached for group in groups if group.workers & bit), default=0)
            elsewhere = max((group.cached for group in groups if group.workers & ~bit), default=0)
            tokens = _MOVED * call.block_size * max(0, here - elsewhere)
        return chain(((until - tokens * worker.rates.prefill_s, -1, worker),), self._order)

    def _groups(self, call: QueuedCall, allowed: int) -> list[_Group]:
        found: list[_Group] = []
        waiting = self._queue.shared(call.chain, allowed)
        for resident, have in self._state.holders.match(call.chain, allowed):
            for shared, lanes in waiting:
                workers = have & lanes
                if workers:
                    cached = max(resident, shared)
                    prefill = max(0, call.prompt_tokens - cached * call.block_size)
                    step = max(DECODE_WEIGHT, self._block_step * (len(call.chain) - cached + 1))
                    least = _WASTE * self._prefill_s * (prefill + step * call.output_tokens)
                    found.append(_Group(workers, resident, shared, cached, least))
        return found
