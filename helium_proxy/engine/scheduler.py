"""vLLM's scheduler as a step machine under any clock.

Follows ``vllm/v1/core/sched/scheduler.py`` (0.32): continuous batching with chunked prefill. In each step the
running requests come first, one token for each that decodes; what is left of the token budget prefills, first the
request that is part way, then the waiting ones in the order of the policy, until one does not fit (those behind it
wait too). A waiting request is admitted only if its whole prompt fits into the free blocks. When a running one
finds no block, the last admitted (policy `priority`: the largest (priority, arrival)) is preempted: it gives up its
blocks and prefills again later, prompt and tokens so far.

The caller drives it::

    scheduler.add(request, now)
    end = scheduler.start(now)        # what the next step does, and when it will be over; None: nothing to do
    end = scheduler.cut(arrival)      # something arrived meanwhile: a run of steps ends with the one in progress
    result = scheduler.finish()       # at `end`: who got a first token, who finished

`start` takes many steps as one while nothing can change: no prefill, no request finishing, blocks for all. So the
cost of decoding grows with the blocks it fills, not with its tokens, and a simulator can afford a million calls.

A reply's length is known beforehand, and given in the request. Not modelled: speculative decoding, encoder inputs,
asynchronous scheduling (a step more for a reply that ends by itself), pipeline and data parallelism.
"""

from __future__ import annotations

import heapq
from bisect import insort
from math import inf

from .blocks import BlockPool
from .config import EngineConfig
from .pins import PATIENCE_S, PinTable
from .request import Counters, Request, Statistics, Step, StepResult


def _valid(entry: tuple[int, int, Request]) -> bool:
    """Whether an entry of the heap of finishes still holds: not so after preemption, delay or abort."""
    request = entry[2]
    return request.state == "decode" and request.base + request.output_tokens == entry[0]


class Scheduler:
    """The scheduler and KV cache of one engine; see the module's text for how to drive it."""

    def __init__(self, config: EngineConfig, *, events: bool = False) -> None:
        # -- all mutable state ------------------------------------------------------------------------------
        self.pool = BlockPool(config.blocks, config.block, events=events)
        self.pins = PinTable(self.pool, int(config.pin_budget * (config.blocks - 1)), config.pin_ttl_s)
        self.counters = Counters()
        self.ticks = 0  # steps so far: every decoding request gets one token a tick
        self._live: dict[str, Request] = {}  # id -> waiting or running
        self._running: dict[Request, None] = {}  # prefilling and decoding, in order of admission
        self._prefilling: dict[Request, None] = {}  # those of them that prefill
        self._waiting: list[tuple[int, float, int, Request]] = []  # (-priority, -arrival, -seq), next one last
        self._due: list[dict[Request, None]] = [{} for _ in range(config.block)]  # tick mod block size -> decoding
        # requests that need a new block then
        self._finishing: list[tuple[int, int, Request]] = []  # heap of (tick, seq, request); may hold outdated ones
        self._decoding = 0  # requests that decode
        self._context = 0  # sum of prompt_tokens - base over them: their contexts' sum at tick 0
        self._step: Step | None = None  # started and not finished
        self._lacking: tuple[Request, int] | None = (
            None  # next in the queue, which lacks blocks; what it found cached
        )
        self._aborting: list[Request] = []  # to be dropped when that step is over
        self._seq = 0
        # ---------------------------------------------------------------------------------------------------
        self.config = config
        self._profile = config.timing
        self._block = config.block
        self._seqs = config.seqs
        self._budget = config.batched_tokens
        self._max_len = config.context
        self._by_priority = config.policy == "priority"

    def __repr__(self) -> str:
        return f"<Scheduler {len(self._running)} running, {len(self._waiting)} waiting, {self.pool!r}>"

    def statistics(self) -> Statistics:
        pool = self.pool.statistics()
        return Statistics(
            len(self._running), len(self._waiting), pool.usage, pool.free, self.pins.blocks, self.counters
        )

    @property
    def idle(self) -> bool:
        """Nothing runs, nothing waits."""
        return not self._live

    def generated(self, request: Request) -> int:
        """Tokens `request` has got by the end of the last finished step."""
        return self.ticks - request.base if request.state == "decode" else request._generated

    def add(self, request: Request, now: float) -> None:
        """Queue `request`. Raises ValueError if it can never run."""
        if request.prompt_tokens < 1 or request.output_tokens < 1:
            raise ValueError("a request has at least one prompt token and one output token")
        if request.prompt_tokens + request.output_tokens > self._max_len:
            raise ValueError(f"the request exceeds max_model_len ({self._max_len})")
        if request.id in self._live:
            raise ValueError(f"request {request.id!r} is already there")
        self._seq += 1
        request.seq = self._seq
        request.arrival = now
        self._live[request.id] = request
        self._enqueue(request)

    def abort(self, request_id: str) -> bool:
        """Drop a request; while a step is in progress, at its end. False if it is not (any longer) there."""
        request = self._live.get(request_id)
        if request is None:
            return False
        if self._step is None:
            self._drop(request)
        else:
            self._aborting.append(request)
        return True

    def reset_prefix_cache(self) -> bool:
        """Forget pins and cached prefixes; False, and all stays, while any request runs."""
        if self._running:
            return False
        self.pins.clear()
        return self.pool.reset()

    # -- one step ---------------------------------------------------------------------------------------------

    def start(self, now: float, max_ticks: int = 1 << 40) -> float | None:
        """Begin the next step, or a run of up to `max_ticks` equal decode steps; returns when it will be over.

        None if nothing waits or runs. Blocks are taken, and their hashes registered, now.
        """
        assert self._step is None, "the last step is not finished"
        self.pins.expire(now)
        skipped: list[Request] = []
        stopped = False
        preemptions = self.counters.preemptions
        if self._decoding:
            if len(self._due[self.ticks % self._block]) <= self.pool.free:
                self._grow(self.ticks)
            else:
                skipped, stopped = self._grow_tight()
        decoding = self._decoding - len(skipped)
        context = self._context + self._decoding * self.ticks
        budget = self._budget - decoding
        chunks: list[tuple[Request, int]] = []
        for request in () if stopped else list(self._prefilling):
            n = min(request.prompt_tokens + request._generated - request.computed, budget)
            if n and self._extend(request, n):
                chunks.append((request, n))
                budget -= n
        preempted = self.counters.preemptions > preemptions
        if preempted:  # those the prefill pushed out no longer decode; and nobody is admitted in this step
            decoding = self._decoding - len(skipped)
            context = self._context + self._decoding * self.ticks
        else:
            self._admit(budget, chunks, now)
        if not chunks and not decoding:
            return self.start(now, max_ticks) if preempted else None
        prefill = attended = 0
        for request, n in chunks:
            prefill += n
            attended += n * request.computed + n * n // 2
        first_s = self._profile.step(prefill, attended, decoding, context)
        slope_s = self._profile.context_token_s * decoding
        ticks = 1 if chunks or preempted else self._steady_ticks(max_ticks)
        self._step = step = Step(now, first_s, slope_s, ticks, decoding, chunks, skipped)
        if ticks > 1 and self._waiting and self.pins.blocks:  # a pin that gives way may let one of them in
            since = self._waiting[-1][3].blocked_since
            patience = inf if since is None else since + PATIENCE_S
            step.ticks = step.ticks_until(min(patience, self.pins.next_expiry))
        return step.end(step.ticks)

    def cut(self, now: float) -> float:
        """End a run of steps with the one in progress at `now`; returns when that is over."""
        step = self._step
        assert step is not None, "no step is in progress"
        step.ticks = step.ticks_until(now)
        return step.end(step.ticks)

    def finish(self) -> StepResult:
        """Complete the step begun: hand out its tokens and free what finished."""
        step = self._step
        assert step is not None, "no step is in progress"
        self._step = None
        end = step.end(step.ticks)
        for tick in range(self.ticks + 1, self.ticks + step.ticks):
            self._grow(tick)
        self.ticks += step.ticks
        for request in step.skipped:
            self._leave_decode(request)
            self._enter_decode(request, request._generated - 1)
        counters = self.counters
        counters.steps += step.ticks
        counters.busy_s += end - step.start
        counters.generation_tokens += step.decoding * step.ticks
        result = StepResult(step.start, end, step.ticks, 0, step.decoding)
        for request, n in step.chunks:
            result.prefill_tokens += n
            request.computed += n
            if request.computed == request.prompt_tokens + request._generated:
                del self._prefilling[request]
                counters.generation_tokens += 1
                self._enter_decode(request, request._generated + 1)
                if request.first_token_at is None:
                    request.first_token_at = end
                    counters.prompt_tokens += request.prompt_tokens
                    counters.cached_tokens += request.cached_tokens
                    result.first.append(request)
        counters.computed_tokens += result.prefill_tokens
        heap = self._finishing
        ending: list[Request] = []
        while heap and heap[0][0] <= self.ticks:
            entry = heapq.heappop(heap)
            if _valid(entry):
                ending.append(entry[2])
        if len(ending) > 1:  # blocks are freed in order of admission, which decides what is evicted first
            among = set(ending)
            ending = [request for request in self._running if request in among]
        for request in ending:
            self._complete(request, end)
        result.finished = ending
        if self._aborting:
            for request in self._aborting:
                self._drop(request)
            self._aborting.clear()
        return result

    # -- its parts --------------------------------------------------------------------------------------------

    def _steady_ticks(self, most: int) -> int:
        """For how many ticks from now nothing changes: nobody finishes and there are blocks for all."""
        heap = self._finishing
        while not _valid(heap[0]):
            heapq.heappop(heap)
        if self._lacking is not None:  # a reply under way may hold the very block that the next in the queue lacks
            waiting, at = self._lacking
            lacking = waiting.hashes[at] if at < len(waiting.hashes) else None
            if any(at < len(r.hashes) and r.hashes[at] == lacking for r in self._running):
                return 1
        ticks = min(most, heap[0][0] - self.ticks)
        free = self.pool.free
        if self._decoding * (ticks // self._block + 1) > free:
            for ahead in range(1, ticks):
                free -= len(self._due[(self.ticks + ahead) % self._block])
                if free < 0:
                    return ahead
        return ticks

    def _grow(self, tick: int) -> None:
        """Give the decoding requests their blocks for `tick`, and cache those that it fills."""
        due = self._due[tick % self._block]
        if due:
            for request, block in zip(due, self.pool.allocate(len(due)), strict=True):
                request.blocks.append(block)
        for request in self._due[(tick + 1) % self._block]:
            self._register(request, len(request.blocks))

    def _grow_tight(self) -> tuple[list[Request], bool]:
        """`_grow` when the free blocks do not suffice: request by request, in order of admission, with preemption.

        Once a request has preempted itself, those after it get no token in this tick. Returns them, and whether
        that happened.
        """
        due = self._due[self.ticks % self._block]
        filled = self._due[(self.ticks + 1) % self._block]
        skipped: list[Request] = []
        stopped = False
        for request in list(self._running):
            if request.state != "decode":
                continue
            if stopped:
                skipped.append(request)
                continue
            if request in due:
                if not self._make_room(1, request):
                    stopped = True
                    continue
                request.blocks += self.pool.allocate(1)
            if request in filled:
                self._register(request, len(request.blocks))
        return skipped, stopped

    def _extend(self, request: Request, n: int) -> bool:
        """Take the blocks for `n` more prefilled tokens; False if `request` itself had to be preempted."""
        end = request.computed + n
        need = -(-end // self._block) - len(request.blocks)
        if need > self.pool.free and not self._make_room(need, request):
            return False
        if need > 0:
            request.blocks += self.pool.allocate(need)
        self._register(request, end // self._block)
        return True

    def _admit(self, budget: int, chunks: list[tuple[Request, int]], now: float) -> None:
        """Move waiting requests to the running ones while tokens, sequences and blocks last."""
        pool, size = self.pool, self._block
        self._lacking = None
        while budget > 0 and self._waiting and len(self._running) < self._seqs:
            request = self._waiting[-1][3]
            total = request.prompt_tokens + request._generated
            hit = pool.lookup(request.hashes, (total - 1) // size) if request.read_cache else []
            need = -(-total // size) - len(hit)
            if self.pins.blocks:
                self._relieve(request, -(-total // size), hit, now)
            if need + pool.idle(hit) > pool.free:
                self._lacking = request, len(hit)
                return
            self._waiting.pop()
            request.blocked_since = None
            pool.touch(hit)
            self.pins.used(hit, now)
            request.blocks = hit
            request.registered = len(hit)
            request.computed = cached = len(hit) * size
            n = min(total - cached, budget)
            self._extend(request, n)
            request.state = "prefill"
            self._running[request] = self._prefilling[request] = None
            if request.scheduled_at is None:
                request.scheduled_at = now
                request.cached_tokens = cached
                self.counters.queries += total
                self.counters.hits += cached
            chunks.append((request, n))
            budget -= n

    def _relieve(self, request: Request, blocks: int, hit: list[int], now: float) -> None:
        """Take pinned blocks for `request`, next in the queue, if it could not run beside the pins even alone, or was
        first next long ago; as the connector does."""
        pool, pins, shared = self.pool, self.pins, set(hit)
        if blocks > pool.capacity - pins.blocks:
            shortage = blocks + pins.outside(shared) - pool.capacity
            pins.relieve(shortage, lambda b: b not in shared)
        if request.blocked_since is None:
            request.blocked_since = now
        elif now >= request.blocked_since + PATIENCE_S:
            request.blocked_since = now
            shortage = blocks - len(hit) + pool.idle(hit) - pool.free
            pins.relieve(shortage, lambda b: b not in shared and pool.references(b) == 1)

    def _register(self, request: Request, full: int) -> None:
        stop = min(full, len(request.hashes))
        if stop > request.registered:
            self.pool.register(request.blocks, request.hashes, request.registered, stop, request.tokens, request.salt)
            request.registered = stop

    def _make_room(self, blocks: int, request: Request) -> bool:
        """Free `blocks` blocks for `request` by preemption; False if it was itself preempted."""
        while self.pool.free < blocks:
            if self._by_priority:
                victim = max(self._running, key=lambda r: (r.priority, r.arrival))
            else:
                victim = next(reversed(self._running))
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _preempt(self, request: Request) -> None:
        self._leave(request)
        request.state = "waiting"
        request.computed = 0
        request.preemptions += 1
        self.counters.preemptions += 1
        self._enqueue(request)

    def _enqueue(self, request: Request) -> None:
        priority = -request.priority if self._by_priority else 0
        insort(self._waiting, (priority, -request.arrival, -request.seq, request))

    def _enter_decode(self, request: Request, generated: int) -> None:
        """From the current tick on `request` decodes, with `generated` tokens so far."""
        request.state = "decode"
        request.base = base = self.ticks - generated
        self._due[(base + 1 - request.prompt_tokens) % self._block][request] = None
        self._decoding += 1
        self._context += request.prompt_tokens - base
        heapq.heappush(self._finishing, (base + request.output_tokens, request.seq, request))
        if len(self._finishing) > 2 * self._decoding + 64:
            self._finishing = [e for e in self._finishing if _valid(e)]
            heapq.heapify(self._finishing)

    def _leave_decode(self, request: Request) -> None:
        request._generated = self.ticks - request.base
        del self._due[(request.base + 1 - request.prompt_tokens) % self._block][request]
        self._decoding -= 1
        self._context -= request.prompt_tokens - request.base

    def _leave(self, request: Request) -> None:
        """Take a running request out, and its blocks back."""
        if request.state == "decode":
            self._leave_decode(request)
        else:
            del self._prefilling[request]
        del self._running[request]
        self.pool.release(request.blocks)
        request.blocks = []
        request.registered = 0

    def _complete(self, request: Request, now: float) -> None:
        if request.directive is not None:
            request.pin_reply = self.pins.apply(
                request.directive, request.blocks, request.prompt_tokens, self._block, now
            )
        self._leave(request)
        request.state = "finished"
        request.finished_at = now
        del self._live[request.id]

    def _drop(self, request: Request) -> None:
        if self._live.get(request.id) is not request:
            return
        if request.state == "waiting":
            self._waiting = [entry for entry in self._waiting if entry[3] is not request]
        else:
            self._leave(request)
        request.state = "aborted"
        del self._live[request.id]
