"""smolagents: tool-calling agents, whose every step is a call that extends the one before, and plain model calls."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

from _run import main
from smolagents import OpenAIServerModel, ToolCallingAgent, tool


@tool
def search(query: str) -> str:
    """Search the archive for a query.

    Args:
        query: What to look for.
    """
    return "Three documents found: a survey of 2019, a ministry report and a newspaper article on the matter."


def model() -> OpenAIServerModel:
    return OpenAIServerModel("gpt-4o-mini", api_base=os.environ["OPENAI_BASE_URL"], api_key="none")


def ask(system: str, prompt: str) -> str:
    out = model()(
        [
            {"role": "system", "content": [{"type": "text", "text": system}]},
            {"role": "user", "content": [{"type": "text", "text": prompt}]},
        ]
    )
    return str(out.content)


def chain(topic: str) -> None:
    agent = ToolCallingAgent(
        tools=[search],
        model=model(),
        instructions="You are the Researcher. Use your tool, then report facts.",
        max_steps=4,
        verbosity_level=0,
    )
    facts = agent.run(f"Research {topic}.")
    draft = ask("You are the Writer. Turn findings into an article.", f"Findings:\n{facts}")
    ask("You are the Editor. Correct what you get.", f"Edit this draft:\n\n{draft}")


def fan(topic: str) -> None:
    roles = ("Economist", "Engineer", "Historian")
    with ThreadPoolExecutor(3) as pool:
        views = list(pool.map(lambda role: ask(f"You are the {role}. Give your professional view.", topic), roles))
    ask("You are the Summarizer. Merge the views.", "\n\n".join(views))


def debate(topic: str) -> None:
    script: list[tuple[str, str]] = []
    for role in ("Optimist", "Skeptic") * 2:
        said = "\n".join(f"{speaker}: {text}" for speaker, text in script)
        script.append((role, ask(f"You are the {role}. Answer the other side.", f"The motion: {topic}\n{said}")))
    ask("You are the Judge. Decide who argued better.", "\n".join(f"{speaker}: {text}" for speaker, text in script))


def loop(topic: str) -> None:
    draft = ask("You are the Writer. Write one paragraph.", f"Write about {topic}.")
    for what in ("draft", "revised draft"):
        review = ask("You are the Critic. Say what to change, or APPROVED.", f"The {what}:\n{draft}")
        if "APPROVED" in review:
            break
        draft = ask(
            "You are the Writer. Write one paragraph.", f"Draft:\n{draft}\n\nReview:\n{review}\n\nRewrite it."
        )


if __name__ == "__main__":
    main(chain=chain, fan=fan, debate=debate, loop=loop)
