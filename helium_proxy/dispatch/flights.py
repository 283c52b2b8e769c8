"""Runs in flight, and how many a worker can have before they push each other's prefixes out.

Agents come back to what they left in the KV cache, after others have used it. If more runs are in flight than the
cache holds, each finds its prefix gone and computes it again. This is thrashing, known from virtual memory, and so is
the cure: a program begins only if its working set fits beside those of the others (Denning, "The working set model
for program behavior", 1968). Engines evict what was used least recently, dead or not, so that a run's working set is
all that it writes from its first call to its last.

How much that is, is learned for each workflow from runs that have ended; of one that has not been seen yet, a run is
taken to write a multiple of what its first call does. A run has ended when the template says so, or when its next
call has not come in the time in which nearly all of that workflow's do.

Whether it pays to wait is another question, since a smaller batch costs time, too: see `WorkerState.full_batch`.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from dataclasses import dataclass, field

from helium_proxy.residency.index import Chain

Group = tuple[str, str]
"""(tenant, workflow)."""

_GROUPS = 10_000
_RUNS = 20_000
_GROWTH = 3.0
"""What a run writes after its first call, in multiples of what that writes, as long as nothing is known."""
_FIRST_GAP_S = 0.1
_LEAST_S = 0.05
_LONGEST_S = 10.0
"""Who lets more time pass between calls does not count as in flight meanwhile."""
_SMOOTH = 0.1
_ENOUGH = 4
"""Ended runs, after which they are believed."""
_RARELY = 0.1


@dataclass(slots=True)
class Habits:
    """What runs of one workflow do. Blocks and seconds."""

    first: float = 0.0
    """The least that a first call has written; 0 until a second run tells what the first one shares with it."""
    begun: int = 0
    ended: int = 0
    written: float = 0.0
    """Mean of the ended runs on a worker."""
    came_back: float = 1.0
    """Share of them that came back to what they had written."""
    gap_s: float = _FIRST_GAP_S
    deviation_s: float = _FIRST_GAP_S
    """Of the time from a run's last answer to its next call."""

    @property
    def patience_s(self) -> float:
        """Within this time the next call has come if any will (as RFC 6298 has it)."""
        return min(_LONGEST_S, max(_LEAST_S, self.gap_s + 4 * self.deviation_s))

    def paused(self, gap_s: float) -> None:
        self.deviation_s += _SMOOTH * (abs(gap_s - self.gap_s) - self.deviation_s)
        self.gap_s += _SMOOTH * (gap_s - self.gap_s)

    def began(self, blocks: float) -> None:
        self.begun += 1
        if self.begun > 1:
            self.first = min(self.first or blocks, blocks)

    def over(self, written: float, *, came_back: bool) -> None:
        self.ended += 1
        share = max(_SMOOTH, 1 / self.ended)
        self.written += share * (written - self.written)
        self.came_back += share * (came_back - self.came_back)

    def working_set(self, first: float) -> float:
        """What a run will have written on a worker at its end whose first call there writes `first`."""
        return self.written if self.ended >= _ENOUGH else first + _GROWTH * min(self.first, first)


@dataclass(slots=True)
class _Written:
    """What a run has written on one worker, in blocks."""

    first: float
    total: float


@dataclass(slots=True, eq=False)
class _Flight:
    """A run in flight."""

    group: Group
    calls: int = 0
    """Waiting or running."""
    idle_since: float = 0.0
    until: float = 0.0
    """When it counts as ended if it stays idle."""
    came_back: bool = False
    tails: set[int] = field(default_factory=set)
    """Last blocks of its prompts, until it has come back to one."""
    written: dict[str, _Written] = field(default_factory=dict)
    """By worker."""


class Flights:
    """The runs in flight on all workers. Bounded: the oldest are forgotten."""

    def __init__(self) -> None:
        # -- state
        self._habits: OrderedDict[Group, Habits] = OrderedDict()
        self._runs: OrderedDict[int, _Flight] = OrderedDict()
        self._ends: list[tuple[float, int]] = []  # heap of (until, run) of idle ones
        self._on: dict[str, dict[int, _Flight]] = {}  # worker → the runs in flight there
        self._committed: dict[str, float] = {}  # worker → sum of their working sets, where it is known
        self.ended = 0  # so far

    def __repr__(self) -> str:
        return f"<Flights {len(self._runs)} runs>"

    def habits(self, group: Group) -> Habits:
        habits = self._habits.get(group)
        if habits is None:
            habits = self._habits[group] = Habits()
            while len(self._habits) > _GROUPS:
                self._habits.popitem(last=False)
        return habits

    def committed(self, worker: str) -> float:
        """Blocks of `worker` that the runs in flight there need, written or not yet. O(runs) after a change."""
        known = self._committed.get(worker)
        if known is None:
            known = 0.0
            for flight in self._on.get(worker, {}).values():
                written = flight.written[worker]
                known += max(written.total, self.habits(flight.group).working_set(written.first))
            self._committed[worker] = known
        return known

    def fits(self, run: int, group: Group, worker: str, blocks: int, capacity: int) -> bool:
        """Whether a call of `run` that will write `blocks` may start on a worker of `capacity` blocks without driving
        others out: its run is in flight there, is the only one of its workflow, does not come back, or fits."""
        here = self._on.get(worker)
        if not here or run in here or not run:
            return True
        habits = self.habits(group)
        if habits.came_back < _RARELY or all(flight.group != group for flight in here.values()):
            return True
        return self.committed(worker) + habits.working_set(blocks) <= capacity

    def arrived(self, run: int, group: Group, chain: Chain, now: float) -> None:
        """A call of `run` (0: of none) waits."""
        if not run:
            return
        flight = self._runs.get(run)
        if flight is None:
            flight = self._runs[run] = _Flight(group)
            while len(self._runs) > _RUNS:
                self._end(next(iter(self._runs)))
        elif not flight.calls:
            self.habits(flight.group).paused(now - flight.idle_since)
        flight.calls += 1
        if chain and not flight.came_back:
            flight.came_back = not flight.tails.isdisjoint(chain)
            flight.tails.add(chain[-1])

    def started(self, run: int, worker: str, blocks: int) -> None:
        """A call of `run` runs on `worker`, where it writes `blocks`."""
        flight = self._runs.get(run)
        if flight is None:
            return
        written = flight.written.get(worker)
        if written is None:
            flight.written[worker] = _Written(blocks, blocks)
            self._on.setdefault(worker, {})[run] = flight
            self.habits(flight.group).began(blocks)
        else:
            written.total += blocks
        self._committed.clear()

    def left(self, run: int, now: float, *, last: bool = False) -> None:
        """A call of `run` no longer waits or runs; `last`: nothing follows it."""
        flight = self._runs.get(run)
        if flight is None:
            return
        flight.calls = max(0, flight.calls - 1)
        if flight.calls:
            return
        if last:
            self._end(run)
            return
        flight.idle_since = now
        flight.until = now + self.habits(flight.group).patience_s
        heapq.heappush(self._ends, (flight.until, run))

    def expire(self, now: float) -> None:
        """Runs whose next call has not come have ended."""
        while (end := self.next_end()) is not None and end <= now:
            self._end(heapq.heappop(self._ends)[1])

    def next_end(self) -> float | None:
        """When the next run counts as ended."""
        while self._ends:
            until, run = self._ends[0]
            flight = self._runs.get(run)
            if flight is not None and not flight.calls and flight.until == until:
                return until
            heapq.heappop(self._ends)
        return None

    def gone(self, worker: str) -> None:
        """`worker` was lost, or its cache."""
        for flight in self._on.pop(worker, {}).values():
            del flight.written[worker]
        self._committed.clear()

    def _end(self, run: int) -> None:
        flight = self._runs.pop(run)
        habits = self.habits(flight.group)
        for worker, written in flight.written.items():
            habits.over(written.total, came_back=flight.came_back)
            del self._on[worker][run]
            self._committed.clear()
        self.ended += 1
