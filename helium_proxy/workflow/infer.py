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

from collections.abc import Sequence
from dataclasses import dataclass

from helium_proxy.workflow.graph import Call, Run
from helium_proxy.workflow.prompt import Prompt, text_of, units
from helium_proxy.workflow.reply_index import MAX_TEXTS, Reply, ReplyIndex, Text

_ENOUGH_CHARS = 40
"""Matched characters that suffice whatever the reply's length."""
_ENOUGH_SHARE = 0.5
"""Share of a shorter reply that must have matched."""
_EXACT_CHARS = 24
"""A message that equals a reply of at least this length was made from it, wherever it is."""
_MAX_USERS = 64
"""Prompts remembered that used a reply."""


@dataclass(frozen=True, slots=True)
class Link:
    """One parent that content shows."""

    parent: Call
    extends: bool


def infer(
    index: ReplyIndex, prompt: Prompt, home: Run | None, workflow: str | None = None, *, prefix_only: bool = False
) -> list[Link]:
    """The calls that made parts of `prompt`, given the run and the workflow the call is known to be of.

    `prefix_only`: just whose conversation it continues (its parents are known). Cost: one dictionary look-up
    per message, plus the splitting of messages never searched before and the look-up of their units.
    """
    search = _Search(index, prompt, home, workflow)
    start = search.prefix()
    if prefix_only:
        index.fill_units(prompt, start)
    else:
        search.tool_results(start)
        search.texts(start)
    return search.resolve()


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
        self.said: dict[int, set[int]] = {}  # units of the assistant's messages from this position on

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
        found = self.said.get(start)
        if found is None:  # once, however many replies there are to compare it with
            texts = (text_of(self.prompt.raw[at])[:16_384] for at in range(start, end))
            found = self.said[start] = {unit for text in texts for unit in units(text)}
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
                    if seen >= posting[0].since and len(posting) <= MAX_TEXTS:
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
        # A text that quotes another has all of its matched units, so the first of them, too.
        having: dict[int, list[Text]] = {next(iter(matched)): [] for _, matched in good if matched}
        if len(good) > 1:
            for other, _ in good:
                for unit in having.keys() & other.units.keys():
                    having[unit].append(other)
        for text, matched in good:
            others = having[next(iter(matched))] if matched else []
            quoted = any(
                other is not text and matched.keys() <= other.units.keys() and other.since >= text.since
                for other in others
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
