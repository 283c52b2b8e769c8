"""What each worker's prefix cache holds, mirrored block by block.

A prompt is a *chain*: one 64-bit hash per full KV block, each covering everything before it, so that a block's hash
names a whole prefix. The mirror follows vLLM's block pool: blocks of running calls are referenced and cannot go;
a finished call's blocks become free, tail first, and are evicted least recently used first when others need room;
blocks count as resident from the moment a call is admitted, since vLLM shares a prefix that is still being
prefilled. A chain's residency is therefore always a prefix of it, which makes a look-up a bisection.

What the mirror cannot see (other clients of the worker) shows as a difference between predicted and actual cached
tokens, and is gone with the answer, since what was missing has been computed then. A prompt that never was is
forgotten by `correct`; `clear` starts anew after a restart.

Where the worker publishes KV events (`follow`) nothing of this is guessed: what no running call holds is resident
when the engine says so, and evicted when it says so. Chains that are no token ids (text hashes, of routes that cannot
be tokenized here) have no events; they go on being mirrored as above.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from helium_proxy.residency.holders import Chain, Holders

__all__ = ["Chain", "Holders", "ResidencyStatistics", "WorkerResidency"]


_NAMELESS = 1 << 64
"""Blocks are named by 64-bit hashes, and those whose content is not known by numbers from here on."""


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

    def __init__(self, capacity: int, holders: Holders | None = None) -> None:
        if capacity < 1:
            raise ValueError("capacity must be at least one block")
        self.capacity = capacity
        self._holders = Holders() if holders is None else holders
        self.bit = self._holders.enter()
        """This worker's bit there."""
        # -- state
        self._refs: dict[int, int] = {}  # block → running calls (and pins) that hold it
        self._free: OrderedDict[int, None] = OrderedDict()  # resident, held by nobody, least recent first
        self._held: dict[str, tuple[Chain, int, bool]] = {}  # call → chain, anonymous blocks, whether token-exact
        self._anonymous = 0  # sum of the latter
        self._nameless = _NAMELESS  # the next of the blocks whose content is not known
        self._pins: dict[str, Chain] = {}  # pin's name → its blocks
        self._pinned: Counter[int] = Counter()  # block → pins that hold it
        self._pinned_idle = 0  # of these, blocks that no running call holds
        self._told: Collection[int] = ()  # blocks that KV events say are resident, kept by whoever follows those
        self._following = False
        self._due: tuple[list[int], list[int]] = ([], [])  # just left by calls, no event yet; and those before them

    def __repr__(self) -> str:
        return (
            f"<WorkerResidency {len(self._refs)}+{self._anonymous} held, {len(self._free)} free of {self.capacity}>"
        )

    def statistics(self) -> ResidencyStatistics:
        free, told = len(self._free), self._told
        if self._following:
            free = max(0, len(told) - len(self._refs)) + sum(block not in told for block in self._free)
        return ResidencyStatistics(len(self._refs), self._anonymous, free, len(self._pinned), self.capacity)

    @property
    def used(self) -> int:
        """Blocks that running calls hold."""
        return len(self._refs) + self._anonymous

    @property
    def referenced(self) -> int:
        """Blocks of prompts that running calls hold."""
        return len(self._refs)

    @property
    def pinned(self) -> int:
        """Blocks that pins hold, whoever else does."""
        return len(self._pinned)

    def pinned_beside(self, chain: Chain, held: int) -> int:
        """Blocks that pins alone would hold beside a call of `chain`, whose first `held` blocks are held already."""
        if not self._pinned_idle:
            return 0
        pinned, refs = self._pinned, self._refs
        return self._pinned_idle - sum(block in pinned and block not in refs for block in chain[held:])

    def match(self, chain: Chain) -> int:
        """How many leading blocks of `chain` are resident. O(log len(chain))."""
        ((count, _),) = self._holders.match(chain, self.bit)
        return count

    def matches(self, chain: Chain, resident: int | None = None) -> tuple[int, int]:
        """How many leading blocks of `chain` are resident (`match`, where that is not known already), and how many
        of those running calls hold, so that they cost no further room."""
        low, high = 0, self.match(chain) if resident is None else resident
        resident, refs = high, self._refs
        while low < high:
            middle = (low + high) >> 1
            if chain[middle] in refs:
                low = middle + 1
            else:
                high = middle
        return resident, low

    def still(self, chain: Chain, resident: int, held: int) -> bool:
        """Whether `matches` gives for `chain` what it has given before."""
        refs = self._refs
        if (held and chain[held - 1] not in refs) or (held < resident and chain[held] in refs):
            return False
        masks, bit = self._holders.masks, self.bit
        if resident > held and not masks.get(chain[resident - 1], 0) & bit:
            return False
        return resident == len(chain) or not masks.get(chain[resident], 0) & bit

    def admit(self, call: str, chain: Chain, anonymous: int, *, exact: bool = False) -> int:
        """A call begins: holds its chain and `anonymous` further blocks, evicting what is in the way. Returns the
        blocks that were already resident. `exact`: the chain is of token ids, so that events speak of it."""
        hit = self.match(chain)
        self._hold(chain)
        self._held[call] = (chain, anonymous, exact)
        self._anonymous += anonymous
        self._evict()
        return hit

    def finish(self, call: str, extension: Chain = ()) -> None:
        """A call ended: its blocks become evictable. `extension` is the rest of its chain through its output, which
        stays cached as well; where it is not known, the output's blocks take their room all the same. Unknown calls
        are ignored (the worker was cleared meanwhile)."""
        held = self._held.pop(call, None)
        if held is None:
            return
        chain, anonymous, exact = held
        self._anonymous -= anonymous
        free, refs = self._free, self._refs
        if exact and self._following:
            self._leave(chain)
            return
        for block in reversed(extension) if extension else range(self._nameless, self._nameless + anonymous):
            if block not in refs:
                free[block] = None
                free.move_to_end(block)
        self._holders.add(self.bit, extension)
        self._nameless += 0 if extension else anonymous
        self._release(chain)
        self._evict()

    def pin(self, name: str, chain: Chain) -> None:
        """`chain`, which has just been computed, is not evicted until `unpin`; a name used again replaces its pin."""
        self.unpin(name)
        self._pins[name] = chain
        self._pinned_idle += sum(block not in self._pinned and block not in self._refs for block in chain)
        self._pinned.update(chain)
        if not self._following:
            self.store(chain[::-1])

    def unpin(self, name: str) -> None:
        for block in self._pins.pop(name, ()):
            self._pinned[block] -= 1
            if not self._pinned[block]:
                del self._pinned[block]
                self._pinned_idle -= block not in self._refs

    def pins(self) -> dict[str, int]:
        """Blocks by pin."""
        return {name: len(chain) for name, chain in self._pins.items()}

    def correct(self, chain: Chain, actual: int) -> None:
        """The worker has only `actual` leading blocks of `chain`: the rest was never computed, or is gone. Blocks
        that running calls hold are left (they will be there)."""
        self._forget(chain[actual:])

    def store(self, blocks: Iterable[int]) -> None:
        """Blocks known to be cached, least recent first."""
        new = [block for block in blocks if block not in self._refs]
        for block in new:
            self._free[block] = None
            self._free.move_to_end(block)
        self._holders.add(self.bit, new)
        self._evict()

    def follow(self, told: Collection[int] | None) -> None:
        """From now on `told`, which changes under us, says which blocks are resident; None: nobody does."""
        self._following = told is not None
        self._told = () if told is None else told
        self._due = ([], [])
        if told is not None:
            self._free.clear()
        self._holders.drop_all(self.bit)
        for blocks in (self._refs, self._free, self._told):
            self._holders.add(self.bit, blocks)

    def stored(self, blocks: Iterable[int]) -> None:
        """The engine says that it has cached these, which `told` has by now."""
        self._holders.add(self.bit, blocks)

    def dropped(self, blocks: Iterable[int]) -> None:
        """The engine says that it has evicted these, which `told` has no longer."""
        self._forget(blocks)

    def settle(self) -> None:
        """Called every second or so: what a call left, and no event has named since the last time but one, was never
        computed (the call was aborted) or is gone."""
        self._forget(self._due[1])
        self._due = ([], self._due[0])

    def clear(self) -> None:
        """The engine lost its cache; calls in flight there are lost with it."""
        lost = [*self._refs, *self._free]
        self._refs.clear()
        self._free.clear()
        self._held.clear()
        self._pins.clear()
        self._pinned.clear()
        self._pinned_idle = 0
        self._due = ([], [])
        self._anonymous = 0
        self._forget(lost)

    def close(self) -> None:
        """The worker is gone. Whoever still has this mirror changes nothing that others see."""
        self._holders.leave(self.bit)
        self._holders = Holders()
        self.bit = self._holders.enter()

    def resize(self, capacity: int) -> None:
        self.capacity = max(1, capacity)
        self._evict()

    # -- the pool's mechanics

    def _forget(self, blocks: Iterable[int]) -> None:
        """Those of `blocks` that no running call holds, nor the engine has named, are gone."""
        gone = []
        for block in blocks:
            self._free.pop(block, None)
            if block not in self._refs and block not in self._told:
                gone.append(block)
        self._holders.drop(self.bit, gone)

    def _hold(self, chain: Chain) -> None:
        refs, free, pinned = self._refs, self._free, self._pinned
        new = []
        for block in chain:
            count = refs.get(block)
            if count is None:
                if block in free:
                    del free[block]
                else:
                    new.append(block)
                refs[block] = 1
                if pinned and block in pinned:
                    self._pinned_idle -= 1
            else:
                refs[block] = count + 1
        self._holders.add(self.bit, new)

    def _release(self, chain: Chain) -> None:
        refs, free, pinned = self._refs, self._free, self._pinned
        for block in reversed(chain):
            count = refs.get(block, 0)
            if count > 1:
                refs[block] = count - 1
            elif count == 1:
                del refs[block]
                free[block] = None  # at the recent end, tail before head
                if pinned and block in pinned:
                    self._pinned_idle += 1

    def _leave(self, chain: Chain) -> None:
        """As `_release`, of a chain that events speak of: those of its last blocks may still be on their way."""
        refs, told, pinned = self._refs, self._told, self._pinned
        for block in reversed(chain):
            count = refs.get(block, 0)
            if count > 1:
                refs[block] = count - 1
            elif count == 1:
                del refs[block]
                if pinned and block in pinned:
                    self._pinned_idle += 1
                if block not in told:
                    self._free[block] = None
                    self._due[0].append(block)

    def _evict(self) -> None:
        free, pinned = self._free, self._pinned
        over = len(self._refs) + self._anonymous + len(free) - self.capacity
        spared, gone = 0, []
        while over > 0 and spared < len(free):
            block, _ = free.popitem(last=False)
            if block in pinned:
                free[block] = None
                spared += 1
                continue
            over -= 1
            if block not in self._told:
                gone.append(block)
        if gone:
            self._holders.drop(self.bit, gone)
