"""Parents of an untagged call, from its content alone.

Three signs, strongest first: the id of a tool call that an earlier reply made; a prompt that begins with an
earlier call's whole prompt and reply; text units (`prompt.units`) of an earlier reply. The rules that keep
wrong edges out, since no edge is better than a wrong one:

- a unit that the producer's own prompt already held says nothing (both may have it from elsewhere);
- a unit that several different replies share says nothing, unless only one of them is in the run that other
  signs have already found;
- a message seen before a reply existed was not made from it;
- of equal replies the one in the call's own run is meant; else the one that no equal prompt has used yet (an
  earlier run of the same program has used its own); if several are left, none;
- a reply whose matched text is wholly part of another matched reply, which had it in its prompt, was quoted.

Not supported, because content does not show it: paraphrase, embeddings (vector-store hops), replies passed on
as numbers or single words.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from helium_proxy.workflow.graph import Call, Run
from helium_proxy.workflow.prompt import Message, Prompt, text_key, text_of, units

_K = TypeVar("_K")
_V = TypeVar("_V")

_ENOUGH_CHARS = 40
"""Matched characters that suffice whatever the reply's length."""
_ENOUGH_SHARE = 0.5
"""Share of a shorter reply that must have matched."""
_EXACT_CHARS = 24
"""A message that equals a reply of at least this length was made from it, wherever it is."""
_MAX_UNITS = 64
"""Units indexed per reply, the first of them."""
_MAX_TEXTS = 8
"""Different replies that may share a unit before it counts as common."""
_MAX_USERS = 64
"""Prompts remembered that used a reply."""
_MAX_TWINS = 512
"""Equal replies, or replies to equal prompts, that are told apart."""


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


@dataclass(frozen=True, slots=True)
class Link:
    """One parent that content shows."""

    parent: Call
    extends: bool


class ReplyIndex:
    """One tenant's recent replies, by everything a later prompt may show of them."""

    def __init__(self, capacity: int, scan_chars: int) -> None:
        # Mutable state. Every entry belongs to a reply in `_replies`, and leaves with it.
        self._capacity = capacity
        self._scan_chars = scan_chars
        self._replies: OrderedDict[str, Reply] = OrderedDict()  # call id → reply, oldest first
        self._texts: dict[int, Text] = {}  # text key → text
        # Fresh unit → the text having it, or those (at most _MAX_TEXTS + 1), the first to be said first. Mostly
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
                if len(others) <= _MAX_TEXTS:
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

    # -- matching ----------------------------------------------------------------------------------------

    def by_response(self, response: str) -> Call | None:
        """The call whose response had that id."""
        reply = self._replies.get(response)
        return None if reply is None else reply.call

    def match(
        self, prompt: Prompt, home: Run | None, workflow: str | None = None, *, prefix_only: bool = False
    ) -> list[Link]:
        """The calls that made parts of `prompt`, given the run and the workflow the call is known to be of.

        `prefix_only`: just whose conversation it continues (its parents are known). Cost: one dictionary look-up
        per message, plus the splitting of messages never searched before and the look-up of their units.
        """
        search = _Search(self, prompt, home, workflow)
        start = search.prefix()
        if prefix_only:
            self.fill_units(prompt, start)
        else:
            search.tool_results(start)
            search.texts(start)
        return search.resolve()

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


class _Search:
    """One call's search: collects candidates, then decides."""

    def __init__(self, index: ReplyIndex, prompt: Prompt, home: Run | None, workflow: str | None) -> None:
        self.index = index
        self.prompt = prompt
        self.home = home
        self.workflow = workflow
        self.homes: set[int] = set() if home is None else {id(home)}
        self.chosen: dict[str, tuple[Reply, bool]] = {}  # call id → reply, extends
        self.doubtful: list[tuple[list[Reply], bool]] = []
        self.scores: dict[int, tuple[Text, dict[int, int]]] = {}  # text key → its matched units
        self.shared: list[tuple[int, int, tuple[Text, ...]]] = []  # unit, size, the texts that share it
        self.exact: list[Text] = []
        self.found: dict[int, int] = {}  # units of the messages that have hits

    def prefix(self) -> int:
        """Find the longest earlier prompt and reply that this prompt begins with; returns the first message
        after them."""
        messages = self.prompt.messages
        for position in range(len(messages) - 1, 0, -1):
            if messages[position].role not in ("assistant", ""):
                continue
            replies = self.index.replies_to(self.prompt.chain[position])
            if not replies:
                continue
            end = position
            while end < len(messages) and messages[end].role in ("assistant", ""):
                end += 1
            said = [reply for reply in replies if self._says(reply, position, end, len(replies) == 1)]
            if said:
                for message in messages[position:end]:
                    if message.units is None and said[0].text is not None:
                        message.units = said[0].text.units
                self._consider(said, extends=True)
                return end
        return 0

    def _says(self, reply: Reply, start: int, end: int, alone: bool) -> bool:
        """Whether messages start..end-1, the assistant's, are `reply`."""
        block = self.prompt.messages[start:end]
        made = [call for message in block for call in message.calls]
        if made and reply.tool_calls:
            return not set(made).isdisjoint(reply.tool_calls)
        if reply.text is None:
            return alone and not made
        if any(message.key == reply.text.key for message in block):
            return True
        found = {unit for at in range(start, end) for unit in units(text_of(self.prompt.raw[at])[:16_384])}
        return not found.isdisjoint(reply.text.units)

    def tool_results(self, start: int) -> None:
        """Replies that made the tool calls whose results (or, without a prefix, whose echoes) are new here."""
        for message in self.prompt.messages[start:]:
            for tool_call in (*message.results, *(message.calls if start == 0 else ())):
                makers = self.index.makers_of(tool_call)
                if makers and not any(maker.call.id in self.chosen for maker in makers):
                    self._consider(makers, extends=False)

    def texts(self, start: int) -> None:
        """Units of earlier replies in the messages that are new here."""
        messages = self.prompt.messages
        for position in range(self.index.fill_units(self.prompt, start), len(messages)):
            message = messages[position]
            whole = self.index.text(message.key) if message.key else None
            if whole is not None and message.first_seen >= whole.since:
                self.exact.append(whole)
            if not message.units:
                continue
            if message.hits is None:
                message.hits = self.index.hits(message.units)
            if not message.hits:
                continue
            found, seen, scores = message.units, message.first_seen, self.scores
            self.found.update(found)
            for unit, posting in message.hits:
                if isinstance(posting, tuple):
                    if seen >= posting[0].since and len(posting) <= _MAX_TEXTS:
                        self.shared.append((unit, found[unit], posting))
                    continue
                text = posting
                if seen < text.since:
                    continue
                if text.key in scores:
                    scores[text.key][1][unit] = found[unit]
                else:
                    scores[text.key] = (text, {unit: found[unit]})

    def resolve(self) -> list[Link]:
        """Decide on everything collected; the surest first, since it tells the run."""
        whole = {text.key for text in self.exact}
        for text in self.exact:
            if text.chars >= _EXACT_CHARS:
                self._consider(text.replies, extends=False)
        self._by_units(whole)
        if self.homes:
            for unit, size, texts in self.shared:
                here = [text for text in texts if any(id(r.call.run) in self.homes for r in text.replies)]
                if len(here) == 1:
                    self.scores.setdefault(here[0].key, (here[0], {}))[1][unit] = size
            if self.shared:
                self._by_units(whole)
            for replies, extends in self.doubtful:
                self._consider([r for r in replies if id(r.call.run) in self.homes], extends)
            for text in self.exact:
                if text.chars < _EXACT_CHARS:
                    here_only = [r for r in text.replies if id(r.call.run) in self.homes]
                    if len(here_only) == 1:
                        self._consider(here_only, extends=False)
        links = [Link(reply.call, extends) for reply, extends in self.chosen.values()]
        for reply, _ in self.chosen.values():
            if len(reply.users) < _MAX_USERS:
                reply.users |= {self.prompt.whole}
        return links

    def _by_units(self, whole: set[int]) -> None:
        """Choose the texts matched well enough, less those that only a quoting reply shows."""
        if not self.scores:
            return
        good = [
            (text, matched)
            for text, matched in self.scores.values()
            if text.key in whole or sum(matched.values()) >= _ENOUGH_CHARS or self._mostly(text)
        ]
        for text, matched in good:
            quoted = len(good) > 1 and any(
                other is not text and matched.keys() <= other.units.keys() and other.since >= text.since
                for other, _ in good
            )
            if not quoted:
                self._consider(text.replies, extends=False)

    def _mostly(self, text: Text) -> bool:
        """Whether most of a short reply is here, what it quotes itself included."""
        here = self.found.keys() & text.units.keys()
        return sum(text.units[unit] for unit in here) >= _ENOUGH_SHARE * text.chars

    def _consider(self, replies: Sequence[Reply], extends: bool) -> None:
        """Choose one of equally good candidates, or put them aside when no rule tells them apart."""
        live = [reply for reply in replies if self._allowed(reply.call.run)]
        if not live:
            return
        if any(reply.call.id in self.chosen for reply in live):
            return
        here = [reply for reply in live if id(reply.call.run) in self.homes]
        if here:
            unused = [reply for reply in here if self.prompt.whole not in reply.users]
            self._choose((unused or here)[-1], extends)
            return
        if len(live) > 1:
            unused = [reply for reply in live if self.prompt.whole not in reply.users]
            if len(unused) != 1:
                self.doubtful.append((live, extends))
                return
            live = unused
        self._choose(live[0], extends)

    def _allowed(self, run: Run) -> bool:
        if run.state != "live" or (run.named and self.workflow is not None and run.workflow != self.workflow):
            return False
        if self.home is not None and self.home.explicit:
            return run is self.home or not run.explicit
        # An untagged call may follow one tagged run, not tie two together.
        return not run.explicit or not any(
            reply.call.run.explicit and reply.call.run is not run for reply, _ in self.chosen.values()
        )

    def _choose(self, reply: Reply, extends: bool) -> None:
        self.chosen[reply.call.id] = (reply, extends)
        self.homes.add(id(reply.call.run))


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
