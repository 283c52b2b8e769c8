"""LangGraph: StateGraph with a prebuilt tool agent, a fan-out with `Send`, cycles by conditional edges."""

from __future__ import annotations

import operator
from typing import Annotated, Any, TypedDict

from _run import main
from langchain_core.messages import AIMessage, AnyMessage, HumanMessage, SystemMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.prebuilt import create_react_agent
from langgraph.types import Send


def llm() -> ChatOpenAI:
    return ChatOpenAI(model="gpt-4o-mini", temperature=0)


@tool
def search(query: str) -> str:
    """Search the archive for a query."""
    return "Three documents found: a survey of 2019, a ministry report and a newspaper article on the matter."


class Chain(TypedDict, total=False):
    topic: str
    research: str
    draft: str
    final: str


def ask(system: str, prompt: str) -> str:
    return str(llm().invoke([SystemMessage(system), HumanMessage(prompt)]).content)


def chain(topic: str) -> None:
    researcher = create_react_agent(
        llm(), [search], prompt="You are the Researcher. Use your tool, then report facts."
    )

    def research(state: Chain) -> Chain:
        out = researcher.invoke({"messages": [HumanMessage(f"Find out about {state['topic']}.")]})
        return {"research": out["messages"][-1].content}

    def write(state: Chain) -> Chain:
        return {"draft": ask("You are the Writer. Turn findings into an article.", f"Findings:\n{state['research']}")}

    def edit(state: Chain) -> Chain:
        return {
            "final": ask("You are the Editor. Correct what you get.", f"Please edit this draft:\n\n{state['draft']}")
        }

    graph: Any = StateGraph(Chain)
    graph.add_node("research", research)
    graph.add_node("write", write)
    graph.add_node("edit", edit)
    graph.add_edge(START, "research")
    graph.add_edge("research", "write")
    graph.add_edge("write", "edit")
    graph.add_edge("edit", END)
    graph.compile().invoke({"topic": topic})


class Fan(TypedDict, total=False):
    topic: str
    views: Annotated[list[str], operator.add]
    summary: str


def fan(topic: str) -> None:
    def expert(state: dict[str, str]) -> Fan:
        system = f"You are the {state['role']}. Give your professional view in a few sentences."
        return {"views": [f"{state['role']}: {ask(system, state['topic'])}"]}

    def summarize(state: Fan) -> Fan:
        return {"summary": ask("You are the Summarizer. Merge the views.", "\n\n".join(state["views"]))}

    def spread(state: Fan) -> list[Send]:
        return [Send("expert", {"role": role, "topic": topic}) for role in ("Economist", "Engineer", "Historian")]

    graph: Any = StateGraph(Fan)
    graph.add_node("expert", expert)
    graph.add_node("summarize", summarize)
    graph.add_conditional_edges(START, spread, ["expert"])
    graph.add_edge("expert", "summarize")
    graph.add_edge("summarize", END)
    graph.compile().invoke({"topic": topic})


class Talk(TypedDict):
    messages: Annotated[list[AnyMessage], add_messages]


def debate(topic: str) -> None:
    def speaker(role: str) -> Any:
        def speak(state: Talk) -> dict[str, Any]:
            system = SystemMessage(f"You are the {role}. Answer the other side in a few sentences.")
            mine: list[AnyMessage] = [
                AIMessage(str(m.content)) if m.name == role else HumanMessage(str(m.content), name=m.name)
                for m in state["messages"]
            ]
            return {"messages": [HumanMessage(str(llm().invoke([system, *mine]).content), name=role)]}

        return speak

    def judge(state: Talk) -> dict[str, Any]:
        script = "\n".join(f"{m.name}: {m.content}" for m in state["messages"][1:])
        return {"messages": [AIMessage(ask("You are the Judge. Decide who argued better.", script))]}

    graph: Any = StateGraph(Talk)
    graph.add_node("Optimist", speaker("Optimist"))
    graph.add_node("Skeptic", speaker("Skeptic"))
    graph.add_node("judge", judge)
    graph.add_edge(START, "Optimist")
    graph.add_edge("Optimist", "Skeptic")
    graph.add_conditional_edges("Skeptic", lambda state: "judge" if len(state["messages"]) >= 5 else "Optimist")
    graph.add_edge("judge", END)
    graph.compile().invoke({"messages": [HumanMessage(f"The motion: {topic}", name="moderator")]})


class Draft(TypedDict, total=False):
    topic: str
    draft: str
    review: str
    turn: int


def loop(topic: str) -> None:
    def write(state: Draft) -> Draft:
        if not state.get("draft"):
            prompt = f"Write about {state['topic']}."
        else:
            prompt = f"Rewrite your draft.\nDraft: {state['draft']}\nReview: {state['review']}"
        return {"draft": ask("You are the Writer. Write one paragraph.", prompt), "turn": state.get("turn", 0) + 1}

    def review(state: Draft) -> Draft:
        what = "draft" if state["turn"] == 1 else "revised draft"
        return {
            "review": ask("You are the Critic. Say what to change, or APPROVED.", f"The {what}:\n{state['draft']}")
        }

    graph: Any = StateGraph(Draft)
    graph.add_node("write", write)
    graph.add_node("review", review)
    graph.add_edge(START, "write")
    graph.add_edge("write", "review")
    graph.add_conditional_edges("review", lambda state: END if "APPROVED" in state["review"] else "write")
    graph.compile().invoke({"topic": topic})


if __name__ == "__main__":
    main(chain=chain, fan=fan, debate=debate, loop=loop)
