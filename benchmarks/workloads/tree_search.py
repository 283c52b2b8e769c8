"""Tree search: at every level each kept thought is continued three ways and the two best continuations are kept.

The score of a thought is a hash of its text, so that what is pruned depends on the replies, as with a real judge, and
is the same wherever the replies are.
"""

from __future__ import annotations

import asyncio
import hashlib

from .base import Message, Run, Workload, assistant, document_inputs, user

BRANCHES = 3
KEPT = 2
DEPTH = 4


def score(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


async def program(run: Run) -> str:
    root: list[Message] = [run.role("thinker"), user(f"{run.inputs['context']}\n\n{run.inputs['question']}")]
    beam: list[tuple[str, list[Message], str]] = [("root", root, await run.ask("root", root))]
    for depth in range(DEPTH):

        async def expand(parent: str, talk: list[Message], thought: str, way: int) -> tuple[str, list[Message], str]:
            node = f"{parent}_{way}"
            messages = [*talk, assistant(thought), user(f"Continue in direction {way + 1}.")]
            return node, messages, await run.ask(node, messages, parents=[parent])

        grown = await asyncio.gather(*(expand(*leaf, way) for leaf in beam for way in range(BRANCHES)))
        beam = sorted(grown, key=lambda leaf: score(leaf[2]))[: KEPT if depth < DEPTH - 1 else 1]
    return beam[0][2]


WORKLOAD = Workload("tree_search", program, document_inputs, calls_per_run=22, batch=16, planned=False)
