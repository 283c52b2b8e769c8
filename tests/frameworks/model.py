"""A scripted model: realistic replies, a deterministic function of the prompt, in the form each framework parses.

Which agent is speaking is read from the prompt ("You are the Writer …"). A call that offers tools and has no tool
result yet gets one tool call; otherwise text of a few sentences whose facts and figures are drawn from a hash of
the whole prompt, as a real model's would differ.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

ROLES = (
    "Researcher", "Writer", "Editor", "Economist", "Engineer", "Historian", "Summarizer", "Optimist", "Skeptic",
    "Judge", "Critic",
)  # fmt: skip
_ROLE = re.compile(r"You are (?:the |a |an )?(" + "|".join(ROLES) + r")\b")

_SUBJECTS = (
    "the regional grid", "a pilot plant near the harbour", "public investment", "the second survey", "local industry",
    "the audit office", "household demand", "the northern cooperative", "a panel of 40 engineers", "early adopters",
    "the revised forecast", "the transport ministry", "an independent laboratory", "the insurance market",
)  # fmt: skip
_VERBS = (
    "reported", "absorbed", "delayed", "overtook", "confirmed", "doubled", "abandoned", "financed", "measured",
    "contradicted", "accelerated", "reduced",
)  # fmt: skip
_OBJECTS = (
    "storage contracts", "the maintenance backlog", "permit applications", "imports of spare parts", "the price gap",
    "seasonal losses", "a third of all tenders", "training programmes", "the cost per unit", "water consumption",
    "delivery times", "export licences", "the opposition's estimate",
)  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """What the model says: text, or one tool call."""

    text: str = ""
    tool: str | None = None
    arguments: str = ""

    @property
    def tokens(self) -> int:
        return len((self.text + self.arguments).split()) + 1


def role_of(texts: Sequence[str]) -> str:
    """The agent that a prompt addresses: the first role it names as *you*."""
    for text in texts:
        found = _ROLE.search(text)
        if found is not None:
            return found[1]
    return "Unknown"


def prose(seed: str, sentences: int = 4) -> str:
    """That many sentences, the same for the same seed."""
    dice = random.Random(sha256(seed.encode()).digest())
    return " ".join(
        f"In {dice.randint(1990, 2025)} {dice.choice(_SUBJECTS)} {dice.choice(_VERBS)} {dice.choice(_OBJECTS)} "
        f"by {dice.randint(2, 97)} percent, after {dice.choice(_SUBJECTS)} {dice.choice(_VERBS)} "
        f"{dice.choice(_OBJECTS)}."
        for _ in range(sentences)
    )


def _fill(schema: Mapping[str, Any], seed: str, root: Mapping[str, Any]) -> Any:
    """A value that a JSON schema allows, with prose for strings."""
    if "$ref" in schema:
        return _fill(root.get("$defs", {}).get(str(schema["$ref"]).rsplit("/", 1)[-1], {}), seed, root)
    for key in ("anyOf", "oneOf", "allOf"):
        if schema.get(key):
            return _fill(schema[key][0], seed, root)
    if schema.get("enum"):
        return schema["enum"][0]
    kind = schema.get("type")
    if kind == "object" or "properties" in schema:
        wanted = schema.get("required") or list(schema.get("properties", {}))
        return {
            name: _fill(part, f"{seed}/{name}", root)
            for name, part in schema.get("properties", {}).items()
            if name in wanted
        }
    if kind == "array":
        return [_fill(schema.get("items", {"type": "string"}), f"{seed}/{at}", root) for at in range(2)]
    if kind in ("integer", "number"):
        return int(sha256(seed.encode()).hexdigest(), 16) % 100
    if kind == "boolean":
        return True
    return prose(seed, 2)


def _arguments(tool: Mapping[str, Any], seed: str) -> str:
    function = tool.get("function") or tool
    schema = function.get("parameters") or {}
    return json.dumps(_fill(schema, seed, schema))


def answer(texts: Sequence[str], roles: Sequence[str], body: Mapping[str, Any]) -> Answer:
    """The reply to a prompt: the texts and roles of its messages, and the request for tools and formats."""
    seed = "\x00".join(texts)
    speaker = role_of(texts)
    tools = list(body.get("tools") or [])
    names = [str((tool.get("function") or tool).get("name")) for tool in tools]
    had_result = any(role in ("tool", "tool-response") for role in roles) or any(
        text.startswith("Observation:") for text in texts
    )
    final = next((at for at, name in enumerate(names) if name.startswith(("final_", "finish"))), None)
    usable = [at for at in range(len(tools)) if at != final]
    if usable and not had_result:
        return Answer(tool=names[usable[0]], arguments=_arguments(tools[usable[0]], seed))
    if final is not None:
        return Answer(tool=names[final], arguments=_arguments(tools[final], seed))
    text = _critique(texts, seed) if speaker == "Critic" else _polite(prose(f"{speaker} {seed}", 5))
    return Answer(text=_form(text, seed, texts, body))


def _polite(text: str) -> str:
    """`text` between the phrases that chat models begin and end with, whatever they say."""
    dice = random.Random(text)
    begin = dice.choice(("Certainly! Here is what I found on the matter.", "I'd be happy to help with this request."))
    end = dice.choice(
        ("Let me know if you would like me to go into more detail.", "I hope that this answers your question.")
    )
    return f"{begin} {text}\n\n{end}"


def _critique(texts: Sequence[str], seed: str) -> str:
    """The critic asks for changes once, then approves."""
    again = sum("Revision requested" in text for text in texts) or any(
        "revised draft" in text.lower() for text in texts
    )
    if again:
        return "APPROVED. " + prose(seed, 1)
    return "Revision requested: " + prose(seed, 2)


def _form(text: str, seed: str, texts: Sequence[str], body: Mapping[str, Any]) -> str:
    """`text` as the framework wants it."""
    form = body.get("response_format") or (body.get("text") or {}).get("format") or {}
    if form.get("type") == "json_schema":
        schema = (form.get("json_schema") or form).get("schema") or {}
        return json.dumps(_fill(schema, seed, schema))
    start = texts[0] if texts else ""
    if "[[ ## " in start:  # DSPy
        fields = re.findall(
            r"^\d+\. `(\w+)`", start.partition("Your output fields are")[2].partition("All inter")[0], re.M
        )
        parts = [
            f"[[ ## {name} ## ]]\n{text if at == len(fields) - 1 else prose(seed + name, 2)}"
            for at, name in enumerate(fields)
        ]
        return "\n\n".join([*parts, "[[ ## completed ## ]]"])
    if any("Final Answer:" in part for part in texts[:2]):  # CrewAI
        return f"Thought: I now can give a great answer\nFinal Answer: {text}"
    return text
