"""What the latest calls were asked and said, as long as prompts of their runs may repeat it: for `skeleton.py`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from helium_proxy.workflow.graph import Call
from helium_proxy.workflow.parts import FRAME, REPLY, SOLE, STRIPPED, Ref, Texts, read
from helium_proxy.workflow.skeleton import Known, Rendered, Skeleton, Source, inside
from helium_proxy.workflow.template import Key, Template

_MAX_ANCESTORS = 64
_FIRST = 16
"""Of a run's calls, that are looked at though they are no ancestors."""
_MAX_ORDINAL = 64


@dataclass(frozen=True, slots=True)
class _Said:
    texts: Texts | None
    reply: str | None
    chars: int


class Recall:
    """Texts and replies of the latest calls, bounded in calls and in characters; the oldest leave first."""

    def __init__(self, max_calls: int = 1_024, max_chars: int = 1 << 23) -> None:
        # Mutable state.
        self._said: OrderedDict[str, _Said] = OrderedDict()  # by call id
        self._chars = 0
        self._max_calls = max_calls
        self._max_chars = max_chars

    def __repr__(self) -> str:
        return f"<Recall {len(self._said)} calls, {self._chars} characters>"

    def __len__(self) -> int:
        return len(self._said)

    def learn(self, call: Call, body: Mapping[str, Any], reply: str | None, template: Template) -> None:
        """A call has ended: its prompt, seen beside what its run had shown when it came, and its reply."""
        texts, stats = read(body), template.nodes.get((call.base, call.iteration))
        self._keep(call.id, texts, reply)
        if stats is None or texts is None:
            return
        if stats.skeleton is None:
            stats.skeleton = Skeleton()
        if stats.skeleton.due:
            stats.skeleton.learn(call.run.id, texts, self._known(call, template))
        else:
            stats.skeleton.skip()

    def _keep(self, call: str, texts: Texts | None, reply: str | None) -> None:
        if (before := self._said.pop(call, None)) is not None:
            self._chars -= before.chars
        size = len(reply or "") + (0 if texts is None else texts.chars)
        self._said[call] = _Said(texts, reply, size)
        self._chars += size
        while self._chars > self._max_chars or len(self._said) > self._max_calls:
            self._chars -= self._said.popitem(last=False)[1].chars

    def _known(self, call: Call, template: Template) -> Known:
        ancestors = _ancestors(call)
        seen = {ancestor.id for ancestor in ancestors}
        others = [c for c in islice(call.run.calls.values(), _FIRST) if c.id not in seen and c is not call]
        keys = [_key(ancestor) for ancestor in ancestors]
        sources = []
        for at, source in enumerate([*ancestors, *others]):
            said, key = self._said.get(source.id), _key(source)
            if said is None or source.finished_at is None or source.finished_at > call.arrived_at:
                continue
            ordinal = SOLE if at < len(keys) and keys.count(key) == 1 else _ordinal(source)
            if ordinal is not None:
                stats = template.nodes.get(key)
                skeleton = None if stats is None else stats.skeleton
                sources.append(Source(*key, ordinal, said.texts, said.reply, skeleton))
        return Known(sources)

    def render(self, ended: Call, template: Template, key: Key) -> Rendered | None:
        """What is known of the prompt of a call of `key` that follows `ended`."""
        stats = template.nodes.get(key)
        if stats is None or stats.skeleton is None:
            return None
        return stats.skeleton.render(self._resolver(ended, template))

    def _resolver(self, ended: Call, template: Template) -> Callable[[Ref], str | None]:
        near: dict[Key, list[Call]] = {}
        for call in (ended, *_ancestors(ended)):
            near.setdefault(_key(call), []).append(call)

        def resolve(ref: Ref) -> str | None:
            key = (ref.base, ref.iteration)
            calls = near.get(key, []) if ref.ordinal == SOLE else []
            if not calls:
                calls = [c for c in ended.run.occurrences.get(ref.base, ())[:_MAX_ORDINAL] if _key(c) == key]
            if ref.ordinal != SOLE:
                calls = calls[ref.ordinal : ref.ordinal + 1]
            if len(calls) != 1 or calls[0].state != "done":
                return None
            said = self._said.get(calls[0].id)
            return None if said is None else _text(said, ref, template)

        return resolve


def _text(said: _Said, ref: Ref, template: Template) -> str | None:
    if ref.message == REPLY:
        return said.reply if said.reply is None or ref.slot != STRIPPED else said.reply.strip()
    texts = said.texts
    if texts is None or ref.message >= len(texts.frames):
        return None
    if ref.slot == FRAME:
        return texts.frames[ref.message]
    if ref.slot >= len(texts.slots[ref.message]):
        return None
    text = texts.slots[ref.message][ref.slot]
    if not ref.inner:
        return text
    stats = template.nodes.get((ref.base, ref.iteration))
    return inside(None if stats is None else stats.skeleton, text, ref.message, ref.slot)


def _key(call: Call) -> Key:
    return (call.base, call.iteration)


def _ordinal(call: Call) -> int | None:
    """Its place among the calls of its key, in order of arrival."""
    same = [c for c in call.run.occurrences.get(call.base, ())[:_MAX_ORDINAL] if c.iteration == call.iteration]
    return same.index(call) if call in same else None


def _ancestors(call: Call) -> list[Call]:
    """The nearest ones first."""
    found: dict[str, Call] = {}
    rest = list(call.parents)
    for ancestor in rest:
        if ancestor.id not in found and ancestor is not call:
            found[ancestor.id] = ancestor
            rest.extend(ancestor.parents)
        if len(found) >= _MAX_ANCESTORS:
            break
    return list(found.values())
