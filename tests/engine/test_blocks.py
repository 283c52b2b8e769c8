"""The block pool: hashes, copies, and the events it tells of."""

from __future__ import annotations

from array import array

from helium_proxy.engine import block_hashes
from helium_proxy.engine.blocks import AllBlocksCleared, BlockPool, BlockRemoved, BlockStored


def test_hashes_chain_and_depend_on_the_salt() -> None:
    a = block_hashes(array("I", range(50)), 16)
    b = block_hashes(array("I", [*range(16), 99, *range(17, 50)]), 16)
    assert len(a) == 3
    assert a[0] == b[0]
    assert not set(a[1:]) & set(b[1:])
    assert not set(a) & set(block_hashes(array("I", range(50)), 16, salt="tenant"))
    assert a == block_hashes(array("I", range(48)), 16)


def test_events_tell_of_what_is_stored_evicted_and_cleared() -> None:
    pool = BlockPool(5, 2, events=True)
    tokens = array("I", range(8))
    blocks = pool.allocate(4)
    pool.register(blocks, (11, 12, 13, 14), 0, 2, tokens)
    pool.register(blocks, (11, 12, 13, 14), 2, 3, tokens)
    pool.release(blocks)
    pool.allocate(2)
    assert pool.events == [
        BlockStored((11, 12), None, (0, 1, 2, 3)),
        BlockStored((13,), 12, (4, 5)),
        BlockRemoved((13,)),  # the fourth block, without a hash, went first; then the tail
    ]
    pool = BlockPool(5, 2, events=True)
    assert pool.reset()
    assert pool.events == [AllBlocksCleared()]


def test_copies_of_a_block_are_removed_one_by_one() -> None:
    pool = BlockPool(4, 2, events=True)
    (a,), (b,) = pool.allocate(1), pool.allocate(1)
    pool.register([a], (7,), 0, 1)
    pool.register([b], (7,), 0, 1)
    assert pool.lookup((7,), 1) == [a]
    pool.release([a])
    pool.allocate(2)
    assert pool.lookup((7,), 1) == [b]
    assert pool.events is not None
    assert pool.events.count(BlockRemoved((7,))) == 1
    pool.release([b])
    pool.allocate(1)
    assert pool.lookup((7,), 1) == []
    assert pool.events.count(BlockRemoved((7,))) == 2


def test_blocks_without_a_hash_are_reused_first() -> None:
    pool = BlockPool(7)
    blocks = pool.allocate(4)
    pool.register(blocks, (1, 2), 0, 2)
    pool.release(blocks)
    assert pool.allocate(2) == [blocks[3], blocks[2]]
    pool.allocate(2)
    assert pool.allocate(2) == [blocks[1], blocks[0]]
    assert pool.statistics().usage == 1.0


def test_a_block_touched_while_free_is_not_handed_out() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(3)
    pool.register(blocks, (1, 2, 3), 0, 3)
    pool.release(blocks)
    for _ in range(200):  # stale entries of the queue must not grow without bound
        pool.touch(blocks[:1])
        pool.release(blocks[:1])
    assert len(pool._queue) <= 2 * pool.capacity + 64
    pool.touch(blocks[:1])
    assert blocks[0] not in pool.allocate(2)
    assert pool.free == 0
