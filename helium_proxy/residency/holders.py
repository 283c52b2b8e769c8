"""Prefixes seen from their blocks: which workers have one. Placing a call asks once for all workers, instead of each
worker for itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Chain = Sequence[int]


class Holders:
    """Which workers have a block resident: for every block a mask with a bit for each of them."""

    def __init__(self) -> None:
        # -- state
        self.masks: dict[int, int] = {}  # block → bits; never 0; changed here alone
        self._bits = 0  # those in use

    def __repr__(self) -> str:
        return f"<Holders {len(self.masks)} blocks of {self._bits.bit_count()} workers>"

    def __len__(self) -> int:
        return len(self.masks)

    def enter(self) -> int:
        """A bit of its own for one more worker."""
        bit = ~self._bits & (self._bits + 1)
        self._bits |= bit
        return bit

    def leave(self, bit: int) -> None:
        """The worker is gone. O(blocks)."""
        self.drop_all(bit)
        self._bits &= ~bit

    def add(self, bit: int, blocks: Iterable[int]) -> None:
        masks = self.masks
        for block in blocks:
            masks[block] = masks.get(block, 0) | bit

    def drop(self, bit: int, blocks: Iterable[int]) -> None:
        masks = self.masks
        for block in blocks:
            left = masks.get(block, 0) & ~bit
            if left:
                masks[block] = left
            else:
                masks.pop(block, None)

    def drop_all(self, bit: int) -> None:
        """O(blocks)."""
        self.drop(bit, [block for block, mask in self.masks.items() if mask & bit])

    def match(self, chain: Chain, workers: int) -> list[tuple[int, int]]:
        """How many leading blocks of `chain` are resident where: (blocks, mask of the workers that have just those),
        every one of `workers`, a mask, in one of the masks. O(log len(chain)) for each number of blocks there is."""
        found: list[tuple[int, int]] = []
        get = self.masks.get
        have = workers & get(chain[0], 0) if chain else 0
        if have != workers:
            found.append((0, workers ^ have))
        parts = [(0, len(chain), have)] if have else []
        while parts:
            low, high, mask = parts.pop()
            while low < high:
                middle = (low + high) >> 1
                have = mask & get(chain[middle], 0)
                if have == mask:
                    low = middle + 1
                else:
                    if have:
                        parts.append((middle + 1, high, have))
                        mask ^= have
                    high = middle
            found.append((low, mask))
        return found
