"""Prefilling what comes next while the client thinks.

When a call has ended, the template says which calls follow. Of each, what is known of its prompt by now is made into
tokens: by the skeleton of its node (`workflow/skeleton.py`), by the conversation so far where it goes on, or by the
node's static prefix, whichever reaches furthest. If no worker holds that, the one with most of it prefills the rest
as soon as it idles, as long as the client may still be thinking.
"""

from __future__ import annotations

import asyncio
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import structlog

from helium_proxy import metrics
from helium_proxy.config import DirectiveSettings
from helium_proxy.dispatch.state import DispatchState, WorkerState
from helium_proxy.gateway.prewarm import Prewarmer, Source
from helium_proxy.gateway.sites import Sites, begins
from helium_proxy.residency.chain import token_chain
from helium_proxy.residency.directives import Key, Prefix
from helium_proxy.residency.index import Chain
from helium_proxy.residency.kv_book import salt_of
from helium_proxy.workers.pool import Pool
from helium_proxy.workflow import Prediction, Rendered, Workflows
from helium_proxy.workflow.parts import shared

log = structlog.get_logger(__name__)

_CHAT = "/v1/chat/completions"
_MAX_ENDED = 256
_MAX_AWAITED = 256
_MAX_WISHES = 64
_FELT_S = 0.02
"""So many seconds of prefill are worth a prewarm, however few tokens they are."""


class Ended(msgspec.Struct, frozen=True):
    """A call that has been answered."""

    call: str
    template: str
    worker: str | None
    source: Source
    reply: str | None


@dataclass(slots=True)
class _Awaited:
    """A prefilled prefix whose call is still to come."""

    worker: str
    blocks: int
    until: float


@dataclass(slots=True, eq=False)
class _Wish:
    """A prefix that is to be prefilled before `until`."""

    ended_on: str | None
    chain: Chain
    source: Source
    tokens: array[int] | None
    until: float
    think_s: float


class Lookahead:
    """See the module. `ended` and `sent` are told of every call and return at once; `work` does the rest."""

    def __init__(
        self,
        settings: DirectiveSettings,
        pool: Pool,
        state: DispatchState,
        prewarmer: Prewarmer,
        workflows: Workflows,
        sites: Sites,
        static: Callable[[Key], Prefix | None],
        *,
        clock: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._pool = pool
        self._state = state
        self._prewarmer = prewarmer
        self._workflows = workflows
        self._sites = sites
        self._static = static
        self._clock = clock
        # -- state
        self._ended: deque[Ended] = deque(maxlen=_MAX_ENDED)  # calls whose successors are to be looked up
        self._wishes: deque[_Wish] = deque(maxlen=_MAX_WISHES)  # what is prefilled as soon as its worker idles
        self._awaited: OrderedDict[int, _Awaited] = OrderedDict()  # last block of a prefilled prefix → what it is for

    def __repr__(self) -> str:
        return f"<Lookahead {len(self._wishes)} wishes, {len(self._awaited)} awaited>"

    def ended(self, ended: Ended) -> bool:
        """Whether there is something to `work` on now."""
        if not self._settings.lookahead:
            return False
        self._ended.append(ended)
        return True

    def sent(self, chain: Chain, worker: str) -> None:
        """A call goes to `worker`: was its prefix prefilled, or is it still to be?"""
        if self._awaited:
            for blocks in {a.blocks for a in self._awaited.values()}:
                if len(chain) >= blocks and (awaited := self._awaited.pop(chain[blocks - 1], None)) is not None:
                    metrics.LOOKAHEAD.labels("used" if awaited.worker == worker else "wasted").inc()
        for wish in [wish for wish in self._wishes if begins(chain, wish.chain)]:
            self._wishes.remove(wish)
            metrics.LOOKAHEAD.labels("skipped").inc()

    def tick(self, now: float) -> None:
        """Once a second: what came to nothing."""
        while self._awaited and (oldest := next(iter(self._awaited.values()))).until <= now:
            self._awaited.popitem(last=False)
            metrics.LOOKAHEAD.labels("wasted").inc()
            log.debug("prewarmed in vain", worker=oldest.worker)
        self._expire(now)

    async def work(self) -> None:
        """Looks up what follows the calls that have ended, and prefills what can be by now."""
        for _ in range(len(self._ended)):  # others may end meanwhile: their turn comes, too
            await self._look(self._ended.popleft())
        now = self._clock()
        self._expire(now)
        for wish in [wish for wish in self._wishes if self._fulfil(wish)]:
            self._wishes.remove(wish)

    def _expire(self, now: float) -> None:
        for wish in [wish for wish in self._wishes if wish.until <= now]:
            self._wishes.remove(wish)
            metrics.LOOKAHEAD.labels("skipped").inc()

    async def _look(self, ended: Ended) -> None:
        settings, now = self._settings, self._clock()
        if ended.source.route == _CHAT:
            self._workflows.study(ended.call, ended.source.body, ended.reply)
        if self._state.queues.get(ended.source.model):
            return  # where calls wait, nothing is prefilled: a busy fleet does not pay for predictions
        for prediction in self._workflows.expected_next(ended.call, now):
            if prediction.probability < settings.min_probability or prediction.think_s < settings.min_think_s:
                continue
            known = await self._known_prefix(ended, prediction)
            if known is None:
                continue
            chain, source, tokens = known
            if len(chain) * source.block_size < settings.min_tokens:
                continue
            if any(wish.chain[-1] == chain[-1] for wish in self._wishes):
                continue
            until = now + 2 * prediction.think_s
            self._wishes.append(_Wish(ended.worker, chain, source, tokens, until, prediction.think_s))

    # -- what is known

    async def _known_prefix(
        self, ended: Ended, prediction: Prediction
    ) -> tuple[Chain, Source, array[int] | None] | None:
        """What is known of the next call's prompt."""
        source = ended.source
        tokens = None
        if source.route == _CHAT and prediction.model in (None, source.model):
            rendered = self._workflows.rendered(ended.call, prediction)
            conversation = None
            if prediction.extends and ended.reply:
                conversation = [*source.body["messages"], {"role": "assistant", "content": ended.reply}]
            if rendered is not None and (conversation is None or rendered.chars >= _chars(conversation)):
                tokens = await self._rendered_tokens(source, rendered)
            elif conversation is not None:
                tokens = await self._prewarmer.tokens(source, _body(source, conversation, source.body))
        prefix = self._static((ended.template, prediction.node, source.model))
        if tokens is not None:
            chain = token_chain(tokens, source.block_size, salt_of(source.model, source.salt))
            if chain and (prefix is None or len(chain) >= len(prefix.chain)):
                return chain, source, tokens
        if prefix is None or not isinstance(prefix.source, Source):
            return None
        return prefix.chain, prefix.source, None

    async def _rendered_tokens(self, source: Source, rendered: Rendered) -> array[int] | None:
        messages = rendered.messages
        if rendered.whole:
            return await self._prewarmer.tokens(source, {**_body(source, messages, rendered.extras), **_GENERATE})
        # Whatever comes next, only those tokens count that come out the same before two different continuations.
        both = (
            [_continued(messages, " a"), _continued(messages, "\n0")]
            if rendered.open
            else [
                [*messages, {"role": "user", "content": "a"}],
                [*messages, {"role": "assistant", "content": "0"}],
            ]
        )
        one, other = [await self._prewarmer.tokens(source, _body(source, made, rendered.extras)) for made in both]
        return None if one is None or other is None else one[: shared(one, other)]

    # -- prefilling

    def _fulfil(self, wish: _Wish) -> bool:
        """Starts the prefill if it can be now; False if it is to be tried again."""
        chain = wish.chain
        workers = [w for w in self._state.serving(wish.source.model) if w.open]
        if not workers or chain[-1] in self._awaited:
            return True
        known = max(workers, key=lambda w: (w.residency.match(chain), w.id == wish.ended_on))
        worker = self._pool.get(known.id)
        if worker is None or not self._pays(known, wish):
            return True
        site = self._sites.of(worker)
        if site.prewarm is not None or not self._sites.idle(worker, known):
            return False
        until = self._clock() + max(10.0, 4 * wish.think_s)
        self._awaited[chain[-1]] = _Awaited(known.id, len(chain), until)
        while len(self._awaited) > _MAX_AWAITED:
            self._awaited.popitem(last=False)
            metrics.LOOKAHEAD.labels("wasted").inc()
        work = self._prewarmer.ask(worker, chain, wish.source, wish.tokens, "lookahead")
        self._sites.start(site, worker, chain, self._again(wish, work))
        return True

    async def _again(self, wish: _Wish, work: Any) -> None:
        """A prefill; one that gives way to a call is wished for again."""
        try:
            await work
        except asyncio.CancelledError:
            if wish.until > self._clock() and self._awaited.pop(wish.chain[-1], None) is not None:
                self._wishes.append(wish)
            raise

    def _pays(self, known: WorkerState, wish: _Wish) -> bool:
        missing = (len(wish.chain) - known.residency.match(wish.chain)) * wish.source.block_size
        return missing >= self._settings.min_tokens or missing * known.rates.prefill_s >= _FELT_S


_GENERATE = {"add_generation_prompt": True}


def _body(source: Source, messages: Sequence[Any], extras: Mapping[str, Any]) -> dict[str, Any]:
    """A request with these messages, its answer not begun yet."""
    return {**extras, "model": source.model, "messages": list(messages), "add_generation_prompt": False}


def _continued(messages: Sequence[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """The messages, the last one's text going on with `text`."""
    *others, last = messages
    content = last["content"]
    if isinstance(content, list):
        return [*others, {**last, "content": [*content[:-1], {**content[-1], "text": content[-1]["text"] + text}]}]
    return [*others, {**last, "content": content + text}]


def _chars(messages: Sequence[Any]) -> int:
    """Characters of texts, as `Rendered.chars` counts them."""
    total = 0
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, str):
            total += len(content)
        elif isinstance(content, list):
            total += sum(len(p["text"]) for p in content if isinstance(p, dict) and isinstance(p.get("text"), str))
    return total
