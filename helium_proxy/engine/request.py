"""What goes into the scheduler and what comes out: requests, step results, counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, inf, sqrt
from typing import Any, Literal

State = Literal["waiting", "prefill", "decode", "finished", "aborted"]


class Request:
    """One sequence to generate. The first group is the caller's, the second the scheduler's."""

    __slots__ = (
        "_generated", "arrival", "base", "blocked_since", "blocks", "cached_tokens", "computed", "directive",
        "finished_at", "first_token_at", "hashes", "id", "output_tokens", "pin_reply", "preemptions", "priority",
        "prompt_tokens", "read_cache", "registered", "salt", "scheduled_at", "seq", "state", "tokens",
    )  # fmt: skip

    def __init__(
        self,
        id: str,
        prompt_tokens: int,
        output_tokens: int,
        hashes: Sequence[int] = (),
        *,
        priority: int = 0,
        tokens: Sequence[int] = (),
        salt: str = "",
        directive: Any = None,
        read_cache: bool = True,
    ) -> None:
        self.id = id
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens  # exactly as many will be generated
        self.hashes = hashes  # of the full blocks of prompt and reply, as far as known; unknown ones are not cached
        self.priority = priority  # lower is earlier
        self.tokens = tokens  # prompt and reply, for KV events; empty: not told
        self.salt = salt  # what `hashes` are seeded with, for KV events
        self.directive = directive  # `kv_transfer_params.helium`, see `PinTable`
        self.read_cache = read_cache  # False: nothing is taken from the cache (vLLM: prompt_logprobs)

        self.state: State = "waiting"
        self.seq = 0  # order of arrival
        self.arrival = 0.0
        self.blocked_since: float | None = None  # while it waits: when pins first stood beside it, next in the queue
        self.scheduled_at: float | None = None  # start of the step that first scheduled it
        self.first_token_at: float | None = None
        self.finished_at: float | None = None
        self.cached_tokens = 0  # of the prompt, found in the cache at first admission
        self.preemptions = 0
        self.pin_reply: dict[str, Any] | None = None
        self.blocks: list[int] = []  # held, head first
        self.registered = 0  # leading blocks of `blocks` that are cached
        self.computed = 0  # tokens whose KV is there (not kept up while decoding)
        self.base = 0  # while decoding: the tick at which nothing was generated; so generated = ticks - base
        self._generated = 0  # while not decoding

    def __repr__(self) -> str:
        return f"<Request {self.id} {self.state} {self.prompt_tokens}+{self.output_tokens}>"


@dataclass(slots=True)
class Counters:
    """Totals since start, in tokens where not said otherwise."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    queries: int = 0
    hits: int = 0
    computed_tokens: int = 0
    """Prefilled in fact, recomputation after preemption included."""
    generation_tokens: int = 0
    preemptions: int = 0
    """Events."""
    steps: int = 0
    busy_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Statistics:
    running: int
    waiting: int
    usage: float
    """Share of the KV blocks that are held."""
    free_blocks: int
    pinned_blocks: int
    counters: Counters


@dataclass(slots=True)
class StepResult:
    """What a step, or a run of `ticks` equal decode steps, brought about at `end`."""

    start: float
    end: float
    ticks: int
    prefill_tokens: int
    decoding: int
    """Sequences that got a token in each tick, those just prefilled not counted."""
    first: list[Request] = field(default_factory=list)
    """Prefilled for the first time, hence with their first token at `end`."""
    finished: list[Request] = field(default_factory=list)


@dataclass(slots=True)
class Step:
    """A step in progress, or a run of `ticks` equal decode steps."""

    start: float
    first_s: float  # duration of the first tick
    slope_s: float  # by how much each further tick takes longer, for the contexts grow
    ticks: int
    decoding: int
    chunks: list[tuple[Request, int]]
    skipped: list[Request]

    def end(self, ticks: int) -> float:
        return self.start + ticks * self.first_s + self.slope_s * (ticks * (ticks - 1) // 2)

    def ticks_until(self, now: float) -> int:
        """How many of its ticks have begun at `now`; at least one, and all if they take no time."""
        if self.ticks == 1 or self.first_s <= 0.0 or now == inf:
            return self.ticks
        elapsed = max(0.0, now - self.start)
        half = self.slope_s / 2
        b = self.first_s - half
        ticks = (sqrt(b * b + 4 * half * elapsed) - b) / (2 * half) if half > 0.0 else elapsed / self.first_s
        return min(max(1, ceil(ticks)), self.ticks)
