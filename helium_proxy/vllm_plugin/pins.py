"""The bookkeeping of pins: names, budget, time to live and worth. Pure: no vLLM, no clock, no I/O.

`PinLedger` decides which KV blocks to hold and which to give back; the connector does it. A block that several pins
share (nested prefixes) is held once and counted once against the budget. Release order is by worth, and among equals
by last use: the planner's worth is reuse probability x tokens x prefill cost / blocks (arXiv 2603.16104, section 5).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

MAX_NAME = 256  # characters
MAX_PINS = 1024  # names; pins that share all their blocks cost no budget, so names need a bound of their own
ACTIONS = ("pin", "renew", "unpin")


class BadDirective(ValueError):
    """The directive is malformed or cannot be obeyed; the message is for the client."""


@dataclass(frozen=True, slots=True)
class Directive:
    """One parsed ``kv_transfer_params.helium`` object. An `action` of "report" asks for the numbers only."""

    action: str
    name: str = ""
    tokens: int | None = None  # of the prompt; None: all
    ttl_s: float | None = None
    worth: float | None = None


def parse_directive(raw: object) -> Directive:
    """Read ``{"pin": NAME, "tokens": N, "ttl_s": S, "worth": W}``, ``{"renew": …}``, ``{"unpin": …}`` or ``{}``."""
    if not isinstance(raw, dict):
        raise BadDirective("helium must be an object")
    if not raw:
        return Directive("report")
    actions = [action for action in ACTIONS if action in raw]
    if len(actions) != 1:
        raise BadDirective(f"give exactly one of {', '.join(ACTIONS)}")
    action = actions[0]
    allowed = {"pin": {"tokens", "ttl_s", "worth"}, "renew": {"ttl_s", "worth"}, "unpin": set[str]()}[action]
    for key in raw:
        if key != action and key not in allowed:
            raise BadDirective(f"{action} does not take {str(key)[:40]!r}")
    name = raw[action]
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME:
        raise BadDirective(f"{action} must be a name of 1 to {MAX_NAME} characters")
    tokens = raw.get("tokens")
    if tokens is not None and (isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1):
        raise BadDirective("tokens must be a positive integer")
    ttl_s = None if raw.get("ttl_s") is None else _number(raw, "ttl_s", above=0.0)
    worth = None if raw.get("worth") is None else _number(raw, "worth", above=-1e-9)
    return Directive(action, name, tokens, ttl_s, worth)


def _number(raw: dict[str, Any], key: str, above: float) -> float:
    value = raw[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= above:
        raise BadDirective(f"{key} must be a {'positive' if above == 0 else 'non-negative'} number")
    return float(value)


@dataclass(slots=True)
class Pin:
    """A named prefix: `blocks` are the ids of its KV blocks, head first; times are on the caller's clock, in s."""

    name: str
    blocks: tuple[int, ...]
    expires_at: float
    used_at: float
    worth: float = 1.0
    tail: object = None  # hash of the last block: a request whose chain holds it uses this pin

    @property
    def rank(self) -> tuple[float, float]:
        return self.worth, self.used_at


@dataclass(frozen=True, slots=True)
class Change:
    """Blocks to start holding and to stop holding, each head first; disjoint."""

    hold: tuple[int, ...] = ()
    release: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class PinStatistics:
    """Counters are totals since the start; `evicted` counts pins given up for a request or a worthier pin."""

    pins: int
    pinned_blocks: int
    budget_blocks: int
    pinned: int
    refused: int
    expired: int
    evicted: int
    hits: int


class PinLedger:
    """All pins of one engine.

    Args:
        budget_blocks: most KV blocks that all pins together hold.
        default_ttl_s, max_ttl_s: time to live when none is given, and the cap on any.
    """

    def __init__(self, budget_blocks: int, default_ttl_s: float = 300.0, max_ttl_s: float = 3600.0) -> None:
        self.budget_blocks = budget_blocks
        self.default_ttl_s = default_ttl_s
        self.max_ttl_s = max_ttl_s
        # ---- mutable state ----
        self._pins: dict[str, Pin] = {}  # at most MAX_PINS
        self._holders: dict[int, int] = {}  # block id -> number of pins on it (> 0); at most budget_blocks keys
        self._next_expiry = math.inf  # earliest expires_at
        self._pinned = self._refused = self._expired = self._evicted = self._hits = 0  # totals
        self.version = 0  # grows with every change that statistics() shows

    def __repr__(self) -> str:
        return f"<PinLedger {len(self._pins)} pins, {self.pinned_blocks}/{self.budget_blocks} blocks>"

    def __len__(self) -> int:
        return len(self._pins)

    @property
    def pinned_blocks(self) -> int:
        return len(self._holders)

    def held_blocks(self) -> tuple[int, ...]:
        return tuple(self._holders)

    def get(self, name: str) -> Pin | None:
        return self._pins.get(name)

    def statistics(self) -> PinStatistics:
        return PinStatistics(
            pins=len(self._pins),
            pinned_blocks=self.pinned_blocks,
            budget_blocks=self.budget_blocks,
            pinned=self._pinned,
            refused=self._refused,
            expired=self._expired,
            evicted=self._evicted,
            hits=self._hits,
        )

    def pin(
        self,
        name: str,
        blocks: Sequence[int],
        now: float,
        *,
        ttl_s: float | None = None,
        worth: float | None = None,
        tail: object = None,
    ) -> Change:
        """Pin `blocks` under `name`, in place of an earlier pin of that name.

        Makes room by giving up pins of less worth, never of equal or more. Raises `BadDirective`, and changes
        nothing, when that is not enough.
        """
        wanted = dict.fromkeys(blocks)
        worth = 1.0 if worth is None else worth
        if len(wanted) > self.budget_blocks:
            raise BadDirective(f"{len(wanted)} blocks are over the budget of {self.budget_blocks}")
        if name not in self._pins and len(self._pins) >= MAX_PINS:
            raise BadDirective(f"there are {MAX_PINS} pins already")
        victims = self._victims(name, wanted, worth)
        before = dict(self._holders)
        for victim in (*victims, *((name,) if name in self._pins else ())):
            self._forget(victim)
        self._evicted += len(victims)
        self._pins[name] = Pin(name, tuple(wanted), now + self._ttl(ttl_s), now, worth, tail)
        for block in wanted:
            self._holders[block] = self._holders.get(block, 0) + 1
        self._pinned += 1
        self._changed()
        return Change(
            hold=tuple(block for block in wanted if block not in before),
            release=tuple(block for block in before if block not in self._holders),
        )

    def _victims(self, name: str, wanted: dict[int, None], worth: float) -> list[str]:
        """The pins to give up, least rank first, so that `wanted` fits the budget."""
        kept = {pin.name: pin for pin in self._pins.values() if pin.name != name}
        victims: list[str] = []
        while len(wanted.keys() | {block for pin in kept.values() for block in pin.blocks}) > self.budget_blocks:
            least = min(kept.values(), key=lambda pin: pin.rank)
            if least.worth >= worth:
                free = self.budget_blocks - self.pinned_blocks
                raise BadDirective(f"{len(wanted)} blocks do not fit: {free} of {self.budget_blocks} are free")
            victims.append(least.name)
            del kept[least.name]
        return victims

    def renew(self, name: str, now: float, *, ttl_s: float | None = None, worth: float | None = None) -> None:
        """Restart the time to live of a pin. Raises `BadDirective` when there is none of that name."""
        pin = self._pins.get(name)
        if pin is None:
            raise BadDirective(f"no pin is named {name!r}")
        pin.expires_at = now + self._ttl(ttl_s)
        pin.used_at = now
        if worth is not None:
            pin.worth = worth
        self._changed()

    def unpin(self, name: str) -> Change:
        """Give up one pin. Raises `BadDirective` when there is none of that name."""
        if name not in self._pins:
            raise BadDirective(f"no pin is named {name!r}")
        return self._give_up([name])

    def expire(self, now: float) -> Change:
        """Give up the pins whose time has passed. Costs one comparison when there are none."""
        if now < self._next_expiry:
            return Change()
        late = [pin.name for pin in self._pins.values() if pin.expires_at <= now]
        self._expired += len(late)
        return self._give_up(late)

    def clear(self) -> Change:
        """Give up every pin."""
        return self._give_up(list(self._pins))

    def relieve(self, shortage: int, gains: Callable[[int], bool]) -> Change:
        """Give up pins, least worth first, until `shortage` blocks are gained or no pin is left that gains any.

        `gains(block)` says whether a block that no pin holds any more would help the caller.
        """
        released: list[int] = []
        while shortage > 0:
            for pin in sorted(self._pins.values(), key=lambda pin: pin.rank):
                gain = sum(self._holders[block] == 1 and gains(block) for block in pin.blocks)
                if gain:
                    break
            else:
                break
            released += self._give_up([pin.name]).release
            self._evicted += 1
            shortage -= gain
        return Change(release=tuple(released))

    def use(self, chain: Sequence[object], now: float) -> int:
        """Note a request whose prompt's block hashes are `chain`; returns how many pins it uses."""
        used = 0
        for pin in self._pins.values():
            if len(pin.blocks) <= len(chain) and chain[len(pin.blocks) - 1] == pin.tail:
                pin.used_at = now
                used += 1
        if used:
            self._hits += 1
            self.version += 1
        return used

    def refuse(self) -> None:
        """Count a directive that was not obeyed."""
        self._refused += 1
        self.version += 1

    def _give_up(self, names: Sequence[str]) -> Change:
        released = [block for name in names for block in self._forget(name)]
        if names:
            self._changed()
        return Change(release=tuple(released))

    def _forget(self, name: str) -> list[int]:
        """Drop a pin; returns the blocks that no pin holds any more."""
        free = []
        for block in self._pins.pop(name).blocks:
            left = self._holders[block] - 1
            if left:
                self._holders[block] = left
            else:
                del self._holders[block]
                free.append(block)
        return free

    def _ttl(self, ttl_s: float | None) -> float:
        return min(self.default_ttl_s if ttl_s is None else ttl_s, self.max_ttl_s)

    def _changed(self) -> None:
        self._next_expiry = min((pin.expires_at for pin in self._pins.values()), default=math.inf)
        self.version += 1
