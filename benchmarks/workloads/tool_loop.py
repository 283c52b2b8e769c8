"""A tool-using loop in the manner of a coding agent: a growing conversation with tool results and think times."""

from __future__ import annotations

import random

from .base import Inputs, Message, Run, Sizes, Workload, assistant, user
from .text import Writer


def make_inputs(writer: Writer, sizes: Sizes, batch: int) -> list[list[Inputs]]:
    """Per run a task, 4 to 10 tool results, and the seconds that each tool takes (log-normal, median 0.4 s)."""
    runs: list[Inputs] = []
    for index in range(batch):
        rng = random.Random(f"{writer.seed}/tool_loop/{index}")
        steps = rng.randint(4, 10)
        inputs = {"task": writer.text(sizes.context, f"task/{index}"), "steps": str(steps)}
        for step in range(steps):
            inputs[f"result_{step}"] = writer.text(rng.randint(16, sizes.context // 2), f"result/{index}/{step}")
            inputs[f"seconds_{step}"] = f"{min(4.0, rng.lognormvariate(-0.9, 0.8)):.3f}"
        runs.append(inputs)
    return [runs]


async def program(run: Run) -> str:
    messages: list[Message] = [run.role("coding_agent"), user(run.inputs["task"])]
    reply = await run.ask("step_0", messages)
    for step in range(int(run.inputs["steps"])):
        await run.think(float(run.inputs[f"seconds_{step}"]))
        messages += [assistant(reply), user(f"Tool result: {run.inputs[f'result_{step}']}")]
        reply = await run.ask(f"step_{step + 1}", messages, parents=[f"step_{step}"])
    return reply


WORKLOAD = Workload("tool_loop", program, make_inputs, calls_per_run=None, batch=24, planned=False)
