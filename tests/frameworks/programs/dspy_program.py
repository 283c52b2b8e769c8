"""DSPy: signatures, chain of thought, ReAct; replies come back as parsed fields and go on one by one."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import dspy
from _run import main


def search(query: str) -> str:
    """Search the archive for a query."""
    return "Three documents found: a survey of 2019, a ministry report and a newspaper article on the matter."


def role(name: str, what: str, inputs: str, output: str) -> type[dspy.Signature]:
    return dspy.Signature(f"{inputs} -> {output}", f"You are the {name}. {what}")  # type: ignore[no-any-return]


def lm() -> dspy.LM:
    return dspy.LM("openai/gpt-4o-mini", api_base=os.environ["OPENAI_BASE_URL"], api_key="none", cache=False)


def chain(topic: str) -> None:
    with dspy.context(lm=lm()):
        # A program with a tool by hand: the first call says what to look for, the second reports.
        plan = dspy.Predict(role("Researcher", "Say what to look for.", "topic", "query"))
        report = dspy.Predict(role("Researcher", "Say what to look for.", "topic, query, result", "findings"))
        query = plan(topic=topic).query
        facts = report(topic=topic, query=query, result=search(query)).findings
        write = dspy.ChainOfThought(role("Writer", "Turn findings into an article.", "findings", "article"))
        draft = write(findings=facts).article
        dspy.Predict(role("Editor", "Correct what you get.", "draft", "corrected"))(draft=draft)


def fan(topic: str) -> None:
    shared = lm()

    def view(name: str) -> str:
        with dspy.context(lm=shared):
            return str(dspy.Predict(role(name, "Give your professional view.", "topic", "view"))(topic=topic).view)

    with ThreadPoolExecutor(3) as pool:
        views = list(pool.map(view, ("Economist", "Engineer", "Historian")))
    with dspy.context(lm=shared):
        dspy.Predict(role("Summarizer", "Merge the views.", "views: list[str]", "summary"))(views=views)


def debate(topic: str) -> None:
    with dspy.context(lm=lm()):
        script: list[str] = []
        speakers = {
            name: dspy.Predict(role(name, "Answer the other side.", "motion, transcript: list[str]", "argument"))
            for name in ("Optimist", "Skeptic")
        }
        for name in ("Optimist", "Skeptic") * 2:
            script.append(f"{name}: {speakers[name](motion=topic, transcript=script).argument}")
        dspy.Predict(role("Judge", "Decide who argued better.", "transcript: list[str]", "verdict"))(
            transcript=script
        )


def loop(topic: str) -> None:
    with dspy.context(lm=lm()):
        writer = dspy.Predict(role("Writer", "Write one paragraph.", "topic, draft, review", "paragraph"))
        critic = dspy.Predict(role("Critic", "Say what to change, or APPROVED.", "stage, text", "review"))
        draft = writer(topic=topic, draft="none", review="none").paragraph
        for what in ("draft", "revised draft"):
            review = critic(stage=what, text=draft).review
            if "APPROVED" in review:
                break
            draft = writer(topic=topic, draft=draft, review=review).paragraph


if __name__ == "__main__":
    main(chain=chain, fan=fan, debate=debate, loop=loop)
