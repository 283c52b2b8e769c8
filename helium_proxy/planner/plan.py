"""A workflow over a batch of inputs: the wire format of ``POST /v1/workflows``, checked.

A plan is untrusted input. Sizes are checked on the raw JSON, before anything is built from it; references,
duplicates and cycles once the shape is known. Every refusal is an `InvalidRequest` that names the offending field.

Placeholders are ``{{inputs.NAME}}`` and ``{{nodes.ID}}``, in message contents (strings and text parts) and prompts.
A template is split into its parts once; values are put between the parts and never looked at again, so that a value
which contains a placeholder stays text. Other ``{{…}}`` is left as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from helium_proxy.errors import InvalidRequest
from helium_proxy.planner.settings import PlanSettings
from helium_proxy.planner.words import counted

NAME = r"[A-Za-z0-9_][A-Za-z0-9_.:\-]{0,127}"
_PLACEHOLDER = re.compile(r"\{\{\s*(inputs|nodes)\b([^{}]*)\}\}")
_REFERENCE = re.compile(rf"\.({NAME})\s*")
_RESERVED = ("messages", "prompt", "model", "stream", "stream_options", "helium")

Scalar = str | int | float | bool


@dataclass(frozen=True, slots=True)
class Reference:
    """A placeholder: a column of the inputs, or the output text of another node."""

    kind: Literal["inputs", "nodes"]
    name: str

    def __str__(self) -> str:
        return f"{{{{{self.kind}.{self.name}}}}}"


Part = str | Reference


def split_template(text: str) -> list[Part]:
    """Split `text` at its placeholders; the literal parts between them are kept as they are.

    >>> [str(part) for part in split_template("Q: {{inputs.q}}\\nA: {{ nodes.a }}")]
    ['Q: ', '{{inputs.q}}', '\\nA: ', '{{nodes.a}}']
    >>> split_template("{{ other }} and {x}")
    ['{{ other }} and {x}']

    Raises `ValueError` for a placeholder that names nothing, such as ``{{nodes.}}``.
    """
    if "{{" not in text:
        return [text] if text else []
    parts: list[Part] = []
    end = 0
    for match in _PLACEHOLDER.finditer(text):
        reference = _REFERENCE.fullmatch(match[2])
        if reference is None:
            raise ValueError(
                f"malformed placeholder {match[0][:80]!r}: write {{{{inputs.NAME}}}} or {{{{nodes.ID}}}}"
            )
        if match.start() > end:
            parts.append(text[end : match.start()])
        parts.append(Reference("inputs" if match[1] == "inputs" else "nodes", reference[1]))
        end = match.end()
    if end < len(text):
        parts.append(text[end:])
    return parts


class Message(BaseModel):
    """One chat message. Fields other than `role` and `content` travel to the worker as they came."""

    model_config = ConfigDict(extra="allow")

    role: str = Field(min_length=1, max_length=64)
    content: str | list[dict[str, Any]] | None = None

    def texts(self) -> Iterator[str]:
        """The content's texts, in order: where placeholders may stand."""
        if isinstance(self.content, str):
            yield self.content
        elif self.content is not None:
            for part in self.content:
                text = part.get("text")
                if isinstance(text, str):
                    yield text


def _check_params(params: dict[str, Any]) -> dict[str, Any]:
    for name in _RESERVED:
        if name in params:
            raise ValueError(f"{name!r} does not belong in params")
    if params.get("n", 1) != 1:
        raise ValueError("'n' must be 1: a node has one output")
    for name in ("max_tokens", "max_completion_tokens"):
        limit = params.get(name, 1)
        if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
            raise ValueError(f"{name!r} must be a positive integer")
    temperature = params.get("temperature", 0)
    if temperature is not None and (
        not isinstance(temperature, int | float) or isinstance(temperature, bool) or not 0 <= temperature <= 2
    ):
        raise ValueError("'temperature' must be a number from 0 to 2")
    return params


Params = Annotated[dict[str, Any], AfterValidator(_check_params)]


class PlanNode(BaseModel):
    """One operator of the workflow: a chat (`messages`) or a completion (`prompt`)."""

    model_config = ConfigDict(extra="forbid")

    id: str = Field(pattern=rf"^{NAME}$")
    model: str | None = Field(None, min_length=1, max_length=512)
    messages: list[Message] | None = Field(None, min_length=1)
    prompt: str | None = None
    params: Params = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_body(self) -> PlanNode:
        if (self.messages is None) == (self.prompt is None):
            raise ValueError("give either 'messages' or 'prompt'")
        return self

    def references(self) -> list[Reference]:
        """Distinct placeholders, in order of first use."""
        texts = [self.prompt or ""] if self.messages is None else [t for m in self.messages for t in m.texts()]
        found = (part for text in texts for part in split_template(text) if isinstance(part, Reference))
        return list(dict.fromkeys(found))


def _one_row() -> list[dict[str, Scalar]]:
    return [{}]


class PlanSpec(BaseModel):
    """A checked plan: `nodes` in the order given, `inputs` one row per run. Build it with `parse_plan`."""

    model_config = ConfigDict(extra="forbid")

    workflow: str = Field("workflow", min_length=1, max_length=256)
    model: str | None = Field(None, min_length=1, max_length=512)
    params: Params = Field(default_factory=dict)
    """Defaults for every node's `params`."""
    nodes: list[PlanNode] = Field(min_length=1)
    outputs: list[str] = Field(default_factory=list)
    """Nodes whose texts are the results; empty: every node that no other node consumes."""
    inputs: list[dict[str, Scalar]] = Field(default_factory=_one_row, min_length=1)

    def __repr__(self) -> str:
        return f"<PlanSpec {self.workflow!r}: {len(self.nodes)} nodes, {len(self.inputs)} inputs>"


@dataclass(frozen=True, slots=True)
class Plan:
    """A plan whose references hold: `order` lists the nodes so that producers come before consumers."""

    spec: PlanSpec
    order: tuple[PlanNode, ...]
    parents: Mapping[str, tuple[str, ...]]
    outputs: tuple[str, ...]


def _where(location: tuple[int | str, ...]) -> str:
    """
    >>> _where(("nodes", 3, "params"))
    'nodes[3].params'
    """
    path = ""
    for step in location:
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else step
    return path


def _check_sizes(raw: Any, settings: PlanSettings) -> None:
    if not isinstance(raw, dict):
        raise InvalidRequest("a plan is a JSON object with 'nodes' and 'inputs'")
    counts = []
    for name in ("nodes", "inputs"):
        value = raw.get(name)
        if value is not None and not isinstance(value, list):
            raise InvalidRequest(f"{name!r} must be a list", param=name)
        if value is not None and len(value) > settings.max_operators:
            raise InvalidRequest(f"{len(value):,} {name}: at most {settings.max_operators:,} are taken", param=name)
        counts.append(len(value) if value else 1)
    if counts[0] * counts[1] > settings.max_operators:
        raise InvalidRequest(
            f"{counted(counts[0], 'node')} over {counted(counts[1], 'input')} are {counts[0] * counts[1]:,} "
            f"operators: at most {settings.max_operators:,} are taken",
            param="inputs",
        )
    elements = 0
    for node in raw.get("nodes") or ():
        messages = node.get("messages") if isinstance(node, dict) else None
        for message in messages if isinstance(messages, list) else ():
            content = message.get("content") if isinstance(message, dict) else None
            elements += len(content) if isinstance(content, list) else 1
    if elements * counts[1] > settings.max_elements:
        raise InvalidRequest(
            f"{elements * counts[1]:,} messages and parts: at most {settings.max_elements:,} are taken", param="nodes"
        )


def parse_plan(raw: Any, settings: PlanSettings | None = None) -> Plan:
    """Check `raw` (parsed JSON or YAML) and order its nodes.

    Raises `InvalidRequest`, its `param` naming the field, for anything wrong with it.

    >>> plan = parse_plan({"model": "m", "inputs": [{"q": "why?"}], "nodes": [
    ...     {"id": "b", "prompt": "{{nodes.a}}"}, {"id": "a", "prompt": "{{inputs.q}}"}]})
    >>> [node.id for node in plan.order], plan.outputs
    (['a', 'b'], ('b',))
    """
    settings = settings or PlanSettings()
    _check_sizes(raw, settings)
    try:
        spec = PlanSpec.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = _where(first["loc"])
        raise InvalidRequest(f"{where or 'plan'}: {first['msg']}", param=where or None) from None
    return _resolve(spec)


def _resolve(spec: PlanSpec) -> Plan:
    index: dict[str, int] = {}
    for position, node in enumerate(spec.nodes):
        if index.setdefault(node.id, position) != position:
            raise InvalidRequest(f"node {node.id!r} is defined twice", param=f"nodes[{position}].id")
        if node.model is None and spec.model is None:
            raise InvalidRequest(
                f"node {node.id!r} has no model: give the plan or the node one", param=f"nodes[{position}].model"
            )
    parents: dict[str, tuple[str, ...]] = {}
    columns: dict[str, str] = {}  # input → the first node that refers to it
    for position, node in enumerate(spec.nodes):
        where = f"nodes[{position}]." + ("prompt" if node.messages is None else "messages")
        try:
            references = node.references()
        except ValueError as error:
            raise InvalidRequest(f"node {node.id!r}: {error}", param=where) from None
        for reference in references:
            if reference.kind == "nodes" and reference.name not in index:
                raise InvalidRequest(f"node {node.id!r} refers to unknown node {reference.name!r}", param=where)
            if reference.kind == "inputs":
                columns.setdefault(reference.name, node.id)
        parents[node.id] = tuple(r.name for r in references if r.kind == "nodes")
    for row, values in enumerate(spec.inputs):
        for name, node_id in columns.items():
            if name not in values:
                raise InvalidRequest(
                    f"node {node_id!r} refers to input {name!r}, which inputs[{row}] does not have",
                    param=f"inputs[{row}].{name}",
                )
    try:
        order = tuple(TopologicalSorter(parents).static_order())
    except CycleError as error:
        cycle = list(reversed(error.args[1]))
        shown = " -> ".join(cycle if len(cycle) <= 12 else [*cycle[:6], "…", *cycle[-5:]])
        raise InvalidRequest(f"nodes depend on each other in a cycle: {shown}", param="nodes") from None
    for position, name in enumerate(spec.outputs):
        if name not in index:
            raise InvalidRequest(f"unknown output node {name!r}", param=f"outputs[{position}]")
    consumed = {parent for names in parents.values() for parent in names}
    outputs = tuple(dict.fromkeys(spec.outputs)) or tuple(n.id for n in spec.nodes if n.id not in consumed)
    return Plan(spec, tuple(spec.nodes[index[name]] for name in order), parents, outputs)


class _PlanLoader(yaml.SafeLoader):
    """YAML as plans have it: an unquoted date is the text that stands there, since JSON has no dates."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in known if tag != "tag:yaml.org,2002:timestamp"]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def read_plan(path: Path) -> Any:
    """A plan file, YAML or JSON, as the JSON to send. Raises `InvalidRequest` when it holds anything else."""
    try:
        text = path.read_text(encoding="utf-8")
        # (JSON that is indented by tabs is no YAML.)
        raw = json.loads(text) if path.suffix == ".json" and text.strip() else yaml.load(text, _PlanLoader)
        json.dumps(raw, allow_nan=False)
    except (yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"{path.name}: {error}") from None
    if raw is None:
        raise InvalidRequest(f"{path.name}: there is no plan in it")
    return raw


def load_plan(path: Path, settings: PlanSettings | None = None) -> Plan:
    """Read a plan file. Raises `InvalidRequest` when it is neither YAML nor JSON, or not a plan."""
    return parse_plan(read_plan(path), settings)
