"""Workflows without text: graphs of calls whose prompts are pieces with a length, and prefixes as chained hashes."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from helium_proxy.types import Hints

from .workloads import Sizes, Workload, Writer, export_plan

_PLACEHOLDER = re.compile(r"(\{\{(?:inputs|nodes)\.\w+\}\})")


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a prompt: equal keys are equal text (in one run, where `own`)."""

    key: int
    tokens: int
    own: bool


@dataclass(slots=True)
class Node:
    """One call of the workflow."""

    name: str
    prompt: tuple[Piece, ...]
    output: Piece
    prompt_tokens: int
    parents: tuple[int, ...]
    children: list[int] = field(default_factory=list)
    hints: Hints = field(default_factory=Hints)


def trace(workload: Workload, sizes: Sizes) -> list[Node]:
    """The workload's graph, parents before children. A word is a token."""
    writer = Writer(1, 1.0)
    inputs = workload.make_inputs(writer, sizes, 1)[0]
    plan = asyncio.run(export_plan(workload, sizes, writer, inputs=inputs, model="demo"))
    index = {node["id"]: place for place, node in enumerate(plan["nodes"])}
    lengths = {name: max(1, len(text.split())) for name, text in inputs[0].items()}
    nodes: list[Node] = []
    for place, raw in enumerate(plan["nodes"]):
        pieces: list[Piece] = []
        parents: set[int] = set()
        for message in raw["messages"]:
            pieces.append(Piece(_key(f"<{message['role']}>"), 4, False))
            for text in filter(None, _PLACEHOLDER.split(message["content"])):
                if _PLACEHOLDER.fullmatch(text):
                    kind, _, name = text[2:-2].partition(".")
                    if kind == "nodes":
                        parents.add(index[name])
                        pieces.append(nodes[index[name]].output)
                    else:
                        pieces.append(Piece(_key(text), lengths[name], True))
                else:
                    pieces.append(Piece(_key(text), max(1, len(text.split())), False))
        pieces.append(Piece(_key("<assistant>"), 4, False))
        output = Piece(_key(f"reply {raw['id']}"), raw["params"]["max_tokens"], True)
        length = sum(piece.tokens for piece in pieces)
        nodes.append(Node(raw["id"], tuple(pieces), output, length, tuple(sorted(parents))))
        for parent in parents:
            nodes[parent].children.append(place)
    _hint(nodes)
    return nodes


def _key(text: str) -> int:
    return random.Random(text).getrandbits(60)


def _hint(nodes: Sequence[Node]) -> None:
    """What a template would say of every node: the longest path that follows."""
    for node in reversed(nodes):
        after = [nodes[child] for child in node.children]
        longest = max(after, key=lambda n: n.hints.path_output_tokens + n.output.tokens, default=None)
        if longest is None:
            node.hints = Hints(last=True)
        else:
            node.hints = Hints(
                path_calls=longest.hints.path_calls + 1,
                path_output_tokens=longest.hints.path_output_tokens + longest.output.tokens,
                path_prompt_tokens=longest.hints.path_prompt_tokens + longest.prompt_tokens,
            )


class Prefix:
    """A prompt's beginning as chained block hashes, with what the last block still lacks."""

    __slots__ = ("fill", "hashes", "pending")

    def __init__(self, hashes: tuple[int, ...], pending: tuple[tuple[int, int], ...], fill: int) -> None:
        self.hashes = hashes
        self.pending = pending
        self.fill = fill

    def extend(self, pieces: Iterable[tuple[int, int]], block: int) -> Prefix:
        """With `pieces` appended, each a key and tokens."""
        hashes, pending, fill = list(self.hashes), list(self.pending), self.fill
        for key, tokens in pieces:
            full, fill = divmod(fill + tokens, block)
            pending.append((key, 0))
            if full:
                # The first of these blocks depends on all before it, and what follows in the same piece on the first
                # alone.
                first = hash((hashes[-1] if hashes else 0, *pending))
                hashes.extend(range(first, first + full))
                pending = [(key, tokens - fill)] if fill else []
        return Prefix(tuple(hashes), tuple(pending), fill)
