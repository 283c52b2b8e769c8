"""Text to tokens and back.

The tokenizer splits text into pieces of up to seven letters, three digits, two signs or sixteen spaces (English
comes out at about one and a quarter tokens a word, as with real vocabularies) and names each by its 32-bit hash: ids
depend on the text alone, so that every engine, in every process, agrees. It is reversible for pieces seen lately;
an unknown id decodes to U+FFFD. Pieces never merge across a special token such as ``<|im_end|>``, so a
conversation's tokens start with its earlier turns' tokens, replies included.
"""

from __future__ import annotations

import re
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from threading import Lock
from typing import Any

import orjson
import xxhash

PIECES = re.compile(r"<\|[a-z_]{1,24}\|>| ?[^\W\d_]{1,7}| ?\d{1,3}| ?[^\w\s]{1,2}|_+|\s{1,16}")
END = "<|im_end|>"


class Tokenizer:
    """Encodes and decodes; remembers texts by their tokens up to `cache_tokens`, and up to `vocabulary` pieces."""

    def __init__(self, *, cache_tokens: int = 1 << 21, vocabulary: int = 1 << 18) -> None:
        # -- all mutable state ------------------------------------------------------------------------------
        self._lock = Lock()  # the proxy encodes long prompts in threads
        self._ids: dict[str, int] = {}  # piece -> id, oldest first; at most `vocabulary`
        self._pieces: dict[int, str] = {}  # id -> piece, the same
        self._texts: OrderedDict[str, array[int]] = OrderedDict()  # text -> tokens, least recently used first
        self._cached = 0  # tokens in `_texts`
        # ---------------------------------------------------------------------------------------------------
        self._cache_tokens = cache_tokens
        self._vocabulary = vocabulary

    def __repr__(self) -> str:
        return f"<Tokenizer {len(self._ids)} pieces, {len(self._texts)} texts of {self._cached} tokens cached>"

    def encode(self, text: str) -> array[int]:
        """The tokens of `text`. The array is shared: do not change it."""
        texts = self._texts
        with self._lock:
            tokens = texts.get(text)
            if tokens is not None:
                texts.move_to_end(text)
                return tokens
        made = array("I", [self.id(piece) for piece in PIECES.findall(text)])  # may take long: nobody waits for it
        with self._lock:
            tokens = texts.get(text)
            if tokens is not None:  # another thread was faster
                return tokens
            texts[text] = made
            self._cached += len(made) + 1
            while self._cached > self._cache_tokens:
                self._cached -= len(texts.popitem(last=False)[1]) + 1
            return made

    def id(self, piece: str) -> int:
        """The token id of one piece. Takes the lock for a piece that is new."""
        known = self._ids.get(piece)
        if known is not None:
            return known
        token = xxhash.xxh32_intdigest(piece.encode())
        with self._lock:
            if len(self._ids) >= self._vocabulary:
                for old in list(self._ids)[: self._vocabulary // 4]:
                    self._pieces.pop(self._ids.pop(old), None)
            self._ids[piece] = token
            self._pieces[token] = piece
        return token

    def piece(self, token: int) -> str:
        return self._pieces.get(token, "\N{REPLACEMENT CHARACTER}")

    def decode(self, tokens: Iterable[int]) -> str:
        return "".join(map(self.piece, tokens))

    def statistics(self) -> tuple[int, int, int]:
        """(pieces known, texts cached, tokens cached)."""
        return len(self._ids), len(self._texts), self._cached


def content_text(content: Any) -> str:
    """A message's content as text. Parts that are not text are named by their hash: equal parts, equal tokens."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, Sequence):
        return str(content)
    parts = []
    for part in content:
        if isinstance(part, str):
            parts.append(part)
        elif isinstance(part, Mapping) and isinstance(part.get("text"), str):
            parts.append(part["text"])
        else:
            parts.append(f"<|media|>{xxhash.xxh3_64_hexdigest(orjson.dumps(part, default=str))}")
    return "".join(parts)


def tool_call_text(name: str, arguments: str) -> str:
    """How the model writes a tool call (Hermes form)."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def message_text(message: Mapping[str, Any]) -> str:
    """A message's content with its tool calls, as the model wrote them."""
    text = content_text(message.get("content"))
    calls = message.get("tool_calls")
    if isinstance(calls, list):
        for call in calls:
            function = call.get("function") if isinstance(call, Mapping) else None
            if isinstance(function, Mapping):
                written = tool_call_text(str(function.get("name")), str(function.get("arguments") or "{}"))
                text = f"{text}\n{written}" if text else written
    return text


def render(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Any] = (),
    *,
    add_generation_prompt: bool = True,
) -> array[int]:
    """The ChatML prompt of a conversation, as tokens. Tools come first, in a system turn of their own."""
    encode = tokenizer.encode
    end = encode(END + "\n")
    out: array[int] = array("I")
    if tools:
        out += encode(
            "<|im_start|>system\n# Tools\n" + "\n".join(orjson.dumps(t, default=str).decode() for t in tools)
        )
        out += end
    last = len(messages) - 1
    for i, message in enumerate(messages):
        out += encode(f"<|im_start|>{message.get('role')}\n")
        out += encode(message_text(message))
        if i < last or add_generation_prompt or message.get("role") != "assistant":
            out += end
    if add_generation_prompt:
        out += encode("<|im_start|>assistant\n")
    return out
