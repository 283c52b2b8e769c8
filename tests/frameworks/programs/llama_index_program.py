"""LlamaIndex: a function agent, an event-driven workflow with a fan-out, chat memory, plain completions."""

from __future__ import annotations

import asyncio
import os

from _run import main
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.workflow import Context, Event, StartEvent, StopEvent, Workflow, step
from llama_index.llms.openai_like import OpenAILike


def model() -> OpenAILike:
    return OpenAILike(
        model="gpt-4o-mini",
        api_base=os.environ["OPENAI_BASE_URL"],
        api_key="none",
        is_chat_model=True,
        is_function_calling_model=True,
        context_window=100_000,
    )


def ask(system: str, prompt: str) -> str:
    out = model().chat([ChatMessage(role="system", content=system), ChatMessage(role="user", content=prompt)])
    return str(out.message.content)


def search(query: str) -> str:
    """Search the archive for a query."""
    return "Three documents found: a survey of 2019, a ministry report and a newspaper article on the matter."


def chain(topic: str) -> None:
    async def go() -> str:
        prompt = "You are the Researcher. Use your tool, then report facts."
        agent = FunctionAgent(tools=[search], llm=model(), system_prompt=prompt)
        return str(await agent.run(user_msg=f"Research {topic}."))

    facts = asyncio.run(go())
    # Prompt templates without a system prompt.
    writing = PromptTemplate("You are the Writer. Turn these findings into an article:\n{facts}\nArticle:")
    draft = model().predict(writing, facts=facts)
    model().predict(PromptTemplate("You are the Editor. Correct this text:\n{draft}\nCorrected:"), draft=draft)


class Ask(Event):
    role: str


class View(Event):
    role: str
    text: str


class Panel(Workflow):
    """Three experts at once, then a summary."""

    @step
    async def begin(self, ctx: Context, ev: StartEvent) -> Ask | None:
        await ctx.store.set("topic", ev.topic)
        for role in ("Economist", "Engineer", "Historian"):
            ctx.send_event(Ask(role=role))
        return None

    @step(num_workers=3)
    async def answer(self, ctx: Context, ev: Ask) -> View:
        topic = await ctx.store.get("topic")
        messages = [
            ChatMessage(role="system", content=f"You are the {ev.role}. Give your professional view."),
            ChatMessage(role="user", content=topic),
        ]
        return View(role=ev.role, text=str((await model().achat(messages)).message.content))

    @step
    async def join(self, ctx: Context, ev: View) -> StopEvent | None:
        views = ctx.collect_events(ev, [View] * 3)
        if views is None:
            return None
        text = "\n\n".join(f"{view.role}:\n{view.text}" for view in views)
        system = ChatMessage(role="system", content="You are the Summarizer. Merge the views.")
        out = await model().achat([system, ChatMessage(role="user", content=text)])
        return StopEvent(result=str(out.message.content))


def fan(topic: str) -> None:
    async def go() -> None:
        await Panel(timeout=60).run(topic=topic)

    asyncio.run(go())


def debate(topic: str) -> None:
    script: list[tuple[str, str]] = []
    for role in ("Optimist", "Skeptic") * 2:
        said = "\n".join(f"{speaker}: {text}" for speaker, text in script)
        script.append((role, ask(f"You are the {role}. Answer the other side.", f"The motion: {topic}\n{said}")))
    ask("You are the Judge. Decide who argued better.", "\n".join(f"{speaker}: {text}" for speaker, text in script))


def loop(topic: str) -> None:
    memory = [
        ChatMessage(role="system", content="You are the Writer. Write one paragraph."),
        ChatMessage(role="user", content=f"Write about {topic}."),
    ]
    for what in ("draft", "revised draft"):
        draft = str(model().chat(memory).message.content)
        review = ask("You are the Critic. Say what to change, or APPROVED.", f"The {what}:\n{draft}")
        if "APPROVED" in review:
            break
        memory += [
            ChatMessage(role="assistant", content=draft),
            ChatMessage(role="user", content=f"Rewrite it as the review says. {review}"),
        ]


if __name__ == "__main__":
    main(chain=chain, fan=fan, debate=debate, loop=loop)
