"""Parallel chains: seven experts each read six chunks in sequence and sum up; a writer joins the summaries."""

from __future__ import annotations

import asyncio

from .base import Message, Run, Workload, assistant, chunk_inputs, user

EXPERTS = 7
CHUNKS = 6


async def _chain(run: Run, expert: str) -> str:
    messages: list[Message] = [run.role(expert), user(f"{run.inputs['question']}\n\n{run.inputs['chunk_0']}")]
    note = await run.ask(f"{expert}_0", messages)
    for index in range(1, CHUNKS):
        messages += [assistant(note), user(f"Read on: {run.inputs[f'chunk_{index}']}")]
        note = await run.ask(f"{expert}_{index}", messages, parents=[f"{expert}_{index - 1}"])
    messages += [assistant(note), user("Sum up what you have found.")]
    return await run.ask(f"{expert}_summary", messages, parents=[f"{expert}_{CHUNKS - 1}"])


async def program(run: Run) -> str:
    names = [f"expert_{index}" for index in range(EXPERTS)]
    summaries = await asyncio.gather(*(_chain(run, name) for name in names))
    joined = "\n\n".join(f"{name}: {text}" for name, text in zip(names, summaries, strict=True))
    prompt = [run.role("writer"), user(f"{run.inputs['question']}\n\n{joined}")]
    return await run.ask("report", prompt, parents=[f"{name}_summary" for name in names])


WORKLOAD = Workload("parallel_chains", program, chunk_inputs, calls_per_run=EXPERTS * (CHUNKS + 1) + 1, batch=6)
