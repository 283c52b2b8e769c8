"""The engine in a process: a scheduler on the real clock, its tokenizer, and what a caller holds of a request.

One task steps the scheduler and sleeps for as long as each step is to take. The engine's own time runs on from
step to step, so that late wake-ups do not add up. Replies are known beforehand; a `Generation` only says how many
of their tokens have come, so that nothing is queued per token and a slow reader costs no memory.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from array import array
from collections.abc import Callable
from typing import Any

from .blocks import KVEvent, block_hashes
from .config import EngineConfig
from .generate import Reply
from .metrics import EngineMetrics
from .request import Request, StepResult
from .scheduler import Scheduler
from .text import Tokenizer

logger = logging.getLogger(__name__)

_MAX_LAG_S = 0.25


class Generation:
    """One sequence being generated."""

    __slots__ = ("_waiter", "finished", "generated", "reply", "request")

    def __init__(self, request: Request, reply: Reply) -> None:
        self.request = request
        self.reply = reply
        self.generated = 0  # tokens of `reply` that have come
        self.finished = False  # no more will come: complete, or aborted
        self._waiter: asyncio.Future[None] | None = None

    def __repr__(self) -> str:
        return f"<Generation {self.request.id} {self.generated}/{len(self.reply.tokens)}>"

    @property
    def complete(self) -> bool:
        """Every token has come."""
        return self.request.state == "finished"

    async def wait(self, seen: int | None = None) -> int:
        """Wait until there are more than `seen` tokens (None: all), or the end; returns how many there are."""
        while not self.finished and (seen is None or self.generated <= seen):
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self.generated

    def progress(self, generated: int, *, finished: bool) -> None:
        """Called by the engine."""
        self.generated = generated
        self.finished = finished
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


class EmbeddedEngine:
    """A simulated vLLM engine on the real clock. Use as ``async with EmbeddedEngine(config) as engine``."""

    def __init__(
        self,
        config: EngineConfig | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        publish: Callable[[list[KVEvent]], None] | None = None,
    ) -> None:
        self.config = config or EngineConfig()
        self.tokenizer = Tokenizer()
        self.scheduler = Scheduler(self.config, events=publish is not None)
        self.metrics = EngineMetrics(self.scheduler)
        # -- all mutable state besides theirs ---------------------------------------------------------------
        self._generations: dict[str, Generation] = {}  # request id -> what its caller holds; live ones only
        self._streams: dict[str, Generation] = {}  # those of them whose every token is waited for
        self._wake: asyncio.Future[bool] | None = None  # what the task sleeps on; set: something changed
        self._task: asyncio.Task[None] | None = None
        self.jitter = 0.0  # a step takes up to this share longer, at random
        # ---------------------------------------------------------------------------------------------------
        self._publish = publish
        self._clock = clock
        self._origin = clock()
        self._random = random.Random(self.config.seed)

    def __repr__(self) -> str:
        return f"<EmbeddedEngine {self.config.model} {self.scheduler!r}>"

    async def __aenter__(self) -> EmbeddedEngine:
        self._task = asyncio.create_task(self._run(), name="embedded-engine")
        self._task.add_done_callback(self._ended)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """The engine is down, by request or by a defect: let nobody wait for it."""
        if not task.cancelled():
            logger.error("the embedded engine died", exc_info=task.exception())
        for generation in list(self._generations.values()):
            generation.progress(generation.generated, finished=True)

    @property
    def alive(self) -> bool:
        return self._task is not None and not self._task.done()

    def now(self) -> float:
        """The engine's time in seconds, from 0 at its making."""
        return (self._clock() - self._origin) * self.config.time_scale

    def submit(
        self,
        id: str,
        prompt: array[int],
        reply: Reply,
        *,
        priority: int = 0,
        salt: str = "",
        directive: Any = None,
        stream: bool = False,
        read_cache: bool = True,
    ) -> Generation:
        """Queue a request whose answer will be `reply`. Raises ValueError if it can never run, RuntimeError if the
        engine is down."""
        if not self.alive:
            raise RuntimeError("the engine is down")
        tokens = prompt + reply.tokens
        request = Request(
            id,
            len(prompt),
            len(reply.tokens),
            block_hashes(tokens, self.config.block, salt=salt),
            priority=priority,
            tokens=tokens if self._publish is not None else (),
            salt=salt,
            directive=directive,
            read_cache=read_cache,
        )
        self.scheduler.add(request, self.now())
        generation = self._generations[id] = Generation(request, reply)
        if stream:
            self._streams[id] = generation
        self._changed()
        return generation

    def abort(self, generation: Generation) -> None:
        """Stop a request; nothing happens if it has ended already."""
        id = generation.request.id
        if self._generations.pop(id, None) is None:
            return
        self._streams.pop(id, None)
        self.scheduler.abort(id)
        self.metrics.finished(generation.request, "abort")
        generation.progress(generation.generated, finished=True)
        self._changed()

    def _changed(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(True)

    async def _sleep(self, seconds: float | None) -> bool:
        """Sleep for `seconds` of real time (None: until something changes); True if something changed."""
        loop = asyncio.get_running_loop()
        wake: asyncio.Future[bool] = loop.create_future()
        self._wake = wake
        timer = None if seconds is None else loop.call_later(seconds, _expire, wake)
        try:
            return await wake
        finally:
            self._wake = None
            if timer is not None:
                timer.cancel()

    async def _run(self) -> None:
        scheduler, scale = self.scheduler, self.config.time_scale
        now = 0.0
        while True:
            if scheduler.idle:
                await self._sleep(None)
                now = max(now, self.now())
                continue
            end = scheduler.start(now, 1) if self._streams else scheduler.start(now)
            if end is None:  # all that was left has been aborted
                await asyncio.sleep(0)
                continue
            late = (end - now) * self.jitter * self._random.random() if self.jitter else 0.0
            remaining = (end + late - self.now()) / scale
            if remaining <= 0.0:
                await asyncio.sleep(0)
            while remaining > 0.0:
                if await self._sleep(remaining):
                    end = scheduler.cut(self.now())
                remaining = (end + late - self.now()) / scale
            result = scheduler.finish()
            now = max(end + late, self.now() - _MAX_LAG_S * scale)
            self._deliver(result)

    def _deliver(self, result: StepResult) -> None:
        self.metrics.stepped(result)
        for request in result.finished:
            generation = self._generations.pop(request.id, None)
            if generation is None:  # aborted while the step ran
                continue
            self._streams.pop(request.id, None)
            self.metrics.finished(request, generation.reply.finish_reason)
            generation.progress(request.output_tokens, finished=True)
        for generation in self._streams.values():
            generated = self.scheduler.generated(generation.request)
            if generated > generation.generated:
                generation.progress(generated, finished=False)
        events = self.scheduler.pool.events
        if events and self._publish is not None:
            self.scheduler.pool.events = []
            self._publish(events)


def _expire(wake: asyncio.Future[bool]) -> None:
    if not wake.done():
        wake.set_result(False)
