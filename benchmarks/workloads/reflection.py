"""Reflection: an expert's draft, two critics who read it, and the expert's revision. Four calls."""

from __future__ import annotations

import asyncio

from .base import Run, Workload, assistant, document_inputs, user

CRITICS = ("fact_critic", "style_critic")


async def program(run: Run) -> str:
    task = user(f"{run.inputs['context']}\n\n{run.inputs['question']}")
    draft = await run.ask("draft", [run.role("expert"), task])
    review = user(f"{run.inputs['context']}\n\n{run.inputs['question']}\n\nThe draft: {draft}")
    remarks = await asyncio.gather(
        *(run.ask(critic, [run.role(critic), review], parents=["draft"]) for critic in CRITICS)
    )
    joined = "\n\n".join(remarks)
    revise = [run.role("expert"), task, assistant(draft), user(f"Revise your draft. Remarks: {joined}")]
    return await run.ask("revision", revise, parents=["draft", *CRITICS])


WORKLOAD = Workload("reflection", program, document_inputs, calls_per_run=4, batch=40)
