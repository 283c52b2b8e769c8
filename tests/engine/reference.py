"""vLLM's scheduling loop written out naively, request by request and token by token, to compare the engine's with.

A transcription of ``Scheduler.schedule`` and ``KVCacheManager.allocate_slots`` (0.32) with plain lists; no shortcuts.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(eq=False)
class Ref:
    """A request of the reference."""

    id: str
    prompt: int
    output: int
    hashes: tuple[int, ...]
    priority: int
    arrival: float
    seq: int
    computed: int = 0
    generated: int = 0
    blocks: list[int] = field(default_factory=list)
    registered: int = 0
    cached: int | None = None
    prefilling: bool = True

    @property
    def tokens(self) -> int:
        return self.prompt + self.generated


class Reference:
    def __init__(self, blocks: int, size: int, seqs: int, budget: int, policy: str) -> None:
        self.size, self.seqs, self.budget, self.policy = size, seqs, budget, policy
        self.refs = [0] * blocks
        self.hash_of: list[int | None] = [None] * blocks
        self.cached: dict[int, list[int]] = {}
        self.free = list(range(1, blocks))
        self.running: list[Ref] = []
        self.waiting: list[Ref] = []
        self.preemptions = 0

    def add(self, request: Ref) -> None:
        self.waiting.append(request)
        self._sort()

    def _sort(self) -> None:
        key = (
            (lambda r: (r.priority, r.arrival, r.seq))
            if self.policy == "priority"
            else (lambda r: (r.arrival, r.seq))
        )
        self.waiting.sort(key=key)

    def _evict(self, block: int) -> None:
        h = self.hash_of[block]
        if h is not None:
            self.cached[h].remove(block)
            if not self.cached[h]:
                del self.cached[h]
            self.hash_of[block] = None

    def _allocate(self, request: Ref, n: int) -> bool:
        need = -(-(request.computed + n) // self.size) - len(request.blocks)
        if need > len(self.free):
            return False
        for _ in range(need):
            block = self.free.pop(0)
            self._evict(block)
            self.refs[block] = 1
            request.blocks.append(block)
        for i in range(request.registered, min((request.computed + n) // self.size, len(request.hashes))):
            self.hash_of[request.blocks[i]] = request.hashes[i]
            self.cached.setdefault(request.hashes[i], []).append(request.blocks[i])
            request.registered = i + 1
        return True

    def _release(self, request: Ref) -> None:
        first, last = [], []
        for block in reversed(request.blocks):
            self.refs[block] -= 1
            if not self.refs[block]:
                (first if self.hash_of[block] is None else last).append(block)
        self.free = first + self.free + last
        request.blocks, request.registered = [], 0

    def step(self) -> tuple[int, int, list[str]] | None:
        """(prefilled tokens, decoding requests, ids finished) of one step; None if nothing is left."""
        while True:
            scheduled, preempted = self._schedule()
            if scheduled:
                break
            if not preempted:
                return None
        decode = sum(1 for request in scheduled if not request.prefilling)
        prefill = sum(n for request, n in scheduled.items() if request.prefilling)
        finished = []
        for request in list(self.running):
            if request not in scheduled:
                continue
            request.computed += scheduled[request]
            request.prefilling = request.computed < request.tokens
            if request.computed == request.tokens:
                request.generated += 1
                if request.generated == request.output:
                    self.running.remove(request)
                    self._release(request)
                    finished.append(request.id)
        return prefill, decode, finished

    def _schedule(self) -> tuple[dict[Ref, int], bool]:
        budget = self.budget
        scheduled: dict[Ref, int] = {}
        preempted = False
        i = 0
        while i < len(self.running) and budget > 0:
            request = self.running[i]
            n = min(request.tokens - request.computed, budget)
            ok = True
            while not self._allocate(request, n):
                if self.policy == "priority":
                    victim = max(self.running, key=lambda r: (r.priority, r.arrival))
                    if self.running.index(victim) < i:
                        i -= 1
                    self.running.remove(victim)
                    budget += scheduled.pop(victim, 0)
                else:
                    victim = self.running.pop()
                self._release(victim)
                victim.computed = 0
                victim.prefilling = True
                self.waiting.append(victim)
                self._sort()
                self.preemptions += 1
                preempted = True
                if victim is request:
                    ok = False
                    break
            if not ok:
                break
            scheduled[request] = n
            budget -= n
            i += 1
        while not preempted and self.waiting and budget > 0 and len(self.running) < self.seqs:
            request = self.waiting[0]
            hit: list[int] = []
            for h in request.hashes[: (request.tokens - 1) // self.size]:
                if h not in self.cached:
                    break
                hit.append(self.cached[h][0])
            idle = [b for b in hit if not self.refs[b]]
            if -(-request.tokens // self.size) - len(hit) + len(idle) > len(self.free):
                break
            self.waiting.pop(0)
            for block in hit:
                if not self.refs[block]:
                    self.free.remove(block)
                self.refs[block] += 1
            request.blocks = list(hit)
            request.registered = len(hit)
            request.computed = len(hit) * self.size
            if request.cached is None:
                request.cached = request.computed
            n = min(request.tokens - request.computed, budget)
            assert self._allocate(request, n)
            request.prefilling = True
            self.running.append(request)
            scheduled[request] = n
            budget -= n
        return scheduled, preempted
