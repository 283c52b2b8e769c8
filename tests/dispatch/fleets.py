"""Calls, workers, and decisions about them, without a network and without a clock."""

from __future__ import annotations

import itertools
from typing import Any

from helium_proxy.dispatch.policy import decide
from helium_proxy.dispatch.settings import DispatchSettings
from helium_proxy.dispatch.state import Assignment, DispatchState, QueuedCall
from helium_proxy.types import Hints

SIZE = 16
_names = itertools.count()


def blocks(name: str, count: int, after: tuple[int, ...] = ()) -> tuple[int, ...]:
    """A chain of `count` blocks of its own behind `after`."""
    return after + tuple(hash((name, i, after[-1:])) for i in range(count))


def call(chain: tuple[int, ...] = (), output: float = 16, **fields: Any) -> QueuedCall:
    hints = Hints(**{k: fields.pop(k) for k in list(fields) if k in Hints.__dataclass_fields__})
    base: dict[str, Any] = {"id": f"c{next(_names)}", "model": "demo", "tenant": "t", "arrived_at": 0.0}
    base |= {"chain": chain, "block_size": SIZE, "prompt_tokens": len(chain) * SIZE + 5, "output_tokens": output}
    return QueuedCall(**{**base, "hints": hints, **fields})


def fleet(count: int = 2, capacity: int | None = 10_000, **options: Any) -> DispatchState:
    state = DispatchState(DispatchSettings(**options))
    for i in range(count):
        state.join(f"w{i}", frozenset({"demo"}), SIZE, capacity)
    return state


def ask(state: DispatchState, *calls: QueuedCall, now: float = 0.0) -> list[Assignment]:
    for one in calls:
        state.enqueue(one, now)
    return decide(state, now)


def finish(state: DispatchState, assignment: Assignment) -> None:
    assert state.release(assignment.worker, assignment.call.id, 0.0)


def in_turn(state: DispatchState) -> list[QueuedCall]:
    """The order in which calls start when one runs at a time."""
    order: list[QueuedCall] = []
    started = decide(state, 0.0)
    while started:
        order += [a.call for a in started]
        for assignment in started:
            finish(state, assignment)
        started = decide(state, 0.0)
    return order


def one_by_one(**options: Any) -> DispatchState:
    return fleet(1, max_running=1, default_running=1, **options)
