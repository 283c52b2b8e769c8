"""Faults to order, for tests: the next calls fail, hang, die mid-stream or come late, and steps jitter.

``POST /engine/faults`` with ``{"kind": K, "count": N, ...}`` adds one, GET lists what is left, DELETE clears:

- ``error``: answer `status` (500) without touching the scheduler;
- ``hang``: answer nothing until the client goes;
- ``die``: break the connection after `after_tokens` (0) tokens of a stream, or inside a whole response;
- ``stream_error``: after `after_tokens`, end a stream with an error in SSE form;
- ``delay``: wait `seconds` (1) first;
- ``unhealthy``: `count` answers of 503 to ``/health``.

``{"jitter": J}`` makes each step take up to the share J longer, drawn from the engine's seed.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

from .core import EmbeddedEngine
from .http import ApiError, Call, integer

KINDS = ("error", "hang", "die", "stream_error", "delay", "unhealthy")
_MAX_KINDS = 256


@dataclass(slots=True)
class Fault:
    kind: str
    count: int
    status: int = 500
    seconds: float = 1.0
    after_tokens: int = 0


class Faults:
    """What is still to go wrong with one engine."""

    def __init__(self) -> None:
        # -- all mutable state: ordered faults, in the order they were given; at most _MAX_KINDS ----------------
        self._ordered: deque[Fault] = deque()

    def __repr__(self) -> str:
        return f"<Faults {[f.kind for f in self._ordered]}>"

    def take(self, *kinds: str) -> Fault | None:
        """The next fault of these kinds, counted down."""
        for fault in self._ordered:
            if fault.kind in kinds:
                fault.count -= 1
                if fault.count == 0:
                    self._ordered.remove(fault)
                return fault
        return None

    async def before(self, call: Call) -> None:
        """Let the call now beginning suffer what is due."""
        if not self._ordered:
            return
        fault = self.take("error", "hang", "die", "stream_error", "delay")
        if fault is None:
            return
        if fault.kind == "error":
            raise ApiError(fault.status, "a fault was ordered")
        if fault.kind == "hang":
            await call.gone()
        elif fault.kind == "delay":
            await asyncio.sleep(fault.seconds)
        else:
            call.fault = fault.kind
            call.fault_after = fault.after_tokens

    async def handle(self, engine: EmbeddedEngine, call: Call) -> None:
        """``/engine/faults``."""
        if call.scope["method"] == "DELETE":
            self._ordered.clear()
            engine.jitter = 0.0
        elif call.scope["method"] == "POST":
            self._order(engine, call.body)
        await call.json({"faults": [asdict(f) for f in self._ordered], "jitter": engine.jitter})

    def _order(self, engine: EmbeddedEngine, body: dict[str, Any]) -> None:
        jitter = body.get("jitter")
        if jitter is not None:
            engine.jitter = _positive(jitter, "jitter")
        kind = body.get("kind")
        if kind is None and jitter is not None:
            return
        if kind not in KINDS:
            raise ApiError(400, f"kind must be one of {', '.join(KINDS)}.", param="kind")
        if len(self._ordered) >= _MAX_KINDS:
            raise ApiError(400, "too many faults are ordered already.")
        self._ordered.append(
            Fault(
                kind,
                integer(body, "count", 1, 1),
                integer(body, "status", 500, 400, 599),
                _positive(body.get("seconds", 1.0), "seconds"),
                integer(body, "after_tokens", 0, 0),
            )
        )


def _positive(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise ApiError(400, f"{name} must be a number, not negative.", param=name)
    return float(value)
