"""Which node of a workflow an untagged call is: learned from its system prompt and tool schemas.

Equal system prompt and tools: the same node; so too without the tools (an agent told to answer now). Otherwise
the same node when tools' names agree and the prompt is a variation of a known one: equal but for digits after its
first words (a date, an id); or beginning and ending alike and sharing most of its sentences (a name, a retrieved
passage in between); or beginning alike where many such prompts were seen once and never again, since roles recur
and data do not. Else prompts are different roles, however much boilerplate they share. Without a system prompt
the first words of the first message take its place.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from helium_proxy.workflow.prompt import Prompt, digest_of, text_of, units

_MASK = {ord(digit): "0" for digit in "123456789"}
_HEAD_CHARS = 64
_FIRST_CHARS = 600
"""Where the first words of a prompt are looked for."""
_MASK_CHARS = 8_192
_TAIL_CHARS = 48
_SIMILAR = 0.5
"""Share of a prompt's units that a variation of it must have."""
_MANY = 12
_NEARLY = 0.8
"""That many prompts, seen once each and this similar, show their differences to be data."""
_YOU = re.compile(r"\b[Yy]ou are\b")
_WORDS = re.compile(r"[A-Za-z0-9]+")
_SKIP = frozenset(
    (
        *("a", "am", "an", "and", "are", "as", "in", "is", "of", "the", "to", "for", "with", "i", "you", "your"),
        *("act", "agent", "assistant", "helpful", "please", "role"),
    )
)
_MAX_CANDIDATES = 16
_GENERIC = "assistant"
"""The name of a node whose prompt says nothing of its own, such as "You are a helpful assistant."."""


@dataclass(slots=True, eq=False)
class Identity:
    """One learned node."""

    name: str
    units: Mapping[int, int]
    head: tuple[str, ...]
    """First words, where there is no system prompt."""
    bucket: int
    tail: str
    keys: list[int]
    """Digests of the prompts that are this node."""
    seen: int = 1


class Identities:
    """One tenant's learned nodes. Bounded: the least recently seen is forgotten."""

    def __init__(self, capacity: int) -> None:
        # Mutable state.
        self._capacity = capacity
        self._exact: OrderedDict[int, Identity] = OrderedDict()  # digest of identity text and tools → node
        self._buckets: dict[int, list[Identity]] = {}  # (tools' names, masked head) → similar nodes
        self._bare: dict[int, Identity] = {}  # (masked head, tail) → the node with that prompt and tools
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
        extra = digest_of((tools, form)) if tools or form else 0
        first = prompt.messages[0].digest if prompt.messages else 0
        key = hash((leading, extra, first if leading <= 1 else prompt.chain[leading]))
        known = self._exact.get(key)
        if known is None:
            known = self._learn(key, prompt, leading, tools, form)
        else:
            self._exact.move_to_end(key)
            known.seen += 1
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
        masked = text.translate(_MASK).strip()
        tail = masked[-_TAIL_CHARS:]
        found = units(masked)
        total = sum(found.values())
        head = text.strip()[:_HEAD_CHARS].partition("\n")[0]  # "expert 3" and "expert 4" are two roles
        bucket = hash((names, head))
        once = []
        for known in self._buckets.get(bucket, ()):
            shared = sum(found[unit] for unit in found.keys() & known.units.keys())
            share = shared / max(total, sum(known.units.values()), 1)
            if known.tail == tail and (share >= _SIMILAR or found.keys() == known.units.keys()):
                return known
            if share >= _NEARLY and known.seen == 1:
                once.append(known)
        if len(once) >= _MANY:
            return once[0]
        slug = _slug(text)
        other = hash((head, tail))
        bare = self._find(hash(((), head)), found, tail) if names else self._bare.get(other)
        if bare is not None and slug != _GENERIC:
            return bare
        made = self._new(slug, found, (), bucket, tail)
        if names:
            self._bare[other] = made
            if len(self._bare) > self._capacity:
                del self._bare[next(iter(self._bare))]
        return made

    def _find(self, bucket: int, found: Mapping[int, int], tail: str) -> Identity | None:
        """The node in `bucket` of the same prompt."""
        for known in self._buckets.get(bucket, ()):
            if known.tail == tail and known.units.keys() == found.keys():
                return known
        return None

    def _by_head(self, text: str, names: tuple[str, ...]) -> Identity:
        line = re.split(r"[:\n\"?]", text.lstrip()[:_FIRST_CHARS].translate(_MASK), maxsplit=1)[0]
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
        return self._new(_slug(" ".join(head)), {}, head, bucket, "")

    def _new(self, slug: str, found: Mapping[int, int], head: tuple[str, ...], bucket: int, tail: str) -> Identity:
        count = self._names[slug] = self._names.get(slug, 0) + 1
        if len(self._names) > 2 * self._capacity:
            del self._names[next(iter(self._names))]
        made = Identity(slug if count == 1 else f"{slug}-{count}", found, head, bucket, tail, [])
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
    you = _YOU.search(text)
    line = (text[you.end() :] if you is not None else text).strip()[:200]
    line = re.split(r"[.\n:]", line, maxsplit=1)[0] or line
    words = [word.lower() for word in _WORDS.findall(line)]
    telling = [word for word in words if word not in _SKIP][:4]
    return "-".join(telling)[:40] or _GENERIC
