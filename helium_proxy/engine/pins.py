"""Pins: cached blocks held by name, so that they are not evicted.

A directive rides in a request's ``kv_transfer_params.helium`` and is carried out when the request finishes, as the
connector plugin does on a real worker:

- ``{"pin": NAME, "tokens": N, "ttl_s": S}`` holds the blocks of the first N prompt tokens (default: all of them);
- ``{"renew": NAME, "ttl_s": S}`` lets a pin live S seconds from now;
- ``{"unpin": NAME}`` drops it.

Pins stay within a budget of blocks (what two pins share counts once), expire, and give way, least recently pinned
or renewed first, whenever a request would otherwise have to wait or be preempted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .blocks import BlockPool


@dataclass(slots=True)
class Pin:
    blocks: list[int]
    expires: float


class PinTable:
    """The pins of one engine. Times are seconds on the scheduler's clock."""

    def __init__(self, pool: BlockPool, budget: int, ttl_s: float) -> None:
        # -- all mutable state ------------------------------------------------------------------------------
        self._pins: dict[str, Pin] = {}  # by name, least recently pinned or renewed first; at most `budget` of them
        self._held: dict[int, int] = {}  # block -> pins that hold it
        self._next_expiry = float("inf")  # no pin expires before this
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
        error = self._apply(directive, blocks, prompt_tokens, block_size, now)
        reply: dict[str, Any] = {"pinned_blocks": self.blocks, "budget_blocks": self.budget}
        if error:
            reply["error"] = error
        return reply

    def _apply(
        self, directive: Any, blocks: Sequence[int], prompt_tokens: int, block_size: int, now: float
    ) -> str | None:
        if not isinstance(directive, Mapping):
            return "the directive is not an object"
        verb = next((v for v in ("pin", "renew", "unpin") if v in directive), None)
        if verb is None:
            return "none of pin, renew, unpin is given"
        name, ttl, tokens = directive[verb], directive.get("ttl_s", self._ttl_s), directive.get("tokens")
        if not isinstance(name, str) or not name or len(name) > 256:
            return f"{verb} must name the pin in 1 to 256 characters"
        if isinstance(ttl, bool) or not isinstance(ttl, int | float) or not 0 < ttl < float("inf"):
            return "ttl_s must be a positive number"
        if tokens is not None and (isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 0):
            return "tokens must be a whole number, not negative"
        if verb == "unpin":
            return None if self._drop(name) else f"no pin is named {name!r}"
        if verb == "renew":
            pin = self._pins.pop(name, None)
            if pin is None:
                return f"no pin is named {name!r}"
            self._insert(name, Pin(pin.blocks, now + ttl))
            return None
        wanted = prompt_tokens if tokens is None else min(tokens, prompt_tokens)
        keep = [b for b in blocks[: wanted // block_size] if self._pool.is_cached(b)]
        old = set(self._pins[name].blocks) if name in self._pins else set()
        kept = sum(1 for b, n in self._held.items() if n > (b in old))
        if kept + sum(1 for b in keep if self._held.get(b, 0) <= (b in old)) > self.budget:
            return "the pin budget is used up"
        if len(self._pins) >= max(1, self.budget) and name not in self._pins:
            return "there are too many pins"
        self._pool.touch(keep)
        for b in keep:
            self._held[b] = self._held.get(b, 0) + 1
        self._drop(name)
        if keep:
            self._insert(name, Pin(keep, now + ttl))
        return None

    def expire(self, now: float) -> None:
        """Drop the pins whose time is over."""
        if now < self._next_expiry:
            return
        for name in [n for n, pin in self._pins.items() if pin.expires <= now]:
            self._drop(name)
        self._next_expiry = min((pin.expires for pin in self._pins.values()), default=float("inf"))

    def yield_one(self) -> bool:
        """Drop the least recently pinned or renewed pin, under pressure; False if there is none."""
        name = next(iter(self._pins), None)
        return name is not None and self._drop(name)

    def clear(self) -> None:
        while self.yield_one():
            pass

    def _insert(self, name: str, pin: Pin) -> None:
        self._pins[name] = pin
        self._next_expiry = min(self._next_expiry, pin.expires)

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
