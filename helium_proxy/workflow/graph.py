"""A run and its calls: the DAG as it is seen, arriving call by call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import networkx as nx

from helium_proxy.types import Fate

EdgeKind = Literal["data", "spawn"]
EdgeSource = Literal["tag", "native", "inferred"]
CallState = Literal["queued", "running", "done", "error"]


@dataclass(slots=True, eq=False)
class Edge:
    """`parent` made something that its child uses (data), or caused the child to be (spawn)."""

    parent: Call
    kind: EdgeKind
    source: EdgeSource
    extends: bool = False
    """The child's prompt begins with the parent's prompt and reply."""


@dataclass(slots=True, eq=False)
class Call:
    """One call of a run. Times are seconds on the caller's monotonic clock; token counts are the engine's."""

    id: str
    run: Run
    base: str
    """Node name without its occurrence."""
    node: str
    """With it: ``critic``, ``critic#2``, … in order of arrival within the run."""
    iteration: int = 1
    """1 + the most calls of the same base on one path of ancestors: its place in a loop, whatever the order of
    arrival of parallel branches."""
    seq: int = 0
    """Order of arrival within the process."""
    arrived_at: float = 0.0
    state: CallState = "queued"
    fate: Fate | None = None
    worker: str | None = None
    status: int | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    predicted_cached_tokens: int | None = None
    output_tokens: int | None = None
    queued_at: float | None = None
    started_at: float | None = None
    first_token_at: float | None = None
    finished_at: float | None = None
    edges: list[Edge] = field(default_factory=list)
    """Incoming."""
    children: list[Call] = field(default_factory=list)
    prompt: int = 0
    """Hash of the whole prompt."""
    reply_id: str | None = None
    """The response id its client saw, where that is another one."""
    retries: int = 0
    child_keys: dict[tuple[str, int], int] = field(default_factory=dict)
    """(base, iteration) → children of that key."""
    template: Any = None
    """The template's node statistics this call feeds (`template.NodeStats`)."""

    @property
    def parents(self) -> list[Call]:
        return [edge.parent for edge in self.edges]

    @property
    def live(self) -> bool:
        return self.state in ("queued", "running")

    def __repr__(self) -> str:
        return f"<Call {self.id} {self.node} of {self.run.id}: {self.state}, {len(self.edges)} parents>"


@dataclass(slots=True, eq=False)
class Run:
    """One execution of a workflow: calls joined by edges, between its first call and its end."""

    id: str
    tenant: str
    workflow: str
    template: str
    """Key of the template it follows."""
    seq: int
    """Order of arrival of runs within the process."""
    explicit: bool
    """Named by a tag: inference never merges it into another explicit run."""
    named: bool
    """Its workflow was named: inference never makes it part of another workflow."""
    created_at: float
    last_at: float
    """Last arrival or end of a call."""
    state: Literal["live", "done"] = "live"
    ended_by: str | None = None
    """final, idle, api, evicted."""
    final: bool = False
    """A call said the run ends with it."""
    calls: dict[str, Call] = field(default_factory=dict)
    """Id → call, in order of arrival."""
    names: dict[str, Call] = field(default_factory=dict)
    """Node name with occurrence → call."""
    occurrences: dict[str, list[Call]] = field(default_factory=dict)
    """Base → its calls, in order of arrival."""
    counts: dict[str, int] = field(default_factory=dict)
    """Base → highest occurrence given out."""
    waiting: dict[str, list[Call]] = field(default_factory=dict)
    """Placeholders: a parent's name that nobody bears yet → the calls that named it."""
    in_flight: int = 0
    sibling_counts: dict[tuple[Any, ...], int] = field(default_factory=dict)
    """(ids of parents, template group) → calls arrived."""
    key_counts: dict[tuple[str, int], int] = field(default_factory=dict)
    """(base, iteration) → calls arrived."""
    finished_keys: dict[tuple[str, int], int] = field(default_factory=dict)
    """(base, iteration) → calls finished."""
    root_keys: dict[tuple[str, int], int] = field(default_factory=dict)
    """(base, iteration) → calls without parents."""
    dropped: int = 0
    """Calls forgotten because the run grew beyond its bound."""

    def __repr__(self) -> str:
        return (
            f"<Run {self.id} of {self.workflow}: {self.state}, {len(self.calls)} calls, {self.in_flight} in flight>"
        )

    def edges(self) -> Iterator[tuple[Call, Call, Edge]]:
        """`(parent, child, edge)` of every edge between calls that are still remembered."""
        for call in self.calls.values():
            for edge in call.edges:
                if edge.parent.id in self.calls:
                    yield edge.parent, call, edge

    @property
    def graph(self) -> nx.DiGraph[str]:
        """The DAG as networkx has it: nodes are call ids with `node`, edges have `kind` and `source`."""
        graph: nx.DiGraph[str] = nx.DiGraph()
        for call in self.calls.values():
            graph.add_node(call.id, node=call.node, base=call.base, state=call.state)
        for parent, child, edge in self.edges():
            graph.add_edge(parent.id, child.id, kind=edge.kind, source=edge.source, extends=edge.extends)
        return graph

    def add(self, call: Call) -> None:
        """Enter `call` under the next free occurrence of its base; links calls that waited for its name."""
        count = self.counts.get(call.base, 0) + 1
        name = call.base if count == 1 else f"{call.base}#{count}"
        while name in self.names:
            count += 1
            name = f"{call.base}#{count}"
        self.counts[call.base] = count
        call.node = name
        call.run = self
        self.occurrences.setdefault(call.base, []).append(call)
        self.names[name] = call
        self.calls[call.id] = call
        for waiting in (self.waiting.pop(name, ()), self.waiting.pop(call.id, ())):
            for child in waiting:
                self.link(call, child, "data", "tag")

    def link(self, parent: Call, child: Call, kind: EdgeKind, source: EdgeSource, extends: bool = False) -> bool:
        """Add an edge unless it exists or would close a cycle; True when the edge is there afterwards."""
        for edge in child.edges:
            if edge.parent is parent:
                edge.extends = edge.extends or extends
                return True
        if parent is child or (child.children and parent.edges and parent.id in below([child])):
            return False
        child.edges.append(Edge(parent, kind, source, extends))
        parent.children.append(child)
        return True

    def wait(self, name: str, child: Call, bound: int) -> bool:
        """Remember that `child` names a parent that has not arrived; False when too many are waited for."""
        if name not in self.waiting and len(self.waiting) >= bound:
            return False
        self.waiting.setdefault(name, []).append(child)
        return True

    def find(self, name: str) -> Call | None:
        """The call of this run with that id, response id or full node name."""
        return self.calls.get(name) or self.names.get(name)

    def place(self, call: Call) -> None:
        """Set `call.iteration` from its ancestors' and count it. Parents are known by now."""
        call.iteration = 1 + longest_same(call)
        key = (call.base, call.iteration)
        self.key_counts[key] = self.key_counts.get(key, 0) + 1

    def forget(self, victim: Call) -> None:
        """Drop a call, its edges, and as much of the counts as is older than the calls still remembered."""
        del self.calls[victim.id]
        self.names.pop(victim.node, None)
        if victim.reply_id is not None:
            self.names.pop(victim.reply_id, None)
        for name in [name for name, children in self.waiting.items() if victim in children]:
            self.waiting[name].remove(victim)
            if not self.waiting[name]:
                del self.waiting[name]
        bound = len(self.calls) + 1
        for counts in (self.sibling_counts, self.key_counts, self.finished_keys, self.root_keys):
            while len(counts) > bound:
                counts.pop(next(iter(counts)))
        same = self.occurrences.get(victim.base)
        if same and victim in same:
            same.remove(victim)
            if not same:  # nodes may come under ever new names
                del self.occurrences[victim.base]
                del self.counts[victim.base]
        for child in victim.children:
            child.edges = [edge for edge in child.edges if edge.parent is not victim]
        for parent in victim.parents:
            parent.children.remove(victim)
        victim.edges, victim.children = [], []
        self.dropped += 1

    def scatter(self) -> None:
        """Let go of all calls, and they of each other. Nobody asks a forgotten run for them; but as long as they are
        a cycle, all of it waits for the garbage collector, whose pauses grow with what waits."""
        for call in self.calls.values():
            call.edges, call.children = [], []
        self.dropped += len(self.calls)
        for table in (self.calls, self.names, self.occurrences, self.waiting):
            table.clear()


def longest_same(call: Call) -> int:
    """The most calls of `call`'s base on one path of its ancestors.

    Walks up only as far as the nearest call of that base on each path, whose own count is already known.
    """
    best, seen, stack = 0, {call.id}, call.parents
    while stack:
        ancestor = stack.pop()
        if ancestor.id in seen:
            continue
        seen.add(ancestor.id)
        if ancestor.base == call.base:
            best = max(best, ancestor.iteration)
        else:
            stack.extend(ancestor.parents)
        if len(seen) > 512:
            break
    return best


def below(calls: Iterable[Call]) -> set[str]:
    """The ids of all calls that descend from one of `calls`."""
    seen: set[str] = set()
    stack = [child for call in calls for child in call.children]
    while stack:
        call = stack.pop()
        if call.id not in seen:
            seen.add(call.id)
            stack.extend(call.children)
    return seen
