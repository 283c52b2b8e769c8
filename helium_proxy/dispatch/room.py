"""How many KV blocks the running calls will hold at the most, from now until they are all done.

Reserving every call's whole output would leave a fifth of the KV unused, since calls are at different places in
their outputs; reserving nothing makes the engine preempt. So the future is looked at: each running call gains a token
a step until it ends, and gives everything back then, so the peak is at the end of one of them (the "past-future"
scheduler of LightLLM, arXiv 2507.10150, with lengths and step times as predicted here).
"""

from __future__ import annotations

from bisect import bisect_left, insort


class KvForecast:
    """Blocks that running calls hold beyond their prompts' full blocks: outputs and prompts' tails."""

    def __init__(self) -> None:
        # -- state
        self._ends: list[tuple[float, str, float]] = []  # (expected end, call, blocks it holds then), sorted
        self._end_of: dict[str, float] = {}
        self.reserved = 0.0  # sum of the blocks at their ends

    def __repr__(self) -> str:
        return f"<KvForecast {len(self._ends)} calls, {self.reserved:.0f} blocks at their ends>"

    def add(self, call: str, end: float, blocks: float) -> None:
        insort(self._ends, (end, call, blocks))
        self._end_of[call] = end
        self.reserved += blocks

    def remove(self, call: str) -> None:
        end = self._end_of.pop(call, None)
        if end is None:
            return
        at = bisect_left(self._ends, (end, call))
        self.reserved -= self._ends.pop(at)[2]

    def peak(self, now: float, growth: float, blocks: float, end: float) -> float:
        """The most blocks held at once if a call began now that ends at `end` with `blocks`. `growth`: blocks a
        second that one call gains. O(running calls). A call that is overdue holds all its blocks."""
        # At time t the calls that end at t or later hold sum(blocks - growth * (their end - t)); from the latest end
        # on backwards, `fixed` sums the part without t.
        peak = fixed = 0.0
        new = (end, "", blocks)
        at = bisect_left(self._ends, new)
        latest_first = (*reversed(self._ends[at:]), new, *reversed(self._ends[:at]))
        for count, (ending, _, held) in enumerate(latest_first, 1):
            gained = growth * (ending if ending > now else now)
            fixed += held - gained
            then = fixed + gained * count
            if then > peak:  # noqa: PLR1730 - this is the dispatcher's innermost loop
                peak = then
        return peak
