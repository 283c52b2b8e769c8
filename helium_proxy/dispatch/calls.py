"""A waiting call and an assignment, as the dispatch room sees them: plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from helium_proxy.residency.index import Chain
from helium_proxy.types import Hints

Reason = Literal["only", "state", "prefix", "balance", "idle", "round-robin", "least-loaded"]
"""Why a call went where it went: the only worker; the one with the state it continues; where its prefix is; away from
it, to balance; taken over by a worker that had room; or by an ablation's rule."""

Rank = tuple[int, float, int, float, int]
"""See `DispatchState._rank`."""


@dataclass(slots=True, eq=False)
class QueuedCall:
    """A call as the dispatcher sees it. Tokens, seconds on the monotonic clock."""

    id: str
    model: str
    tenant: str
    chain: Chain
    block_size: int
    """Tokens per block of `chain`."""
    prompt_tokens: int
    output_tokens: float
    """Expected."""
    arrived_at: float
    hints: Hints = field(default_factory=Hints)
    group: str = ""
    """The workflow it belongs to."""
    share: str = ""
    """Whose turn it waits for among the tenant's; by default its group's."""
    node: str = ""
    """The operator within the workflow."""
    prefer: str | None = None
    """The worker that holds what it continues; none other can serve it."""
    suggestion: str | None = None
    """Where a submitted plan has placed it: a preference, given up where it costs more than its own prefill."""
    exact: bool = False
    """Whether `chain` is of the token ids that the engine computes with."""
    exclude: frozenset[str] = frozenset()
    """Workers that failed it."""
    # -- the dispatcher's own notes
    turns: tuple[str, str] = field(init=False)
    """Who is served when it is: (tenant, share)."""
    workflow: tuple[str, str, str] = field(init=False)
    """Of which tenant, on which model."""
    flight: tuple[int, int | None] = field(init=False)
    """Its run among those in flight."""
    rank: Rank = (0, 0.0, 0, 0.0, 0)
    hits: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    """worker → (version of its residency, resident leading blocks, those of them that running calls hold)."""
    home: str | None = None
    """Where the call that it extends has run."""
    lane: str | None = None
    """The worker it waits for; None: not placed yet."""
    reason: Reason = "only"
    """Why it waits for that one."""
    lane_work: float = 0.0
    """Prompt tokens' worth of work by which it lengthens that lane."""
    passed: int = 0
    """Calls behind it in rank that went before it."""
    _own: tuple[int, int] = field(init=False, default=(0, 0))

    def __post_init__(self) -> None:
        self.turns = self.tenant, self.share or self.group
        self.workflow = self.tenant, self.model, self.group
        self.flight = self.hints.run_seq, self.hints.row

    def own_blocks(self, size: int) -> int:
        """Blocks of `size` tokens that it needs beyond its chain: the prompt's tail and its output."""
        if self._own[0] != size:
            tokens = max(0, self.prompt_tokens - len(self.chain) * self.block_size) + self.output_tokens
            self._own = size, max(1, -int(-tokens // size))
        return self._own[1]

    def __repr__(self) -> str:
        return f"<QueuedCall {self.id} {self.model} {self.prompt_tokens}+{self.output_tokens:.0f}>"


@dataclass(slots=True, eq=False)
class Assignment:
    """A decision: `call` goes to `worker`, which is believed to hold `cached_tokens` of its prompt."""

    call: QueuedCall
    worker: str
    cached_tokens: int
    reason: Reason
    engine_priority: int
    """For the engine's own queue; lower is earlier."""
    started_at: float
    work: float
    """Prompt tokens' worth of work it was counted as."""
    predicted_s: float
    """Expected duration on the worker."""
