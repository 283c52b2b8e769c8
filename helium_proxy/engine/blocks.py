"""The KV cache as vLLM keeps it: blocks with hash chains, reference counts and a free queue.

Follows ``vllm/v1/core/block_pool.py``. A block whose count falls to zero joins the free queue and stays in the
cache until it is handed out again: cached blocks at the tail (so that reuse is LRU), blocks without a hash at the
head (they are of no use to anyone). A request's blocks are released tail first. Equal blocks are not merged: the
cache maps a hash to every copy, and a lookup takes the oldest.

Not modelled: partial blocks, sliding windows, swapping to other media.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import xxhash

_chain = xxhash.xxh3_64_intdigest


def block_hashes(tokens: Any, block_size: int, *, salt: str = "") -> tuple[int, ...]:
    """The chain of 64-bit hashes of the full blocks of `tokens`, an ``array('I')``.

    `salt` (a cache salt, an adapter's name) seeds the first block, and through it all that follow.
    """
    parent = _chain(salt.encode())
    raw = memoryview(tokens).cast("B")
    width = block_size * tokens.itemsize
    out = []
    for start in range(0, len(tokens) // block_size * width, width):
        parent = _chain(raw[start : start + width], parent)
        out.append(parent)
    return tuple(out)


class BlockStored(NamedTuple):
    hashes: tuple[int, ...]
    parent: int | None
    tokens: tuple[int, ...]
    """Empty when the request came as hashes alone."""
    salt: str = ""
    """The request's cache salt, told with the first block of a prompt only (`parent` is None)."""


class BlockRemoved(NamedTuple):
    hashes: tuple[int, ...]


class AllBlocksCleared(NamedTuple):
    pass


KVEvent = BlockStored | BlockRemoved | AllBlocksCleared


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """Blocks: in all, free (cached ones included), and cached hashes."""

    blocks: int
    free: int
    cached: int

    @property
    def usage(self) -> float:
        """Share of the blocks that live requests and pins hold."""
        return 1.0 - self.free / self.blocks


class BlockPool:
    """`num_blocks` blocks, the first a placeholder never handed out (vLLM's null block)."""

    def __init__(self, num_blocks: int, block_size: int = 16, *, events: bool = False) -> None:
        # -- all mutable state ------------------------------------------------------------------------------
        self._refs = [0] * num_blocks  # block -> requests and pins that hold it; 0: it is in the free queue
        self._hash: list[int | None] = [None] * num_blocks  # block -> the hash it is cached under
        self._cached: dict[int, int] = {}  # hash -> its oldest copy
        self._copies: dict[int, list[int]] = {}  # hash -> its further copies, oldest first
        self._queue = deque(range(1, num_blocks))  # free blocks, next to be handed out first; may hold stale ones
        self._stale = [0] * num_blocks  # block -> its entries in the queue that no longer count (the first ones)
        self.free = num_blocks - 1  # how many can be handed out
        self.events: list[KVEvent] | None = [] if events else None  # drained by the publisher; None: not wanted
        # ---------------------------------------------------------------------------------------------------
        self.capacity = num_blocks - 1
        self.block_size = block_size

    def __repr__(self) -> str:
        return f"<BlockPool {self.capacity - self.free}/{self.capacity} in use, {len(self._cached)} cached>"

    def statistics(self) -> PoolStatistics:
        return PoolStatistics(self.capacity, self.free, len(self._cached))

    def lookup(self, hashes: Sequence[int], limit: int) -> list[int]:
        """The blocks of the longest cached prefix of `hashes`, of at most `limit` blocks."""
        cached = self._cached
        out: list[int] = []
        for h in hashes[:limit] if limit < len(hashes) else hashes:
            block = cached.get(h)
            if block is None:
                break
            out.append(block)
        return out

    def idle(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` nobody holds: to touch them uses up as many free blocks."""
        refs = self._refs
        return sum(1 for b in blocks if not refs[b])

    def touch(self, blocks: Iterable[int]) -> None:
        """Hold `blocks` once more; idle ones leave the free queue."""
        refs, stale = self._refs, self._stale
        for b in blocks:
            if refs[b]:
                refs[b] += 1
            else:
                refs[b] = 1
                stale[b] += 1
                self.free -= 1
        if len(self._queue) > 2 * self.capacity + 64:
            self._compact()

    def allocate(self, n: int) -> list[int]:
        """`n` blocks from the head of the free queue, evicted from the cache. The caller checked `free`."""
        queue, stale, refs, hash_of, cached = self._queue, self._stale, self._refs, self._hash, self._cached
        plain = not self._copies and self.events is None  # then an eviction is two assignments, done in place
        self.free -= n
        out: list[int] = []
        while n:
            b = queue.popleft()
            if stale[b]:
                stale[b] -= 1
                continue
            h = hash_of[b]
            if h is not None:
                if plain:
                    del cached[h]
                    hash_of[b] = None
                else:
                    self._evict(b)
            refs[b] = 1
            out.append(b)
            n -= 1
        return out

    def register(
        self,
        blocks: Sequence[int],
        hashes: Sequence[int],
        start: int,
        stop: int,
        tokens: Any = (),
        salt: str = "",
    ) -> None:
        """Cache ``blocks[start:stop]``, now full, under ``hashes[start:stop]``.

        `tokens` are the whole sequence's, for the event; none if the caller knows hashes alone. `salt` is for the
        event, too.
        """
        cached, hash_of = self._cached, self._hash
        for i in range(start, stop):
            h, b = hashes[i], blocks[i]
            hash_of[b] = h
            if cached.setdefault(h, b) != b:
                self._copies.setdefault(h, []).append(b)
        if self.events is not None and start < stop:
            parent = hashes[start - 1] if start else None
            ids = tuple(tokens[start * self.block_size : stop * self.block_size])
            self.events.append(BlockStored(tuple(hashes[start:stop]), parent, ids, "" if start else salt))

    def release(self, blocks: Sequence[int]) -> None:
        """Give `blocks` (head first) back, tail first."""
        refs, hash_of = self._refs, self._hash
        freed = 0
        first: list[int] = []
        last = self._queue.append
        for b in reversed(blocks):
            refs[b] -= 1
            if refs[b]:
                continue
            freed += 1
            if hash_of[b] is None:
                first.append(b)
            else:
                last(b)
        self._queue.extendleft(reversed(first))
        self.free += freed

    def references(self, block: int) -> int:
        """How many requests and pins hold `block`."""
        return self._refs[block]

    def is_cached(self, block: int) -> bool:
        return self._hash[block] is not None

    def reset(self) -> bool:
        """Forget all cached prefixes; refused (False) while any block is held, as in vLLM."""
        if self.free != self.capacity:
            return False
        self._compact()
        self._cached.clear()
        self._copies.clear()
        self._hash = [None] * len(self._hash)
        if self.events is not None:
            self.events.append(AllBlocksCleared())
        return True

    def _evict(self, block: int) -> None:
        h = self._hash[block]
        assert h is not None
        self._hash[block] = None
        copies = self._copies.get(h)
        if copies is None:
            del self._cached[h]
        else:
            if self._cached[h] == block:
                self._cached[h] = copies.pop(0)
            else:
                copies.remove(block)
            if not copies:
                del self._copies[h]
        if self.events is not None:
            self.events.append(BlockRemoved((h,)))

    def _compact(self) -> None:
        """Drop stale entries, so that the queue stays within a constant factor of the pool."""
        stale = self._stale
        kept: deque[int] = deque()
        for b in self._queue:
            if stale[b]:
                stale[b] -= 1
            else:
                kept.append(b)
        self._queue = kept
