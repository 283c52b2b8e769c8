"""Runs in flight, and how many a worker can have before they push each other's prefixes out.

Agents come back to what they left in the KV cache, after others have used it. If more runs are in flight than the
cache holds, each finds its prefix gone and computes it again. This is thrashing, known from virtual memory, and so is
the cure: a program begins only if its working set fits beside those of the others (Denning, "The working set model
for program behavior", 1968). Engines evict what was used least recently, dead or not, so that a run's working set is
all that it writes from its first call to its last.

How much that is, is learned for each workflow from runs that have ended; of one that has not been seen yet, a run is
taken to write a multiple of what its first call does. A run has ended when the template says so, or when its next
call has not come in the time in which nearly all of that workflow's do.

Whether it pays to wait is another question, since a smaller batch costs time, too (`WorkerState.full_batch`). It
depends on how often calls of the workflow come back to what is gone. While that hardly happens, more may begin, as
with the page fault frequency (Chu and Opderbeck, 1972): what runs write is an upper bound of what they come back to.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from dataclasses import dataclass, field

from helium_proxy.dispatch.patience import Patience
from helium_proxy.residency.index import Chain

Group = tuple[str, str, str]
"""(tenant, model, workflow)."""
RunKey = tuple[int, int | None]
"""(the run's number, the input's where the run is a whole submitted plan); a number of 0: of no run."""

_GROUPS = 10_000
_RUNS = 20_000
_TAILS = 256
"""So many calls of a run are remembered for others to come back to."""
_GROWTH = 3.0
"""What a run writes after its first call, in multiples of what that writes, as long as nothing is known."""
_FIRST_GAP_S = 0.1
_LEAST_S = 0.05
_LONGEST_S = 10.0
"""Who lets more time pass between calls does not count as in flight meanwhile."""
_JUDGED = 4.0
"""Patiences, after which a run that has not gone on counts as ended."""
_SMOOTH = 0.1
_ENOUGH = 4
"""Ended runs, after which they are believed."""
_CAME_BACK = 0.5
"""The share of calls that come back, as long as nothing is known."""
_LOST = 1.0
"""The share of these that would find it gone, if more runs began."""
_LOST_SMOOTH = 0.02
"""Slow: that too many have begun is noticed only when they come back."""
_RECOUNTED = 32
"""Calls on a worker, after which the working sets of its runs are added up anew. O(runs)."""


@dataclass(slots=True)
class Habits:
    """What runs of one workflow do. Blocks and seconds."""

    first: float = 0.0
    """The least that a run's first call on a worker has written; 0 until a second one tells what both share."""
    begun: int = 0
    ended: int = 0
    written: float = 0.0
    """Mean of the ended runs on a worker."""
    came_back: float = _CAME_BACK
    """The share of their calls that came back to what the run had written."""
    lost: float = _LOST
    """The share of these that found it gone, lately."""
    pause: Patience = field(default_factory=lambda: Patience(_FIRST_GAP_S, _FIRST_GAP_S))
    """From a run's last answer to its next call."""

    @property
    def patience_s(self) -> float:
        """Within this time the next call has come if any will."""
        return min(_LONGEST_S, max(_LEAST_S, self.pause.seconds))

    @property
    def losing(self) -> float:
        """The share of all calls that come back to what is gone."""
        return self.came_back * self.lost

    def returned(self, *, gone: bool) -> None:
        self.lost += _LOST_SMOOTH * (gone - self.lost)

    def paused(self, gap_s: float) -> None:
        self.pause.came(min(gap_s, _LONGEST_S))

    def began(self, blocks: float) -> bool:
        """Whether this changes what is expected of all runs."""
        self.begun += 1
        if self.begun == 1 or 0 < self.first <= blocks:
            return False
        self.first = blocks
        return not self.known

    def over(self, written: float, came_back: float) -> bool:
        """Whether this changes what is expected of all runs by more than a little."""
        self.ended += 1
        share = max(_SMOOTH, 1 / self.ended)
        self.written += share * (written - self.written)
        self.came_back += share * (came_back - self.came_back)
        return _ENOUGH <= self.ended < 1 / _SMOOTH

    @property
    def known(self) -> bool:
        """Whether the working set is that of the runs that have ended, however much a first call writes."""
        return self.ended >= _ENOUGH

    def working_set(self, first: float) -> float:
        """What a run will have written on a worker at its end whose first call there writes `first`."""
        return self.written if self.known else first + _GROWTH * min(self.first, first)


@dataclass(slots=True)
class _Written:
    """What a run has written on one worker, in blocks."""

    first: float
    total: float
    counted: float = 0.0
    """What the worker's `committed` counts of it."""

    def count(self, habits: Habits) -> float:
        self.counted = max(self.total, habits.working_set(self.first))
        return self.counted


@dataclass(slots=True, eq=False)
class _Flight:
    """A run in flight, or one that pauses for long and has not been judged yet."""

    group: Group
    habits: Habits
    calls: int = 0
    """Waiting or running."""
    idle_since: float = 0.0
    until: float = 0.0
    """When it counts as pausing, and then as ended, if it stays idle."""
    pauses: bool = False
    started: int = 0
    came_back: int = 0
    """Calls so far, and those of them that extend another."""
    tails: dict[int, str] = field(default_factory=dict)
    """Last blocks of their prompts, and the workers that ran them."""
    written: dict[str, _Written] = field(default_factory=dict)
    """By worker."""


@dataclass(slots=True)
class _Here:
    """One worker's."""

    runs: dict[RunKey, _Flight] = field(default_factory=dict)
    """Those in flight."""
    groups: Counter[Group] = field(default_factory=Counter)
    """How many of each."""
    gone: int = 0
    """Runs that no longer are, so far."""
    calls: int = 0
    committed: float | None = None
    """Sum of their working sets, each as it was known when the run last went on, or later; None: to be added up."""
    estimates: int = 0
    """Of `Flights`, when it was added up."""

    def went_on(self, run: RunKey, flight: _Flight, worker: str) -> None:
        written = flight.written[worker]
        if run not in self.runs:
            self.runs[run] = flight
            self.groups[flight.group] += 1
            written.counted = 0.0
        self.calls += 1
        if self.calls % _RECOUNTED == 0:
            self.committed = None
        elif self.committed is not None:
            self.committed -= written.counted
            self.committed += written.count(flight.habits)

    def landed(self, run: RunKey, worker: str) -> None:
        flight = self.runs.pop(run, None)
        if flight is None:
            return
        self.gone += 1
        self.groups[flight.group] -= 1
        if not self.groups[flight.group]:
            del self.groups[flight.group]
        if self.committed is not None:
            self.committed = self.committed - flight.written[worker].counted if self.runs else 0.0

    def add_up(self, worker: str, estimates: int) -> float:
        if self.committed is None or self.estimates != estimates:
            self.estimates = estimates
            self.committed = sum(flight.written[worker].count(flight.habits) for flight in self.runs.values())
        return self.committed


class Flights:
    """The runs in flight on all workers. Bounded: the oldest are forgotten."""

    def __init__(self) -> None:
        # -- state
        self._habits: OrderedDict[Group, Habits] = OrderedDict()
        self._runs: OrderedDict[RunKey, _Flight] = OrderedDict()
        self._over: OrderedDict[RunKey, float] = OrderedDict()  # ended runs → since when they were idle
        self._ends: list[tuple[float, RunKey]] = []  # heap of (until, run) of idle ones
        self._here: dict[str, _Here] = {}
        self._estimates = 0  # changes with what is expected of runs

    def __repr__(self) -> str:
        return f"<Flights {len(self._runs)} runs>"

    def habits(self, group: Group) -> Habits:
        habits = self._habits.get(group)
        if habits is None:
            habits = self._habits[group] = Habits()
            while len(self._habits) > _GROUPS:
                self._habits.popitem(last=False)
        return habits

    def gone_from(self, worker: str) -> int:
        """Runs that are no longer in flight on `worker`, so far: if it is the same, so is what `fits`."""
        here = self._here.get(worker)
        return here.gone if here is not None else 0

    def committed(self, worker: str) -> float:
        """Blocks of `worker` that the runs in flight there need, written or not yet."""
        here = self._here.get(worker)
        return here.add_up(worker, self._estimates) if here is not None else 0.0

    def has_begun(self, run: RunKey, worker: str) -> bool:
        """Whether `run` has written something on `worker`; of a call of no run, always."""
        flight = self._runs.get(run)
        return not run[0] or (flight is not None and worker in flight.written)

    def fits(self, group: Group, worker: str, blocks: int, capacity: int) -> bool:
        """Whether a run whose first call writes `blocks` may begin on a worker of `capacity` blocks without driving
        others out: it is the only one of its workflow there, or it fits."""
        here = self._here.get(worker)
        if here is None or group not in here.groups:
            return True
        return here.add_up(worker, self._estimates) + self.habits(group).working_set(blocks) <= capacity

    def arrived(self, run: RunKey, group: Group, now: float) -> None:
        """A call of `run` waits."""
        if not run[0]:
            return
        self.expire(now)
        habits = self.habits(group)
        self._habits.move_to_end(group)
        flight = self._runs.get(run)
        if flight is None:
            if (idle_since := self._over.pop(run, None)) is not None:
                habits.paused(now - idle_since)
            flight = self._runs[run] = _Flight(group, habits)
            while len(self._runs) > _RUNS:
                self._end(next(iter(self._runs)))
        elif not flight.calls:
            habits.paused(now - flight.idle_since)
        flight.calls += 1
        flight.pauses = False

    def started(self, run: RunKey, worker: str, chain: Chain, resident: int, blocks: int) -> None:
        """A call of `run` runs on `worker`, where the first `resident` blocks of its prompt are cached and it writes
        `blocks`."""
        flight = self._runs.get(run)
        if flight is None:
            return
        flight.started += 1
        earlier = chain[:-1]  # (an equal prompt is a retry)
        if not flight.tails.keys().isdisjoint(earlier):
            flight.came_back += 1
            depth = next(i for i in range(len(earlier), 0, -1) if earlier[i - 1] in flight.tails)
            if flight.tails[earlier[depth - 1]] == worker:
                flight.habits.returned(gone=resident < depth)
        if chain and len(flight.tails) < _TAILS:
            flight.tails[chain[-1]] = worker
        written = flight.written.get(worker)
        if written is None:
            flight.written[worker] = _Written(blocks, blocks)
            self._estimates += flight.habits.began(blocks)
        else:
            written.total += blocks
        self._here.setdefault(worker, _Here()).went_on(run, flight, worker)

    def left(self, run: RunKey, now: float, *, last: bool = False) -> None:
        """A call of `run` has ended; `last`: nothing follows it."""
        flight = self._runs.get(run)
        if flight is None:
            return
        flight.calls = max(0, flight.calls - 1)
        if flight.calls:
            return
        flight.idle_since = now
        if last:
            self._end(run)
        else:
            self._idle_until(run, flight, now + flight.habits.patience_s)

    def withdrawn(self, run: RunKey) -> None:
        """A call of `run` was given up: a run that has no other teaches nothing."""
        flight = self._runs.get(run)
        if flight is None:
            return
        flight.calls = max(0, flight.calls - 1)
        if not flight.calls:
            del self._runs[run]
            self._land(run, flight)

    def expire(self, now: float) -> None:
        """Runs whose next call has not come pause, and have ended after some time more."""
        while (end := self.next_end()) is not None and end <= now:
            _, run = heapq.heappop(self._ends)
            flight = self._runs[run]
            if flight.pauses:
                self._end(run)
                continue
            flight.pauses = True
            self._land(run, flight)
            patience_s = flight.habits.patience_s
            self._idle_until(run, flight, max(end, flight.idle_since + min(_LONGEST_S, _JUDGED * patience_s)))

    def next_end(self) -> float | None:
        """When the next run may no longer be in flight."""
        while self._ends:
            until, run = self._ends[0]
            flight = self._runs.get(run)
            if flight is not None and not flight.calls and flight.until == until:
                return until
            heapq.heappop(self._ends)
        return None

    def gone(self, worker: str) -> None:
        """`worker` was lost, or its cache."""
        here = self._here.pop(worker, None)
        if here is not None:
            for flight in self._runs.values():
                flight.written.pop(worker, None)

    def _idle_until(self, run: RunKey, flight: _Flight, until: float) -> None:
        flight.until = until
        heapq.heappush(self._ends, (until, run))

    def _end(self, run: RunKey) -> None:
        flight = self._runs.pop(run)
        for written in flight.written.values():
            self._estimates += flight.habits.over(written.total, flight.came_back / flight.started)
        self._land(run, flight)
        self._over[run] = flight.idle_since
        while len(self._over) > _RUNS:
            self._over.popitem(last=False)

    def _land(self, run: RunKey, flight: _Flight) -> None:
        for worker in flight.written:
            self._here[worker].landed(run, worker)
