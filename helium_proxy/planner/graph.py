"""Operators: a plan's nodes expanded over its inputs, as a DAG that the rewrite rules transform.

A prompt is a list of elements: a `Mark` (where a message begins, or content that is not text), text, or the id of
the operator whose output stands there. Marks are no text, so no value can imitate a message boundary. An operator's
id is larger than the ids of those it depends on, here and after every rule.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, Literal, NamedTuple

import orjson

from helium_proxy.errors import InvalidRequest
from helium_proxy.planner.plan import Message, Part, Plan, Reference, Scalar, split_template
from helium_proxy.planner.settings import PlanSettings

Kind = Literal["chat", "completion"]


class Mark(NamedTuple):
    """A place in a prompt that is no text: a message's beginning (`role` first), or a part such as an image."""

    label: str
    tokens: int = 4
    """What a chat template spends on it, roughly: planning only."""


GENERATION = Mark("assistant")
"""The end of every chat prompt, and the beginning of an assistant message: a reply quoted in a later prompt of the
same conversation lies where it was generated."""

Element = Mark | str | int
_OPAQUE_TOKENS = 256


def _canonical(value: Any) -> str:
    try:
        return orjson.dumps(value).decode()
    except orjson.JSONEncodeError as error:  # nested beyond what any worker would read
        raise InvalidRequest(f"not sendable as JSON: {error}", param="nodes") from None


def _role_mark(message: Message) -> Mark:
    extra = message.model_extra or {}
    label = message.role + ("" if message.content is not None else " (no content)")
    if not extra:
        return GENERATION if label == "assistant" else Mark(label)
    text = _canonical(extra)
    return Mark(f"{label} {text}", 4 + len(text) // 4)


def _is_input(part: Mark | Part) -> bool:
    return isinstance(part, Reference) and part.kind == "inputs"


@dataclass(frozen=True, slots=True, eq=False)
class NodeTemplate:
    """What all operators of one node share."""

    node: str
    kind: Kind
    model: str
    params: Mapping[str, Any]
    """The body's fields beside model, messages and prompt."""
    messages: tuple[Message, ...]
    """Empty for a completion."""
    parts: tuple[Mark | Part, ...]
    """The prompt before the inputs are known."""
    literal: bool = False
    """Placeholders are text (Batch API)."""
    prompt: str = ""
    deterministic: bool = field(init=False)
    head: bytes = field(init=False)
    """Everything in a signature but the prompt."""
    skeleton: tuple[Mark | Reference, ...] = field(init=False)
    """The parts that are neither text nor inputs."""
    static_chars: int = field(init=False)
    columns: tuple[str, ...] = field(init=False)
    """Inputs referred to, as often as they are."""

    def __post_init__(self) -> None:
        columns = tuple(part.name for part in self.parts if isinstance(part, Reference) and part.kind == "inputs")
        object.__setattr__(self, "columns", columns)
        object.__setattr__(self, "static_chars", sum(len(part) for part in self.parts if isinstance(part, str)))
        skeleton = tuple(part for part in self.parts if not isinstance(part, str) and not _is_input(part))
        object.__setattr__(self, "skeleton", skeleton)
        greedy = self.params.get("temperature") == 0 and self.params.get("n", 1) in (1, None)
        object.__setattr__(self, "deterministic", greedy)
        object.__setattr__(self, "head", _canonical([self.kind, self.model, sorted(self.params.items())]).encode())

    @property
    def max_tokens(self) -> int | None:
        """The client's bound on the output, tokens."""
        limit = self.params.get("max_completion_tokens") or self.params.get("max_tokens")
        return limit if isinstance(limit, int) else None


def make_template(
    node: str,
    model: str,
    params: Mapping[str, Any],
    messages: Sequence[Message] | None,
    prompt: str | None,
    *,
    literal: bool = False,
) -> NodeTemplate:
    """Compile one node; `literal` leaves placeholders alone."""

    def split(text: str) -> list[Part]:
        return [text] if literal else split_template(text)

    if messages is None:
        return NodeTemplate(node, "completion", model, params, (), tuple(split(prompt or "")), literal, prompt or "")
    parts: list[Mark | Part] = []
    for message in messages:
        parts.append(_role_mark(message))
        if isinstance(message.content, str):
            parts.extend(split(message.content))
        for piece in message.content if isinstance(message.content, list) else ():
            text = piece.get("text")
            if isinstance(text, str):
                rest = {key: value for key, value in piece.items() if key != "text"}
                parts.extend((Mark("part " + _canonical(rest), 0), *split(text)))
            else:
                parts.append(Mark("part " + _canonical(piece), _OPAQUE_TOKENS))
    parts.append(GENERATION)
    return NodeTemplate(node, "chat", model, params, tuple(messages), tuple(parts), literal)


@dataclass(frozen=True, slots=True, eq=False)
class Operator:
    """One LLM call of a plan: a node for one row of the inputs."""

    id: int
    template: NodeTemplate
    row: int
    values: Mapping[str, str]
    """The row's inputs as text."""
    bindings: Mapping[str, int]
    """Node id in the template → operator whose output takes its place."""
    fetched: str | None = None
    """The output, when a rule took it from the prompt cache: a CacheFetch."""

    @property
    def name(self) -> str:
        return f"{self.template.node}[{self.row}]"

    @property
    def deps(self) -> tuple[int, ...]:
        return () if self.fetched is not None else tuple(dict.fromkeys(self.bindings.values()))

    def prompt(self) -> list[Element]:
        """The prompt with inputs in place; operators' outputs stay references. Texts may adjoin."""
        values, bindings = self.values, self.bindings
        return [
            part
            if not isinstance(part, Reference)
            else values[part.name]
            if part.kind == "inputs"
            else bindings[part.name]
            for part in self.template.parts
        ]

    def __repr__(self) -> str:
        if self.fetched is not None:
            return f"{self.name} = CacheFetch"
        deps = " ".join(str(dep) for dep in self.deps)
        return f"{self.name} #{self.id}" + (f" <- {deps}" if deps else "")


@dataclass(frozen=True, slots=True)
class OperatorGraph:
    """Operators by id (ascending, so producers first) and, per input row, which operator makes which output."""

    workflow: str
    operators: Mapping[int, Operator]
    outputs: tuple[Mapping[str, int], ...]
    """Row → output node → operator."""

    def consumers(self) -> dict[int, list[int]]:
        """Operator → those that depend on it."""
        found: dict[int, list[int]] = {id_: [] for id_ in self.operators}
        for operator in self.operators.values():
            for dep in operator.deps:
                found[dep].append(operator.id)
        return found

    def restricted(self, operators: Iterable[Operator]) -> OperatorGraph:
        """The same outputs over fewer or changed operators."""
        return replace(self, operators={operator.id: operator for operator in operators})

    def lines(self) -> list[str]:
        """One line per operator, by name: what the fixture files of the rules show."""
        names = {id_: operator.name for id_, operator in self.operators.items()}
        shown = []
        for operator in self.operators.values():
            if operator.fetched is not None:
                shown.append(f"{operator.name} = {operator.fetched!r}")
            else:
                deps = ", ".join(names[dep] for dep in operator.deps)
                shown.append(f"{operator.name} <- {deps}" if deps else operator.name)
        for row, outputs in enumerate(self.outputs):
            shown.extend(f"output {node}[{row}]: {names[id_]}" for node, id_ in outputs.items())
        return shown

    def __repr__(self) -> str:
        return f"<OperatorGraph {self.workflow!r}: {len(self.operators)} operators, {len(self.outputs)} rows>"


def _text(value: Scalar) -> str:
    return value if isinstance(value, str) else _canonical(value)


def expand(plan: Plan, settings: PlanSettings) -> OperatorGraph:
    """One operator per node and input row. Raises `InvalidRequest` when the prompts would be too large."""
    spec = plan.spec
    templates = [
        make_template(
            node.id, node.model or spec.model or "", {**spec.params, **node.params}, node.messages, node.prompt
        )
        for node in plan.order
    ]
    rows = [{name: _text(value) for name, value in values.items()} for values in spec.inputs]
    _check_lengths(templates, rows, settings)
    operators: dict[int, Operator] = {}
    outputs: list[dict[str, int]] = []
    for row, values in enumerate(rows):
        made: dict[str, int] = {}
        for template in templates:
            id_ = len(operators)
            bindings = {parent: made[parent] for parent in plan.parents[template.node]}
            operators[id_] = Operator(id_, template, row, values, bindings)
            made[template.node] = id_
        outputs.append({node: made[node] for node in plan.outputs})
    return OperatorGraph(spec.workflow, operators, tuple(outputs))


def _check_lengths(templates: list[NodeTemplate], rows: list[dict[str, str]], settings: PlanSettings) -> None:
    """Sizes from lengths alone, before any text is joined: one value may be referred to many times."""
    elements = sum(len(template.parts) for template in templates) * len(rows)
    if elements > settings.max_elements:
        raise InvalidRequest(
            f"{elements:,} messages, texts and placeholders: at most {settings.max_elements:,} are taken",
            param="nodes",
        )
    lengths = [{name: len(value) for name, value in values.items()} for values in rows]
    total = 0
    for template in templates:
        for row, known in enumerate(lengths):
            size = template.static_chars + sum(known[name] for name in template.columns)
            total += size
            if size > settings.max_prompt_chars or total > settings.max_total_chars:
                what, limit = (
                    (f"the prompt of node {template.node!r}", settings.max_prompt_chars)
                    if size > settings.max_prompt_chars
                    else ("all prompts together", settings.max_total_chars)
                )
                raise InvalidRequest(f"{what} would exceed {limit:,} characters", param=f"inputs[{row}]")


def classes(graph: OperatorGraph) -> dict[int, int]:
    """Operator → the first operator of equal signature: kind, model, parameters and prompt, where a reference to an
    operator stands for that operator's class. One that samples is a class of its own.

    Texts are compared only where everything but the texts, and their total length, is equal.
    """
    found: dict[int, int] = {}
    buckets: dict[object, int | dict[tuple[Element, ...], int]] = {}  # a lone operator, or several by their prompts

    def prompt_of(operator: Operator) -> tuple[Element, ...]:
        return _join([found[part] if isinstance(part, int) else part for part in operator.prompt()])

    for operator in graph.operators.values():
        found[operator.id] = operator.id
        template, values, bindings = operator.template, operator.values, operator.bindings
        if not template.deterministic:
            continue
        size = template.static_chars + sum([len(values[name]) for name in template.columns])
        shape = tuple([part if isinstance(part, Mark) else found[bindings[part.name]] for part in template.skeleton])
        key = (template.head, size, shape)
        bucket = buckets.setdefault(key, operator.id)
        if isinstance(bucket, int):
            if bucket == operator.id:
                continue
            bucket = buckets[key] = {prompt_of(graph.operators[bucket]): bucket}
        found[operator.id] = bucket.setdefault(prompt_of(operator), operator.id)
    return found


def _join(prompt: Sequence[Element]) -> tuple[Element, ...]:
    """Adjoining texts as one, empty ones left out.

    >>> _join(["a", "b", 3, "", "c"])
    ('ab', 3, 'c')
    """
    elements: list[Element] = []
    for is_text, run in groupby(prompt, key=lambda element: isinstance(element, str)):
        if is_text:
            elements.extend(filter(None, ["".join(part for part in run if isinstance(part, str))]))
        else:
            elements.extend(run)
    return tuple(elements)


def request_body(operator: Operator, texts: Mapping[int, str]) -> dict[str, Any]:
    """The OpenAI request of `operator`, given the outputs of those it depends on."""
    template = operator.template

    def fill(text: str) -> str:
        if template.literal or "{{" not in text:
            return text
        return "".join(
            part
            if isinstance(part, str)
            else operator.values[part.name]
            if part.kind == "inputs"
            else texts[operator.bindings[part.name]]
            for part in split_template(text)
        )

    body: dict[str, Any] = {"model": template.model}
    if template.kind == "completion":
        body["prompt"] = fill(template.prompt)
    else:
        body["messages"] = messages = []
        for message in template.messages:
            filled = message.model_dump(exclude_unset=True)
            if isinstance(message.content, str):
                filled["content"] = fill(message.content)
            elif message.content is not None:
                filled["content"] = [
                    {**part, "text": fill(part["text"])} if isinstance(part.get("text"), str) else part
                    for part in message.content
                ]
            messages.append(filled)
    body.update(template.params)
    return body
