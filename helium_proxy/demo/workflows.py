"""The demo's agents: plain code over the OpenAI client, as a user's would be.

The only thing about helium-proxy here is the `helium` field of a call: its place in the workflow. Engines ignore it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from openai import AsyncOpenAI

from helium_proxy.demo.texts import DEBATERS, EXPERTS, SUMMARIZER, handbook, report

Message = dict[str, str]


@dataclass
class Agent:
    """Asks one model, and keeps what it said."""

    client: Callable[[], AsyncOpenAI]
    """The client of the next call: always the same one, or several in rotation."""
    model: str
    extra: dict[str, Any] = field(default_factory=dict)
    """More fields for every call."""
    answered: Callable[[], None] = lambda: None
    """Called after every answer."""
    max_tokens: int = 24
    # -- state
    answers: dict[tuple[str, str], str] = field(default_factory=dict)
    """(run, node) → what was answered."""

    async def ask(
        self, workflow: str, run: str, node: str, messages: list[Message], parents: list[str] | None = None
    ) -> str:
        response = await self.client().chat.completions.create(
            model=self.model,
            messages=messages,  # type: ignore[arg-type]
            temperature=0,
            max_tokens=self.max_tokens,
            extra_body={
                "helium": {"workflow": workflow, "run": run, "node": node, "parents": parents or []},
                **self.extra,
            },
        )
        answer = response.choices[0].message.content or ""
        self.answers[run, node] = answer
        self.answered()
        return answer


async def map_reduce(agent: Agent, number: int) -> str:
    """Fourteen experts read one report; a summarizer joins what they found. 15 calls."""
    run = f"review-{number}"

    async def expert(name: str) -> str:
        prompt = [system(handbook(name, EXPERTS[name])), user(report(number))]
        return await agent.ask("incident-review", run, name, prompt)

    findings = await asyncio.gather(*map(expert, EXPERTS))
    joined = "\n\n".join(f"{name}: {finding}" for name, finding in zip(EXPERTS, findings, strict=True))
    prompt = [system(SUMMARIZER), user(f"{report(number)}\n\n{joined}")]
    return await agent.ask("incident-review", run, "summary", prompt, parents=list(EXPERTS))


async def debate(agent: Agent, number: int) -> str:
    """Three sides answer, then answer again having read the others. 6 calls."""
    run = f"debate-{number}"
    openings = {name: [system(handbook(name, duty)), user(report(number))] for name, duty in DEBATERS.items()}

    async def open_with(name: str) -> str:
        return await agent.ask("rollback-debate", run, name, openings[name])

    said = dict(zip(DEBATERS, await asyncio.gather(*map(open_with, DEBATERS)), strict=True))

    async def answer(name: str) -> str:
        others = "\n\n".join(f"{other} said: {text}" for other, text in said.items() if other != name)
        prompt = [*openings[name], assistant(said[name]), user(f"{others}\n\nAnswer them.")]
        return await agent.ask("rollback-debate", run, f"{name}_reply", prompt, parents=list(DEBATERS))

    replies = await asyncio.gather(*map(answer, DEBATERS))
    return replies[-1]


def calls(batch: int) -> int:
    """How many calls `run_all` makes."""
    return batch * (len(EXPERTS) + 1 + 2 * len(DEBATERS))


async def run_all(agent: Agent, batch: int) -> None:
    """Both workflows over `batch` reports, all at once."""
    async with asyncio.TaskGroup() as group:
        for number in range(batch):
            group.create_task(map_reduce(agent, number))
            group.create_task(debate(agent, number))


def system(text: str) -> Message:
    return {"role": "system", "content": text}


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}
