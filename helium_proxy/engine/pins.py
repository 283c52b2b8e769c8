"""Pins: cached blocks held by name, so that they are not evicted. The same rules as the connector plugin's.

A directive rides in a request's ``kv_transfer_params.helium`` and is carried out when the request finishes:

- ``{"pin": NAME, "tokens": N, "ttl_s": S, "worth": W}`` holds the blocks of the first N prompt tokens (default: all);
- ``{"renew": NAME, "ttl_s": S, "worth": W}`` lets a pin live S seconds from now;
- ``{"unpin": NAME}`` drops it;
- ``{}`` only reports.

Pins stay within a budget of blocks (what several share counts once) and expire. They give way, least worth and then
longest unused first, to a worthier pin, to a request that could not run beside them even alone, and to one that waits
`PATIENCE_S` after it was first next in the queue.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .blocks import BlockPool

MAX_NAME = 256
MAX_PINS = 1024
MAX_TTL_S = 3600.0
PATIENCE_S = 5.0
ALLOWED = {"pin": {"tokens", "ttl_s", "worth"}, "renew": {"ttl_s", "worth"}, "unpin": set[str]()}


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
        self.next_expiry = math.inf  # no pin expires before this
        self.totals: Counter[str] = Counter(directives=0, refusals=0, expirations=0, evictions=0, hits=0)
        # ---------------------------------------------------------------------------------------------------
        self._pool = pool
        self.budget = budget
        self._ttl_s = ttl_s

    def __repr__(self) -> str:
        return f"<PinTable {len(self._pins)} pins, {self.blocks}/{self.budget} blocks>"

    def __len__(self) -> int:
        return len(self._pins)

    @property
    def blocks(self) -> int:
        """Blocks held, each counted once."""
        return len(self._held)

    def names(self) -> tuple[str, ...]:
        return tuple(self._pins)

    def outside(self, blocks: set[int]) -> int:
        """How many blocks pins hold besides `blocks`."""
        return sum(1 for b in self._held if b not in blocks)

    def apply(
        self, directive: Any, blocks: Sequence[int], prompt_tokens: int, block_size: int, now: float
    ) -> dict[str, Any]:
        """Carry out `directive` for a finished request that holds `blocks`; returns what the client is told."""
        self.expire(now)
        error = None
        try:
            self._apply(directive, blocks, prompt_tokens, block_size, now)
        except Refused as refused:
            error = str(refused)
            self.totals["refusals"] += 1
        reply: dict[str, Any] = {"pinned_blocks": self.blocks, "budget_blocks": self.budget}
        if error is not None:
            reply["error"] = error
        return reply

    def _apply(self, directive: Any, blocks: Sequence[int], prompt_tokens: int, block_size: int, now: float) -> None:
        if not isinstance(directive, Mapping):
            raise Refused("helium must be an object")
        if not directive:
            return
        verbs = [v for v in ALLOWED if v in directive]
        if len(verbs) != 1:
            raise Refused("give exactly one of pin, renew, unpin")
        verb = verbs[0]
        for key in directive:
            if key != verb and key not in ALLOWED[verb]:
                raise Refused(f"{verb} does not take {str(key)[:40]!r}")
        name = directive[verb]
        if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME:
            raise Refused(f"{verb} must be a name of 1 to {MAX_NAME} characters")
        if verb != "pin" and name not in self._pins:
            raise Refused(f"no pin is named {name!r}")
        if verb == "unpin":
            self._drop(name)
            return
        expires = now + min(_number(directive, "ttl_s", self._ttl_s), MAX_TTL_S)
        worth = _number(directive, "worth", 1.0)
        if verb == "renew":
            pin = self._pins[name]
            pin.expires, pin.used = expires, now
            if directive.get("worth") is not None:
                pin.worth = worth
        else:
            keep = self._prefix(directive.get("tokens"), blocks, prompt_tokens, block_size)
            self._displace(name, keep, worth)
            self._pool.touch(keep)
            for b in keep:
                self._held[b] = self._held.get(b, 0) + 1
            self._drop(name)
            self._pins[name] = Pin(keep, expires, now, worth)
        self.totals["directives"] += verb == "pin"
        self.next_expiry = min(self.next_expiry, expires)

    def _prefix(self, tokens: Any, blocks: Sequence[int], prompt_tokens: int, block_size: int) -> list[int]:
        if tokens is not None and (isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1):
            raise Refused("tokens must be a positive integer")
        wanted = prompt_tokens if tokens is None else min(tokens, prompt_tokens)
        keep = list(blocks[: wanted // block_size])
        if not keep:
            raise Refused(f"{wanted} tokens do not fill one block of {block_size}")
        if not all(map(self._pool.is_cached, keep)):
            raise Refused("the prefix's blocks are not in the prefix cache")
        return keep

    def _displace(self, name: str, keep: list[int], worth: float) -> None:
        """Give up pins of less worth until the budget holds `keep` in place of the pin of that name."""
        if name not in self._pins and len(self._pins) >= MAX_PINS:
            raise Refused(f"there are {MAX_PINS} pins already")
        others = [n for n in self._ranked() if n != name]
        victims = 0
        while len(set(keep).union(*(self._pins[n].blocks for n in others[victims:]))) > self.budget:
            if victims == len(others) or self._pins[others[victims]].worth >= worth:
                raise Refused(f"{len(keep)} blocks do not fit the budget of {self.budget}")
            victims += 1
        for victim in others[:victims]:
            self._drop(victim)
        self.totals["evictions"] += victims

    def _ranked(self) -> list[str]:
        """Names, the first to give way first."""
        return sorted(self._pins, key=lambda n: (self._pins[n].worth, self._pins[n].used))

    def expire(self, now: float) -> None:
        """Drop the pins whose time is over."""
        if now < self.next_expiry:
            return
        late = [n for n, pin in self._pins.items() if pin.expires <= now]
        for name in late:
            self._drop(name)
        self.totals["expirations"] += len(late)
        self.next_expiry = min((pin.expires for pin in self._pins.values()), default=math.inf)

    def relieve(self, shortage: int, gains: Callable[[int], bool]) -> None:
        """Give up pins until `shortage` blocks are gained, or no pin is left that gains any.

        `gains(block)` says whether it helps that no pin holds the block any more.
        """
        while shortage > 0:
            for name in self._ranked():
                gain = sum(1 for b in self._pins[name].blocks if self._held[b] == 1 and gains(b))
                if gain:
                    break
            else:
                return
            self._drop(name)
            self.totals["evictions"] += 1
            shortage -= gain

    def used(self, blocks: Sequence[int], now: float) -> None:
        """A request was admitted whose prompt begins with the cached `blocks`: note the pins it uses."""
        if not self._held or not blocks or blocks[0] not in self._held:
            return
        hit = set(blocks)
        using = [pin for pin in self._pins.values() if pin.blocks[-1] in hit]
        for pin in using:
            pin.used = now
        self.totals["hits"] += bool(using)

    def clear(self) -> None:
        """Drop every pin."""
        for name in list(self._pins):
            self._drop(name)

    def _drop(self, name: str) -> None:
        pin = self._pins.pop(name, None)
        if pin is None:
            return
        for b in pin.blocks:
            n = self._held[b] - 1
            if n:
                self._held[b] = n
            else:
                del self._held[b]
        self._pool.release(pin.blocks)


def _number(directive: Mapping[str, Any], key: str, default: float) -> float:
    value = directive.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise Refused(f"{key} must be a number, not negative")
    return float(value)
