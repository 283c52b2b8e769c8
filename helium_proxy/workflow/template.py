"""What runs of one workflow have in common, learned call by call, also from runs that are still live.

A template's node is a `Key`: a call's base name and its iteration, that is its place in a loop along its own
ancestors, so that parallel branches of equal nodes fall together whatever order they arrive in. Counts come in
two kinds. *Live* ones, of runs still going: a child that has not come may yet come, so they can only show that
something happens. *Closed* ones, of ended runs, also show what does not happen, hence probabilities.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import orjson

from helium_proxy.workflow.graph import Call, Run
from helium_proxy.workflow.prompt import Prompt
from helium_proxy.workflow.skeleton import Skeleton

Key = tuple[str, int]
"""(base node name, iteration)."""

ROOT: Final[Key] = ("", 0)
"""A run's own beginning, as if it were the parent of every call that has none."""

_MEMORY = 32
"""Means weigh about this many latest samples, so that a template follows a changing workflow."""
_SAMPLES = 64
_MAX_GROUPS = 8


@dataclass(slots=True)
class Mean:
    """A running mean; exact at first, exponentially weighted later."""

    n: int = 0
    mean: float = 0.0

    def add(self, value: float) -> None:
        self.n += 1
        self.mean += (value - self.mean) / min(self.n, _MEMORY)


@dataclass(slots=True)
class EdgeStats:
    """Calls of one key as parents of calls of another."""

    live: int = 0
    """Parents in live runs that have at least one such child."""
    live_fan: int = 0
    """Most such children of one parent, so far."""
    closed: int = 0
    """Parents in ended runs that had at least one such child."""
    children: int = 0
    """Such children of those."""
    links: int = 0
    """Edges of this kind."""
    joined: int = 0
    """Children with at least one such parent."""
    think: Mean = field(default_factory=Mean)
    """Seconds from the end of a child's last parent to the child's arrival."""
    extends: Mean = field(default_factory=Mean)
    """1 where the child continues the parent's conversation."""

    @property
    def fan_out(self) -> float:
        """Children per parent that has any."""
        return self.children / self.closed if self.closed else float(max(self.live_fan, 1))

    @property
    def fan_in(self) -> float:
        """Such parents per child that has any."""
        return self.links / self.joined if self.joined else 1.0

    def probability(self, closed_parents: int) -> float:
        """Of a parent having such a child."""
        seen = self.closed + self.live
        return seen / max(closed_parents + self.live, seen, 1)


@dataclass(slots=True, eq=False)
class NodeStats:
    """Calls of one key."""

    key: Key
    calls: int = 0
    closed: int = 0
    """Calls in ended runs."""
    per_run: Mean = field(default_factory=Mean)
    counts: deque[int] = field(default_factory=lambda: deque(maxlen=_MEMORY))
    """Calls in each of the latest ended runs."""
    rank: Mean = field(default_factory=Mean)
    """Position within its run, in order of arrival: parents rank below their children."""
    prompt: Mean = field(default_factory=Mean)
    output: Mean = field(default_factory=Mean)
    outputs: deque[int] = field(default_factory=lambda: deque(maxlen=_SAMPLES))
    edges: dict[Key, EdgeStats] = field(default_factory=dict)
    """To keys of children."""
    groups: dict[frozenset[Key], int] = field(default_factory=dict)
    """Sets of parents' keys, how often each."""
    static: tuple[int, ...] | None = None
    """Digests of the leading messages equal in all calls so far."""
    model: str | None = None
    """Which the first call asked for."""
    static_share: float = 0.0
    """Of the prompt's characters, in the latest call."""
    static_runs: int = 0
    last_run: str = ""
    skeleton: Skeleton | None = None
    """What its prompts are made of."""

    @property
    def static_messages(self) -> int:
        """Leading messages equal in every run; 0 until two runs agree."""
        return len(self.static or ()) if self.static_runs >= 2 else 0

    def group(self) -> frozenset[Key]:
        return max(self.groups, key=self.groups.__getitem__, default=frozenset())

    def learn_static(self, run: str, prompt: Prompt, body: Mapping[str, Any], max_chars: int) -> None:
        messages = prompt.messages
        if self.static is None:
            kept, chars = 0, 0
            for message in messages:
                chars += message.chars
                if chars > max_chars:
                    break
                kept += 1
            self.static = tuple(message.digest for message in messages[:kept])
            model = body.get("model")
            self.model = model if isinstance(model, str) else None
        else:
            same = 0
            for digest, message in zip(self.static, messages, strict=False):
                if digest != message.digest:
                    break
                same += 1
            if same < len(self.static):
                self.static = self.static[:same]
        if run != self.last_run:
            self.last_run = run
            self.static_runs += 1
            total = sum(message.chars for message in messages) or 1
            self.static_share = sum(message.chars for message in messages[: len(self.static)]) / total


class Template:
    """One workflow's statistics."""

    def __init__(self, key: str, workflow: str, tenant: str, max_nodes: int = 512, max_static: int = 65_536) -> None:
        self.key = key
        self.workflow = workflow
        self.tenant = tenant
        self._max_nodes = max_nodes
        self._max_static = max_static
        # Mutable state.
        self.nodes: dict[Key, NodeStats] = {ROOT: NodeStats(ROOT)}
        self.runs = 0  # ended ones
        self.version = 0  # grows with everything learned

    def __repr__(self) -> str:
        return f"<Template {self.key}: {len(self.nodes) - 1} nodes, {self.runs} runs>"

    # -- learning ----------------------------------------------------------------------------------------

    def arrive(self, call: Call) -> None:
        """Count a call whose edges and iteration are known."""
        stats = self._node((call.base, call.iteration))
        if stats is None:
            return
        self.version += 1
        call.template = stats
        stats.calls += 1
        stats.rank.add(len(call.run.calls))
        key = stats.key
        parents: set[Key] = set()
        last = max([edge.parent.finished_at or 0.0 for edge in call.edges], default=0.0)
        for edge in call.edges:
            parent = edge.parent
            source = parent.template
            if source is None:
                continue
            edges = self._count(source, parent.child_keys, key)
            if source.key not in parents:
                parents.add(source.key)
                edges.joined += 1
            edges.extends.add(float(edge.extends))
            if parent.finished_at is not None and parent.finished_at >= last:
                edges.think.add(max(0.0, call.arrived_at - parent.finished_at))
        if not call.edges:
            edges = self._count(self.nodes[ROOT], call.run.root_keys, key)
            edges.joined += 1
            edges.think.add(max(0.0, call.arrived_at - call.run.created_at))
            parents.add(ROOT)
        group = frozenset(parents)
        if group in stats.groups or len(stats.groups) < _MAX_GROUPS:
            stats.groups[group] = stats.groups.get(group, 0) + 1

    def finish(self, call: Call) -> None:
        """Learn a finished call's lengths."""
        stats = call.template
        if not isinstance(stats, NodeStats):
            return
        self.version += 1
        if call.prompt_tokens is not None:
            stats.prompt.add(call.prompt_tokens)
        if call.output_tokens is not None:
            stats.output.add(call.output_tokens)
            stats.outputs.append(call.output_tokens)

    def close(self, run: Run) -> None:
        """Count an ended run."""
        self.version += 1
        self.runs += 1
        for call in run.calls.values():
            if isinstance(call.template, NodeStats):
                self._close(call.template, call.child_keys)
                call.template = None
        self._close(self.nodes[ROOT], run.root_keys)
        for key, stats in self.nodes.items():
            if key != ROOT:
                count = run.key_counts.get(key, 0)
                stats.per_run.add(count)
                stats.counts.append(count)

    def close_call(self, call: Call) -> None:
        """Count a call that is forgotten while its run goes on."""
        if isinstance(call.template, NodeStats):
            self._close(call.template, call.child_keys)
            call.template = None

    def withdraw(self, run: Run) -> None:
        """Uncount a live run, which turns out to be part of another one. Means keep what they learned."""
        self.version += 1
        for call in run.calls.values():
            stats = call.template
            call.template = None
            if isinstance(stats, NodeStats):
                stats.calls -= 1
                self._withdraw(stats, call.child_keys)
                call.child_keys.clear()
        self._withdraw(self.nodes[ROOT], run.root_keys)
        run.root_keys.clear()

    @property
    def single(self) -> bool:
        """Whether all it has ever seen is one run of one call."""
        return self.runs == 1 and sum(stats.calls for stats in self.nodes.values()) <= 1

    @property
    def young(self) -> bool:
        """Whether nothing can be predicted yet: there is a first call, and that is all."""
        return not self.runs and len(self.nodes) <= 2 and all(stats.calls <= 1 for stats in self.nodes.values())

    @property
    def empty(self) -> bool:
        return not self.runs and all(stats.calls <= 0 for stats in self.nodes.values())

    def static(self, call: Call, prompt: Prompt, body: Mapping[str, Any]) -> None:
        """Learn which leading messages of a node never change."""
        if isinstance(call.template, NodeStats):
            call.template.learn_static(call.run.id, prompt, body, self._max_static)

    def _node(self, key: Key) -> NodeStats | None:
        stats = self.nodes.get(key)
        if stats is None and len(self.nodes) <= self._max_nodes:
            stats = self.nodes[key] = NodeStats(key)
        return stats

    def _count(self, source: NodeStats, counts: dict[Key, int], key: Key) -> EdgeStats:
        edges = source.edges.get(key)
        if edges is None:
            edges = source.edges[key] = EdgeStats()
        count = counts[key] = counts.get(key, 0) + 1
        edges.live += count == 1
        edges.live_fan = max(edges.live_fan, count)
        edges.links += 1
        return edges

    def _close(self, stats: NodeStats, counts: dict[Key, int]) -> None:
        stats.closed += 1
        for key, count in counts.items():
            edges = stats.edges.get(key)
            if edges is None:  # this template was dropped meanwhile, and has begun anew
                continue
            edges.live -= 1
            edges.closed += 1
            edges.children += count

    def _withdraw(self, stats: NodeStats, counts: dict[Key, int]) -> None:
        for key, count in counts.items():
            edges = stats.edges.get(key)
            if edges is None:
                continue
            edges.live -= 1
            edges.links -= count
            edges.joined -= min(count, edges.joined)
            if not edges.live and not edges.closed:
                del stats.edges[key]

    # -- keeping -----------------------------------------------------------------------------------------

    def dump(self) -> bytes:
        """Everything learned from ended runs, as JSON."""
        return orjson.dumps(
            {
                "v": 2,
                "workflow": self.workflow,
                "tenant": self.tenant,
                "runs": self.runs,
                "nodes": [_dump_node(stats) for stats in self.nodes.values()],
            },
            default=lambda value: dict(value) if isinstance(value, Mapping) else str(value),
            option=orjson.OPT_NON_STR_KEYS,
        )

    @classmethod
    def load(cls, key: str, blob: bytes, max_nodes: int = 512, max_static: int = 65_536) -> Template:
        """The inverse of `dump`. Raises `ValueError`, `KeyError` or `TypeError` on a blob it does not know."""
        data = orjson.loads(blob)
        if data["v"] != 2:
            raise ValueError(f"unknown template version {data['v']}")
        made = cls(key, data["workflow"], data["tenant"], max_nodes, max_static)
        made.runs = data["runs"]
        for item in data["nodes"][: max_nodes + 1]:
            stats = _load_node(item)
            made.nodes[stats.key] = stats
        for stats in made.nodes.values():
            stats.edges = {child: edge for child, edge in stats.edges.items() if child in made.nodes}
        return made


def _dump_node(stats: NodeStats) -> dict[str, Any]:
    return {
        "key": stats.key,
        "calls": stats.closed,
        "per_run": (stats.per_run.n, stats.per_run.mean),
        "counts": list(stats.counts),
        "rank": (stats.rank.n, stats.rank.mean),
        "prompt": (stats.prompt.n, stats.prompt.mean),
        "output": (stats.output.n, stats.output.mean),
        "outputs": list(stats.outputs),
        "groups": [[list(group), count] for group, count in stats.groups.items()],
        "static": [stats.static_share, stats.static_runs, stats.model],
        "static_digests": stats.static,
        "skeleton": None if stats.skeleton is None else stats.skeleton.dump(),
        "edges": [
            [
                child,
                edge.closed,
                edge.children,
                edge.links,
                edge.joined,
                (edge.think.n, edge.think.mean),
                (edge.extends.n, edge.extends.mean),
            ]
            for child, edge in stats.edges.items()
            if edge.closed
        ],
    }


def _load_node(item: Mapping[str, Any]) -> NodeStats:
    share, runs, model = item["static"]
    digests = item["static_digests"]
    return NodeStats(
        key=(item["key"][0], item["key"][1]),
        calls=item["calls"],
        closed=item["calls"],
        per_run=Mean(*item["per_run"]),
        counts=deque(item["counts"], maxlen=_MEMORY),
        rank=Mean(*item["rank"]),
        prompt=Mean(*item["prompt"]),
        output=Mean(*item["output"]),
        outputs=deque(item["outputs"], maxlen=_SAMPLES),
        groups={frozenset((k[0], k[1]) for k in group): count for group, count in item["groups"]},
        static=None if digests is None else tuple(digests),
        static_share=share,
        static_runs=runs,
        model=model,
        skeleton=Skeleton.load(skeleton) if (skeleton := item.get("skeleton")) is not None else None,
        edges={
            (child[0], child[1]): EdgeStats(
                closed=closed,
                children=children,
                links=links,
                joined=joined,
                think=Mean(*think),
                extends=Mean(*extends),
            )
            for child, closed, children, links, joined, think, extends in item["edges"]
        },
    )
