"""Trading: a firm of 19 roles decides on one company in 88 calls.

Four analysts in parallel; a bull and a bear, who answers the bull, with a research manager; eight traders, each with
a risk debate of three roles over three rounds; a fund manager. 4 + 2 + 1 + 8 × (1 + 3 × 3) + 1 = 88.
"""

from __future__ import annotations

import asyncio

from .base import Inputs, Message, Run, Sizes, Workload, assistant, user
from .text import Writer

ANALYSTS = ("market", "social", "news", "fundamentals")
RISK = ("aggressive", "conservative", "neutral")
TRADERS = 8
ROUNDS = 3


def company(writer: Writer, sizes: Sizes, index: int, day: int, same: tuple[str, ...] = ()) -> Inputs:
    """One company's data of a day; the sources in `same` are as on day 0."""
    inputs = {
        source: writer.text(sizes.context, f"{source}/{index}/{0 if source in same else day}") for source in ANALYSTS
    }
    return inputs | {"company": writer.text(sizes.question, f"company/{index}")}


def make_inputs(writer: Writer, sizes: Sizes, batch: int) -> list[list[Inputs]]:
    return [[company(writer, sizes, index, 0) for index in range(batch)]]


async def _analyst(run: Run, source: str) -> str:
    prompt = [run.role(f"{source}_analyst"), user(f"{run.inputs['company']}\n\n{run.inputs[source]}")]
    return await run.ask(f"{source}_report", prompt)


async def _branch(run: Run, trader: int, briefing: str, known: list[str]) -> str:
    """A trader's proposal and its risk debate: in each round every role has read the round before."""
    node = f"trader_{trader}"
    proposal = await run.ask(node, [run.role(node), user(briefing)], parents=known)
    task = f"{briefing}\n\nThe proposal to judge: {proposal}"
    talks: dict[str, list[Message]] = {role: [run.role(f"{role}_risk"), user(task)] for role in RISK}
    parents = [*known, node]
    said: list[str] = []
    for turn in range(ROUNDS):
        nodes = [f"{role}_{trader}_{turn}" for role in RISK]
        said = await asyncio.gather(
            *(run.ask(name, talks[role], parents) for name, role in zip(nodes, RISK, strict=True))
        )
        for index, role in enumerate(RISK):
            others = "\n\n".join(f"{RISK[other]}: {said[other]}" for other in range(len(RISK)) if other != index)
            talks[role] = [*talks[role], assistant(said[index]), user(f"The others say:\n\n{others}")]
        parents = nodes
    return f"Proposal: {proposal}\nRisk: " + " | ".join(said)


async def program(run: Run) -> str:
    reports = await asyncio.gather(*(_analyst(run, source) for source in ANALYSTS))
    known = [f"{source}_report" for source in ANALYSTS]
    dossier = run.inputs["company"] + "".join(
        f"\n\n{source} report: {text}" for source, text in zip(ANALYSTS, reports, strict=True)
    )
    bull = await run.ask("bull", [run.role("bull_researcher"), user(dossier)], parents=known)
    bear_task = user(f"{dossier}\n\nThe bull says: {bull}")
    bear = await run.ask("bear", [run.role("bear_researcher"), bear_task], parents=[*known, "bull"])
    debate = f"{dossier}\n\nThe bull says: {bull}\n\nThe bear says: {bear}"
    plan = await run.ask("manager", [run.role("research_manager"), user(debate)], parents=[*known, "bull", "bear"])
    briefing = f"{dossier}\n\nThe research manager's plan: {plan}"
    known = [*known, "manager"]
    books = await asyncio.gather(*(_branch(run, trader, briefing, known) for trader in range(TRADERS)))
    last = [f"{role}_{trader}_{ROUNDS - 1}" for trader in range(TRADERS) for role in RISK]
    final = f"{run.inputs['company']}\n\n" + "\n\n".join(books)
    parents = [f"trader_{trader}" for trader in range(TRADERS)] + last
    return await run.ask("decision", [run.role("fund_manager"), user(final)], parents=parents)


WORKLOAD = Workload("trading", program, make_inputs, calls_per_run=88, batch=6)
