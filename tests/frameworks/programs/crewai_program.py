"""CrewAI: crews of role-playing agents, tasks with context, a tool."""

from __future__ import annotations

import os

from _run import main
from crewai import LLM, Agent, Crew, Process, Task
from crewai.tools import tool


@tool("search")
def search(query: str) -> str:
    """Search the archive for a query."""
    return "Three documents found: a survey of 2019, a ministry report and a newspaper article on the matter."


def agent(role: str, goal: str, **options: object) -> Agent:
    llm = LLM(model="gpt-4o-mini", base_url=os.environ["OPENAI_BASE_URL"], temperature=0)
    return Agent(role=role, goal=goal, backstory="You have done this for years.", llm=llm, **options)  # type: ignore[arg-type]


def crew(*tasks: Task) -> str:
    agents = list({id(task.agent): task.agent for task in tasks}.values())
    return str(Crew(agents=agents, tasks=list(tasks), process=Process.sequential, verbose=False).kickoff())


def task(what: str, who: Agent, *context: Task, parallel: bool = False) -> Task:
    return Task(
        description=what, expected_output="A paragraph.", agent=who, context=list(context), async_execution=parallel
    )


def chain(topic: str) -> None:
    research = task(f"Research {topic}.", agent("Researcher", "Report facts", tools=[search]))
    write = task("Write an article from the findings.", agent("Writer", "Write well"), research)
    crew(research, write, task("Edit the draft.", agent("Editor", "Correct texts"), write))


def fan(topic: str) -> None:
    views = [
        task(f"Give your view on {topic}.", agent(role, "Give a professional view"), parallel=True)
        for role in ("Economist", "Engineer", "Historian")
    ]
    crew(*views, task("Merge the views.", agent("Summarizer", "Summarize"), *views))


def debate(topic: str) -> None:
    speakers = [agent("Optimist", "Defend the motion"), agent("Skeptic", "Attack the motion")]
    turns: list[Task] = []
    for at in range(4):
        turns.append(task(f"Turn {at + 1} on the motion: {topic}. Answer what was said.", speakers[at % 2], *turns))
    crew(*turns, task("Decide who argued better.", agent("Judge", "Be fair"), *turns))


def loop(topic: str) -> None:
    writer, critic = agent("Writer", "Write one paragraph"), agent("Critic", "Ask for changes, or say APPROVED")
    draft = task(f"Write about {topic}.", writer)
    text = crew(draft)
    for what in ("draft", "revised draft"):
        review = crew(task(f"Review the {what}:\n{text}", critic))
        if "APPROVED" in review:
            break
        text = crew(task(f"Rewrite this draft:\n{text}\nas the review says:\n{review}", writer))


if __name__ == "__main__":
    main(chain=chain, fan=fan, debate=debate, loop=loop)
