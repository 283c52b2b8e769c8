"""pydantic-ai: agents with a tool, a typed output, and message histories."""

from __future__ import annotations

import asyncio

from _run import main
from pydantic import BaseModel
from pydantic_ai import Agent
from pydantic_ai.messages import ModelMessage
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


class View(BaseModel):
    """A professional's view."""

    opinion: str
    outlook: str


def agent(role: str, what: str, **options: object) -> Agent:
    model = OpenAIChatModel("gpt-4o-mini", provider=OpenAIProvider())
    return Agent(model, system_prompt=f"You are the {role}. {what}", **options)  # type: ignore[call-overload, no-any-return]


def chain(topic: str) -> None:
    researcher = agent("Researcher", "Use your tool, then report facts.")

    @researcher.tool_plain
    def search(query: str) -> str:
        """Search the archive for a query."""
        return "Three documents found: a survey of 2019, a ministry report and a newspaper article on the matter."

    facts = researcher.run_sync(f"Research {topic}.").output
    draft = agent("Writer", "Turn findings into an article.").run_sync(f"Findings: {facts}").output
    agent("Editor", "Correct what you get.").run_sync(f"Edit this draft.\n\n{draft}")


def fan(topic: str) -> None:
    async def go() -> None:
        roles = ("Economist", "Engineer", "Historian")
        runs = (agent(role, "Give your professional view.", output_type=View).run(topic) for role in roles)
        views = [result.output for result in await asyncio.gather(*runs)]
        # A parsed field goes on, not the reply as it came.
        text = "\n".join(f"- {role}: {view.opinion}" for role, view in zip(roles, views, strict=True))
        await agent("Summarizer", "Merge the views.").run(text)

    asyncio.run(go())


def debate(topic: str) -> None:
    script: list[tuple[str, str]] = []
    history: dict[str, list[ModelMessage]] = {}
    speakers = {role: agent(role, "Answer the other side.") for role in ("Optimist", "Skeptic")}
    given = f"The motion: {topic}"
    for role in ("Optimist", "Skeptic") * 2:
        result = speakers[role].run_sync(given, message_history=history.get(role))
        history[role] = result.all_messages()
        script.append((role, result.output))
        given = f"The other side says: {result.output}"
    agent("Judge", "Decide who argued better.").run_sync("\n".join(f"{role}: {said}" for role, said in script))


def loop(topic: str) -> None:
    writer, critic = agent("Writer", "Write one paragraph."), agent("Critic", "Say what to change, or APPROVED.")
    draft = writer.run_sync(f"Write about {topic}.")
    for what in ("draft", "revised draft"):
        review = critic.run_sync(f"The {what}: {draft.output}").output
        if "APPROVED" in review:
            break
        draft = writer.run_sync(f"Rewrite it. {review}", message_history=draft.all_messages())


if __name__ == "__main__":
    main(chain=chain, fan=fan, debate=debate, loop=loop)
