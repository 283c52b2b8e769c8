"""AutoGen: assistants with tools, round-robin and selector-free group chats, a reflection loop by termination."""

from __future__ import annotations

import asyncio

from _run import main
from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.conditions import MaxMessageTermination, TextMentionTermination
from autogen_agentchat.teams import DiGraphBuilder, GraphFlow, RoundRobinGroupChat
from autogen_ext.models.openai import OpenAIChatCompletionClient


async def search(query: str) -> str:
    """Search the archive for a query."""
    return "Three documents found: a survey of 2019, a ministry report and a newspaper article on the matter."


def agent(role: str, what: str, **options: object) -> AssistantAgent:
    client = OpenAIChatCompletionClient(model="gpt-4o-mini")
    return AssistantAgent(role, client, system_message=f"You are the {role}. {what}", **options)  # type: ignore[arg-type]


def chain(topic: str) -> None:
    async def go() -> None:
        researcher = agent("Researcher", "Use your tool, then report.", tools=[search], reflect_on_tool_use=True)
        team = RoundRobinGroupChat(
            [researcher, agent("Writer", "Turn findings into an article."), agent("Editor", "Correct what you get.")],
            max_turns=3,
        )
        await team.run(task=f"An article about {topic}.")

    asyncio.run(go())


def fan(topic: str) -> None:
    async def go() -> None:
        experts = [agent(role, "Give your professional view.") for role in ("Economist", "Engineer", "Historian")]
        summarizer = agent("Summarizer", "Merge the views.")
        graph = DiGraphBuilder()
        for expert in experts:
            graph.add_node(expert)
        graph.add_node(summarizer)
        for expert in experts:
            graph.add_edge(expert, summarizer)
        flow = GraphFlow([*experts, summarizer], graph.build())
        await flow.run(task=topic)

    asyncio.run(go())


def debate(topic: str) -> None:
    async def go() -> None:
        talk = RoundRobinGroupChat(
            [agent("Optimist", "Answer the other side."), agent("Skeptic", "Answer the other side.")],
            termination_condition=MaxMessageTermination(5),
        )
        result = await talk.run(task=f"The motion: {topic}")
        said = [f"{message.source}: {message.content}" for message in result.messages[1:]]  # type: ignore[union-attr]
        await agent("Judge", "Decide who argued better.").run(task="\n".join(said))

    asyncio.run(go())


def loop(topic: str) -> None:
    async def go() -> None:
        team = RoundRobinGroupChat(
            [agent("Writer", "Write one paragraph."), agent("Critic", "Say what to change, or APPROVED.")],
            termination_condition=TextMentionTermination("APPROVED", sources=["Critic"]) | MaxMessageTermination(9),
        )
        await team.run(task=f"Write about {topic}.")

    asyncio.run(go())


if __name__ == "__main__":
    main(chain=chain, fan=fan, debate=debate, loop=loop)
