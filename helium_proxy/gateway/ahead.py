"""What is done ahead of need: static prefixes pinned where they are used, and prefilled before they are asked for.

Pins ride on calls that are made anyway. Everything else is a *prewarm*: one token of a prompt that is nothing but the
prefix, straight to a worker, on idle capacity alone. It is cut off as soon as that worker is given a real call
(unless that is the very call it was meant for), and it is no call: no run, no metric of calls sees it.

- **pins**, on workers with the plugin: renewed before they lapse by the next call of the prefix, or by a one-token
  call while the worker idles. They keep a workflow's prefixes from other workflows' calls: while its own wait for
  room, its pins are given back, for they would keep out the calls that they are there for;
- **re-touching**, on workers without it: a static prefix that others' blocks are about to push out is asked for again
  while the worker idles, and one that was pushed out is prefilled again;
- **lookahead**: when a call has ended, the prefix of the next one is prefilled while the client still thinks.

Nothing here may cost an answer: the callers of `sent`, `done` and `ended` swallow what fails there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import structlog

from helium_proxy import metrics
from helium_proxy.config import DirectiveSettings
from helium_proxy.dispatch.state import DispatchState, QueuedCall, WorkerState
from helium_proxy.gateway.lookahead import Ended, Lookahead
from helium_proxy.gateway.prewarm import Prewarmer, Source, report_of, transfer
from helium_proxy.gateway.sites import Site, Sites, begins
from helium_proxy.residency.directives import MEMORY_S, Key, Pin, Prefix, Prefixes, busiest, choose, name_of
from helium_proxy.residency.registry import Tokenizers
from helium_proxy.workers.pool import Pool
from helium_proxy.workers.upstream import UpstreamClient
from helium_proxy.workers.worker import Worker
from helium_proxy.workflow import Workflows

log = structlog.get_logger(__name__)

_TICK_S = 1.0
_TOUCH = 0.4
"""Of a worker's blocks: once so many were filled since a prefix was last used there, it may be next to go."""
_AGAIN_S = 4.0
"""After a prefix was prefilled on a worker it is let be there so long, and twice as long each time that it is not
resident then: by then a mirror that is told of blocks has given up what the engine has not named."""
_AGAIN_MOST_S = 256.0
_SOURCE_TOKENS = 65_536
_TENDED = 8
"""Workers whose pins are planned in one tick: in a larger fleet they take turns."""


__all__ = ["Ahead", "Ended"]


class Ahead:
    """See the module. `sent`, `done` and `ended` are told of every call, and return at once."""

    def __init__(
        self,
        settings: DirectiveSettings,
        pool: Pool,
        client: UpstreamClient,
        state: DispatchState,
        tokenizers: Tokenizers,
        workflows: Workflows,
        *,
        clock: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._pool = pool
        self._state = state
        self._prewarmer = Prewarmer(client, state, tokenizers)
        self._clock = clock
        self._enabled = settings.pins or settings.prewarm or settings.lookahead
        # -- state
        self._prefixes = Prefixes()
        self._asked: dict[str, tuple[str, str]] = {}  # call under way → its directive's verb and the pin it names
        self._wake = asyncio.Event()
        self._turn = 0  # of the workers, whose pins are planned next
        self._sites = Sites(settings, state, self._wake.set)
        self._lookahead = Lookahead(
            settings,
            pool,
            state,
            self._prewarmer,
            workflows,
            self._sites,
            self._static,
            clock=clock,
        )

    def _static(self, key: Key) -> Prefix | None:
        return self._prefixes.static(key)

    def __repr__(self) -> str:
        return f"<Ahead {self._prefixes!r}, {self._lookahead!r}>"

    # -- what calls tell

    def sent(self, call: QueuedCall, key: Key, run: str, source: Source, worker: Worker) -> dict[str, Any] | None:
        """A call goes to `worker`. Returns the directive to send along, if one is due."""
        if not self._enabled:
            return None
        now, chain = self._clock(), call.chain
        site = self._sites.of(worker)
        if site.prewarm is not None and not begins(chain, site.prewarm.chain):
            site.prewarm.task.cancel()
        self._lookahead.sent(chain, worker.id)
        if not chain:
            return None
        if not call.exact:  # chains of text and of tokens have nothing in common
            key = (key[0], key[1], f"{key[2]}\x1ftext")
        kept = source if call.exact and call.prompt_tokens <= _SOURCE_TOKENS else None
        self._prefixes.learn(key, run, chain, worker.id, now, kept)
        known = self._state.workers.get(worker.id)
        if known is not None:  # `call` is admitted already: what it found is in its own notes
            site.filled += len(chain) - call.hits.get(worker.id, (0, 0))[1] + known.anonymous_blocks(call)
        name, directive = name_of(key), None
        speaks = self._settings.pins and worker.facts.has_plugin
        pin = site.pins.planned.get(name)
        if pin is not None and begins(chain, pin.chain):
            site.used[name] = site.filled
            directive = site.pins.directive(name, call.block_size, now) if speaks else None
        if directive is None and speaks:
            directive = site.pins.give_back()
        if directive is not None:
            self._asked[call.id] = next(iter(directive.items()))
        return directive

    def done(self, call: QueuedCall, worker: str, *, ok: bool, report: Mapping[str, Any] | None, whole: bool) -> None:
        """A call that was `sent` is over. `report`: the engine's word on the directive, which only `whole` answers
        (not streams) carry."""
        verb, name = self._asked.pop(call.id, ("", ""))
        site = self._sites.get(worker)
        if not name or site is None:
            return
        if verb == "unpin":
            if ok:
                metrics.DIRECTIVES.labels(verb, "ok").inc()
                self._unpinned(site, worker, name)
            else:
                site.pins.kept(name)
        elif not ok:
            site.pins.forget(name)
        elif whole and (report is None or report.get("error")):
            metrics.DIRECTIVES.labels("pin", "error").inc()
            log.info("pin refused", worker=worker, pin=name, error=(report or {}).get("error"))
            site.pins.refused(name, self._clock())
        else:
            metrics.DIRECTIVES.labels("pin", "ok").inc()
            self._pinned(site, worker, name)

    def ended(self, ended: Ended) -> None:
        """A call has been answered, by whatever means: what follows it is looked up in a moment."""
        if self._lookahead.ended(ended):
            self._wake.set()

    # -- the loop

    async def run(self) -> None:
        """Until cancelled."""
        if not self._enabled:
            return
        due = self._clock() + _TICK_S
        try:
            while True:
                try:
                    async with asyncio.timeout(max(0.0, due - self._clock())):
                        await self._wake.wait()
                except TimeoutError:
                    pass
                self._wake.clear()
                try:
                    await self._lookahead.work()
                    if self._clock() >= due:
                        due = self._clock() + _TICK_S
                        self._tick()
                except Exception:
                    log.exception("working ahead failed")
                    metrics.FAIL_OPEN.labels("directives").inc()
        finally:
            await self._sites.close()

    def _tick(self) -> None:
        now = self._clock()
        self._lookahead.tick(now)
        self._sites.keep({w.id for w in self._pool})
        if self._settings.pins:
            workers = self._pool.all()
            for worker in [workers[(self._turn + i) % len(workers)] for i in range(min(_TENDED, len(workers)))]:
                if worker.state == "up" and (known := self._state.workers.get(worker.id)) is not None:
                    self._tend(worker, known, now)
            self._turn += _TENDED

    def _tend(self, worker: Worker, known: WorkerState, now: float) -> None:
        """Plans a worker's pins anew, and sends what is due if it is idle."""
        settings, site = self._settings, self._sites.of(worker)
        size = known.block_size
        if not size or not known.capacity:
            return
        budget = int(settings.pin_share * known.capacity)
        if worker.facts.pin_budget_blocks is not None:
            budget = min(budget, worker.facts.pin_budget_blocks)
        least = max(1, settings.min_tokens // size)
        # A lone use is forgotten after its half-life.
        lanes = [queue.lanes[worker.id] for queue in self._state.queues.values() if worker.id in queue.lanes]
        waiting = {group for lane in lanes for _, group in lane.groups}
        wanted = self._prefixes.used_on(
            worker.id, now, least_blocks=least, least_uses_s=0.5 / MEMORY_S, without=waiting
        )
        pins = choose(busiest(wanted, 4 * budget), budget, known.rates.seconds(size, 0), least)
        for name in site.pins.plan(pins, now):
            known.residency.unpin(name)
            known.version += 1
        site.used = {pin.name: site.used.get(pin.name, site.filled) for pin in pins}
        self._count_losses(site, worker, known, now)
        if not self._sites.idle(worker, known) or site.prewarm is not None:
            return
        renewals, surplus = site.pins.renewals(now), site.pins.surplus()
        if worker.facts.has_plugin and renewals:
            self._tell(site, worker, "renew", renewals[0].name)
        elif worker.facts.has_plugin and surplus:
            self._tell(site, worker, "unpin", surplus[0])
        elif settings.prewarm:
            self._touch(site, worker, known.capacity, size, now)

    def _count_losses(self, site: Site, worker: Worker, known: WorkerState, now: float) -> None:
        whole = {n for n, pin in site.pins.planned.items() if known.residency.match(pin.chain) == len(pin.chain)}
        lost = (site.resident & site.pins.planned.keys()) - whole
        if lost:
            metrics.PREFIXES_LOST.labels(worker.id).inc(len(lost))
        site.resident = whole
        for name, (until, _) in list(site.later.items()):
            if name not in site.pins.planned or (name in whole and until <= now):
                del site.later[name]

    def _touch(self, site: Site, worker: Worker, capacity: int, size: int, now: float) -> None:
        """Prefills the worthiest prefix that has been lost, or is about to be."""
        for name, pin in site.pins.planned.items():
            pinned = site.pins.held(name)
            fresh = pinned or site.filled - site.used.get(name, 0) < _TOUCH * capacity
            if (fresh and name in site.resident) or not isinstance(pin.source, Source):
                continue
            if name in site.later and now < site.later[name][0]:
                continue
            directive = None
            if worker.facts.has_plugin:
                directive = site.pins.directive(name, size, now)
                if directive is None:
                    continue
            site.used[name] = site.filled
            self._sites.start(site, worker, pin.chain, self._keep(site, worker, pin, directive))
            return

    def _tell(self, site: Site, worker: Worker, verb: str, name: str) -> None:
        self._sites.start(site, worker, (), self._say(site, worker, verb, name))

    # -- talking to workers

    async def _keep(self, site: Site, worker: Worker, pin: Pin, directive: dict[str, Any] | None) -> None:
        """Prefills a static prefix, and pins it where that can be."""
        try:
            report = await self._prewarmer.ask(worker, pin.chain, pin.source, None, "static", directive)
        except BaseException as error:
            site.pins.forget(pin.name)
            if isinstance(error, Exception):  # else it gave way to a call
                self._put_off(site, pin.name)
            raise
        self._put_off(site, pin.name)
        if directive is None:
            return
        if report is None or report.get("error"):
            site.pins.refused(pin.name, self._clock())
            metrics.DIRECTIVES.labels("pin", "error").inc()
        else:
            self._pinned(site, worker.id, pin.name)
            metrics.DIRECTIVES.labels("pin", "ok").inc()

    async def _say(self, site: Site, worker: Worker, verb: str, name: str) -> None:
        """Renews or gives back a pin, by a call of one token."""
        directive: dict[str, Any] = {verb: name}
        if verb == "renew":
            directive["ttl_s"] = self._settings.pin_ttl_s
        model = worker.facts.models[0].id
        answer = await self._prewarmer.post(worker, {"model": model, "prompt": ".", **transfer(directive)})
        report = report_of(answer)
        ok = report is not None and not report.get("error")
        metrics.DIRECTIVES.labels(verb, "ok" if ok else "error").inc()
        if ok and verb == "renew":
            site.pins.renewed(name, self._clock())
            return
        self._unpinned(site, worker.id, name)

    # -- helpers

    def _put_off(self, site: Site, name: str) -> None:
        _, wait = site.later.get(name, (0.0, _AGAIN_S / 2))
        wait = min(2 * wait, _AGAIN_MOST_S)
        site.later[name] = (self._clock() + wait, wait)

    def _pinned(self, site: Site, worker: str, name: str) -> None:
        chain, known = site.pins.obeyed(name), self._state.workers.get(worker)
        if chain is not None and known is not None:
            known.residency.pin(name, chain)
            known.version += 1

    def _unpinned(self, site: Site, worker: str, name: str) -> None:
        site.pins.dropped(name)
        if (known := self._state.workers.get(worker)) is not None:
            known.residency.unpin(name)
            known.version += 1
