"""Prompts as messages of texts, and texts as lines of parts: reading, splitting and comparing them.

A message is its *frame* (the message without its texts, as JSON) and its texts. A text is a *line* of parts:
constant, or a `Ref` to a text of an earlier call of the run or to its reply, or unknown. Only exact text counts.
Matching is `str.find` and dictionaries, never a loop over characters. Nothing here raises on odd input.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeVar

import orjson

MIN_CHARS = 16
"""Shorter texts are too common to say where they came from."""
MAX_MESSAGES = 256
_MAX_FRAME = 16_384
"""A message with more beside its texts (pictures) is not read."""
_PROBE = 32
_MAX_HITS = 8
"""Places at which one of them is noted in one text."""
_FIELDS = (
    *("tools", "tool_choice", "functions", "documents", "chat_template", "chat_template_kwargs"),
    *("continue_final_message", "mm_processor_kwargs", "reasoning_effort"),
)
"""What else of a request decides its prompt."""


_Sliced = TypeVar("_Sliced", str, "array[int]")

REPLY: Final = -1
RAW, STRIPPED, EITHER = 0, 1, 2
"""The slots of a reply: as it came, without white space at its ends, and one that has none there."""
FRAME: Final = -1
SOLE: Final = -1


class Ref(NamedTuple):
    """A text of an earlier call of the run."""

    base: str
    iteration: int
    ordinal: int
    """Which of the run's calls of that key, in order of arrival; `SOLE`: the only one among the ancestors."""
    message: int
    """`REPLY`: the call's reply."""
    slot: int
    """Which of the message's texts; `FRAME`: the message without them. Of a reply: `RAW`, `STRIPPED` or `EITHER`."""
    inner: bool = False
    """The part between what is constant at the text's two ends."""


class Part(NamedTuple):
    """Constant text, a reference, or both (equal so far in all runs, and a reference in each); neither: unknown."""

    text: str | None = None
    ref: Ref | None = None


GAP: Final = Part()
Line = tuple[Part, ...]
"""Parts in order; at most one of them is a gap, and it is last or last but one constant."""


class Texts(NamedTuple):
    """A request as it is learned."""

    frames: tuple[str, ...]
    slots: tuple[tuple[str, ...], ...]
    whole: bool
    """False where messages were left out."""
    extras: str

    @property
    def chars(self) -> int:
        return sum(map(len, self.frames)) + sum(len(text) for slots in self.slots for text in slots)


def read(body: Mapping[str, Any]) -> Texts | None:
    """The texts of a chat request; None for anything else."""
    messages = body.get("messages")
    if not isinstance(messages, list):
        return None
    frames, slots = [], []
    for message in messages[:MAX_MESSAGES]:
        read_ = _frame(message)
        if read_ is None:
            break
        frames.append(read_[0])
        slots.append(read_[1])
    extras = _json({name: body[name] for name in _FIELDS if body.get(name) is not None})
    if extras is None:
        return None
    return Texts(tuple(frames), tuple(slots), len(frames) == len(messages), extras)


def _frame(message: Any) -> tuple[str, tuple[str, ...]] | None:
    if not isinstance(message, dict):
        return None
    content, frame = message.get("content"), message
    texts: tuple[str, ...] = ()
    if isinstance(content, str):
        frame, texts = {**message, "content": ""}, (content,)
    elif isinstance(content, list):
        blank = [{**item, "text": ""} if is_text(item) else item for item in content]
        frame, texts = {**message, "content": blank}, tuple(item["text"] for item in content if is_text(item))
    written = _json(frame)
    if written is None or len(written) > _MAX_FRAME or _json(texts) is None:
        return None
    return written, texts


def is_text(item: Any) -> bool:
    """Whether it is a text among a message's parts."""
    return isinstance(item, dict) and isinstance(item.get("text"), str)


def _json(value: Any) -> str | None:
    try:
        return orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS).decode()
    except (TypeError, ValueError, RecursionError):  # lone surrogates, large integers, deep nesting
        return None


def dump_part(one: Part) -> list[Any]:
    """As JSON has it."""
    return [one.text, None if one.ref is None else list(one.ref)]


def load_part(data: Any) -> Part:
    """The inverse of `dump_part`. Raises TypeError or ValueError."""
    text, ref = data
    if not (text is None or isinstance(text, str)):
        raise ValueError("not a part")
    return Part(text, None if ref is None else Ref(*ref))


def split(text: str, whole: Mapping[str, Ref], search: Sequence[tuple[str, Ref]]) -> Line:
    """`text` in parts: those of `whole` that it is, or those of `search` that are in it."""
    ref = whole.get(text)
    if ref is not None or len(text) < MIN_CHARS:
        return (Part(text, ref),)
    hits: list[tuple[int, int, Ref]] = []
    for value, ref in search:
        begin, size = value[:_PROBE], len(value)  # looking for long texts costs more
        at = text.find(begin)
        for _ in range(_MAX_HITS):
            if at < 0:
                break
            if text.startswith(value, at):
                hits.append((at, -size, ref))
                at = text.find(begin, at + size)
            else:
                at = text.find(begin, at + 1)
    line, done = [], 0
    for at, size, ref in sorted(hits):
        if at < done:
            continue
        if at > done:
            line.append(Part(text[done:at]))
        done = at - size
        line.append(Part(text[at:done], ref))
    if done < len(text):
        line.append(Part(text[done:]))
    return tuple(line)


def both(one: Part, other: Part) -> Part:
    """What two parts agree on."""
    return Part(one.text if one.text == other.text else None, _same(one.ref, other.ref))


def _same(one: Ref | None, other: Ref | None) -> Ref | None:
    if one == other or one is None or other is None:
        return one if one == other else None
    if one.message == REPLY and EITHER in (one.slot, other.slot) and one._replace(slot=other.slot) == other:
        return other if one.slot == EITHER else one
    return None


def merge(one: Line, other: Line) -> Line:
    """What two lines agree on, from their beginnings to where they part, and their last words. `other` has no gap."""
    merged: list[Part] = []
    for mine, theirs in zip(one, other, strict=False):
        agreed = both(mine, theirs)
        if agreed == GAP:
            break
        merged.append(agreed)
    at = len(merged)
    if at == len(one) == len(other):
        return tuple(merged)
    head = ""
    mine_left = one[at].text if at < len(one) else ""
    theirs_left = other[at].text if at < len(other) else ""
    if mine_left and theirs_left:
        head = mine_left[: shared(mine_left, theirs_left)]
        if head:
            merged.append(Part(head))
    merged.append(GAP)
    if at < len(one) and at < len(other):
        mine_last = (one[-1].text or "")[len(head) if len(one) == at + 1 else 0 :]
        theirs_last = (other[-1].text or "")[len(head) if len(other) == at + 1 else 0 :]
        size = shared(mine_last[::-1], theirs_last[::-1])
        if size:
            merged.append(Part(mine_last[-size:]))
    return tuple(merged)


def shared(one: _Sliced, other: _Sliced) -> int:
    """Leading characters of texts, or ids of prompts, that two share, by halving."""
    low, high = 0, min(len(one), len(other))
    if one[:high] == other[:high]:
        return high
    while low < high:
        middle = (low + high + 1) >> 1
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
