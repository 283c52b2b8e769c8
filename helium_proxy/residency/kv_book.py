"""vLLM's KV events, understood: decoding, sequence, reference counts, and what they say about a prompt. No I/O.

vLLM publishes batches numbered from 0: ``[ts, [event, …], dp_rank]`` in msgpack, each event a map with a ``type``. A
block's hash is stored once per *copy* (vLLM does not merge equal blocks, and recomputes the last block of a prompt
that fills it) and removed once per copy, so copies are counted. `EventBook` turns numbered batches into events that
say what changed, and says when to ask for a replay. `BlockView` maps the engine's hashes to this proxy's own chain
hashes through (parent, token ids), so that a look-up needs nothing but the chain the planner has anyway.

Counted on purpose, not trusted: a request with ``kv_cache_report_mode: full`` reports blocks again that exist once;
their count is then one too high, until `forget` (a wrong prediction) or `Cleared`.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from helium_proxy.residency.chain import token_chain

BlockHash = int | bytes
"""64 bits by default, the whole digest where the engine runs with VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES=0."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Consecutive full blocks became resident (some may have been already). `salt` is the request's ``cache_salt``
    and `parent` None where the first of them begins a prompt. `opaque`: they hold more than tokens (an image), or
    not one block per hash, and cannot be told from text."""

    hashes: tuple[BlockHash, ...]
    parent: BlockHash | None
    token_ids: array[int]
    block_size: int
    salt: str = ""
    lora: str | None = None
    opaque: bool = False


@dataclass(frozen=True, slots=True)
class Removed:
    """The last copy of each of these blocks is gone."""

    hashes: tuple[BlockHash, ...]


@dataclass(frozen=True, slots=True)
class Cleared:
    """Nothing known before holds: the engine reset its cache, began anew, or events were lost beyond recall."""

    reason: Literal["engine", "restart", "lost"]


Event = Stored | Removed | Cleared


@dataclass(frozen=True, slots=True)
class NeedReplay:
    """Ask for all batches from number `start` on, and hand them to `EventBook.replayed`."""

    start: int


class _BlockStored(msgspec.Struct, tag="BlockStored", kw_only=True):
    block_hashes: list[BlockHash]
    parent_block_hash: BlockHash | None = None
    token_ids: list[int]
    block_size: int
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[list[Any] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None


class _BlockRemoved(msgspec.Struct, tag="BlockRemoved", kw_only=True):
    block_hashes: list[BlockHash]
    medium: str | None = None
    group_idx: int | None = None


class _AllBlocksCleared(msgspec.Struct, tag="AllBlocksCleared"):
    pass


class _Batch(msgspec.Struct, array_like=True):
    ts: float
    events: list[msgspec.Raw]
    rank: int | None = None


_decode_batch = msgspec.msgpack.Decoder(_Batch).decode
_decode_event = msgspec.msgpack.Decoder(_BlockStored | _BlockRemoved | _AllBlocksCleared).decode


@dataclass(frozen=True, slots=True)
class BookStatistics:
    blocks: int
    """Distinct blocks believed resident."""
    applied: int
    """Batches taken in."""
    gaps: int
    resets: int
    """Times everything was given up: a restart, or events lost beyond recall."""
    undecodable: int
    """Batches or events not understood, skipped."""


class EventBook:
    """One publisher's batches in order, whatever the network did to them.

    `live` takes what the subscription delivers, `replayed` the answer to a `NeedReplay`; both give the events to act
    on. At most `max_blocks` hashes are remembered; beyond that the oldest are given up, as if removed.
    """

    def __init__(self, max_blocks: int = 1 << 20) -> None:
        self._max_blocks = max_blocks
        # State. `_copies`: hash → copies, in order of first arrival. `_next`: number of the batch expected next;
        # `_last`: the bytes of the one before it, by which a restarted engine is told from the same one. `_live`: the
        # highest number the subscription delivered, `_held`: a live batch that waits for a replay before it.
        # `_whole`: see `whole`. `_group`: the KV cache group that is followed (hybrid models have several).
        self._copies: dict[BlockHash, int] = {}
        self._next = 0
        self._last: bytes | None = None
        self._live = -1
        self._held: tuple[int, bytes] | None = None
        self._from_zero = True  # the replay that was asked for is of everything
        self._joining = False  # nothing is known and nothing can be replayed: the next live batch is the first
        self._whole = False
        self._group: int | None = None
        self._applied = self._gaps = self._resets = self._undecodable = 0

    def __repr__(self) -> str:
        return f"EventBook({len(self._copies)} blocks, next {self._next}, {self._gaps} gaps)"

    def statistics(self) -> BookStatistics:
        return BookStatistics(len(self._copies), self._applied, self._gaps, self._resets, self._undecodable)

    def __contains__(self, block: BlockHash) -> bool:
        return block in self._copies

    @property
    def whole(self) -> bool:
        """Whether all that is resident is known: the history began with the engine's first batch, or its cache has
        been emptied since. Else blocks from before, and all that follows them in a prompt, are not."""
        return self._whole

    def resync(self) -> NeedReplay:
        """What to ask after a (re)connection, or to find out whether something was missed."""
        self._from_zero = self._last is None
        return NeedReplay(0 if self._last is None else self._next - 1)

    def live(self, number: int, payload: bytes) -> list[Event] | NeedReplay:
        """A batch from the subscription, whose numbers only rise while the engine lives."""
        restarted = number <= self._live
        self._live = number
        if restarted:  # the book still holds the former life: the replay will not begin with its last batch
            self._held = (number, payload)
            return self.resync()
        if number < self._next:
            return []  # a replay brought it already
        if number == self._next or self._joining:
            self._joining = False
            return self._apply(number, payload)
        self._gaps += 1
        self._held = (number, payload)
        return self.resync()

    def replayed(self, batches: Sequence[tuple[int, bytes]] | None) -> Iterator[Event] | NeedReplay:
        """The answer to a `NeedReplay`, in order; None when there was none (no replay endpoint, a timeout).

        The events come lazily, as there may be many: read them all before anything else is done with the book.
        """
        held, self._held = self._held, None
        stranger = self._from_zero and self._last is not None  # the last answer did not go on from what we knew
        events: list[Event] = []
        if batches is None:
            if held or stranger:
                events += self._reset("lost")
            self._joining = self._last is None and not held
        elif not self._from_zero:
            if not batches or batches[0] != (self._next - 1, self._last):
                self._held = held
                self._from_zero = True
                return NeedReplay(0)  # another engine, or too much was lost: take all it has
        elif stranger:
            events += self._reset("restart" if not batches or batches[0][0] == 0 else "lost")
        return self._take(events, [*(batches or ()), *([held] if held else ())])

    def _take(self, events: list[Event], batches: list[tuple[int, bytes]]) -> Iterator[Event]:
        yield from events
        for number, payload in batches:
            if number > self._next and self._last is not None:
                yield from self._reset("lost")
            if number >= self._next:
                yield from self._apply(number, payload)

    def forget(self, blocks: Iterable[BlockHash]) -> None:
        """These turned out not to be there."""
        for block in blocks:
            self._copies.pop(block, None)

    def _reset(self, reason: Literal["restart", "lost"]) -> list[Event]:
        if self._last is None:
            return []  # nothing was known
        self._copies.clear()
        self._next = 0
        self._last = None
        self._group = None
        self._whole = False
        self._resets += 1
        return [Cleared(reason)]

    def _apply(self, number: int, payload: bytes) -> list[Event]:
        if self._last is None:
            self._whole = number == 0
        self._next = number + 1
        self._last = payload
        self._applied += 1
        try:
            batch = _decode_batch(payload)
        except msgspec.MsgspecError:
            self._undecodable += 1
            return []
        events: list[Event] = []
        for raw in batch.events:
            try:
                event = _decode_event(raw)
            except msgspec.MsgspecError:
                self._undecodable += 1
                continue
            match event:
                case _BlockStored():
                    events += self._stored(event)
                case _BlockRemoved():
                    events += self._removed(event)
                case _:
                    self._copies.clear()
                    self._whole = True
                    events.append(Cleared("engine"))
        return events

    def _stored(self, event: _BlockStored) -> list[Event]:
        if event.medium not in _ON_DEVICE or event.kv_cache_spec_kind not in _WHOLE_PREFIX:
            return []
        if self._group is None:
            self._group = event.group_idx
        if event.group_idx != self._group or not event.block_hashes:
            return []
        for block in event.block_hashes:
            self._copies[block] = self._copies.get(block, 0) + 1
        salt, opaque = _salt(event)
        stored = Stored(
            tuple(event.block_hashes),
            event.parent_block_hash,
            array("I", event.token_ids),
            event.block_size,
            salt,
            event.lora_name,
            opaque or len(event.token_ids) != event.block_size * len(event.block_hashes),
        )
        over = len(self._copies) - self._max_blocks
        if over <= 0:
            return [stored]
        oldest = tuple(block for block, _ in zip(self._copies, range(over), strict=False))
        self.forget(oldest)
        return [stored, Removed(oldest)]

    def _removed(self, event: _BlockRemoved) -> list[Event]:
        if event.medium not in _ON_DEVICE or event.group_idx != self._group:
            return []
        gone: list[BlockHash] = []
        for block in event.block_hashes:
            copies = self._copies.get(block, 0)
            if copies > 1:
                self._copies[block] = copies - 1
            elif copies == 1:
                del self._copies[block]
                gone.append(block)
        return [Removed(tuple(gone))] if gone else []


_ON_DEVICE = (None, "GPU")
"""The device's own cache (vLLM says GPU on a CPU, too); other media are what a connector keeps elsewhere."""

_WHOLE_PREFIX = (None, "full_attention", "mla_attention", "sink_full_attention")
"""Kinds of KV cache groups in which every block of a prefix is kept."""


def _salt(event: _BlockStored) -> tuple[str, bool]:
    """The request's cache salt (it is among the first block's extra keys), and whether there are others."""
    salt, opaque = "", False
    for index, keys in enumerate(event.extra_keys or ()):
        left = [key for key in keys or () if key != event.lora_name]
        if index == 0 and event.parent_block_hash is None and left and isinstance(left[0], str):
            salt, left = left[0], left[1:]
        opaque = opaque or bool(left)
    return salt, opaque


@dataclass(frozen=True, slots=True)
class Change:
    """What an event means in chain hashes (`helium_proxy.residency.chain`): for `WorkerResidency.store` and `drop`.
    `cleared` comes before both."""

    stored: tuple[int, ...] = ()
    dropped: tuple[int, ...] = ()
    cleared: bool = False


class BlockView:
    """One worker's resident blocks under this proxy's chain hashes.

    `model` is the served name whose chains are mirrored; an adapter's blocks go under the adapter's name. Memory is
    that of the book: one entry per resident block.
    """

    def __init__(self, model: str, block_size: int) -> None:
        self._model = model
        self._block_size = block_size
        # State: engine's hash → chain hash of every block whose whole prefix is known, and the inverse.
        self._chain_of: dict[BlockHash, int] = {}
        self._block_of: dict[int, BlockHash] = {}
        self._fits: bool | None = None  # whether blocks of our size have been stored; None: no blocks at all

    def __repr__(self) -> str:
        return f"BlockView({self._model}, {len(self._block_of)} blocks of {self._block_size})"

    def __len__(self) -> int:
        return len(self._block_of)

    @property
    def fits(self) -> bool:
        """False where the engine's blocks are all of another size than was said (with decode context parallelism
        they are larger): then none of them is seen."""
        return self._fits is not False

    @property
    def blocks(self) -> Mapping[int, BlockHash]:
        """The resident blocks' chain hashes, as keys; changes with every event."""
        return self._block_of

    def apply(self, event: Event) -> Change:
        """Take in one event of the book."""
        match event:
            case Cleared():
                self._chain_of.clear()
                self._block_of.clear()
                return Change(cleared=True)
            case Removed(hashes):
                chains = (self._chain_of.pop(block, None) for block in hashes)
                dropped = tuple(chain for chain in chains if chain is not None)
                for chain in dropped:
                    self._block_of.pop(chain, None)
                return Change(dropped=dropped)
            case Stored():
                return self._store(event)

    def resident(self, chain: Sequence[int]) -> int:
        """How many leading blocks of `chain` (from `token_chain`, salted as `salt_of` says) are resident."""
        known = self._block_of
        for count, block in enumerate(chain):
            if block not in known:
                return count
        return len(chain)

    def resident_tokens(self, tokens: Sequence[int], cache_salt: str = "") -> int:
        """How many leading full blocks of a prompt are resident."""
        return self.resident(token_chain(tokens, self._block_size, salt_of(self._model, cache_salt)))

    def _store(self, event: Stored) -> Change:
        if event.block_size == self._block_size:
            self._fits = True
        elif self._fits is None:
            self._fits = False
        if event.opaque or event.block_size != self._block_size:
            return Change()
        if event.parent is None:
            chain = token_chain(event.token_ids, self._block_size, salt_of(event.lora or self._model, event.salt))
        elif (parent := self._chain_of.get(event.parent)) is not None:
            chain = token_chain(event.token_ids, self._block_size, parent=parent)
        else:
            return Change()  # its beginning is not known: events from before the subscription, or an image
        for block, own in zip(event.hashes, chain, strict=True):
            self._chain_of[block] = own
            self._block_of[own] = block
        return Change(stored=chain)


def salt_of(model: str, cache_salt: str = "") -> str:
    """The salt of a prompt's chain: what separates prompts of equal tokens that share no blocks."""
    return f"{model}\x1f{cache_salt}"
