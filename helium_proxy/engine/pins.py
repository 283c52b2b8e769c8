"""Pins: cached blocks held by name, so that they are not evicted.

A directive rides in a request's ``kv_transfer_params.helium`` and is carried out when the request finishes, as the
connector plugin does on a real worker:

- ``{"pin": NAME, "tokens": N, "ttl_s": S, "worth": W}`` holds the blocks of the first N prompt tokens (default: all);
- ``{"renew": NAME, "ttl_s": S, "worth": W}`` lets a pin live S seconds from now;
- ``{"unpin": NAME}`` drops it;
- ``{}`` only reports.

Pins stay within a budget of blocks (what several share counts once), expire, and give way, least worth and then
least recently used first, to a worthier pin and whenever a request would otherwise be preempted or never run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .blocks import BlockPool

MAX_NAME = 256
MAX_PINS = 1024


@dataclass(slots=True)
class Pin:
    blocks: list[int]
    expires: float
    used: float
    worth: float


class Refused(Exception):
    """The directive is malformed or cannot be obeyed; the message is for the client."""


class PinTable:
    """The pins of one engine. Times are seconds on the scheduler's clock."""

    def __init__(self, pool: BlockPool, budget: int, ttl_s: float) -> None:
        # -- all mutable state ------------------------------------------------------------------------------
        self._pins: dict[str, Pin] = {}  # by name; at most MAX_PINS
        self._held: dict[int, int] = {}  # block -> pins that hold it; at most `budget` blocks
        self._next_expiry = math.inf  # no pin expires before this
        # ---------------------------------------------------------------------------------------------------
        self._pool = pool
        self.budget = budget
        self._ttl_s = ttl_s

    def __repr__(self) -> str:
        return f"<PinTable {len(self._pins)} pins, {self.blocks}/{self.budget} blocks>"

    @property
    def blocks(self) -> int:
        """Blocks held, each counted once."""
        return len(self._held)

    def names(self) -> tuple[str, ...]:
        return tuple(self._pins)

    def apply(
        self, directive: Any, blocks: Sequence[int], prompt_tokens: int, block_size: int, now: float
    ) -> dict[str, Any]:
        """Carry out `directive` for a finished request that holds `blocks`; returns what the client is told."""
        error = None
        try:
            self._apply(directive, blocks, prompt_tokens, block_size, now)
        except Refused as refused:
            error = str(refused)
        reply: dict[str, Any] = {"pinned_blocks": self.blocks, "budget_blocks": self.budget}
        if error is not None:
            reply["error"] = error
        return reply

    def _apply(self, directive: Any, blocks: Sequence[int], prompt_tokens: int, block_size: int, now: float) -> None:
        if not isinstance(directive, Mapping):
            raise Refused("helium must be an object")
        if not directive:
            return
        verbs = [v for v in ("pin", "renew", "unpin") if v in directive]
        if len(verbs) != 1:
            raise Refused("give exactly one of pin, renew, unpin")
        verb = verbs[0]
        name = directive[verb]
        if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME:
            raise Refused(f"{verb} must be a name of 1 to {MAX_NAME} characters")
        if verb != "pin" and name not in self._pins:
            raise Refused(f"no pin is named {name!r}")
        if verb == "unpin":
            self._drop(name)
            return
        expires = now + _number(directive, "ttl_s", self._ttl_s)
        worth = _number(directive, "worth", 1.0)
        if verb == "renew":
            pin = self._pins[name]
            pin.expires, pin.used = expires, now
            if "worth" in directive:
                pin.worth = worth
        else:
            tokens = directive.get("tokens")
            if tokens is not None and (isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1):
                raise Refused("tokens must be a positive integer")
            wanted = prompt_tokens if tokens is None else min(tokens, prompt_tokens)
            keep = [b for b in blocks[: wanted // block_size] if self._pool.is_cached(b)]
            self._make_room(name, keep, worth)
            self._pool.touch(keep)
            for b in keep:
                self._held[b] = self._held.get(b, 0) + 1
            self._drop(name)
            self._pins[name] = Pin(keep, expires, now, worth)
        self._next_expiry = min(self._next_expiry, expires)

    def _make_room(self, name: str, keep: list[int], worth: float) -> None:
        """Give up pins of less worth until the budget holds `keep` in place of the pin of that name."""
        if name not in self._pins and len(self._pins) >= MAX_PINS:
            raise Refused(f"there are {MAX_PINS} pins already")
        others = sorted((p.worth, p.used, n) for n, p in self._pins.items() if n != name)
        victims: list[str] = []
        while True:
            held = set(keep)
            for _, _, other in others[len(victims) :]:
                held.update(self._pins[other].blocks)
            if len(held) <= self.budget:
                break
            if len(victims) == len(others) or others[len(victims)][0] >= worth:
                raise Refused(f"{len(keep)} blocks do not fit the budget of {self.budget}")
            victims.append(others[len(victims)][2])
        for victim in victims:
            self._drop(victim)

    def expire(self, now: float) -> None:
        """Drop the pins whose time is over."""
        if now < self._next_expiry:
            return
        for name in [n for n, pin in self._pins.items() if pin.expires <= now]:
            self._drop(name)
        self._next_expiry = min((pin.expires for pin in self._pins.values()), default=math.inf)

    def yield_one(self) -> bool:
        """Drop the pin of least worth, under pressure; False if there is none."""
        if not self._pins:
            return False
        return self._drop(min(self._pins, key=lambda n: (self._pins[n].worth, self._pins[n].used)))

    def used(self, blocks: Sequence[int], now: float) -> None:
        """A request was admitted with the cached prefix `blocks`: the pins it covers are in use."""
        if self._pins and blocks and blocks[0] in self._held:
            hit = set(blocks)
            for pin in self._pins.values():
                if pin.blocks and pin.blocks[-1] in hit:
                    pin.used = now

    def clear(self) -> None:
        while self.yield_one():
            pass

    def _drop(self, name: str) -> bool:
        pin = self._pins.pop(name, None)
        if pin is None:
            return False
        for b in pin.blocks:
            n = self._held[b] - 1
            if n:
                self._held[b] = n
            else:
                del self._held[b]
        self._pool.release(pin.blocks)
        return True


def _number(directive: Mapping[str, Any], key: str, default: float) -> float:
    value = directive.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise Refused(f"{key} must be a number, not negative")
    return float(value)
