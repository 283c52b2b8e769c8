"""A request's prompt as the engine will see it: its token ids, or failing that its text.

The chat template and the tokenizer of the served model give the very ids the engine computes with (`LocalTokenizer`:
checked against the worker's own `/tokenize` before it is trusted). Encoding is the dear part, and agents send the
same system prompts and documents over and over: so a rendered prompt is cut at the template's special tokens, where
no token can cross, and each piece is encoded once (a bounded cache).
"""

from __future__ import annotations

import json
import re
from array import array
from collections import OrderedDict
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers

Tokens = array  # of unsigned 32-bit ids ("I")


class CannotTokenize(Exception):
    """This request's ids cannot be known here (pictures, a template of the client's own, an unknown route)."""


class Tokenizer(Protocol):
    """Turns requests into token ids."""

    def request(self, route: str, body: Mapping[str, Any]) -> array[int]:
        """The prompt's ids. Raises CannotTokenize."""

    def text(self, text: str) -> array[int]:
        """The ids of plain text, without special tokens."""


_OWN_TEMPLATE = (
    "chat_template",
    "documents",
    "continue_final_message",
    "truncate_prompt_tokens",
    "mm_processor_kwargs",
)


class LocalTokenizer:
    """The model folder's tokenizer and chat template. Raises OSError or ValueError when the folder has none.

    `as_parts`: hand message contents to the template as lists of parts, as vLLM does with templates that loop over
    them, rather than as one string. Which of the two the engine does is found by asking it (`registry.py`).
    """

    def __init__(self, folder: Path, *, as_parts: bool = False, cache_tokens: int = 4_000_000) -> None:
        self._encoder = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._encoder.no_truncation()
        self._encoder.no_padding()
        config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
        self._variables = {
            name: value["content"] if isinstance(value, dict) else value
            for name in ("bos_token", "eos_token", "unk_token", "pad_token")
            if (value := config.get(name)) is not None
        }
        source = _template_source(folder, config)
        self._template = _compile(source)
        self._as_parts = as_parts
        self._knows_developers = "'developer'" in source or '"developer"' in source
        special = sorted(
            (t.content for t in self._encoder.get_added_tokens_decoder().values() if not (t.lstrip or t.rstrip)),
            key=len,
            reverse=True,
        )
        self._special = {s: self._encoder.token_to_id(s) for s in special}
        self._split = re.compile("(" + "|".join(map(re.escape, special)) + ")") if special else None
        # -- state. Long prompts are encoded in threads, several at a time.
        self._lock = Lock()
        self._cache: OrderedDict[str, array[int]] = OrderedDict()  # piece → ids, least recent first
        self._cached = 0  # ids in it
        self._cache_tokens = cache_tokens

    def __repr__(self) -> str:
        return f"<LocalTokenizer {len(self._cache)} pieces, {self._cached} ids>"

    def request(self, route: str, body: Mapping[str, Any]) -> array[int]:
        try:
            return self._completion(body) if route == "/v1/completions" else self._chat(route, body)
        except CannotTokenize:
            raise
        except Exception as error:  # whatever a template, or text that is none (a lone surrogate), may cause
            raise CannotTokenize(repr(error)) from error

    def _chat(self, route: str, body: Mapping[str, Any]) -> array[int]:
        if route != "/v1/chat/completions" or any(body.get(f) for f in _OWN_TEMPLATE):
            raise CannotTokenize(route)
        rendered = self._template.render(
            messages=self._messages(body["messages"]),
            tools=_tools(body),
            **{"documents": None, **self._variables, **_template_kwargs(body)},
        )
        return self._pieces(rendered)

    def _messages(self, messages: list[Any]) -> list[dict[str, Any]]:
        plain = [_plain(m, self._as_parts) for m in messages]
        if not self._knows_developers and any(m["role"] == "developer" for m in plain):
            if plain[0]["role"] != "developer" or any(m["role"] in ("system", "developer") for m in plain[1:]):
                raise CannotTokenize("developer messages that the engine puts together")
            plain[0]["role"] = "system"
        return plain

    def text(self, text: str) -> array[int]:
        return array("I", self._encoder.encode(text, add_special_tokens=False).ids)

    def _completion(self, body: Mapping[str, Any]) -> array[int]:
        prompt = body.get("prompt")
        if isinstance(prompt, list) and prompt and all(isinstance(t, int) for t in prompt):
            return array("I", prompt)
        if isinstance(prompt, list) and len(prompt) == 1:
            prompt = prompt[0]
        if not isinstance(prompt, str) or not body.get("add_special_tokens", True):
            raise CannotTokenize("several prompts")
        return array("I", self._encoder.encode(prompt).ids)

    def _pieces(self, rendered: str) -> array[int]:
        if self._split is None:
            return self.text(rendered)
        ids: array[int] = array("I")
        for piece in self._split.split(rendered):
            special = self._special.get(piece)
            if special is not None:
                ids.append(special)
            elif piece:
                ids.extend(self._piece(piece))
        return ids

    def _piece(self, piece: str) -> array[int]:
        with self._lock:
            cached = self._cache.get(piece)
            if cached is not None:
                self._cache.move_to_end(piece)
                return cached
        ids = self.text(piece)
        with self._lock:
            if piece not in self._cache:  # another thread may have been first
                self._cache[piece] = ids
                self._cached += len(ids)
                while self._cached > self._cache_tokens:
                    _, old = self._cache.popitem(last=False)
                    self._cached -= len(old)
        return ids


def _template_source(folder: Path, config: Mapping[str, Any]) -> str:
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text("utf-8")
    source = config.get("chat_template")
    if isinstance(source, list):  # several by name, as old tokenizer configs have them
        source = next((t["template"] for t in source if t.get("name") == "default"), None)
    if not isinstance(source, str):
        raise ValueError(f"no chat template in {folder}")
    return source


def _compile(source: str) -> jinja2.Template:
    """The template in the environment that Hugging Face's `apply_chat_template` gives it."""

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)


_TEXTS = ("text", "input_text", "output_text", "refusal")


def _plain(message: Mapping[str, Any], as_parts: bool) -> dict[str, Any]:
    """A message as vLLM hands it to the template: known fields alone, its content as parts or as one string (parts
    joined by newlines), tool arguments parsed."""
    role, content = message["role"], message.get("content")
    parts = [] if content is None else [content] if isinstance(content, str) else content
    texts = [t for t in map(_text_of, parts) if t]
    if role == "system" and any(t.startswith("x-anthropic-billing-header") for t in texts):
        raise CannotTokenize("the engine strips this header")
    wrapped = as_parts and role != "tool"
    plain: dict[str, Any] = {
        "role": role,
        "content": [{"type": "text", "text": t} for t in texts] if wrapped else "\n".join(texts),
    }
    if role == "assistant":
        if calls := message.get("tool_calls"):
            plain["tool_calls"] = [_parsed(call) for call in calls]
        if (reasoning := message.get("reasoning")) is not None:
            plain["reasoning"] = plain["reasoning_content"] = reasoning
    if role == "tool" and "tool_call_id" in message:
        plain["tool_call_id"] = message["tool_call_id"]
    if isinstance(message.get("name"), str):
        plain["name"] = message["name"]
    return plain


def _text_of(part: Any) -> str:
    if isinstance(part, str):
        return part
    if part.get("type") not in _TEXTS:
        raise CannotTokenize("not only text")
    return part.get("text") or part.get("refusal") or ""


def _parsed(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call.get("function") or {})
    arguments = function.get("arguments")
    if isinstance(arguments, str) or arguments is None:
        try:
            function["arguments"] = json.loads(arguments) if arguments else {}
        except json.JSONDecodeError:
            function["arguments"] = {}  # as the engine does, lest a conversation be lost to one bad call
    return {**call, "function": function}


def _tools(body: Mapping[str, Any]) -> list[Any] | None:
    """The tools as vLLM hands them to the template, also where `tool_choice` is none: read into its models and
    written out again."""
    tools = body.get("tools")
    return None if tools is None else [_tool(tool) for tool in tools]


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    kind, function = tool.get("type", "function"), tool["function"]
    name, description = function["name"], function.get("description")
    parameters = function.get("parameters")
    if kind != "function" or not isinstance(name, str) or not isinstance(description, str | None):
        raise CannotTokenize("a tool that is none")
    if not isinstance(parameters, dict | None):
        raise CannotTokenize("a tool's parameters that are none")
    known: dict[str, Any] = {"name": name, "description": description, "parameters": parameters}
    deferred = tool.get("defer_loading")
    own = function.get("defer_loading")
    for flag, value in (("strict", function.get("strict")), ("defer_loading", deferred if own is None else own)):
        if value is not None:
            known[flag] = _true_or_false(value)
    out = {"type": kind, "function": known}
    return out if deferred is None else {**out, "defer_loading": _true_or_false(deferred)}


def _true_or_false(value: Any) -> bool:
    if not isinstance(value, bool):
        raise CannotTokenize("a flag that engines read in their own way")
    return value


def _template_kwargs(body: Mapping[str, Any]) -> dict[str, Any]:
    """What the template is told besides: the client's own, over which vLLM puts what the request says elsewhere."""
    own = body.get("chat_template_kwargs") or {}
    effort = body.get("reasoning_effort")
    told = {**own, "add_generation_prompt": body.get("add_generation_prompt", True)}
    if effort is not None:
        told["reasoning_effort"] = effort
        if "enable_thinking" not in own:
            told["enable_thinking"] = effort != "none"
    return told


def prompt_pieces(route: str, body: Mapping[str, Any]) -> list[str]:
    """The prompt's text in the engine's order (tools, system, messages), for hashing where no ids are known;
    empty for routes that have no prompt."""
    pieces: list[str] = []
    tools = body.get("tools")
    if tools:
        pieces.append(json.dumps(tools, sort_keys=True))
    pieces.extend(_flat(body[field]) for field in ("system", "instructions") if body.get(field))
    if route == "/v1/completions":
        prompt = body.get("prompt")
        pieces.append(prompt if isinstance(prompt, str) else json.dumps(prompt))
    items = body.get("messages") if "messages" in body else body.get("input") if route == "/v1/responses" else None
    if isinstance(items, str):
        pieces.append(items)
    elif isinstance(items, list):
        for item in items:
            if isinstance(item, dict):
                pieces.append(str(item.get("role") or item.get("type") or ""))
                pieces.append(_flat(item.get("content")))
                if item.get("tool_calls"):
                    pieces.append(json.dumps(item["tool_calls"], sort_keys=True))
                pieces.extend(_flat(item[field]) for field in ("output", "arguments") if field in item)
            else:
                pieces.append(str(item))
    return pieces


def _flat(content: Any) -> str:
    if isinstance(content, str):
        return content
    if content is None:
        return ""
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        return "\n".join(p["text"] for p in content)
    return json.dumps(content, sort_keys=True)
