"""What all workers hold, seen from the blocks, against asking every worker."""

from __future__ import annotations

import random
from bisect import bisect_left

import pytest

from helium_proxy.residency.holders import Holders
from helium_proxy.residency.index import WorkerResidency


def chain(*names: str) -> tuple[int, ...]:
    return tuple(hash(names[: i + 1]) for i in range(len(names)))


def leading(worker: WorkerResidency, some: tuple[int, ...]) -> int:
    """Leading blocks of `some` that calls hold, that are free, or that the engine has named: the same bisection."""
    known = {*worker._refs, *worker._free, *worker._told}
    if not some or some[0] not in known:
        return 0
    return bisect_left(some, True, key=lambda block: block not in known)


def agree(holders: Holders, workers: list[WorkerResidency], some: tuple[int, ...]) -> None:
    asked = sum(worker.bit for worker in workers)
    found = holders.match(some, asked)
    assert sum(mask for _, mask in found) == asked, "every worker once"
    for worker in workers:
        assert next(blocks for blocks, mask in found if mask & worker.bit) == leading(worker, some)
        assert worker.match(some) == leading(worker, some)
        assert worker.still(some, *worker.matches(some))
        assert worker.matches(some, worker.match(some)) == worker.matches(some)


@pytest.mark.parametrize("seed", range(8))
def test_it_knows_what_the_workers_know(seed: int) -> None:
    rng, holders = random.Random(seed), Holders()
    workers = [WorkerResidency(rng.choice([4, 9, 1000]), holders) for _ in range(3)]
    told: list[dict[int, None] | None] = [None] * 3
    running: list[dict[str, tuple[int, ...]]] = [{}, {}, {}]
    for step in range(2000):
        at = rng.randrange(3)
        index, mine, events = workers[at], running[at], told[at]
        some = chain(*rng.choices("ab", k=rng.randint(0, 5)))
        match rng.randrange(16):
            case 0 | 1 | 2:
                index.admit(f"c{step}", some, rng.randint(0, 2), exact=rng.random() < 0.7)
                mine[f"c{step}"] = some
            case 3 | 4 | 5 if mine:
                done = rng.choice(list(mine))
                index.finish(done, chain(*rng.choices("ab", k=2)) if rng.random() < 0.3 else ())
                del mine[done]
            case 6:
                index.correct(some, rng.randint(0, len(some)))
            case 7 if events is None:
                index.store(some[::-1])
            case 8:
                index.pin(f"p{rng.randrange(3)}", some)
            case 9:
                index.unpin(f"p{rng.randrange(3)}")
            case 10 if events is not None:
                events.update(dict.fromkeys(some))
                index.stored(some)
            case 11 if events is not None:
                gone = [block for block in some[1:] if events.pop(block, 0) is None]
                index.dropped(gone)
            case 12:
                index.settle()
            case 13:
                index.resize(rng.choice([4, 9, 1000]))
            case 14 if rng.random() < 0.2:
                told[at] = None if rng.random() < 0.3 else {}
                index.follow(told[at])
            case 15 if rng.random() < 0.1:
                index.clear()
                mine.clear()
        agree(holders, workers, some)
        agree(holders, workers[: at + 1], chain(*rng.choices("ab", k=5)))


def test_a_worker_that_leaves_takes_everything_with_it() -> None:
    holders = Holders()
    one, other = WorkerResidency(10, holders), WorkerResidency(10, holders)
    one.admit("a", chain("s", "x"), 0)
    other.admit("b", chain("s", "y"), 0)
    assert sorted(holders.match(chain("s", "x"), one.bit | other.bit)) == [(1, other.bit), (2, one.bit)]
    one.close()
    assert len(holders) == 2
    newcomer = WorkerResidency(10, holders)
    assert newcomer.bit & other.bit == 0
    one.admit("late", chain("s", "x"), 0)
    one.clear()
    assert holders.match(chain("s", "x"), newcomer.bit) == [(0, newcomer.bit)]
    other.close()
    assert len(holders) == 0


def test_what_it_knows_is_bounded_by_what_the_workers_can_hold() -> None:
    holders = Holders()
    workers = [WorkerResidency(50, holders) for _ in range(4)]
    for step in range(2000):
        index = workers[step % 4]
        index.admit(f"c{step}", chain("s", str(step), "t"), 0)
        index.finish(f"c{step}", chain("s", str(step), "t", "u")[3:])
        assert len(holders) <= 4 * 50
