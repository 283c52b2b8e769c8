"""The mirror of a worker's prefix cache, against a model that keeps everything in the plainest way."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from helium_proxy.residency.index import WorkerResidency


def chain(*names: str) -> tuple[int, ...]:
    """A chain in which equal prefixes have equal blocks."""
    return tuple(hash(names[: i + 1]) for i in range(len(names)))


def test_a_prefix_is_shared_and_outlives_its_call() -> None:
    index = WorkerResidency(10)
    assert index.admit("a", chain("s", "x"), 1) == 0
    assert index.admit("b", chain("s", "y"), 1) == 1, "resident from the moment it is admitted"
    assert index.used == 5
    index.finish("a")
    index.finish("b")
    assert index.used == 0
    assert index.match(chain("s", "x")) == 2
    assert index.match(chain("s", "z")) == 1


def test_eviction_takes_the_least_recent_and_tails_before_heads() -> None:
    index = WorkerResidency(4)
    for call, names in (("a", "xyz"), ("b", "p")):
        index.admit(call, chain(*names), 0)
        index.finish(call)
    index.admit("c", (), 2)
    assert index.match(chain(*"xyz")) == 1
    assert index.match(chain("p")) == 1
    index.admit("d", (), 1)
    assert index.match(chain(*"xyz")) == 0
    assert index.match(chain("p")) == 1


def test_blocks_of_running_calls_cannot_go() -> None:
    index = WorkerResidency(3)
    index.admit("a", chain(*"xyz"), 0)
    index.admit("b", chain(*"pqr"), 5)
    assert index.match(chain(*"xyz")) == 3
    assert index.used == 11, "more than there is: the engine will preempt, the mirror counts on"
    index.finish("a")
    assert index.match(chain(*"xyz")) == 0


def test_an_output_that_is_not_known_takes_its_room_all_the_same() -> None:
    index = WorkerResidency(10)
    index.admit("a", chain(*"xyz"), 4)
    index.finish("a")
    assert index.statistics().free == 7, "the engine keeps a reply's blocks as it does a prompt's"
    index.admit("b", chain(*"pqr"), 4)
    index.finish("b")
    assert index.match(chain(*"xyz")) == 3, "what is oldest goes first: the first call's reply"
    index.admit("c", chain(*"st"), 1)
    assert index.match(chain(*"xyz")) == 0


def test_the_output_extends_the_chain() -> None:
    index = WorkerResidency(10)
    whole = chain("x", "y", "answer", "more")
    index.admit("a", whole[:2], 2)
    index.finish("a", whole[2:])
    assert index.match(whole) == 4


def test_pins_hold_until_unpinned_or_replaced() -> None:
    index = WorkerResidency(3)
    index.pin("p", chain("x", "y"))
    index.admit("a", (), 3)
    index.finish("a")
    assert index.match(chain("x", "y")) == 2
    assert index.pins() == {"p": 2}
    index.pin("p", chain("z"))
    assert index.pins() == {"p": 1}
    index.admit("a", (), 3)
    assert index.match(chain("x", "y")) == 0
    assert index.match(chain("z")) == 1
    index.unpin("p")
    index.unpin("never was")
    index.finish("a")
    index.admit("b", (), 3)
    assert index.match(chain("z")) == 0


@pytest.mark.parametrize("following", [False, True])
def test_what_pins_alone_hold_is_kept_count_of(following: bool) -> None:
    rng = random.Random(3)
    index, running, pins = WorkerResidency(1000), dict[str, tuple[int, ...]](), dict[str, tuple[int, ...]]()
    if following:
        index.follow(())
    for step in range(500):
        some = chain(*rng.choices("abc", k=rng.randint(1, 5)))
        kind, name = rng.randrange(4), f"n{rng.randrange(4)}"
        if kind == 0:
            index.admit(f"c{step}", some, 1, exact=following)
            running[f"c{step}"] = some
        elif kind == 1 and running:
            done = rng.choice(list(running))
            index.finish(done)
            del running[done]
        elif kind == 2:
            index.pin(name, some)
            pins[name] = some
        else:
            index.unpin(name)
            pins.pop(name, None)
        alone = {b for held in pins.values() for b in held} - {b for held in running.values() for b in held}
        assert index.pinned_beside((), 0) == len(alone)
        assert index.pinned_beside(some, 0) == len(alone - set(some))


def test_a_wrong_belief_is_corrected() -> None:
    index = WorkerResidency(10)
    index.admit("a", chain(*"wxyz"), 0)
    index.finish("a")
    index.correct(chain(*"wxyz"), 1)
    assert index.match(chain(*"wxyz")) == 1


def test_after_a_restart_nothing_is_left() -> None:
    index = WorkerResidency(10)
    index.admit("a", chain(*"xy"), 2)
    index.pin("p", chain("x"))
    index.clear()
    assert index.used == index.match(chain(*"xy")) == 0
    assert not index.pins()
    index.finish("a")
    assert index.used == 0


def test_a_capacity_of_none_is_refused() -> None:
    with pytest.raises(ValueError, match="capacity"):
        WorkerResidency(0)


@given(st.lists(st.sampled_from("abc"), max_size=12), st.integers(0, 12))
def test_match_finds_the_length_of_any_resident_prefix(names: list[str], count: int) -> None:
    index = WorkerResidency(100)
    whole = chain(*names)
    index.admit("x", whole[:count], 0)
    assert index.match(whole) == min(count, len(whole))
    assert index.matches(whole) == (min(count, len(whole)), min(count, len(whole)))
    index.finish("x")
    assert index.match(whole) == min(count, len(whole))
    assert index.matches(whole) == (min(count, len(whole)), 0)


class Mirror(RuleBasedStateMachine):
    """Any sequence of calls, against lists and sets."""

    def __init__(self) -> None:
        super().__init__()
        self.capacity = 12
        self.index = WorkerResidency(self.capacity)
        self.running: dict[str, tuple[tuple[int, ...], int]] = {}
        self.free: list[int] = []  # least recent first
        self.count = 0
        self.outputs: list[int] = []

    def held(self) -> set[int]:
        return {block for blocks, _ in self.running.values() for block in blocks}

    def settle(self, released: tuple[int, ...] = ()) -> None:
        held = self.held()
        for block in reversed(released):
            if block not in held:
                self.free = [b for b in self.free if b != block] + [block]
        self.free = [b for b in self.free if b not in held]
        used = len(held) + sum(n for _, n in self.running.values())
        while self.free and used + len(self.free) > self.capacity:
            self.free.pop(0)

    def known(self, blocks: tuple[int, ...]) -> int:
        resident = self.held() | set(self.free)
        count = 0
        for block in blocks:
            if block not in resident:
                break
            count += 1
        return count

    chains = st.lists(st.sampled_from("ab"), max_size=5).map(lambda names: chain(*names))

    @rule(blocks=chains, anonymous=st.integers(0, 4))
    def admit(self, blocks: tuple[int, ...], anonymous: int) -> None:
        self.count += 1
        expected = self.known(blocks)
        assert self.index.admit(f"c{self.count}", blocks, anonymous) == expected
        self.running[f"c{self.count}"] = (blocks, anonymous)
        self.settle()

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        call = data.draw(st.sampled_from(sorted(self.running)))
        blocks, anonymous = self.running.pop(call)
        self.index.finish(call)
        self.free += [(1 << 64) + len(self.outputs) + i for i in range(anonymous)]
        self.outputs += [0] * anonymous
        self.settle(blocks)

    @rule(capacity=st.integers(1, 20))
    def resize(self, capacity: int) -> None:
        self.capacity = capacity
        self.index.resize(capacity)
        self.settle()

    @rule(blocks=chains)
    def match(self, blocks: tuple[int, ...]) -> None:
        assert self.index.match(blocks) == self.known(blocks)
        assert self.index.still(blocks, *self.index.matches(blocks))

    @invariant()
    def counts_agree(self) -> None:
        statistics = self.index.statistics()
        assert statistics.referenced == len(self.held())
        assert statistics.anonymous == sum(n for _, n in self.running.values())
        assert statistics.free == len(self.free)
        assert self.index.used == statistics.referenced + statistics.anonymous
        assert not self.free or self.index.used + statistics.free <= self.capacity


Mirror.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestMirror = Mirror.TestCase
