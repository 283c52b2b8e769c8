"""Iterative refinement: one answer, refined as six chunks of a document arrive one after the other."""

from __future__ import annotations

from .base import Message, Run, Workload, assistant, chunk_inputs, user

CHUNKS = 6


async def program(run: Run) -> str:
    messages: list[Message] = [run.role("refiner"), user(f"{run.inputs['question']}\n\n{run.inputs['chunk_0']}")]
    answer = await run.ask("step_0", messages)
    for index in range(1, CHUNKS):
        messages += [assistant(answer), user(f"Refine your answer: {run.inputs[f'chunk_{index}']}")]
        answer = await run.ask(f"step_{index}", messages, parents=[f"step_{index - 1}"])
    return answer


WORKLOAD = Workload("iterative", program, chunk_inputs, calls_per_run=CHUNKS, batch=40)
