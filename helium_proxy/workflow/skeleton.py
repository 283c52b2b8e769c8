"""What the prompts of one node are made of: texts equal in all runs, texts the run has shown before, replies.

The lines (`parts.py`) of several runs' prompts are merged into what they agree on, so that a part that was wrong
once is gone; a second generation, begun later, takes over after a while, so that a prompt that was changed is learned
anew. What is left can be rendered while the client still thinks, up to the first part that is not known by then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import orjson

from helium_proxy.workflow.parts import (
    EITHER,
    FRAME,
    GAP,
    MIN_CHARS,
    RAW,
    REPLY,
    STRIPPED,
    Line,
    Part,
    Ref,
    Texts,
    both,
    dump_part,
    is_text,
    load_part,
    merge,
    split,
)

MAX_CHARS = 65_536
"""Of one node's prompts that are kept."""
MAX_PARTS = 256
_MAX_SOURCES = 64
_MAX_TEXTS = 128
"""Texts that are looked for inside others, for one prompt."""
_SCAN_CHARS = 1 << 22
"""Characters gone through for one prompt, all texts together."""
_GENERATION = 16
"""Observations after which a prompt is learned anew beside the old one, that it may change."""
_ALWAYS = 16
_SELDOM = 8
"""After the first so many prompts of a node, one in so many is learned."""


@dataclass(frozen=True, slots=True)
class Source:
    """An earlier call of the run: where its texts may be found again."""

    base: str
    iteration: int
    ordinal: int
    texts: Texts | None
    reply: str | None
    skeleton: Skeleton | None = None


class Known:
    """The texts that a run has shown so far, by what they are. The first of equal texts counts, in an order that
    does not depend on which call came first: replies, then messages, by node."""

    def __init__(self, sources: Iterable[Source]) -> None:
        self.whole: dict[str, Ref] = {}
        self.frames: dict[str, Ref] = {}
        ordered = sorted(sources, key=lambda s: (s.base, s.iteration, s.ordinal))[:_MAX_SOURCES]
        for source in ordered:
            if source.reply is not None:
                key, stripped = (source.base, source.iteration, source.ordinal), source.reply.strip()
                self._add(source.reply, Ref(*key, REPLY, EITHER if source.reply == stripped else RAW))
                self._add(stripped, Ref(*key, REPLY, STRIPPED))
        for source in ordered:
            if source.texts is not None:
                self._read(source, source.texts)

    def __repr__(self) -> str:
        return f"<Known {len(self.whole)} texts>"

    def _add(self, text: str, ref: Ref) -> None:
        if len(text) >= MIN_CHARS:
            self.whole.setdefault(text, ref)

    def _read(self, source: Source, texts: Texts) -> None:
        key = (source.base, source.iteration, source.ordinal)
        for at, (frame, slots) in enumerate(zip(texts.frames, texts.slots, strict=True)):
            self.frames.setdefault(frame, Ref(*key, at, FRAME))
            for slot, text in enumerate(slots):
                self._add(text, Ref(*key, at, slot))
                inner = inside(source.skeleton, text, at, slot)
                if inner is not None:
                    self._add(inner, Ref(*key, at, slot, True))


def inside(skeleton: Skeleton | None, text: str, message: int, slot: int) -> str | None:
    """The part of `text` that changes from run to run, where the rest of it is constant."""
    ends = None if skeleton is None else skeleton.ends(message, slot)
    if ends is None:
        return None
    head, tail = ends
    if len(text) < len(head) + len(tail) or not (text.startswith(head) and text.endswith(tail)):
        return None
    return text[len(head) : len(text) - len(tail)]


@dataclass(slots=True)
class _Message:
    frame: Part
    lines: tuple[Line, ...]


@dataclass(slots=True)
class Rendered:
    """A prompt as far as it is known."""

    messages: list[dict[str, Any]]
    extras: dict[str, Any]
    open: bool
    """The last message's last text goes on."""
    whole: bool
    """Nothing is missing."""
    chars: int


class Skeleton:
    """One node's. At most `MAX_PARTS` parts and `MAX_CHARS` characters, twice."""

    def __init__(self) -> None:
        # Mutable state.
        self._old: _Generation | None = None  # what is rendered
        self._young: _Generation | None = None  # what will take its place
        self.seen = 0

    def __repr__(self) -> str:
        return f"<Skeleton of {self.seen} prompts>"

    @property
    def due(self) -> bool:
        """Whether the next prompt is to be learned."""
        return self.seen < _ALWAYS or self.seen % _SELDOM == 0

    def skip(self) -> None:
        """A prompt that was not."""
        self.seen += 1

    def learn(self, run: str, texts: Texts, known: Known) -> None:
        """Another prompt of the node."""
        self.seen += 1
        made = _observe(run, texts, known)
        if self._old is None:
            self._old = made
            return
        self._old.merge(made)
        if self._young is None:
            self._young = made
        else:
            self._young.merge(made)
        if self._young.merged >= _GENERATION and self._young.runs >= 2:
            self._old, self._young = self._young, None

    def ends(self, message: int, slot: int) -> tuple[str, str] | None:
        """The constant ends of a text, where something between them changes."""
        old = self._old
        if old is None or old.runs < 2 or message >= len(old.messages) or slot >= len(old.messages[message].lines):
            return None
        line = old.messages[message].lines[slot]
        if len(line) < 2 or GAP not in line:
            return None
        at = line.index(GAP)
        head, tail = line[:at], line[at + 1 :]
        if any(part.text is None for part in (*head, *tail)):
            return None
        return "".join(part.text or "" for part in head), "".join(part.text or "" for part in tail)

    def render(self, resolve: Callable[[Ref], str | None]) -> Rendered | None:
        """The prompt up to the first part that `resolve` does not know. None until two runs have shown it."""
        old = self._old
        if old is None or old.runs < 2 or old.extras is None:
            return None
        rendered = Rendered([], orjson.loads(old.extras), open=False, whole=old.whole, chars=0)
        for message in old.messages:
            if not _fill(rendered, message, resolve):
                rendered.whole = False
                break
        return rendered if rendered.messages else None

    # -- keeping

    def dump(self) -> list[Any] | None:
        """As JSON has it; None as long as there is nothing but one run's own text."""
        old = self._old
        if old is None or old.runs < 2:
            return None
        messages = [
            [dump_part(m.frame), [[dump_part(part) for part in line] for line in m.lines]] for m in old.messages
        ]
        return [self.seen, old.runs, old.whole, old.extras, messages]

    @classmethod
    def load(cls, data: Any) -> Skeleton | None:
        """The inverse of `dump`; None for what it does not know."""
        try:
            made = cls()
            made.seen, runs, whole, extras, messages = data
            read_ = [
                _Message(load_part(frame), tuple(tuple(map(load_part, line)) for line in lines))
                for frame, lines in messages
            ]
            made._old = _Generation("", read_, bool(whole), extras, runs=int(runs), merged=int(runs))
        except (TypeError, ValueError):
            return None
        return made


@dataclass(slots=True)
class _Generation:
    run: str
    messages: list[_Message]
    whole: bool
    extras: str | None
    runs: int = 1
    merged: int = field(default=1)

    def merge(self, other: _Generation) -> None:
        """What this and a new prompt have in common."""
        self.merged += 1
        if other.run != self.run:
            self.run = other.run
            self.runs += 1
        if self.extras != other.extras:
            self.extras = None
        kept: list[_Message] = []
        for mine, theirs in zip(self.messages, other.messages, strict=False):
            frame = both(mine.frame, theirs.frame)
            if frame == GAP or len(mine.lines) != len(theirs.lines):
                break
            lines = tuple(merge(a, b) for a, b in zip(mine.lines, theirs.lines, strict=True))
            kept.append(_Message(frame, lines))
        equal = len(kept) == len(self.messages) == len(other.messages)
        self.messages, self.whole = kept, self.whole and other.whole and equal


def _observe(run: str, texts: Texts, known: Known) -> _Generation:
    """One prompt in parts."""
    messages: list[_Message] = []
    chars, parts, budget = 0, 0, _SCAN_CHARS
    search = sorted(known.whole.items(), key=lambda item: -len(item[0]))[:_MAX_TEXTS]
    whole = texts.whole
    for frame, slots in zip(texts.frames, texts.slots, strict=True):
        lines = []
        for text in slots:
            lines.append(split(text, known.whole, search if budget > 0 else ()))
            budget -= len(text) * (1 if text in known.whole else len(search))
        chars += len(frame) + sum(map(len, slots))
        parts += 1 + sum(map(len, lines))
        if chars > MAX_CHARS or parts > MAX_PARTS:
            whole = False
            break
        messages.append(_Message(Part(frame, known.frames.get(frame)), tuple(lines)))
    return _Generation(run, messages, whole, texts.extras)


def _fill(rendered: Rendered, message: _Message, resolve: Callable[[Ref], str | None]) -> bool:
    """Adds what is known of `message`; False where something is missing."""
    frame = _value(message.frame, resolve)
    try:
        made = None if frame is None else orjson.loads(frame)
    except ValueError:  # of a store that somebody has changed
        return False
    if not isinstance(made, dict):
        return False
    content = made.get("content")
    parts: list[Any] = content if isinstance(content, list) else []
    holders = [made] if isinstance(content, str) else [part for part in parts if is_text(part)]
    if len(holders) != len(message.lines):
        return False
    for holder, line in zip(holders, message.lines, strict=True):
        values: list[str] = []
        for part in line:
            value = _value(part, resolve)
            if value is None:
                break
            values.append(value)
        text = "".join(values)
        if len(values) < len(line):
            text = text[: max(text.rfind(" "), text.rfind("\n"), 0)]  # what follows may change the last word's tokens
            if holder is made:
                made["content"] = text
            else:
                holder["text"] = text
                made["content"] = parts[: next(i for i, part in enumerate(parts) if part is holder) + 1]
            rendered.messages.append(made)
            rendered.chars += len(text)
            rendered.open = True
            return False
        holder["content" if holder is made else "text"] = text
        rendered.chars += len(text)
    rendered.messages.append(made)
    return True


def _value(part: Part, resolve: Callable[[Ref], str | None]) -> str | None:
    value = resolve(part.ref) if part.ref is not None else None
    return part.text if value is None else value
