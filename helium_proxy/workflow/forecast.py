"""What a template expects of a live run: how long each call, what still follows, what comes next.

Compiled from a template's statistics every so often, and read on every call. Nodes are taken in order of their
mean position in a run, in which parents precede children, so that one pass each way suffices even where loops
make the graph of keys cyclic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from helium_proxy.types import Hints
from helium_proxy.workflow.graph import Call, Run
from helium_proxy.workflow.template import ROOT, Key, NodeStats, Template

_LIKELY = 0.5
"""Edges at least this probable make up the expected rest of a run."""
_NEVER = 0.1
"""Calls expected to follow, below which none is."""
_ALWAYS = 0.9
"""Share of a node's calls that have a parent of some key, above which that key alone drives its count."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """A call expected after another one."""

    node: str
    iteration: int
    probability: float
    count: float
    """Such calls expected."""
    think_s: float
    """Expected seconds from the last parent's end to the call's arrival."""
    model: str | None
    """Which the node's calls have asked for."""
    extends: bool
    """The call's prompt is expected to begin with the finished call's whole prompt and reply."""


@dataclass(slots=True)
class _Edge:
    child: Key
    probability: float
    fan_out: float
    fan_in: float
    instances: float
    """Children per parent, a child with several such parents counted in parts."""
    think_s: float
    extends: float


@dataclass(slots=True)
class _Node:
    stats: NodeStats
    edges: list[_Edge]
    parents: list[tuple[Key, _Edge, float]] = field(default_factory=list)
    """(parent's key, edge, share of this node's calls having such a parent)."""
    group: frozenset[Key] = frozenset()
    constant: float | None = None
    """Calls per run, where that never varies though many calls are joined in each."""
    siblings: float = 1.0
    """Calls expected with the same parents, this one included."""
    path: tuple[int, float, float] = (0, 0.0, 0.0)
    """Longest chain after it: calls, output tokens, prompt tokens."""


class Forecast:
    """One compiled version of a template."""

    def __init__(self, template: Template, now: float) -> None:
        self.version = template.version
        self.compiled_at = now
        self._nodes: dict[Key, _Node] = {}
        self._hints: dict[Key, dict[str, Any]] = {}  # filled on demand
        self._bases: dict[str, Key] = {}  # base → its highest iteration
        by_rank = sorted(template.nodes.values(), key=lambda stats: (stats.rank.mean, stats.key))
        self._order = [stats.key for stats in by_rank if stats.calls > 0 or stats.key == ROOT]
        self._place = {key: at for at, key in enumerate(self._order)}
        for key in self._order:
            stats = template.nodes[key]
            self._nodes[key] = _Node(stats, self._edges(stats), group=stats.group())
            if stats.output.n and key[1] >= self._bases.get(key[0], ROOT)[1]:
                self._bases[key[0]] = key
        # Compiling costs by the edge, and matters less once runs have confirmed what is known.
        edges = sum(len(node.stats.edges) for node in self._nodes.values())
        self.keep = max(edges / 32, 1.0) * (1.0 if template.runs < 5 else 8.0)
        self._link()
        self._chains()

    def __repr__(self) -> str:
        return f"<Forecast of version {self.version}: {len(self._order) - 1} nodes>"

    def _edges(self, stats: NodeStats) -> list[_Edge]:
        """To nodes further on; those that lead back (of loops) are left out."""
        out, place = [], self._place
        here, closed_parents = place[stats.key], stats.closed
        for child, edge in stats.edges.items():
            if edge.closed + edge.live > 0 and place.get(child, -1) > here:
                probability, fan_out = edge.probability(closed_parents), edge.fan_out
                fan_in = edge.fan_in if edge.links > edge.joined else 1.0
                instances = probability * fan_out / fan_in
                out.append(_Edge(child, probability, fan_out, fan_in, instances, edge.think.mean, edge.extends.mean))
        return out

    def _link(self) -> None:
        place = self._place
        for node in self._nodes.values():
            for edge in node.edges:
                child = self._nodes[edge.child]
                joined, calls = node.stats.edges[edge.child].joined, child.stats.calls
                child.parents.append((node.stats.key, edge, 1.0 if joined >= calls else joined / calls))
        for node in self._nodes.values():
            counts = node.stats.counts
            if len(counts) > 1 and min(counts) == max(counts) and any(e.fan_in > 1.5 for _, e, _ in node.parents):
                node.constant = float(counts[0])
            if not node.group:
                continue
            nearest = max((parent for parent in node.group if parent in place), key=place.__getitem__, default=ROOT)
            node.siblings = sum(
                edge.probability * edge.fan_out
                for edge in self._nodes[nearest].edges
                if self._nodes[edge.child].group == node.group
            )

    def _chains(self) -> None:
        for key in reversed(self._order):
            node = self._nodes[key]
            best = (0, 0.0, 0.0)
            for edge in node.edges:
                if edge.probability < _LIKELY:
                    continue
                child = self._nodes[edge.child]
                calls, output, prompt = child.path
                stats = child.stats
                best = max(best, (calls + 1, output + stats.output.mean, prompt + stats.prompt.mean))
            node.path = best

    def _known(self, call: Call) -> _Node | None:
        return self._nodes.get((call.base, call.iteration))

    def _profile(self, call: Call) -> NodeStats | None:
        """The node's own lengths, or where the loop goes deeper than ever those of its deepest iteration."""
        node = self._known(call)
        if node is not None and node.stats.output.n:
            return node.stats
        deepest = self._bases.get(call.base)
        return None if deepest is None else self._nodes[deepest].stats

    def hints(self, call: Call, siblings_arrived: int) -> dict[str, Any]:
        """The fields of `Hints` that a template knows, in a dict of the caller's own."""
        key = (call.base, call.iteration)
        known = self._hints.get(key)
        if known is None:
            known = self._hints[key] = self._constant(call)
        node = self._nodes.get(key)
        if node is None:
            return known.copy()
        return {**known, "siblings_to_come": max(0, round(node.siblings) - siblings_arrived)}

    def _constant(self, call: Call) -> dict[str, Any]:
        """What holds for every call of a key, for as long as this forecast is kept."""
        known: dict[str, Any] = {}
        profile = self._profile(call)
        if profile is not None and profile.output.n:
            known["output_tokens"] = profile.output.mean
        node = self._known(call)
        if node is not None:
            known["path_calls"], known["path_output_tokens"], known["path_prompt_tokens"] = node.path
            # What has not followed yet in runs that still go may yet follow.
            known["last"] = node.stats.closed > 0 and self.descends((call.base, call.iteration)) < _NEVER
        return known

    def group(self, call: Call) -> frozenset[Key]:
        node = self._known(call)
        return frozenset() if node is None else node.group

    def descends(self, key: Key) -> float:
        """Calls expected below one call of `key`."""
        instances = {key: 1.0}
        for at in self._order[self._place[key] :]:
            above = instances.get(at)
            if above is None:
                continue
            for edge in self._nodes[at].edges:
                # A join below this call is one call, however small this call's part in it.
                below = max(above * edge.instances, edge.probability * min(above, 1.0))
                if below > instances.get(edge.child, 0.0):
                    instances[edge.child] = below
        return sum(instances.values()) - 1.0

    def totals(self, run: Run) -> dict[Key, float]:
        """Calls of each key expected in `run` from beginning to end, given those that have arrived."""
        totals: dict[Key, float] = {ROOT: 1.0}
        for key in self._order:
            if key == ROOT:
                continue
            node = self._nodes[key]
            through = [(share, totals.get(parent, 0.0) * edge.instances) for parent, edge, share in node.parents]
            sure = [count for share, count in through if share >= _ALWAYS]
            expected = sure[-1] if sure else sum(count for _, count in through)
            if node.constant is not None and expected > node.constant:
                expected = node.constant  # a join of everything, however much that is
            totals[key] = max(float(run.key_counts.get(key, 0)), expected)
        del totals[ROOT]
        return totals

    def remaining(self, run: Run) -> dict[Key, int]:
        """Calls of each key that `run` is still expected to make."""
        return {
            key: left
            for key, total in self.totals(run).items()
            if (left := round(total) - run.key_counts.get(key, 0)) > 0
        }

    def lengths(self, key: Key) -> tuple[float | None, float | None]:
        """Expected prompt and output tokens of one call of `key`."""
        stats = self._nodes[key].stats
        return (stats.prompt.mean if stats.prompt.n else None, stats.output.mean if stats.output.n else None)

    def expected_next(self, call: Call, min_probability: float) -> list[Prediction]:
        """Calls expected to arrive now that `call` has finished: those whose other parents have too."""
        node = self._known(call)
        if node is None:
            return []
        totals: dict[Key, float] | None = None
        out = []
        for edge in node.edges:
            left = edge.fan_out - call.child_keys.get(edge.child, 0)
            if edge.probability < min_probability or left < 0.5:
                continue
            if totals is None:
                totals = self.totals(call.run)
            if not self._ready(call, edge, totals):
                continue
            out.append(
                Prediction(
                    node=edge.child[0],
                    iteration=edge.child[1],
                    probability=edge.probability,
                    count=left,
                    think_s=edge.think_s,
                    model=self._nodes[edge.child].stats.model,
                    extends=edge.extends >= _LIKELY,
                )
            )
        return sorted(out, key=lambda item: (-item.probability, item.think_s, item.node, item.iteration))

    def _ready(self, call: Call, edge: _Edge, totals: Mapping[Key, float]) -> bool:
        """Whether the other parents that a child of this edge usually has are finished."""
        run = call.run
        own = (call.base, call.iteration)
        for parent, other, share in self._nodes[edge.child].parents:
            if share < _LIKELY or parent == ROOT:
                continue
            expected = round(totals.get(parent, 0.0))
            if other.fan_in > 1.5 or expected <= 1:
                done = run.finished_keys.get(parent, 0)
                if done < expected:
                    return False
            elif parent != own and run.finished_keys.get(parent, 0) <= run.key_counts.get(edge.child, 0):
                return False
        return True


def fill(
    forecast: Forecast | None,
    call: Call,
    *,
    siblings: int,
    output_tokens: float | None,
    priority: int | None,
    deadline_s: float | None,
) -> Hints:
    """A call's hints: the template's knowledge, under what the client itself has said."""
    known = {} if forecast is None else forecast.hints(call, siblings)
    if output_tokens is not None:
        known["output_tokens"] = output_tokens
    return Hints(run_seq=call.run.seq, priority=priority or 0, deadline_s=deadline_s, **known)
