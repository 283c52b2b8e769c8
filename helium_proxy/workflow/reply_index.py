"""A tenant's recent replies, by everything that a later prompt may show of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from helium_proxy.workflow.graph import Call
from helium_proxy.workflow.prompt import Message, Prompt, text_key, text_of, units

_K = TypeVar("_K")
_V = TypeVar("_V")

_MAX_UNITS = 64
"""Units indexed per reply, the first of them."""
_MAX_TWINS = 512
"""Equal replies, or replies to equal prompts, that are told apart."""
MAX_TEXTS = 8
"""Different replies that may share a unit before it counts as common."""


@dataclass(slots=True, eq=False)
class Reply:
    """A remembered reply."""

    call: Call
    text: Text | None
    tool_calls: tuple[str, ...]
    prompt: int
    finished_at: float
    users: frozenset[int] = frozenset()
    """Prompts (hashes) of the calls linked to it."""


@dataclass(slots=True, eq=False)
class Text:
    """One reply text, said once or by several calls."""

    key: int
    chars: int
    units: Mapping[int, int]
    """All its units."""
    fresh: Mapping[int, int]
    """Those that the producer's prompt did not hold: evidence."""
    since: float
    """When it was first said."""
    replies: list[Reply] = field(default_factory=list)


class ReplyIndex:
    """One tenant's recent replies, by everything a later prompt may show of them."""

    def __init__(self, capacity: int, scan_chars: int) -> None:
        # Mutable state. Every entry belongs to a reply in `_replies`, and leaves with it.
        self._capacity = capacity
        self._scan_chars = scan_chars
        self._replies: OrderedDict[str, Reply] = OrderedDict()  # call id → reply, oldest first
        self._texts: dict[int, Text] = {}  # text key → text
        # Fresh unit → the text having it, or those (at most MAX_TEXTS + 1), the first to be said first. Mostly
        # one: a list for each would be most of what the garbage collector has to look at.
        self._units: dict[int, Text | tuple[Text, ...]] = {}
        self._prompts: dict[int, list[Reply]] = {}  # hash of a whole prompt → replies to it
        self._tool_calls: dict[str, list[Reply]] = {}  # tool-call id → replies that made it

    def __len__(self) -> int:
        return len(self._replies)

    def __repr__(self) -> str:
        return f"<ReplyIndex {len(self._replies)} replies, {len(self._units)} units>"

    @property
    def sizes(self) -> dict[str, int]:
        """Entries per table."""
        return {
            "replies": len(self._replies),
            "texts": len(self._texts),
            "units": len(self._units),
            "prompts": len(self._prompts),
            "tool_calls": len(self._tool_calls),
        }

    # -- remembering -------------------------------------------------------------------------------------

    def remember(
        self, call: Call, own: Sequence[Message], text: str | None, tool_calls: tuple[str, ...], now: float
    ) -> None:
        """Index a finished call's reply; `own` is the call's own prompt."""
        if call.id in self._replies:
            self.forget(call.id)
        reply = Reply(call, None, tool_calls, call.prompt, now)
        if text and (key := text_key(text)):
            known = self._texts.get(key)
            if known is None:
                known = self._texts[key] = self._new_text(key, text, own, now)
            if len(known.replies) < _MAX_TWINS:
                known.replies.append(reply)
                reply.text = known
        self._replies[call.id] = reply
        _post(self._prompts, call.prompt, reply)
        for tool_call in tool_calls:
            _post(self._tool_calls, tool_call, reply)
        while len(self._replies) > self._capacity:
            self.forget(next(iter(self._replies)))

    def _new_text(self, key: int, text: str, own: Sequence[Message], now: float) -> Text:
        every = units(text[: self._scan_chars])
        if len(every) > _MAX_UNITS:
            every = dict(list(every.items())[:_MAX_UNITS])
        new = set(every)
        for message in own:
            if message.units:
                new.difference_update(every.keys() & message.units.keys())
        fresh = every if len(new) == len(every) else {unit: size for unit, size in every.items() if unit in new}
        made = Text(key, len(text), every, fresh, now)
        known = self._units
        for unit in fresh:
            posting = known.setdefault(unit, made)
            if posting is not made:
                others = posting if isinstance(posting, tuple) else (posting,)
                if len(others) <= MAX_TEXTS:
                    known[unit] = (*others, made)
        return made

    def forget(self, call: str) -> None:
        """Drop one call's reply and everything that pointed to it."""
        reply = self._replies.pop(call, None)
        if reply is None:
            return
        _unpost(self._prompts, reply.prompt, reply)
        for tool_call in reply.tool_calls:
            _unpost(self._tool_calls, tool_call, reply)
        text = reply.text
        if text is not None:
            text.replies.remove(reply)
            if not text.replies:
                del self._texts[text.key]
                for unit in text.fresh:
                    self._forget_unit(unit, text)

    def _forget_unit(self, unit: int, text: Text) -> None:
        posting = self._units.get(unit)
        if posting is text:
            del self._units[unit]
        elif isinstance(posting, tuple) and text in posting:
            left = tuple(other for other in posting if other is not text)
            self._units[unit] = left if len(left) > 1 else left[0]

    # -- looking up --------------------------------------------------------------------------------------

    def by_response(self, response: str) -> Call | None:
        """The call whose response had that id."""
        reply = self._replies.get(response)
        return None if reply is None else reply.call

    def fill_units(self, prompt: Prompt, start: int) -> int:
        """Split the messages from `start` that never were, newest first, within the budget; returns what is
        the first message that can be searched."""
        left = self._scan_chars
        for position in range(len(prompt.messages) - 1, start - 1, -1):
            message = prompt.messages[position]
            if message.units is None:
                if left <= 0:
                    return position + 1
                message.units = units(text_of(prompt.raw[position])[:left])
                left -= message.chars
        return start

    def replies_to(self, prompt: int) -> list[Reply]:
        return self._prompts.get(prompt, [])

    def makers_of(self, tool_call: str) -> list[Reply]:
        return self._tool_calls.get(tool_call, [])

    def text(self, key: int) -> Text | None:
        return self._texts.get(key)

    def hits(self, found: Mapping[int, int]) -> Sequence[tuple[int, Text | tuple[Text, ...]]]:
        """`(unit, texts)` of the units that any reply has freshly."""
        known = self._units
        return [(unit, known[unit]) for unit in found if unit in known]


def _post(table: dict[_K, list[_V]], key: _K, value: _V) -> None:
    posting = table.setdefault(key, [])
    if len(posting) < _MAX_TWINS:
        posting.append(value)


def _unpost(table: dict[_K, list[_V]], key: _K, value: _V) -> None:
    posting = table.get(key)
    if posting is None:
        return
    try:
        posting.remove(value)
    except ValueError:
        return
    if not posting:
        del table[key]
