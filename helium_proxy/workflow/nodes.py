"""Which node of a workflow an untagged call is: learned from its system prompt and tool schemas.

Equal system prompt and tools: the same node. Otherwise the same node when tools' names agree and the prompt is
a variation of a known one: equal but for digits (a date, an id), or beginning alike and sharing most of its
sentences (a user's name, a retrieved passage). Prompts that begin differently are different roles, however much
boilerplate they share. Without a system prompt the first words of the first message take its place.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson
import xxhash

from helium_proxy.workflow.prompt import Prompt, text_of, units

_MASK = {ord(digit): "0" for digit in "123456789"}
_HEAD_CHARS = 64
_MASK_CHARS = 8_192
_SIMILAR = 0.5
"""Share of a prompt's units that a variation of it must have."""
_WORDS = re.compile(r"[A-Za-z0-9]+")
_SKIP = frozenset(
    (
        *("a", "am", "an", "and", "are", "as", "in", "is", "of", "the", "to", "for", "with", "i", "you", "your"),
        *("act", "agent", "assistant", "helpful", "please", "role"),
    )
)
_MAX_CANDIDATES = 16


@dataclass(slots=True, eq=False)
class Identity:
    """One learned node."""

    name: str
    units: Mapping[int, int]
    head: tuple[str, ...]
    """First words, where there is no system prompt."""
    bucket: int
    keys: list[int]


class Identities:
    """One tenant's learned nodes. Bounded: the least recently seen is forgotten."""

    def __init__(self, capacity: int) -> None:
        # Mutable state.
        self._capacity = capacity
        self._exact: OrderedDict[int, Identity] = OrderedDict()  # digest of identity text and tools → node
        self._buckets: dict[int, list[Identity]] = {}  # (tools' names, masked head) → similar nodes
        self._names: dict[str, int] = {}  # slug → how many nodes have it

    def __len__(self) -> int:
        return len(self._exact)

    def __repr__(self) -> str:
        return f"<Identities {len(self._exact)} of {self._capacity}>"

    def name(self, prompt: Prompt, body: Mapping[str, Any]) -> str:
        """The node name of a call; the same for every call of the same node."""
        leading = 0
        for message in prompt.messages:
            if message.role not in ("system", "developer"):
                break
            leading += 1
        tools = body.get("tools") or body.get("functions") or ()
        form = body.get("response_format") or body.get("text") or ()
        extra = xxhash.xxh3_64_intdigest(orjson.dumps((tools, form))) if tools or form else 0
        first = prompt.messages[0].digest if prompt.messages else 0
        key = hash((leading, extra, first if leading <= 1 else prompt.chain[leading]))
        known = self._exact.get(key)
        if known is None:
            known = self._learn(key, prompt, leading, tools, form)
        else:
            self._exact.move_to_end(key)
        return known.name

    def _learn(self, key: int, prompt: Prompt, leading: int, tools: Any, form: Any) -> Identity:
        text = "\n".join(text_of(item) for item in prompt.raw[: max(leading, 1)])[:_MASK_CHARS]
        names = tuple(_names(tools)) + tuple(_names((form,)))
        identity = self._by_system(text, names) if leading else self._by_head(text, names)
        identity.keys.append(key)
        self._exact[key] = identity
        while len(self._exact) > self._capacity:
            self._forget(*self._exact.popitem(last=False))
        return identity

    def _forget(self, key: int, identity: Identity) -> None:
        identity.keys.remove(key)
        if identity.keys:
            return
        bucket = self._buckets.get(identity.bucket, [])
        if identity in bucket:
            bucket.remove(identity)
        if not bucket:
            self._buckets.pop(identity.bucket, None)

    def _by_system(self, text: str, names: tuple[str, ...]) -> Identity:
        masked = text.translate(_MASK)
        bucket = hash((names, masked.lstrip()[:_HEAD_CHARS].partition("\n")[0]))
        found = units(masked)
        total = sum(found.values())
        for known in self._buckets.get(bucket, ()):
            shared = sum(found[unit] for unit in found.keys() & known.units.keys())
            if found.keys() == known.units.keys() or shared >= _SIMILAR * max(total, sum(known.units.values()), 1):
                return known
        return self._new(_slug(text), found, (), bucket)

    def _by_head(self, text: str, names: tuple[str, ...]) -> Identity:
        line = re.split(r"[:\n\"?]", text.translate(_MASK).lstrip(), maxsplit=1)[0]
        head = tuple(line.split()[:8])
        bucket = hash((names, head[:3]))
        for known in self._buckets.get(bucket, ()):
            same = 0
            for ours, theirs in zip(head, known.head, strict=False):
                if ours != theirs:
                    break
                same += 1
            if same >= 4 or head == known.head:
                return known
        return self._new(_slug(" ".join(head)), {}, head, bucket)

    def _new(self, slug: str, found: Mapping[int, int], head: tuple[str, ...], bucket: int) -> Identity:
        count = self._names[slug] = self._names.get(slug, 0) + 1
        if len(self._names) > 2 * self._capacity:
            del self._names[next(iter(self._names))]
        made = Identity(slug if count == 1 else f"{slug}-{count}", found, head, bucket, [])
        same = self._buckets.setdefault(bucket, [])
        same.append(made)
        if len(same) > _MAX_CANDIDATES:
            del same[0]
        return made


def _names(tools: Any) -> list[str]:
    """Names of tools or of a response schema, in any API's form."""
    out = []
    for tool in tools if isinstance(tools, list | tuple) else ():
        if isinstance(tool, Mapping):
            inner = tool.get("function") or tool.get("json_schema") or tool.get("format") or tool
            if isinstance(inner, Mapping):
                out.append(str(inner.get("name") or inner.get("type") or ""))
    return out


def _slug(text: str) -> str:
    """A short readable name from the first telling words of a prompt."""
    line = text.strip()[:200]
    line = re.split(r"[.\n:]", line, maxsplit=1)[0] or line
    words = [word.lower() for word in _WORDS.findall(line)]
    telling = [word for word in words if word not in _SKIP][:4] or words[:3]
    return "-".join(telling)[:40] or "call"
