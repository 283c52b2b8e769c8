"""What is kept for calls that come back: while it pays, and no longer."""

from __future__ import annotations

from helium_proxy.dispatch import returns
from helium_proxy.dispatch.returns import Returns

CHAIN = tuple(range(100, 120))
NEXT = (*CHAIN, 7, 8, 9)
KEY = ("workflow", "step")


def finish(awaited: Returns, now: float = 0.0, chain: tuple[int, ...] = CHAIN, whole_s: float = 10.0) -> None:
    awaited.finished(KEY, chain, "w", 20, whole_s, now)


def test_room_is_kept_until_the_next_call_comes() -> None:
    awaited = Returns()
    finish(awaited)
    assert awaited.kept("w") == 20
    assert awaited.kept("other") == 0
    awaited.arrived((1, 2, 3), 0.01)
    assert awaited.kept("w") == 20, "somebody else's call"
    awaited.arrived(NEXT, 0.02)
    assert awaited.kept("w") == 0, "it is first in line now"


def test_it_is_given_up_in_time() -> None:
    awaited = Returns()
    finish(awaited)
    end = awaited.next_end()
    assert end == 1.5, "a third, about, of the time for which it would pay if every second call came back"
    awaited.expire(end)
    assert awaited.kept("w") == 0
    assert awaited.next_end() is None


def test_once_calls_come_back_it_is_known_how_soon() -> None:
    awaited = Returns()
    for turn in range(20):
        finish(awaited, 10.0 * turn)
        awaited.arrived(NEXT, 10.0 * turn + 0.03)
    finish(awaited, 500.0)
    end = awaited.next_end()
    assert end is not None
    assert 500.03 < end <= 500.2


def test_nodes_whose_calls_do_not_come_back_get_no_place() -> None:
    awaited = Returns()
    for turn in range(100):
        finish(awaited, turn * 100.0, tuple(range(turn * 1000, turn * 1000 + 20)))
        awaited.expire(turn * 100.0 + 99)
    assert awaited.habit(KEY).probability < 0.01
    finish(awaited, 20_000.0)
    assert awaited.kept("w") == 0
    awaited.arrived(NEXT, 20_000.5)
    assert awaited.habit(KEY).probability > 0.05, "what is not kept is learned from, too"


def test_of_a_first_wave_few_are_waited_for_and_then_as_many_more_as_have_come_back() -> None:
    awaited = Returns()
    chains = [tuple(range(wave * 1000, wave * 1000 + 20)) for wave in range(20)]
    for chain in chains:
        finish(awaited, 0.0, chain)
    assert awaited.habit(KEY).kept == 4
    for chain in chains[:8]:
        awaited.arrived((*chain, 1), 0.01)
    for chain in chains:
        finish(awaited, 1.0, (*chain, chain[0] + 500))
    assert awaited.habit(KEY).kept == 12
    awaited.expire(1.9)
    assert awaited.habit(KEY).kept == 0
    for chain in chains:
        finish(awaited, 2.0, (*chain, chain[0] + 600))
    assert awaited.habit(KEY).kept == 1, "those were kept in vain"


def test_what_ends_while_a_place_is_kept_is_kept_as_long_as_that() -> None:
    """It is evicted after the place's blocks, so that room made of it would be made of those."""
    awaited = Returns()
    later = tuple(range(1000, 1020))
    awaited.habit(KEY).trust, awaited.habit(KEY).seen = 1, True
    finish(awaited, 0.0)
    end = awaited.next_end()
    finish(awaited, 0.01, later)
    assert awaited.kept("w") == 40
    assert awaited.next_end() == end
    assert end is not None
    awaited.expire(end)
    assert awaited.kept("w") == 0
    assert awaited.habit(KEY).kept == 0
    finish(awaited, 0.5, later)
    awaited.arrived(NEXT, 0.5)
    assert awaited.kept("w") == 20, "the one alone"


def test_it_says_where_a_call_comes_back_to() -> None:
    awaited = Returns()
    finish(awaited)
    assert awaited.arrived((1, 2, 3), 0.01) is None
    assert awaited.arrived(NEXT, 0.02) == "w"
    assert awaited.arrived(NEXT, 0.03) is None, "once"


def test_waiting_pays_only_for_a_share_of_the_time_that_a_whole_cache_takes() -> None:
    """t < probability * seconds to prefill the cache."""
    for pause, kept in ((0.5, 20), (9.0, 0)):
        awaited = Returns()
        for turn in range(60):
            now = turn * 100.0
            chain = tuple(range(turn * 1000, turn * 1000 + 20))
            finish(awaited, now, chain)
            if turn % 2 or pause < 1:
                awaited.arrived((*chain, 1), now + pause)
            awaited.expire(now + 99)
        finish(awaited, 10_000.0)
        assert awaited.kept("w") == kept, pause


def test_the_time_that_is_waited_follows_the_pauses() -> None:
    awaited = Returns()
    for turn in range(100):
        chain = tuple(range(turn * 1000, turn * 1000 + 20))
        finish(awaited, turn * 100.0, chain)
        awaited.arrived((*chain, 1), turn * 100.0 + 2.0)
    habit = awaited.habit(KEY)
    assert abs(habit.after.mean_s - 2.0) < 0.1
    finish(awaited, 20_000.0)
    end = awaited.next_end()
    assert end is not None
    assert 20_002 < end < 20_004


def test_a_lost_worker_keeps_nothing() -> None:
    awaited = Returns()
    finish(awaited)
    awaited.gone("w")
    assert awaited.kept("w") == 0
    awaited.arrived(NEXT, 0.1)
    assert awaited.habit(KEY).probability == 0.5, "it says nothing of the node"


def test_an_empty_prompt_and_shared_blocks_need_no_place() -> None:
    awaited = Returns()
    awaited.finished(KEY, (), "w", 0, 10.0, 0.0)
    awaited.finished(KEY, CHAIN, "w", 0, 10.0, 0.0)
    assert awaited.kept("w") == 0
    assert awaited.next_end() is None


def test_the_same_prompt_again_has_one_place() -> None:
    awaited = Returns()
    for _ in range(5):
        finish(awaited)
    assert awaited.kept("w") == 20


def test_memory_is_bounded() -> None:
    awaited = Returns()
    for index in range(returns._AWAITED + 500):
        awaited.finished((f"flow{index}", "n"), (index,), "w", 1, 10.0, 0.0)
    assert len(awaited._awaited) == returns._AWAITED
    assert len(awaited._habits) == returns._KEYS
    assert awaited.kept("w") <= returns._AWAITED
    awaited.expire(1e9)
    assert not awaited._awaited
    assert not awaited._ends
    assert not awaited._judged
    assert awaited.kept("w") == 0


def test_what_ends_after_a_place_is_kept_as_far_as_that_pays() -> None:
    """A place of 20 blocks is worth 5 s of the whole cache, and is kept for 0.76 s on average: so are 131 blocks."""
    awaited = Returns()
    awaited.habit(KEY).trust = 1
    for index in range(100):
        awaited.finished(KEY, (index,), "w", 20, 10.0, 0.001 * index)
    assert awaited.kept("w") == 120
    awaited.arrived((0, -1), 0.2)
    assert awaited.kept("w") == 0, "it has come back, and none is kept for the others' sake"


def test_where_nothing_comes_back_nothing_is_kept_after_the_first_wait() -> None:
    """Although what a call's place is worth is known much later: a minute, on a worker that has not been timed."""
    awaited = Returns()
    now = 0.0
    for index in range(10_000):
        awaited.expire(now)
        awaited.finished(KEY, (index,), "w", 20, 60.0, now)
        now += 0.01
    assert awaited.kept("w") == 0
    assert awaited.habit(KEY).trust == 0
    awaited.arrived((9_999, 1), now)
    awaited.finished(KEY, (10_000,), "w", 20, 60.0, now)
    assert awaited.kept("w") == 20, "until one does"


def test_each_place_is_judged_at_its_own_time() -> None:
    awaited = Returns()
    finish(awaited, now=0.0)
    finish(awaited, now=9.0)
    believed = awaited.habit(KEY).probability
    awaited.expire(10.6)
    assert awaited.habit(KEY).probability == believed, "the first has been replaced, the second has not had its time"
    assert awaited.arrived(NEXT, 11.0) == "w"
    finish(awaited, now=12.0)
    believed = awaited.habit(KEY).probability
    awaited.expire(22.0)
    assert awaited.habit(KEY).probability < believed
