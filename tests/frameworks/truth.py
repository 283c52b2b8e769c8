"""The programs' true DAGs, and how an inferred one compares.

Every framework's programs play the same four workflows with the framework's own constructs. An edge is *true* when
the earlier call's reply is part of the later call's prompt. *Required* are those that bring something new; *allowed*
those that only repeat history, such as a debater's own earlier turn: finding them is right, not finding them no loss.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Edge = tuple[str, str]


@dataclass(frozen=True)
class Truth:
    required: frozenset[Edge]
    allowed: frozenset[Edge] = frozenset()


def _edges(*pairs: str) -> frozenset[Edge]:
    out = set()
    for pair in pairs:
        source, target = pair.split(" > ")
        out.add((source, target))
    return frozenset(out)


TRUTH: dict[str, Truth] = {
    # A researcher with a tool, then a writer, then an editor.
    "chain": Truth(
        _edges("Researcher > Researcher#2", "Researcher#2 > Writer", "Writer > Editor"),
        _edges("Researcher#2 > Editor", "Researcher > Writer", "Researcher > Editor"),
    ),
    # Three experts at once, then a summarizer.
    "fan": Truth(_edges("Economist > Summarizer", "Engineer > Summarizer", "Historian > Summarizer")),
    # Two debaters, two rounds, each seeing all that was said; then a judge.
    "debate": Truth(
        _edges(
            "Optimist > Skeptic",
            "Skeptic > Optimist#2",
            "Optimist#2 > Skeptic#2",
            "Optimist > Judge",
            "Skeptic > Judge",
            "Optimist#2 > Judge",
            "Skeptic#2 > Judge",
        ),
        _edges("Optimist > Optimist#2", "Skeptic > Skeptic#2", "Optimist > Skeptic#2"),
    ),
    # A writer and a critic, until the critic approves.
    "loop": Truth(
        _edges("Writer > Critic", "Critic > Writer#2", "Writer#2 > Critic#2"),
        _edges("Writer > Writer#2", "Critic > Critic#2", "Writer > Critic#2"),
    ),
}


@dataclass
class Score:
    """Edges and nodes, right and wrong."""

    right: int = 0
    wrong: int = 0
    missed: int = 0
    required: int = 0
    grouped: int = 0
    calls: int = 0
    foreign: int = 0
    """Edges between tenants."""

    def __add__(self, other: Score) -> Score:
        return Score(
            self.right + other.right,
            self.wrong + other.wrong,
            self.missed + other.missed,
            self.required + other.required,
            self.grouped + other.grouped,
            self.calls + other.calls,
            self.foreign + other.foreign,
        )

    @property
    def precision(self) -> float:
        return self.right / (self.right + self.wrong) if self.right + self.wrong else 1.0

    @property
    def recall(self) -> float:
        return 1.0 - self.missed / self.required if self.required else 1.0

    @property
    def grouping(self) -> float:
        return self.grouped / self.calls if self.calls else 1.0


def edge_score(found: Iterable[Edge], truth: Truth) -> Score:
    """Compare the edges of one run."""
    edges = set(found)
    true = truth.required | truth.allowed
    return Score(
        right=len(edges & true),
        wrong=len(edges - true),
        missed=len(truth.required - edges),
        required=len(truth.required),
    )


def grouped(pairs: Sequence[tuple[str, str]]) -> int:
    """Of `(true role, inferred node)` of each call, how many are in the right
    group: the role's commonest node, unless that node is commoner for another role.
    """
    both = Counter(pairs)
    best_node: dict[str, str] = {}
    best_role: dict[str, str] = {}
    for (role, node), _ in both.most_common():
        best_node.setdefault(role, node)
        best_role.setdefault(node, role)
    return sum(1 for role, node in pairs if best_node[role] == node and best_role[node] == role)
