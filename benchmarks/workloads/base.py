"""What every workload is made of.

A workload's *program* is plain async client code: it awaits replies and puts them into later prompts. It sees a `Run`
only, so that the same program runs over HTTP (tagged or not, through any system), in a test against a function, or
symbolically: `export_plan` runs it once with placeholders for inputs and replies and gets the submitted plan
(``POST /v1/workflows``) from the prompts it built. Program and plan cannot drift apart.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from .text import Writer

Message = dict[str, str]
Inputs = dict[str, str]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Lengths in tokens: of a role's static prompt, one context, a question, and a reply."""

    static: int
    context: int
    question: int
    output: int


SIZES: dict[str, Sizes] = {
    "tiny": Sizes(96, 64, 16, 8),
    "compact": Sizes(192, 160, 32, 16),
    "replies": Sizes(192, 160, 32, 96),
    "small": Sizes(384, 512, 64, 32),
    "P1": Sizes(1024, 128, 128, 64),
    "P2": Sizes(1024, 512, 512, 256),
    "P3": Sizes(1024, 1024, 1024, 512),
    "P4": Sizes(2048, 256, 256, 128),
    "P5": Sizes(2048, 1024, 1024, 512),
    "P6": Sizes(2048, 2048, 2048, 1024),
}
"""The paper's grid P1-P6; ``small`` for CPU engines with 96 KV blocks of 128 tokens, ``compact`` for slow ones with
blocks of 32; ``tiny`` for tests."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call a program makes: its place in the workflow and its prompt."""

    workflow: str
    run: str
    node: str
    parents: tuple[str, ...]
    messages: tuple[Message, ...]
    max_tokens: int


class Caller(Protocol):
    """Whatever answers calls: an HTTP client, a function in a test, a plan being traced."""

    async def complete(self, call: Call) -> str: ...


class Run:
    """One run of a workflow, as its program sees it."""

    def __init__(
        self,
        caller: Caller,
        workflow: str,
        run: str,
        *,
        inputs: Mapping[str, str],
        roles: Roles,
        time_scale: float = 1.0,
        think_s: float = 0.0,
    ) -> None:
        self._caller = caller
        self._think_s = think_s
        self._roles = roles
        self._time_scale = time_scale
        self.workflow = workflow
        self.id = run
        self.inputs = inputs
        self.sizes = roles.sizes

    def __repr__(self) -> str:
        return f"Run({self.workflow}, {self.id})"

    def role(self, name: str) -> Message:
        """The system message of a role: static, equal in every run of the workload."""
        return self._roles.message(name)

    async def ask(
        self, node: str, messages: Sequence[Message], parents: Sequence[str] = (), max_tokens: int | None = None
    ) -> str:
        """The reply to one chat call; `parents` name the nodes whose replies are in the prompt."""
        if parents and self._think_s:
            await self.think(self._think_s)
        tokens = self.sizes.output if max_tokens is None else max_tokens
        call = Call(self.workflow, self.id, node, tuple(parents), tuple(messages), tokens)
        return await self._caller.complete(call)

    async def think(self, seconds: float) -> None:
        """The client's own time between calls (a tool at work), scaled by the harness."""
        if self._time_scale > 0:
            await asyncio.sleep(seconds * self._time_scale)


class Roles:
    """The static prompts of a workload, made once."""

    def __init__(self, workload: str, sizes: Sizes, writer: Writer) -> None:
        self.sizes = sizes
        self._workload = workload
        self._writer = Writer(0, writer.tokens_per_word)  # roles do not depend on the batch's seed
        # name -> system message
        self._messages: dict[str, Message] = {}

    def message(self, name: str) -> Message:
        if name not in self._messages:
            text = self._writer.text(self.sizes.static, f"{self._workload}/role/{name}")
            title = name.replace("_", " ")
            self._messages[name] = {"role": "system", "content": f"You are the {title}. {text}"}
        return self._messages[name]


Program = Callable[[Run], Awaitable[object]]
MakeInputs = Callable[[Writer, Sizes, int], list[list[Inputs]]]


@dataclass(frozen=True)
class Workload:
    """A shape: its program and how its inputs are drawn."""

    name: str
    program: Program
    make_inputs: MakeInputs
    """(writer, sizes, batch) -> phases of runs' inputs. A phase starts when the one before has ended (days)."""
    calls_per_run: int | None
    """None: decided while it runs."""
    batch: int = 8
    """Runs in a phase unless asked otherwise: on two CPU engines of 96 × 128 tokens, several times what they hold."""
    arrivals: Callable[[int, int], list[float]] | None = None
    """(batch, seed) -> start offsets in seconds; None: all at once."""
    programs: Mapping[str, Program] = field(default_factory=dict)
    """For mixed traffic: input ``tenant`` names the program of the run."""
    think_s: float = 0.0
    """The client's pause before every call that has parents."""
    planned: bool = True
    """Whether the shape can be submitted as a plan (its calls do not depend on replies' contents or on time)."""

    def program_of(self, inputs: Mapping[str, str]) -> Program:
        return self.programs.get(inputs.get("tenant", ""), self.program)


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def document_inputs(writer: Writer, sizes: Sizes, batch: int) -> list[list[Inputs]]:
    """One phase; per run a context and a question."""
    return [
        [
            {
                "context": writer.text(sizes.context, f"context/{index}"),
                "question": writer.text(sizes.question, f"question/{index}"),
            }
            for index in range(batch)
        ]
    ]


def chunk_inputs(writer: Writer, sizes: Sizes, batch: int, chunks: int = 6) -> list[list[Inputs]]:
    """One phase; per run a question and `chunks` pieces of a document, each `sizes.context` // 2 tokens."""
    return [
        [
            {"question": writer.text(sizes.question, f"question/{index}")}
            | {f"chunk_{piece}": writer.text(sizes.context // 2, f"chunk/{index}/{piece}") for piece in range(chunks)}
            for index in range(batch)
        ]
    ]


class _Tracer:
    """Answers a call with the placeholder of its reply and notes the node."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    async def complete(self, call: Call) -> str:
        self.calls.append(call)
        return f"{{{{nodes.{call.node}}}}}"


async def export_plan(
    workload: Workload, sizes: Sizes, writer: Writer, *, inputs: Sequence[Inputs], model: str
) -> dict[str, Any]:
    """A batch of the workload, one phase's inputs, as the JSON of ``POST /v1/workflows``.

    Raises:
        ValueError: the workload's calls are decided at run time, so that no plan describes it.
    """
    if not workload.planned:
        raise ValueError(f"{workload.name} is decided at run time and cannot be submitted as a plan")
    placeholders = {name: f"{{{{inputs.{name}}}}}" for name in inputs[0]}
    tracer = _Tracer()
    roles = Roles(workload.name, sizes, writer)
    await workload.program(Run(tracer, workload.name, "plan", inputs=placeholders, roles=roles))
    consumed = {parent for call in tracer.calls for parent in call.parents}
    return {
        "workflow": workload.name,
        "model": model,
        "nodes": [
            {
                "id": call.node,
                "messages": list(call.messages),
                "params": {"max_tokens": call.max_tokens, "temperature": 0, "ignore_eos": True},
            }
            for call in tracer.calls
        ],
        "outputs": [call.node for call in tracer.calls if call.node not in consumed],
        "inputs": list(inputs),
    }
