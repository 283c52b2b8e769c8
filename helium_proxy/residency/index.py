"""What each worker's prefix cache holds, mirrored block by block.

A prompt is a *chain*: one 64-bit hash per full KV block, each covering everything before it, so that a block's hash
names a whole prefix. The mirror follows vLLM's block pool: blocks of running calls are referenced and cannot go;
a finished call's blocks become free, tail first, and are evicted least recently used first when others need room;
blocks count as resident from the moment a call is admitted, since vLLM shares a prefix that is still being
prefilled. A chain's residency is therefore always a prefix of it, which makes a look-up a bisection.

What the mirror cannot see (other clients of the worker, a restart) shows as a difference between predicted and
actual cached tokens; `correct` repairs it, `clear` starts anew.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Chain = Sequence[int]


@dataclass(frozen=True, slots=True)
class ResidencyStatistics:
    """Counts of blocks: `referenced` by running calls, `anonymous` of those (outputs and tails, which have no
    shareable identity), `free` but resident, `pinned`, and `capacity`."""

    referenced: int
    anonymous: int
    free: int
    pinned: int
    capacity: int


class WorkerResidency:
    """The mirror of one worker's prefix cache. Memory is O(capacity): beyond it blocks are evicted."""

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError("capacity must be at least one block")
        self.capacity = capacity
        # -- state
        self._refs: dict[int, int] = {}  # block → running calls (and pins) that hold it
        self._free: OrderedDict[int, None] = OrderedDict()  # resident, held by nobody, least recent first
        self._held: dict[str, tuple[Chain, int]] = {}  # call → its chain, and its anonymous blocks
        self._anonymous = 0  # sum of the latter
        self._pins: dict[str, Chain] = {}  # pin's name → its blocks
        self._ghosts: OrderedDict[int, None] = OrderedDict()  # evicted, at most `capacity` of them, oldest first

    def __repr__(self) -> str:
        return (
            f"<WorkerResidency {len(self._refs)}+{self._anonymous} held, {len(self._free)} free of {self.capacity}>"
        )

    def statistics(self) -> ResidencyStatistics:
        pinned = len({b for chain in self._pins.values() for b in chain})
        return ResidencyStatistics(len(self._refs), self._anonymous, len(self._free), pinned, self.capacity)

    @property
    def used(self) -> int:
        """Blocks that cannot be evicted now."""
        return len(self._refs) + self._anonymous

    @property
    def resident(self) -> int:
        """Blocks with a shareable identity."""
        return len(self._refs) + len(self._free)

    def match(self, chain: Chain) -> int:
        """How many leading blocks of `chain` are resident. O(log len(chain))."""
        refs, free = self._refs, self._free
        low, high = 0, len(chain)
        if not high or not (chain[0] in refs or chain[0] in free):
            return 0
        while low < high:
            middle = (low + high) >> 1
            block = chain[middle]
            if block in refs or block in free:
                low = middle + 1
            else:
                high = middle
        return low

    def match_held(self, chain: Chain) -> int:
        """How many leading blocks of `chain` are held by running calls (so cost no further room)."""
        refs = self._refs
        low, high = 0, len(chain)
        while low < high:
            middle = (low + high) >> 1
            if chain[middle] in refs:
                low = middle + 1
            else:
                high = middle
        return low

    def evicted(self, chain: Chain) -> int:
        """Blocks of `chain` that were resident not long ago and are not now."""
        ghosts = self._ghosts
        return sum(block in ghosts for block in chain[self.match(chain) :])

    def admit(self, call: str, chain: Chain, anonymous: int) -> int:
        """A call begins: holds its chain and `anonymous` further blocks, evicting what is in the way. Returns the
        blocks that were already resident."""
        hit = self.match(chain)
        self._hold(chain)
        self._held[call] = (chain, anonymous)
        self._anonymous += anonymous
        self._evict()
        return hit

    def finish(self, call: str, extension: Chain = ()) -> None:
        """A call ended: its blocks become evictable. `extension` is the rest of its chain through its output, which
        stays cached as well. Unknown calls are ignored (the worker was cleared meanwhile)."""
        held = self._held.pop(call, None)
        if held is None:
            return
        chain, anonymous = held
        self._anonymous -= anonymous
        free, refs = self._free, self._refs
        for block in reversed(extension):
            if block not in refs:
                free[block] = None
                free.move_to_end(block)
        self._release(chain)
        self._evict()

    def pin(self, name: str, chain: Chain) -> None:
        """Holds `chain` under `name` until `unpin`; a name used again replaces its pin."""
        self._hold(chain)
        previous = self._pins.get(name)
        self._pins[name] = chain
        if previous is not None:
            self._release(previous)
        self._evict()

    def unpin(self, name: str) -> None:
        chain = self._pins.pop(name, None)
        if chain is not None:
            self._release(chain)
            self._evict()

    def pins(self) -> dict[str, int]:
        """Blocks by pin."""
        return {name: len(chain) for name, chain in self._pins.items()}

    def correct(self, chain: Chain, actual: int) -> None:
        """The worker had only `actual` leading blocks of `chain`: the rest was not there after all. Blocks that
        running calls hold are left (they are there now)."""
        for block in chain[actual:]:
            self._free.pop(block, None)

    def store(self, blocks: Iterable[int]) -> None:
        """Blocks reported as cached (KV events), least recent first."""
        for block in blocks:
            if block not in self._refs:
                self._free[block] = None
                self._free.move_to_end(block)
        self._evict()

    def drop(self, blocks: Iterable[int]) -> None:
        """Blocks reported as removed (KV events)."""
        for block in blocks:
            self._free.pop(block, None)

    def clear(self) -> None:
        """The engine lost its cache; calls in flight there are lost with it."""
        self._refs.clear()
        self._free.clear()
        self._held.clear()
        self._pins.clear()
        self._ghosts.clear()
        self._anonymous = 0

    def resize(self, capacity: int) -> None:
        self.capacity = max(1, capacity)
        self._evict()

    # -- the pool's mechanics

    def _hold(self, chain: Chain) -> None:
        refs, free, ghosts = self._refs, self._free, self._ghosts
        for block in chain:
            count = refs.get(block)
            if count is None:
                free.pop(block, None)
                ghosts.pop(block, None)
                refs[block] = 1
            else:
                refs[block] = count + 1

    def _release(self, chain: Chain) -> None:
        refs, free = self._refs, self._free
        for block in reversed(chain):
            count = refs.get(block, 0)
            if count > 1:
                refs[block] = count - 1
            elif count == 1:
                del refs[block]
                free[block] = None  # at the recent end, tail before head

    def _evict(self) -> None:
        free, ghosts = self._free, self._ghosts
        over = len(self._refs) + self._anonymous + len(free) - self.capacity
        while over > 0 and free:
            block, _ = free.popitem(last=False)
            ghosts[block] = None
            over -= 1
        while len(ghosts) > self.capacity:
            ghosts.popitem(last=False)
