"""A live stream folded, chunk by chunk, into the JSON body that the same request gets without ``stream``."""

from __future__ import annotations

from typing import Any

import orjson

from helium_proxy.reuse.routes import Family, family
from helium_proxy.reuse.sse import EventSplitter, payload

_BATCH_BYTES = 16 * 1024


class StreamAssembler:
    """Feed it a stream's bytes as they pass; afterwards `result()` is the whole answer, or None if there is none.

    There is none when the stream broke off, carried an error, was larger than `max_bytes` or was not understood:
    such an answer must be neither kept nor handed to anyone as complete. It never raises. `refused` (an error
    came), `text`, `usage` and `tool_call_ids` may be read at any time.

    Bytes are laid aside and looked at when enough have come, or when something is asked: while a stream is relayed,
    a chunk costs an append.
    """

    def __init__(self, route: str, max_bytes: int = 16 * 1024 * 1024) -> None:
        self._family = family(route)
        self._max_bytes = max_bytes
        # State. `_pending`: chunks not looked at yet. `_answer` grows with each event; `_pieces` hold text not yet
        # joined, by block.
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._split = EventSplitter(max_bytes)
        self._answer: dict[str, Any] = {}
        self._choices: dict[int, _Choice] = {}
        self._blocks: dict[int, dict[str, Any]] = {}
        self._pieces: dict[int, list[str]] = {}
        self._seen_bytes = 0
        self._ended = False
        self._failed = not self._family.streams
        self._refused = False

    def __repr__(self) -> str:
        state = "failed" if self._failed else "complete" if self._ended else "open"
        return f"StreamAssembler({self._family.value}, {state}, {self._seen_bytes} B)"

    @property
    def refused(self) -> bool:
        self._look()
        return self._refused

    @property
    def usage(self) -> dict[str, Any] | None:
        self._look()
        return self._answer.get("usage")

    @property
    def text(self) -> str:
        """The assistant's text so far (first choice)."""
        self._look()
        match self._family:
            case Family.MESSAGES:
                return "".join(
                    "".join(self._pieces.get(index, ()))
                    for index, block in sorted(self._blocks.items())
                    if block.get("type") == "text"
                )
            case Family.RESPONSES:
                return output_text(self._answer) if self._ended else "".join(self._pieces.get(0, ()))
            case _:
                return self._choices[0].joined() if 0 in self._choices else ""

    @property
    def tool_call_ids(self) -> tuple[str, ...]:
        self._look()
        match self._family:
            case Family.MESSAGES:
                return tuple(b["id"] for b in self._blocks.values() if b.get("type") == "tool_use" and "id" in b)
            case Family.RESPONSES:
                items = self._answer.get("output") or ()
                return tuple(i["call_id"] for i in items if isinstance(i, dict) and i.get("call_id"))
            case _:
                return tuple(
                    call["id"] for c in self._choices.values() for call in c.tool_calls.values() if call["id"]
                )

    def feed(self, chunk: bytes) -> None:
        if self._failed:
            return
        self._seen_bytes += len(chunk)
        if self._seen_bytes > self._max_bytes:
            self._fail()
            return
        self._pending.append(chunk)
        self._pending_bytes += len(chunk)
        if self._pending_bytes >= _BATCH_BYTES:
            self._look()

    def _look(self) -> None:
        """Fold what has been laid aside."""
        if not self._pending:
            return
        data = b"".join(self._pending)
        self._pending.clear()
        self._pending_bytes = 0
        try:
            for event in self._split.feed(data):
                data = payload(event)
                if data == b"[DONE]":
                    self._ended = self._ended or self._family in (Family.CHAT, Family.COMPLETIONS)
                elif data:
                    self._fold(orjson.loads(data))
        except (ValueError, TypeError, KeyError, AttributeError, IndexError):
            self._fail()

    def result(self) -> dict[str, Any] | None:
        """The answer, once the stream has ended as it should."""
        self._look()
        if self._failed or not self._ended or self._split.rest.strip():
            return None
        match self._family:
            case Family.CHAT | Family.COMPLETIONS:
                if not self._choices:
                    return None
                chat = self._family is Family.CHAT
                choices = [c.as_chat() if chat else c.as_text() for _, c in sorted(self._choices.items())]
                return {**self._answer, "choices": choices}
            case Family.MESSAGES:
                try:
                    return {**self._answer, "content": [self._block(i) for i in sorted(self._blocks)]}
                except (orjson.JSONDecodeError, KeyError):
                    return None
            case _:
                return self._answer

    def _fail(self) -> None:
        self._failed = True
        self._pending.clear()
        self._choices.clear()
        self._pieces.clear()

    def _fold(self, event: dict[str, Any]) -> None:
        if event.get("error") is not None or event.get("type") in ("error", "response.failed"):
            self._refused = True
            self._fail()
            return
        match self._family:
            case Family.CHAT | Family.COMPLETIONS:
                self._fold_choice_chunk(event)
            case Family.RESPONSES:
                self._fold_response_event(event)
            case Family.MESSAGES:
                self._fold_message_event(event)

    def _fold_choice_chunk(self, chunk: dict[str, Any]) -> None:
        answer = self._answer
        if not answer:
            kind = "chat.completion" if self._family is Family.CHAT else "text_completion"
            answer.update(id=chunk["id"], object=kind, created=chunk.get("created"), model=chunk.get("model"))
        for name, value in chunk.items():
            if value is not None and name not in _CHUNK_ONLY and name not in answer:
                answer[name] = value
        if chunk.get("usage") is not None:
            answer["usage"] = chunk["usage"]
        for delta in chunk["choices"]:
            index = delta["index"]
            if index not in self._choices:
                self._choices[index] = _Choice(index)
            self._choices[index].add(delta)

    def _fold_response_event(self, event: dict[str, Any]) -> None:
        kind = event["type"]
        if kind in ("response.completed", "response.incomplete"):
            self._answer = event["response"]
            self._ended = True
        elif kind == "response.output_text.delta":
            self._pieces.setdefault(0, []).append(event["delta"])

    def _fold_message_event(self, event: dict[str, Any]) -> None:
        match event["type"]:
            case "message_start":
                self._answer = {**event["message"]}
            case "content_block_start":
                self._blocks[event["index"]] = {**event["content_block"]}
                self._pieces[event["index"]] = []
            case "content_block_delta":
                delta, index = event["delta"], event["index"]
                if delta["type"] == "signature_delta":
                    self._blocks[index]["signature"] = delta["signature"]
                else:
                    self._pieces[index].append(delta[_DELTA_FIELDS[delta["type"]]])
            case "message_delta":
                self._answer.update(event["delta"])
                self._answer["usage"] = {**(self._answer.get("usage") or {}), **(event.get("usage") or {})}
            case "message_stop":
                self._ended = True

    def _block(self, index: int) -> dict[str, Any]:
        block = self._blocks[index]
        joined = "".join(self._pieces[index])
        match block["type"]:
            case "text":
                return {**block, "text": block.get("text", "") + joined}
            case "thinking":
                return {**block, "thinking": block.get("thinking", "") + joined}
            case "tool_use" if joined:
                return {**block, "input": orjson.loads(joined)}
            case _:
                return block


_CHUNK_ONLY = frozenset({"id", "object", "created", "model", "choices", "usage"})
_DELTA_FIELDS = {"text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "partial_json"}


class _Choice:
    """One choice of a chat or completions stream, growing."""

    def __init__(self, index: int) -> None:
        self.index = index
        # State. Lists of pieces, joined once at the end; fields in the order they first came.
        self.role = "assistant"
        self.text: dict[str, list[str]] = {}
        self.tool_calls: dict[int, dict[str, Any]] = {}
        self.logprobs: dict[str, list[Any]] | None = None
        self.rest: dict[str, Any] = {"finish_reason": None, "stop_reason": None}

    def add(self, delta: dict[str, Any]) -> None:
        for name, value in delta.items():
            if value is None or name == "index":
                continue
            if name == "delta":
                self._add_message(value)
            elif name == "text":
                self.text.setdefault("text", []).append(value)
            elif name == "logprobs":
                self._add_logprobs(value)
            elif isinstance(value, list):  # token_ids
                self.rest.setdefault(name, []).extend(value)
            else:
                self.rest[name] = value

    def _add_message(self, message: dict[str, Any]) -> None:
        for name, value in message.items():
            if name == "tool_calls":
                for call in value or ():
                    self._add_tool_call(call)
            elif name == "role":
                self.role = value or self.role
            elif isinstance(value, str):
                self.text.setdefault(name, []).append(value)

    def _add_tool_call(self, call: dict[str, Any]) -> None:
        known = self.tool_calls.setdefault(call["index"], {"id": None, "type": "function", "name": "", "args": []})
        known["id"] = call.get("id") or known["id"]
        known["type"] = call.get("type") or known["type"]
        function = call.get("function") or {}
        known["name"] += function.get("name") or ""
        known["args"].append(function.get("arguments") or "")

    def _add_logprobs(self, logprobs: dict[str, Any]) -> None:
        if self.logprobs is None:
            self.logprobs = {}
        for name, values in logprobs.items():
            if values is not None:
                self.logprobs.setdefault(name, []).extend(values)

    def joined(self) -> str:
        return "".join(self.text.get("content") or self.text.get("text") or ())

    def as_text(self) -> dict[str, Any]:
        return {"index": self.index, "text": self.joined(), "logprobs": self.logprobs, **self.rest}

    def as_chat(self) -> dict[str, Any]:
        pieces = {name: "".join(parts) for name, parts in self.text.items()}
        content = pieces.pop("content", None)
        silent = None if self.tool_calls or any(pieces.values()) else ""
        message: dict[str, Any] = {"role": self.role, "content": content or silent}
        message.update(pieces)
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call["id"],
                    "type": call["type"],
                    "function": {"name": call["name"], "arguments": "".join(call["args"])},
                }
                for _, call in sorted(self.tool_calls.items())
            ]
        return {"index": self.index, "message": message, "logprobs": self.logprobs, **self.rest}


def output_text(response: dict[str, Any]) -> str:
    """The text of a responses body: its message items' output_text parts, joined."""
    return "".join(
        part.get("text") or ""
        for item in response.get("output") or ()
        if item.get("type") == "message"
        for part in item.get("content") or ()
        if part.get("type") == "output_text"
    )
