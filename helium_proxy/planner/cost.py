"""The cost model (arXiv 2603.16104): token usage and precedence delay; and the same schedule in seconds.

Units: tokens, and *token steps*: one decode step with the whole KV capacity in use. A call that holds its new prompt
tokens u_p and its growing output for L steps uses ``L·u_p + L(L+1)/2`` token·steps of the M a worker offers per step.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from helium_proxy.planner.trie import TemplatedRadixTree


@dataclass(frozen=True, slots=True)
class PlanWorker:
    """A worker as planning sees it."""

    name: str
    models: frozenset[str] = frozenset()
    """Names it serves; empty: any."""
    kv_tokens: int = 32_768
    prefill_tokens_s: float = 8_000.0
    """Prompt tokens computed per second."""
    decode_step_s: float = 0.02
    """Seconds per decode step of a full batch."""
    max_seqs: int = 256

    def __post_init__(self) -> None:
        assert min(self.kv_tokens, self.prefill_tokens_s, self.decode_step_s, self.max_seqs) > 0

    def serves(self, model: str) -> bool:
        return not self.models or model in self.models


def decode_usage(length: float) -> float:
    """u_d: token·steps of an output of `length` tokens.

    >>> decode_usage(4)
    10.0
    """
    return length * (length + 1) / 2


def token_usage(length: float, prefill: float, kv_tokens: float) -> float:
    """u = a(L·u_p + u_d) with a = 1/M: steps for which the call uses the whole worker.

    >>> token_usage(4, 10, 100)
    0.5
    """
    return (length * prefill + decode_usage(length)) / kv_tokens


def precedence_delay(length: float) -> float:
    """d = a·M·L: steps that an output of `length` tokens takes, however empty the worker.

    >>> precedence_delay(64)
    64
    """
    return length


@dataclass(slots=True)
class PrefixLru:
    """What a worker's prefix cache holds, by nodes of the radix tree: least recently used out first."""

    capacity: float
    # All mutable state: resident nodes, oldest first, with their tokens, and the sum of those.
    resident: OrderedDict[int, float] = field(default_factory=OrderedDict)
    used: float = 0.0

    def admit(self, tree: TemplatedRadixTree, operator: int) -> float:
        """Run `operator`: returns the prompt tokens it must compute, and leaves its path resident."""
        path = tree.paths[operator]
        cached = 0.0
        for node in path:
            if node.tokens and node.index not in self.resident:
                break
            cached = node.depth
        for node in reversed(path):  # ends with the root most recent: a chain is evicted from its tail
            if not node.tokens:
                continue
            if self.resident.pop(node.index, None) is None:
                self.used += node.tokens
            self.resident[node.index] = node.tokens
        while self.used > self.capacity and len(self.resident) > 1:
            self.used -= self.resident.popitem(last=False)[1]
        prompt = tree.prompts[operator]
        return prompt - min(cached, prompt)


@dataclass(frozen=True, slots=True)
class Forecast:
    """A schedule in real terms: tokens to compute by operator, when each starts and ends, seconds from the start."""

    computed: dict[int, float]
    started: dict[int, float]
    finished: dict[int, float]

    @property
    def computed_tokens(self) -> float:
        return sum(self.computed.values())

    @property
    def makespan_s(self) -> float:
        return max(self.finished.values(), default=0.0)


def forecast(
    tree: TemplatedRadixTree,
    workers: Sequence[PlanWorker],
    order: Iterable[int],
    placement: dict[int, int],
    deps: dict[int, tuple[int, ...]],
) -> Forecast:
    """Play `order` (producers first) on workers that prefill one prompt after another, decode side by side, and hold
    no more calls than their KV and `max_seqs` allow."""
    caches = [PrefixLru(worker.kv_tokens) for worker in workers]
    prefill_free = [0.0] * len(workers)
    running: list[list[tuple[float, float]]] = [[] for _ in workers]  # per worker: heap of (end, tokens held)
    held = [0.0] * len(workers)
    computed: dict[int, float] = {}
    started: dict[int, float] = {}
    finished: dict[int, float] = {}
    for operator in order:
        k = placement[operator]
        worker = workers[k]
        new = caches[k].admit(tree, operator)
        need = new + tree.lengths[operator]
        start = max([prefill_free[k], *(finished[dep] for dep in deps[operator] if dep in finished)])
        while running[k] and (
            running[k][0][0] <= start or held[k] + need > worker.kv_tokens or len(running[k]) >= worker.max_seqs
        ):
            end, tokens = heapq.heappop(running[k])
            held[k] -= tokens
            start = max(start, end)
        prefill_free[k] = start + new / worker.prefill_tokens_s
        end = prefill_free[k] + tree.lengths[operator] * worker.decode_step_s
        heapq.heappush(running[k], (end, need))
        held[k] += need
        computed[operator], started[operator], finished[operator] = new, start, end
    return Forecast(computed, started, finished)
