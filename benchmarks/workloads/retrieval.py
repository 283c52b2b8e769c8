"""Retrieval: questions over a shared pool of documents, popular ones more often, and a follow-up to each answer."""

from __future__ import annotations

import random

from .base import Inputs, Run, Sizes, Workload, assistant, user
from .text import Writer

DOCUMENTS = 24
PER_QUESTION = 3


def make_inputs(writer: Writer, sizes: Sizes, batch: int) -> list[list[Inputs]]:
    """Per run three distinct documents, drawn with weights 1/rank and put in order of rank, as a retriever with a
    static ranking does, so that popular pairs are shared prefixes."""
    weights = [1.0 / (rank + 1) for rank in range(DOCUMENTS)]
    documents = [writer.text(sizes.context, f"document/{rank}") for rank in range(DOCUMENTS)]
    runs: list[Inputs] = []
    for index in range(batch):
        rng = random.Random(f"{writer.seed}/retrieval/{index}")
        chosen: set[int] = set()
        while len(chosen) < PER_QUESTION:
            chosen.add(rng.choices(range(DOCUMENTS), weights)[0])
        inputs = {f"document_{slot}": documents[rank] for slot, rank in enumerate(sorted(chosen))}
        inputs["question"] = writer.text(sizes.question, f"question/{index}")
        inputs["follow_up"] = writer.text(sizes.question, f"follow_up/{index}")
        runs.append(inputs)
    return [runs]


async def program(run: Run) -> str:
    pages = "\n\n".join(run.inputs[f"document_{slot}"] for slot in range(PER_QUESTION))
    messages = [run.role("librarian"), user(f"{pages}\n\n{run.inputs['question']}")]
    answer = await run.ask("answer", messages)
    messages += [assistant(answer), user(run.inputs["follow_up"])]
    return await run.ask("follow_up", messages, parents=["answer"])


WORKLOAD = Workload("retrieval", program, make_inputs, calls_per_run=2, batch=48)
