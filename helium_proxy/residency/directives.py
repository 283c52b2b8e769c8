"""Cache directives: which prefixes are worth keeping, and where. Pure: state, values and an injected clock.

`Prefixes` learns from the calls themselves which part of a node's prompt is *static*, that is equal in all runs of
its workflow, in the engine's own blocks: whatever the API, and whether the part ends at a message or within one. It
counts how often each worker serves it. `choose` gives a worker's budget to the prefixes of most worth,

    worth of a block = expected uses per second × seconds to prefill it,

which is reuse probability × tokens × prefill cost ÷ blocks. `PinBook` remembers what was pinned where and says what
to tell a worker next.
"""

from __future__ import annotations

import math
from collections import OrderedDict, defaultdict, deque
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import xxhash

from helium_proxy.residency.index import Chain

Key = tuple[str, str, str]
"""(template, node, model)."""

MEMORY_S = 600.0
"""Uses are counted with this time constant, and their rate is that count over it."""
_RUNS = 8
"""The static part is what so many latest runs have in common: a prompt that was changed is learned anew."""
_MAX_BLOCKS = 4096
_MAX_WORKERS = 64


@dataclass(slots=True)
class _Node:
    chain: Chain = ()
    run: str = ""
    common: deque[int] = field(default_factory=lambda: deque(maxlen=_RUNS))
    uses: dict[str, tuple[float, float]] = field(default_factory=dict)  # worker → (decayed count, as of)
    source: Any = None


@dataclass(frozen=True, slots=True)
class Prefix:
    """A static prefix, used `uses_s` times a second on some worker. `source`: what the caller can make it from."""

    name: str
    chain: Chain
    uses_s: float
    source: Any = None


@dataclass(frozen=True, slots=True)
class Pin:
    """A prefix to be kept: `chain` may be shorter than the prefix where the budget ended. `worth` in engine seconds
    saved per second, per block."""

    name: str
    chain: Chain
    worth: float
    source: Any = None


class Prefixes:
    """What the nodes' prompts begin with. At most `limit` nodes, the least recently called leave first."""

    def __init__(self, limit: int = 512) -> None:
        self._limit = limit
        # -- state
        self._nodes: OrderedDict[Key, _Node] = OrderedDict()

    def __repr__(self) -> str:
        return f"<Prefixes of {len(self._nodes)} nodes>"

    def __len__(self) -> int:
        return len(self._nodes)

    def learn(self, key: Key, run: str, chain: Chain, worker: str, now: float, source: Any = None) -> None:
        """A call of `key` goes to `worker`. O(length of what it shares with the one before)."""
        node = self._nodes.get(key)
        if node is None:
            node = self._nodes[key] = _Node()
            while len(self._nodes) > self._limit:
                self._nodes.popitem(last=False)
        else:
            self._nodes.move_to_end(key)
            shared = common(node.chain, chain)
            if run != node.run or (node.common and shared < min(node.common)):
                node.common.append(shared)
        node.chain, node.run, node.source = tuple(chain[:_MAX_BLOCKS]), run, source
        count, since = node.uses.get(worker, (0.0, now))
        node.uses[worker] = (count * math.exp((since - now) / MEMORY_S) + 1.0, now)
        if len(node.uses) > _MAX_WORKERS:
            del node.uses[min(node.uses, key=lambda w: node.uses[w][1])]

    def static(self, key: Key) -> Prefix | None:
        """The static prefix of `key`; None until two runs agree on one."""
        node = self._nodes.get(key)
        blocks = min(node.common, default=0) if node is not None else 0
        if node is None or not blocks:
            return None
        return Prefix(name_of(key), node.chain[:blocks], 0.0, node.source)

    def used_on(
        self, worker: str, now: float, *, least_blocks: int, least_uses_s: float, without: Container[str] = ()
    ) -> list[Prefix]:
        """Static prefixes that `worker` serves, the cold, the short and those of the templates `without` left out."""
        found = []
        for key, node in self._nodes.items():
            if key[0] in without:
                continue
            count, since = node.uses.get(worker, (0.0, now))
            uses_s = count * math.exp((since - now) / MEMORY_S) / MEMORY_S
            blocks = min(node.common, default=0)
            if blocks >= least_blocks and uses_s >= least_uses_s:
                found.append(Prefix(name_of(key), node.chain[:blocks], uses_s, node.source))
        return found


def common(one: Chain, other: Chain) -> int:
    """Leading blocks that two chains share. O(log): a block's hash covers everything before it."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high) >> 1
        if one[middle] == other[middle]:
            low = middle + 1
        else:
            high = middle
    return low


@lru_cache(maxsize=1024)
def name_of(key: Key) -> str:
    """A pin's name: readable, and one key's alone."""
    return f"{key[1][:64]}@{xxhash.xxh64_hexdigest(chr(31).join(key).encode('utf-8', 'surrogatepass'))[:12]}"


def busiest(prefixes: Sequence[Prefix], blocks: int) -> list[Prefix]:
    """The most used of `prefixes`, about `blocks` blocks of them: bounds what `choose` has to look at."""
    found, total = [], 0
    for prefix in sorted(prefixes, key=lambda p: (-p.uses_s, p.name)):
        if total >= blocks:
            break
        found.append(prefix)
        total += len(prefix.chain)
    return found


def choose(prefixes: Sequence[Prefix], budget: int, block_prefill_s: float, least_blocks: int = 1) -> list[Pin]:
    """The pins that make the most of `budget` blocks. A block that several prefixes begin with counts once, and is
    worth what it is to all of them; the last prefix to fit is cut to what is left, if that is `least_blocks`."""
    uses: defaultdict[int, float] = defaultdict(float)  # of a block, a second
    for prefix in prefixes:
        for block in prefix.chain:
            uses[block] += prefix.uses_s
    worth = {p.name: block_prefill_s * sum(uses[b] for b in p.chain) / len(p.chain) for p in prefixes if p.chain}
    taken: set[int] = set()
    pins = []
    for prefix in sorted((p for p in prefixes if p.chain), key=lambda p: (-worth[p.name], p.name)):
        room = budget - len(taken)
        new = sum(block not in taken for block in prefix.chain)
        keep = len(prefix.chain) - max(0, new - room)  # blocks taken already are its first ones
        if keep < least_blocks or (new and not room):
            continue
        chain = prefix.chain[:keep]
        taken.update(chain)
        pins.append(Pin(prefix.name, chain, worth[prefix.name], prefix.source))
    return pins


@dataclass(slots=True)
class _Held:
    chain: Chain
    expires: float
    sure: bool = False
    """The engine has not said otherwise."""
    before: _Held | None = None
    """What the engine holds as long as it is not."""


class PinBook:
    """One worker's pins: what they should be, and what they are as far as is known. Seconds."""

    def __init__(self, ttl_s: float) -> None:
        self._ttl_s = ttl_s
        # -- state, bounded by the budget's blocks
        self.planned: dict[str, Pin] = {}
        self._held: dict[str, _Held] = {}
        self._refused: dict[str, float] = {}  # name → when it may be tried again

    def __repr__(self) -> str:
        return f"<PinBook {len(self._held)} of {len(self.planned)} pins>"

    def held(self, name: str) -> bool:
        return name in self._held

    def plan(self, pins: Sequence[Pin], now: float) -> list[str]:
        """What should be pinned from now on. Returns the names of pins that have lapsed meanwhile."""
        self.planned = {pin.name: pin for pin in pins}
        lapsed = [name for name, held in self._held.items() if held.expires <= now]
        for name in lapsed:
            del self._held[name]
        self._refused = {name: until for name, until in self._refused.items() if until > now}
        return lapsed

    def directive(self, name: str, block_size: int, now: float) -> dict[str, Any] | None:
        """What to send along with a call that begins with the prefix `name`. None: nothing is due."""
        pin, held = self.planned.get(name), self._held.get(name)
        if pin is None or name in self._refused:
            return None
        if held is not None and held.expires - now > self._ttl_s / 2 and held.chain == pin.chain:
            return None
        before = held if held is None or held.sure else held.before
        self._held[name] = _Held(pin.chain, now + self._ttl_s, before=before)  # so that its siblings do not ask, too
        return {"pin": name, "tokens": len(pin.chain) * block_size, "ttl_s": self._ttl_s, "worth": pin.worth}

    def obeyed(self, name: str) -> Chain | None:
        """The engine has it; returns the blocks that are pinned."""
        held = self._held.get(name)
        if held is None:
            return None
        held.sure, held.before = True, None
        return held.chain

    def refused(self, name: str, now: float) -> None:
        """The engine has not; it is asked again after a while."""
        self.forget(name)
        self._refused[name] = now + self._ttl_s / 10

    def forget(self, name: str) -> None:
        """The call that carried the directive failed: the engine holds what it held before, until that lapses."""
        held = self._held.get(name)
        if held is None or held.sure:
            return
        if held.before is not None:
            self._held[name] = held.before
        else:
            del self._held[name]

    def renewals(self, now: float) -> list[Pin]:
        """Planned pins that lapse within a third of their life (a short one: within 3 s) unless somebody renews
        them."""
        margin = max(self._ttl_s / 3, min(3.0, 0.75 * self._ttl_s))
        return [
            pin
            for name, pin in self.planned.items()
            if (held := self._held.get(name)) and held.sure and held.expires - now < margin
        ]

    def renewed(self, name: str, now: float) -> None:
        held = self._held.get(name)
        if held is not None:
            held.expires = now + self._ttl_s

    def surplus(self) -> list[str]:
        """Pins that nobody wants any more."""
        return [name for name, held in self._held.items() if held.sure and name not in self.planned]

    def give_back(self) -> dict[str, Any] | None:
        """What to send along with any call to get rid of a surplus pin; None: there is none. `dropped` or `kept` says
        how it went."""
        name = next(iter(self.surplus()), None)
        if name is None:
            return None
        self._held[name].sure = False  # so that the next call does not ask, too
        return {"unpin": name}

    def kept(self, name: str) -> None:
        """The call that was to give it back failed."""
        held = self._held.get(name)
        if held is not None:
            held.sure = True

    def dropped(self, name: str) -> None:
        self._held.pop(name, None)

    def clear(self) -> None:
        """The engine restarted: it holds nothing."""
        self._held.clear()
        self._refused.clear()
