"""How many KV blocks the running calls will hold at the most, from now until they are all done.

Reserving every call's whole output would leave a fifth of the KV unused, since calls are at different places in
their outputs; reserving nothing makes the engine preempt. So the future is looked at: each running call gains a token
a step until it ends, and gives everything back then, so the peak is at the end of one of them (the "past-future"
scheduler of LightLLM, arXiv 2507.10150, with lengths and step times as predicted here).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from itertools import accumulate, chain, count
from operator import add, mul, sub


class KvForecast:
    """Blocks that running calls hold beyond their prompts' full blocks: outputs and prompts' tails."""

    def __init__(self) -> None:
        # -- state: of each call, by its end
        self._ends: list[float] = []  # expected, sorted
        self._calls: list[str] = []
        self._blocks: list[float] = []  # that it holds then
        self._end_of: dict[str, float] = {}
        self.reserved = 0.0  # sum of the blocks at their ends

    def __repr__(self) -> str:
        return f"<KvForecast {len(self._ends)} calls, {self.reserved:.0f} blocks at their ends>"

    def add(self, call: str, end: float, blocks: float) -> None:
        at = bisect_right(self._ends, end)
        self._ends.insert(at, end)
        self._calls.insert(at, call)
        self._blocks.insert(at, blocks)
        self._end_of[call] = end
        self.reserved += blocks

    def remove(self, call: str) -> None:
        end = self._end_of.pop(call, None)
        if end is None:
            return
        at = self._calls.index(call, bisect_left(self._ends, end))
        del self._ends[at], self._calls[at]
        self.reserved -= self._blocks.pop(at)

    def peak(self, now: float, growth: float, blocks: float, end: float) -> float:
        """The most blocks held at once if a call began now that ends at `end` with `blocks`. `growth`: blocks a
        second that one call gains. O(running calls). A call that is overdue holds all its blocks."""
        # At time t the calls that end at t or later hold sum(blocks - growth * (their end - t)); from the latest end
        # on backwards, `fixed` sums the part without t. (The dispatcher's innermost loop: iterators of C.)
        at, overdue = bisect_left(self._ends, end), bisect_right(self._ends, now)
        ends = [now] * overdue + self._ends[overdue:]
        ends.insert(at, max(end, now))
        held = self._blocks.copy()
        held.insert(at, blocks)
        gained = [growth * ending for ending in reversed(ends)]
        fixed: Iterator[float] = accumulate(map(sub, reversed(held), gained))
        then: Iterator[float] = map(add, fixed, map(mul, gained, count(1)))
        return max(chain((0.0,), then))
