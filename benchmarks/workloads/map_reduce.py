"""Map-Reduce: seven (or fourteen) experts look at one question, a summarizer joins what they say."""

from __future__ import annotations

import asyncio

from .base import Run, Workload, document_inputs, user


async def with_experts(run: Run, count: int) -> str:
    question = f"{run.inputs['context']}\n\n{run.inputs['question']}"
    names = [f"expert_{index}" for index in range(count)]
    opinions = await asyncio.gather(*(run.ask(name, [run.role(name), user(question)]) for name in names))
    joined = "\n\n".join(f"Expert {index}: {text}" for index, text in enumerate(opinions))
    prompt = [run.role("summarizer"), user(f"{run.inputs['question']}\n\n{joined}")]
    return await run.ask("summary", prompt, parents=names)


async def program(run: Run) -> str:
    return await with_experts(run, 7)


async def wide_program(run: Run) -> str:
    return await with_experts(run, 14)


WORKLOAD = Workload("map_reduce", program, document_inputs, calls_per_run=8, batch=16)
WIDE = Workload("map_reduce_14", wide_program, document_inputs, calls_per_run=15, batch=8)
