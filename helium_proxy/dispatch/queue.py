"""Waiting calls of one model: those not placed yet, and a lane for each worker.

A call is placed when it arrives, into the lane of the worker where it would be done cheapest. It is not bound to it:
a worker that has room and an empty lane takes over from the longest lane. Lanes make a decision cheap (only the lane
of the worker that has room is looked at) and let a worker choose among all that waits for it, so that calls that
share a prefix run side by side there.

Tenants take turns, and each tenant's workflows within its turn, by the work that they have been given; inside a
workflow calls go by rank. Fair shares protect a small workflow beside a large one, and leave the order within one
free. (Workflows that nobody has named take turns as one: `Arrival.share`. So do those of a tenant beyond the first
`_TURNS` that wait, since clients choose their names, and a decision looks at every turn.)
"""

from __future__ import annotations

import bisect
import itertools
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from functools import lru_cache

from helium_proxy.dispatch.calls import QueuedCall, Rank
from helium_proxy.residency.index import Chain, Holders
from helium_proxy.types import UNNAMED

GroupKey = tuple[str, str]
"""(tenant, workflow): a call's `turns`."""

_GROUPS_REMEMBERED = 10_000
_TURNS = 256
"""Workflows of one tenant that take turns of their own."""
_stamps = itertools.count()  # of all lanes: one that is opened again is another


@lru_cache(4096)
def depths(length: int) -> tuple[int, ...]:
    """1, 2, … 16, 18, 20, … (an eighth more each time) below `length`, and `length`: where chains are compared."""
    found, depth = [], 1
    while depth < length:
        found.append(depth)
        depth += max(1, depth // 8)
    return (*found, length) if length else ()


class Lane:
    """Calls that wait for one worker, whose bit in `holders` is `bit`."""

    def __init__(self, holders: Holders, bit: int) -> None:
        self._holders = holders
        self._bit = bit
        # -- state
        self.groups: dict[GroupKey, list[tuple[Rank, QueuedCall]]] = {}  # never empty lists, sorted by rank
        self.work = 0.0  # sum of the calls' `lane_work`
        self._marks: dict[int, int] = {}  # block at one of `depths` of a waiting chain → chains that have it
        self._length = 0
        self.stamp = next(_stamps)  # another one whenever other calls wait here
        self.blocked: object = None  # the state of worker and lane in which the next call found no room

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        return f"<Lane {self._length} calls, {self.work:.0f} tokens>"

    def __iter__(self) -> Iterator[QueuedCall]:
        for waiting in self.groups.values():
            for _, call in waiting:
                yield call

    def push(self, call: QueuedCall) -> None:
        bisect.insort(self.groups.setdefault(call.turns, []), (call.rank, call))
        self._length += 1
        self.stamp = next(_stamps)
        self.work += call.lane_work
        new, marks = [], self._marks
        for depth in depths(len(call.chain)):
            block = call.chain[depth - 1]
            count = marks.get(block, 0)
            marks[block] = count + 1
            if not count:
                new.append(block)
        self._holders.add(self._bit, new)

    def remove(self, call: QueuedCall) -> None:
        key = call.turns
        waiting = self.groups[key]
        del waiting[bisect.bisect_left(waiting, (call.rank,))]
        if not waiting:
            del self.groups[key]
        self._length -= 1
        self.stamp = next(_stamps)
        self.work = max(0.0, self.work - call.lane_work) if self._length else 0.0
        gone, marks = [], self._marks
        for depth in depths(len(call.chain)):
            block = call.chain[depth - 1]
            count = marks[block] - 1
            if count:
                marks[block] = count
            else:
                del marks[block]
                gone.append(block)
        self._holders.drop(self._bit, gone)

    def close(self) -> None:
        """The lane is no longer used."""
        self._holders.drop(self._bit, self._marks)


class Queue:
    """Everything that waits for one model."""

    def __init__(self) -> None:
        # -- state
        self.unplaced: dict[str, QueuedCall] = {}
        self.lanes: dict[str, Lane] = {}  # by worker
        self._holders = Holders()  # which lanes have calls with a block
        self._waiting: Counter[str | GroupKey] = Counter()  # tenant or group → its calls waiting
        self._turns: Counter[str] = Counter()  # tenant → its groups that have calls waiting
        self._served: OrderedDict[str | GroupKey, float] = OrderedDict()  # the same → work given
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        return f"<Queue {self._length} calls, {len(self.unplaced)} not placed>"

    def __iter__(self) -> Iterator[QueuedCall]:
        yield from self.unplaced.values()
        for lane in self.lanes.values():
            yield from lane

    def work(self, worker: str) -> float:
        """What waits for `worker`: prompt tokens' worth of work."""
        lane = self.lanes.get(worker)
        return lane.work if lane is not None else 0.0

    def shared(self, chain: Chain, workers: int) -> list[tuple[int, int]]:
        """How many leading blocks of `chain` some call that waits for a worker has, too: (blocks, mask of workers),
        every one of `workers`, a mask, in one of the masks. An eighth too few at most."""
        places = depths(len(chain))
        marks = [chain[place - 1] for place in places]
        return [(places[count - 1] if count else 0, lanes) for count, lanes in self._holders.match(marks, workers)]

    def push(self, call: QueuedCall) -> None:
        if not self._waiting[call.turns] and self._turns[call.tenant] >= _TURNS:
            call.turns = call.tenant, UNNAMED
        for who in (call.tenant, call.turns):
            if not self._waiting[who]:
                self._enter(who)
            self._waiting[who] += 1
        self.unplaced[call.id] = call
        self._length += 1

    def _enter(self, who: str | GroupKey) -> None:
        """Whoever comes (back) starts level with the least served of those waiting: no credit is saved up."""
        others: Iterable[str | GroupKey]
        if isinstance(who, str):
            others = [o for o in self._waiting if isinstance(o, str)]
        else:
            self._turns[who[0]] += 1
            others = [o for o in self._waiting if not isinstance(o, str) and o[0] == who[0]]
        floor = min((self._served.get(o, 0.0) for o in others if o != who), default=0.0)
        self._served[who] = max(self._served.get(who, 0.0), floor)
        self._served.move_to_end(who)
        while len(self._served) > _GROUPS_REMEMBERED:
            self._served.popitem(last=False)

    def remove(self, call: QueuedCall) -> bool:
        """False when it does not wait here."""
        if call.lane is None:
            if self.unplaced.pop(call.id, None) is None:
                return False
        else:
            self.lanes[call.lane].remove(call)
            call.lane = None
        for who in (call.tenant, call.turns):
            self._waiting[who] -= 1
            if not self._waiting[who]:
                del self._waiting[who]
                if not isinstance(who, str):
                    self._turns[who[0]] -= 1
        if call.tenant not in self._waiting:
            del self._turns[call.tenant]
        self._length -= 1
        return True

    def place(self, call: QueuedCall, worker: str, bit: int) -> None:
        """Into the lane of `worker`, from wherever it waits. `bit`: the worker's in the masks of `shared`."""
        if call.lane is None:
            del self.unplaced[call.id]
        else:
            self.lanes[call.lane].remove(call)
        call.lane = worker
        lane = self.lanes.get(worker)
        if lane is None:
            lane = self.lanes[worker] = Lane(self._holders, bit)
        lane.push(call)

    def close(self, worker: str) -> None:
        """`worker` takes no calls: those in its lane are to be placed anew."""
        lane = self.lanes.pop(worker, None)
        if lane is not None:
            lane.close()
            for call in lane:
                call.lane = None
                self.unplaced[call.id] = call

    def charge(self, call: QueuedCall, work: float) -> None:
        """`call` was given so much work."""
        for who in (call.tenant, call.turns):
            self._served[who] = self._served.get(who, 0.0) + work

    def turn(self, lane: Lane) -> list[tuple[Rank, QueuedCall]]:
        """The calls of the workflow whose turn it is in a lane that is not empty, by rank. A client's priority goes
        before any turn."""
        groups = lane.groups
        if len(groups) == 1:
            return next(iter(groups.values()))
        return groups[min(groups, key=lambda key: self._place(lane, key))]

    def in_turn(self, lane: Lane) -> list[list[tuple[Rank, QueuedCall]]]:
        """The calls of all its workflows, in the order in which it is their turn."""
        return [lane.groups[key] for key in sorted(lane.groups, key=lambda key: self._place(lane, key))]

    def _place(self, lane: Lane, key: GroupKey) -> tuple[int, float, float, GroupKey]:
        return lane.groups[key][0][0][0], self._served.get(key[0], 0.0), self._served.get(key, 0.0), key
