"""Which finished calls come back, how soon, and whether it pays to keep their place.

An agent's next call usually extends its last one: the prompt, the reply, something new. It arrives milliseconds after
the reply, and in these milliseconds a worker under pressure would give the room to somebody else, whose blocks push
out the very prefix that comes back. So the room is kept for a while where that pays. The rule is that of the
five-minute rule (Gray and Putzolu, 1987), for a KV cache instead of memory pages: keeping ``b`` of ``M`` blocks for
``t`` seconds costs ``b / M * t`` engine seconds, losing them costs their prefill with the probability that they come
back, and so a prefix is kept exactly if ::

    t < probability * seconds to prefill a whole KV cache

Probability and time are learned for each node of a workflow, from all its calls, kept or not; a call comes back if
another's prompt contains every full block of its own.

Engines evict what was used least recently, so what is left after a kept prefix is evicted after it: to give that room
away would cost the kept prefix. Whatever ends while a place is kept is therefore kept as long as that, as far as it
pays: ``B`` blocks in all, kept for ``b`` of them, while ::

    B * mean seconds until they are needed or given up < b * probability * seconds to prefill a whole KV cache
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from dataclasses import dataclass, field

from helium_proxy.dispatch.patience import Patience
from helium_proxy.residency.index import Chain

Key = tuple[str, str]
"""(workflow, node)."""

_KEYS = 10_000
_AWAITED = 20_000
_LONGEST_S = 60.0
"""Whatever comes back later counts as not coming back."""
_FIRST_PROBABILITY, _FIRST_S = 0.5, 0.02
_FIRST_PATIENCE = 0.3
"""As a share of the time for which keeping a place pays: of a node whose calls have not come back yet, some may."""
_SMOOTH = 0.1
_LEAST_S = 0.02
_LEAST_MEAN_S = 0.001


@dataclass(slots=True)
class Habit:
    """How calls of one node come back: the share that does, and when."""

    probability: float = _FIRST_PROBABILITY
    after: Patience = field(default_factory=lambda: Patience(_FIRST_S, _FIRST_S))
    seen: bool = False
    """Whether any has come back."""
    kept: int = 0
    """Places kept at this moment."""
    trust: int = 4
    """The most that may be kept at a time: one more for each that comes back, half for each kept in vain (none soon,
    where none has come back yet). Else a whole wave of calls would be waited for before the first of them has shown
    whether it comes."""

    @property
    def patience_s(self) -> float:
        """Within this time nearly all have come back that will."""
        return max(_LEAST_S, self.after.seconds)

    def came(self, after_s: float) -> None:
        self.seen = True
        self.probability += _SMOOTH * (1 - self.probability)
        self.after.came(after_s)
        self.trust = min(_AWAITED, self.trust + 1)

    def stayed_away(self) -> None:
        self.probability -= _SMOOTH * self.probability


@dataclass(slots=True, eq=False)
class Place:
    """What is kept for one call that may come back."""

    key: Key
    worker: str
    since: float
    blocks: int = 0
    """KV blocks that nobody else may take meanwhile."""
    pays_for: float = 0.0
    """Blocks, its own among them, that it pays to keep for it; 0: it is not kept for its own sake."""
    until: float = 0.0
    """Until when they are kept, if it has not come back by then."""
    judged: float = 0.0
    """When it counts as not come back."""


@dataclass(slots=True)
class _Kept:
    """What one worker keeps."""

    blocks: int = 0
    pays: float = 0.0
    """Blocks that it pays to keep."""
    places: int = 0
    """Kept for their own sake."""
    until: float = 0.0
    """The latest end of one of them."""
    others: dict[int, Place] = field(default_factory=dict)
    """What has ended since, by last block."""


class Returns:
    """Finished calls whose next one is awaited. Bounded: the oldest are given up."""

    def __init__(self) -> None:
        # -- state
        self._habits: OrderedDict[Key, Habit] = OrderedDict()
        self._awaited: OrderedDict[int, Place] = OrderedDict()  # last block of a finished prompt → its place
        self._ends: list[tuple[float, int]] = []  # heap of (when the place is given up, block)
        self._judged: list[tuple[float, int]] = []  # heap of (when it counts as not come back, block)
        self._kept: dict[str, _Kept] = {}  # by worker, while there is a place

    def __repr__(self) -> str:
        return f"<Returns {len(self._awaited)} awaited, {sum(k.blocks for k in self._kept.values())} blocks kept>"

    def kept(self, worker: str) -> int:
        """Blocks of `worker` that are kept for calls that may come back."""
        here = self._kept.get(worker)
        return here.blocks if here is not None else 0

    def habit(self, key: Key) -> Habit:
        habit = self._habits.get(key)
        if habit is None:
            habit = self._habits[key] = Habit()
            while len(self._habits) > _KEYS:
                self._habits.popitem(last=False)
        return habit

    def finished(self, key: Key, chain: Chain, worker: str, blocks: int, whole_s: float, now: float) -> None:
        """A call of `key` ended on `worker`, leaving `blocks` that nobody else holds. `whole_s`: seconds to prefill
        as many tokens as the worker's KV cache has."""
        if not chain or not blocks:
            return
        self._forget(chain[-1])
        habit = self.habit(key)
        window = min(_LONGEST_S, whole_s)
        worth_s = habit.probability * window
        here = self._kept.get(worker)
        place = self._awaited[chain[-1]] = Place(key, worker, now, judged=now + window)
        if habit.kept < habit.trust and habit.after.mean_s < worth_s:
            habit.kept += 1
            wait_s = min(window, habit.patience_s) if habit.seen else _FIRST_PATIENCE * worth_s
            mean_s = max(_LEAST_MEAN_S, habit.probability * habit.after.mean_s + (1 - habit.probability) * wait_s)
            place.blocks, place.until, place.pays_for = blocks, now + wait_s, blocks * worth_s / mean_s
            if here is None:
                here = self._kept[worker] = _Kept()
            here.blocks += blocks
            here.places += 1
            here.pays += place.pays_for
            here.until = max(here.until, place.until)
        elif here is not None and here.until > now and here.blocks + blocks <= here.pays:
            place.blocks, place.until = blocks, here.until
            here.blocks += blocks
            here.others[chain[-1]] = place
        if place.blocks:
            heapq.heappush(self._ends, (place.until, chain[-1]))
        heapq.heappush(self._judged, (place.judged, chain[-1]))
        while len(self._awaited) > _AWAITED:
            self._forget(next(iter(self._awaited)))

    def arrived(self, chain: Chain, now: float) -> str | None:
        """A call with this prompt has come: if it extends a finished one, that has come back, and needs no place any
        more, since it is first in line now. Returns the worker that it comes back to."""
        if self._awaited:
            for block in reversed(chain):
                place = self._awaited.get(block)
                if place is not None:
                    self.habit(place.key).came(now - place.since)
                    self._forget(block)
                    return place.worker
        return None

    def expire(self, now: float) -> None:
        """Gives up what was kept long enough, and learns from what has not come back."""
        while self._ends and self._ends[0][0] <= now:
            until, block = heapq.heappop(self._ends)
            place = self._awaited.get(block)
            if place is not None and place.until == until:
                if place.pays_for:
                    habit = self.habit(place.key)
                    habit.trust = max(int(habit.seen), habit.trust // 2)
                self._give_up(block, place)
        while self._judged and self._judged[0][0] <= now:
            judged, block = heapq.heappop(self._judged)
            place = self._awaited.get(block)
            if place is not None and place.judged == judged and place.until <= now:
                self.habit(place.key).stayed_away()
                self._forget(block)

    def next_end(self) -> float | None:
        """When the next place is given up."""
        while self._ends:
            until, block = self._ends[0]
            place = self._awaited.get(block)
            if place is not None and place.until == until and place.blocks:
                return until
            heapq.heappop(self._ends)
        return None

    def gone(self, worker: str) -> None:
        """`worker` was lost, or its cache."""
        for block in [b for b, place in self._awaited.items() if place.worker == worker]:
            self._forget(block)

    def _forget(self, block: int) -> None:
        place = self._awaited.pop(block, None)
        if place is not None:
            self._give_up(block, place)

    def _give_up(self, block: int, place: Place) -> None:
        if not place.blocks:
            return
        here = self._kept[place.worker]
        here.blocks -= place.blocks
        place.blocks = 0
        if not place.pays_for:
            del here.others[block]
            return
        habit = self.habit(place.key)
        habit.kept = max(0, habit.kept - 1)
        here.places -= 1
        here.pays -= place.pays_for
        if not here.places:  # nor is there any use now for what has ended since
            for other in here.others.values():
                other.blocks = 0
            del self._kept[place.worker]
