"""Drives `Workflows` without a gateway: calls with scripted replies on a clock of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from helium_proxy.types import Arrival, CallRequest, Outcome
from helium_proxy.workflow import Workflows, WorkflowSettings
from helium_proxy.workflow.store import TemplateStore

Messages = Sequence[Mapping[str, Any]]


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str | None, *tool_ids: str) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if tool_ids:
        message["tool_calls"] = [
            {"id": id_, "type": "function", "function": {"name": "look_up", "arguments": "{}"}} for id_ in tool_ids
        ]
    return message


def tool(id_: str, text: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id_, "content": text}


@dataclass
class Driver:
    """`now` moves by a tenth of a second with every event."""

    settings: WorkflowSettings = field(default_factory=WorkflowSettings)
    store: TemplateStore | None = None
    now: float = 1_000.0
    count: int = 0

    def __post_init__(self) -> None:
        self.workflows = Workflows(self.settings, self.store, clock=lambda: self.now, wall=lambda: self.now)

    def arrive(
        self,
        messages: Messages,
        *,
        tenant: str = "t",
        route: str = "/v1/chat/completions",
        headers: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        id_: str | None = None,
        **helium: Any,
    ) -> Arrival:
        self.count += 1
        self.now += 0.1
        whole: dict[str, Any] = {"model": "m", "messages": list(messages), **(body or {})}
        if helium:
            whole["helium"] = helium
        request = CallRequest(id_ or f"chatcmpl-{self.count}", tenant, route, "m", whole, dict(headers or {}))
        return self.workflows.arrive(request, self.now)

    def finish(
        self,
        call: str,
        reply: str | None = None,
        tool_calls: Iterable[str] = (),
        *,
        prompt_tokens: int | None = 100,
        output_tokens: int | None = 10,
        **outcome: Any,
    ) -> None:
        self.now += 0.1
        outcome.setdefault("fate", "computed")
        self.workflows.finished(
            call,
            Outcome(
                worker="w",
                reply_text=reply,
                reply_tool_calls=tuple(tool_calls),
                prompt_tokens=prompt_tokens,
                output_tokens=output_tokens,
                finished_at=self.now,
                **outcome,
            ),
            self.now,
        )

    def call(
        self, messages: Messages, reply: str | None = None, tool_calls: Iterable[str] = (), **arrive: Any
    ) -> Arrival:
        arrival = self.arrive(messages, **arrive)
        self.workflows.started(arrival.call, "w", self.now)
        self.finish(arrival.call, reply, tool_calls)
        return arrival

    def edges(self, run: str) -> set[tuple[str, str]]:
        """Edges of a run as pairs of call ids."""
        found = self.workflows.run(run)
        assert found is not None, f"no run {run}"
        return {(edge["from"], edge["to"]) for edge in found["edges"]}

    def all_edges(self) -> set[tuple[str, str]]:
        return {edge for run in self.workflows.runs(limit=100_000) for edge in self.edges(run["run"])}
