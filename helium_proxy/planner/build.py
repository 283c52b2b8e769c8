"""Plans written in Python: nodes are values, and putting one into another's text is the edge between them.

>>> with Plan("map-reduce", model="demo", temperature=0) as plan:
...     question = input_("question")
...     experts = [chat(f"expert_{i}", system=f"You are expert {i}.", user=question, max_tokens=64) for i in range(2)]
...     summary = chat("summary", user=f"{question}\\n" + "\\n".join(map(str, experts)))
>>> plan.outputs(summary)
>>> [node["id"] for node in plan.to_dict([{"question": "Why?"}])["nodes"]]
['expert_0', 'expert_1', 'summary']
>>> str(summary)
'{{nodes.summary}}'
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextvars import ContextVar, Token
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import httpx
import yaml

from helium_proxy.errors import InvalidRequest
from helium_proxy.planner.plan import Reference, Scalar, parse_plan
from helium_proxy.planner.words import counted

_current: ContextVar[Plan | None] = ContextVar("plan", default=None)


@dataclass(frozen=True, slots=True)
class NodeRef:
    """A node's output: as text, the placeholder for it."""

    id: str

    def __str__(self) -> str:
        return str(Reference("nodes", self.id))


@dataclass(frozen=True, slots=True)
class InputRef:
    """A column of the inputs: as text, the placeholder for it."""

    name: str

    def __str__(self) -> str:
        return str(Reference("inputs", self.name))


Text = str | NodeRef | InputRef


class PlanFailed(RuntimeError):
    """Some inputs of a plan did not complete; what did come out is here all the same."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        failed = [row for row in rows if row["status"] != "completed"]
        self.results: list[dict[str, str]] = [row["outputs"] for row in rows]
        """As `Plan.run` would have returned them; an output that failed is missing from its input's."""
        self.errors: dict[int, dict[str, Any]] = {row["input"]: row.get("errors", {}) for row in failed}
        """Input → output node → OpenAI's error object; of an input that was cancelled there may be none."""
        first = failed[0]
        said = "; ".join(f"{node}: {error.get('message')}" for node, error in self.errors[first["input"]].items())
        super().__init__(
            f"{len(failed):,} of {counted(len(rows), 'input')} did not complete: input {first['input']} "
            f"{first['status']}" + (f" ({said})" if said else "")
        )


class Plan:
    """A workflow under construction. `params` are defaults for every node: ``temperature=0``, ``max_tokens=64``…"""

    def __init__(self, workflow: str, *, model: str | None = None, **params: Any) -> None:
        self.workflow = workflow
        self.model = model
        self.params = params
        self._nodes: list[dict[str, Any]] = []
        self._outputs: list[str] = []
        self._token: Token[Plan | None] | None = None

    def __repr__(self) -> str:
        return f"<Plan {self.workflow!r}: {len(self._nodes)} nodes>"

    def __enter__(self) -> Plan:
        self._token = _current.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        assert self._token is not None
        _current.reset(self._token)

    def chat(
        self,
        id: str,
        *,
        system: Text | None = None,
        user: Text | None = None,
        messages: Sequence[Mapping[str, Any]] | None = None,
        model: str | None = None,
        **params: Any,
    ) -> NodeRef:
        """Add a chat call: `system` and `user` texts, or whole `messages`; `ValueError` for both or neither."""
        if (messages is None) == (system is None and user is None):
            raise ValueError("give 'messages', or 'system' and 'user'")
        if messages is None:
            given = (("system", system), ("user", user))
            messages = [{"role": role, "content": str(text)} for role, text in given if text is not None]
        return self._add(id, {"messages": [_plain(message) for message in messages]}, model, params)

    def completion(self, id: str, prompt: Text, *, model: str | None = None, **params: Any) -> NodeRef:
        """Add a completion call."""
        return self._add(id, {"prompt": str(prompt)}, model, params)

    def _add(self, id_: str, body: dict[str, Any], model: str | None, params: dict[str, Any]) -> NodeRef:
        node = {"id": id_, **({"model": model} if model else {}), **body, **({"params": params} if params else {})}
        self._nodes.append(node)
        return NodeRef(id_)

    def outputs(self, *nodes: NodeRef) -> None:
        """The nodes whose texts are wanted; without this, every node that no other consumes."""
        self._outputs = [node.id for node in nodes]

    def to_dict(self, inputs: Iterable[Mapping[str, Scalar]] | None = None) -> dict[str, Any]:
        """The body of ``POST /v1/workflows``, checked. Raises `InvalidRequest`."""
        found: dict[str, Any] = {"workflow": self.workflow}
        if self.model is not None:
            found["model"] = self.model
        if self.params:
            found["params"] = self.params
        found["nodes"] = self._nodes
        if self._outputs:
            found["outputs"] = self._outputs
        if inputs is not None:
            found["inputs"] = [dict(row) for row in inputs]
            parse_plan(found)
        return found

    def to_yaml(self, inputs: Iterable[Mapping[str, Scalar]] | None = None) -> str:
        """The same as a plan file."""
        return yaml.safe_dump(self.to_dict(inputs), sort_keys=False, allow_unicode=True, width=100)

    def run(
        self,
        inputs: Iterable[Mapping[str, Scalar]] | None = None,
        *,
        base_url: str = "http://127.0.0.1:8080/v1",
        api_key: str | None = None,
        client: httpx.Client | None = None,
    ) -> list[dict[str, str]]:
        """Submit the plan over `inputs` (None: once, without any) to a proxy and wait: per input, output node → text.
        Raises `InvalidRequest` when the proxy refuses it, and `PlanFailed`, which holds the results there are, when
        an input failed; the job is cancelled when interrupted."""
        own = client is None
        http = client or httpx.Client(timeout=httpx.Timeout(90.0))
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        root = base_url.rstrip("/") + "/workflows"
        try:
            body = self.to_dict([{}] if inputs is None else inputs)
            job = _answer(http.post(root, json=body, headers=headers))
            url = f"{root}/{job['id']}"
            try:
                while job["status"] == "running":
                    job = _answer(http.get(url, params={"wait_s": 30}, headers=headers))
            except BaseException:
                if job["status"] == "running":
                    http.delete(url, headers=headers)
                raise
        finally:
            if own:
                http.close()
        if any(row["status"] != "completed" for row in job["results"]):
            raise PlanFailed(job["results"])
        return [row["outputs"] for row in job["results"]]


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """`message` with references as text, so that ``{"role": "user", "content": node}`` works too."""
    content = message.get("content")
    return {**message, "content": str(content)} if isinstance(content, NodeRef | InputRef) else dict(message)


def _answer(response: httpx.Response) -> dict[str, Any]:
    try:
        body = response.json()
    except ValueError:
        body = {"error": {"message": response.text[:500]}}
    if response.is_error:
        error = body.get("error") or {}
        raise InvalidRequest(f"{response.status_code}: {error.get('message')}", param=error.get("param"))
    assert isinstance(body, dict)
    return body


def _plan() -> Plan:
    plan = _current.get()
    if plan is None:
        raise RuntimeError("no plan: use this inside `with Plan(…):`")
    return plan


def chat(
    id: str,
    *,
    system: Text | None = None,
    user: Text | None = None,
    messages: Sequence[Mapping[str, Any]] | None = None,
    model: str | None = None,
    **params: Any,
) -> NodeRef:
    """`Plan.chat` of the plan whose ``with`` block this is in."""
    return _plan().chat(id, system=system, user=user, messages=messages, model=model, **params)


def completion(id: str, prompt: Text, *, model: str | None = None, **params: Any) -> NodeRef:
    """`Plan.completion` of the plan whose ``with`` block this is in."""
    return _plan().completion(id, prompt, model=model, **params)


def input_(name: str) -> InputRef:
    """A column of the inputs."""
    return InputRef(name)
