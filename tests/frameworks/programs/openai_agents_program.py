"""openai-agents: a tool agent, agents in sequence, in parallel, in turns, and one used as another's tool."""

from __future__ import annotations

import asyncio

from _run import main
from agents import Agent, Runner, function_tool
from agents.models.openai_provider import OpenAIProvider
from agents.run import RunConfig

MODEL = "gpt-4o-mini"
LOOP = asyncio.Runner()
"""One event loop for all, since the framework keeps its connections."""


@function_tool
def search(query: str) -> str:
    """Search the archive for a query."""
    return "Three documents found: a survey of 2019, a ministry report and a newspaper article on the matter."


async def run(agent: Agent, given: object) -> str:
    config = RunConfig(model_provider=OpenAIProvider(), tracing_disabled=True)
    return str((await Runner.run(agent, given, run_config=config)).final_output)  # type: ignore[arg-type]


def agent(role: str, what: str, **options: object) -> Agent:
    return Agent(name=role, instructions=f"You are the {role}. {what}", model=MODEL, **options)  # type: ignore[arg-type]


def chain(topic: str) -> None:
    async def go() -> None:
        facts = await run(
            agent("Researcher", "Use your tool, then report facts.", tools=[search]), f"Research {topic}."
        )
        draft = await run(agent("Writer", "Turn findings into an article."), f"Findings:\n{facts}")
        await run(agent("Editor", "Correct what you get."), f"Edit this: {draft}")

    LOOP.run(go())


def fan(topic: str) -> None:
    async def go() -> None:
        roles = ("Economist", "Engineer", "Historian")
        views = await asyncio.gather(*(run(agent(role, "Give your professional view."), topic) for role in roles))
        await run(agent("Summarizer", "Merge the views."), "\n---\n".join(views))

    LOOP.run(go())


def debate(topic: str) -> None:
    async def go() -> None:
        script: list[tuple[str, str]] = []
        for role in ("Optimist", "Skeptic") * 2:
            items = [{"role": "user", "content": f"The motion: {topic}"}]
            for speaker, said in script:
                own = speaker == role
                items.append({"role": "assistant" if own else "user", "content": said})
            script.append((role, await run(agent(role, "Answer the other side."), items)))
        text = "\n\n".join(f"{speaker}: {said}" for speaker, said in script)
        await run(agent("Judge", "Decide who argued better."), text)

    LOOP.run(go())


def loop(topic: str) -> None:
    async def go() -> None:
        config = RunConfig(model_provider=OpenAIProvider(), tracing_disabled=True)
        writer = agent("Writer", "Write one paragraph.")
        critic = agent("Critic", "Say what to change, or APPROVED.")
        result = await Runner.run(writer, f"Write about {topic}.", run_config=config)
        for what in ("draft", "revised draft"):
            review = await run(critic, f"The {what}:\n{result.final_output}")
            if "APPROVED" in review:
                break
            turn = [*result.to_input_list(), {"role": "user", "content": f"Rewrite it. The review says: {review}"}]
            result = await Runner.run(writer, turn, run_config=config)

    LOOP.run(go())


if __name__ == "__main__":
    main(chain=chain, fan=fan, debate=debate, loop=loop)
