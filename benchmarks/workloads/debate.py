"""Debate: three agents answer, then each answers again having read the others. Two rounds, six calls."""

from __future__ import annotations

import asyncio

from .base import Run, Workload, assistant, document_inputs, user

AGENTS = ("proposer", "opponent", "moderator")


async def program(run: Run) -> list[str]:
    opening = user(f"{run.inputs['context']}\n\n{run.inputs['question']}")
    said = await asyncio.gather(*(run.ask(f"{name}_1", [run.role(name), opening]) for name in AGENTS))
    parents = [f"{name}_1" for name in AGENTS]

    async def rebut(index: int) -> str:
        others = "\n\n".join(f"The {AGENTS[other]} said: {text}" for other, text in enumerate(said) if other != index)
        prompt = [run.role(AGENTS[index]), opening, assistant(said[index]), user(f"{others}\n\nAnswer again.")]
        return await run.ask(f"{AGENTS[index]}_2", prompt, parents)

    return await asyncio.gather(*(rebut(index) for index in range(len(AGENTS))))


WORKLOAD = Workload("debate", program, document_inputs, calls_per_run=6, batch=32)
