"""A worker's circuit breaker: pure, with the time passed in.

A breaker that counts every failed send ejects healthy workers: an engine closes idle connections, and a burst of
sends on stale ones fails without saying anything about the engine. So failures here are *evidence*: a stale
connection is none, a refused or broken fresh connection or a 5xx is one, and the breaker opens only when the
evidence of a window is both plentiful (`failures` of them) and at least half of what was sent. A worker that comes
back from being down starts with a closed breaker.
"""

from __future__ import annotations

from collections import deque
from typing import Literal

BreakerState = Literal["closed", "open", "half-open"]


class Breaker:
    """Opens on `failures` failures that are at least half of the sends in `window_s`; after `cooldown_s` it lets
    one probe through, whose result closes or re-opens it (cool-down doubling up to eight-fold)."""

    def __init__(self, *, failures: int = 5, window_s: float = 10.0, cooldown_s: float = 1.0) -> None:
        self._failures = failures
        self._window_s = window_s
        self._cooldown_s = cooldown_s
        # -- state
        self._events: deque[tuple[float, bool]] = deque(maxlen=256)  # (when, succeeded), oldest first
        self._opened_at: float | None = None
        self._backoff = 1.0
        self._probed_at: float | None = None  # when the half-open state's probe was sent

    def __repr__(self) -> str:
        return f"<Breaker opened_at={self._opened_at} events={len(self._events)}>"

    def state(self, now: float) -> BreakerState:
        if self._opened_at is None:
            return "closed"
        return "half-open" if now - self._opened_at >= self._cooldown_s * self._backoff else "open"

    def allows(self, now: float) -> bool:
        """Whether a call may be sent; in the half-open state, one a cool-down (a probe may end without a result, when
        its client leaves)."""
        state = self.state(now)
        if state == "half-open" and self._probed_at is not None:
            return now - self._probed_at >= self._cooldown_s * self._backoff
        return state != "open"

    def sent(self, now: float) -> None:
        """A call was sent; matters only to the half-open state, whose probe this is."""
        if self.state(now) == "half-open":
            self._probed_at = now

    def record(self, succeeded: bool, now: float) -> bool:
        """Notes the result of a send; True when this opened the breaker, for the first time or again."""
        self._probed_at = None
        self._events.append((now, succeeded))
        if succeeded:
            if self._opened_at is not None and self.state(now) == "half-open":
                self.reset()
            return False
        if self._opened_at is not None:
            if self.state(now) != "half-open":
                return False
            self._opened_at = now
            self._backoff = min(8.0, self._backoff * 2)
            return True
        while self._events and now - self._events[0][0] > self._window_s:
            self._events.popleft()
        failed = sum(1 for _, ok in self._events if not ok)
        if failed >= self._failures and failed * 2 >= len(self._events):
            self._opened_at = now
            return True
        return False

    def reset(self) -> None:
        """Closes the breaker: the health check has seen the worker well."""
        self._events.clear()
        self._opened_at = None
        self._backoff = 1.0
        self._probed_at = None
