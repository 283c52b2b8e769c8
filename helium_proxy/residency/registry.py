"""Which tokenizer speaks for which model; learned from workers as they come up, and verified before it is trusted."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson
import structlog

from helium_proxy.engine.text import Tokenizer as EngineText
from helium_proxy.engine.text import render
from helium_proxy.residency.tokens import CannotTokenize, LocalTokenizer, Tokenizer
from helium_proxy.workers.upstream import SendFailed, UpstreamClient
from helium_proxy.workers.worker import ModelInfo, Worker

log = structlog.get_logger(__name__)

_DEFAULT_BLOCK = 16
_DEFAULT_CHARS = 4.0
_MAX_MODELS = 256

# What a worker's own `/tokenize` is asked, and what ours must answer alike: white space, scripts; roles, parts; a
# tool, which engines write in an order of their own. The first must have an answer; the template may refuse others.
_PROBES: tuple[dict[str, Any], ...] = (
    {"messages": [{"role": "user", "content": "Hello,  world!\n\n1 + 1 = 2 – naïve, 東京 "}]},
    {
        "messages": [
            {"role": "system", "content": "You are terse.\n"},
            {"role": "user", "content": [{"type": "text", "text": "One"}, {"type": "text", "text": " two "}]},
            {"role": "assistant", "content": "Three."},
            {"role": "user", "content": "Go on"},
        ]
    },
    {
        "messages": [{"role": "user", "content": "Hello"}],
        "tools": [
            {"function": {"parameters": {"type": "object", "properties": {}}, "name": "look"}, "type": "function"}
        ],
    },
)


class EngineTokenizer:
    """The embedded engine's own tokens."""

    def __init__(self) -> None:
        self._text = EngineText()

    def request(self, route: str, body: Mapping[str, Any]) -> array[int]:
        try:
            return self._request(route, body)
        except CannotTokenize:
            raise
        except Exception as error:  # what the engine will refuse
            raise CannotTokenize(repr(error)) from error

    def _request(self, route: str, body: Mapping[str, Any]) -> array[int]:
        if route == "/v1/chat/completions":
            generate = body.get("add_generation_prompt", True)
            return render(self._text, body["messages"], body.get("tools") or (), add_generation_prompt=generate)
        prompt = body.get("prompt")
        if route != "/v1/completions" or not isinstance(prompt, str):
            raise CannotTokenize(route)
        return self._text.encode(prompt)

    def text(self, text: str) -> array[int]:
        return self._text.encode(text)


class Tokenizers:
    """Tokenizers, block sizes and, for the fallback, characters per token, by model. At most 256 models."""

    def __init__(self, client: UpstreamClient) -> None:
        self._client = client
        # -- state
        self._tokenizers: dict[str, Tokenizer] = {}
        self._block_sizes: dict[str, int] = {}
        self._chars: dict[str, float] = {}
        self._tried: set[tuple[str, str]] = set()  # (model, folder) that was verified or refused

    def __repr__(self) -> str:
        return f"<Tokenizers {sorted(self._tokenizers)}>"

    def get(self, model: str) -> Tokenizer | None:
        return self._tokenizers.get(model)

    def block_size(self, model: str) -> int:
        return self._block_sizes.get(model, _DEFAULT_BLOCK)

    def chars_per_token(self, model: str) -> float:
        return self._chars.get(model, _DEFAULT_CHARS)

    def calibrate(self, model: str, chars_per_token: float) -> None:
        known = self._chars.get(model)
        if known is None and len(self._chars) >= _MAX_MODELS:
            return
        value = min(16.0, max(1.0, chars_per_token))
        self._chars[model] = value if known is None else known + 0.05 * (value - known)

    async def learn(self, worker: Worker) -> None:
        """Learns what a worker that is up can tell. Never raises: without a tokenizer the text is hashed."""
        for model in worker.facts.models:
            if worker.facts.block_size and (model.id in self._block_sizes or len(self._block_sizes) < _MAX_MODELS):
                self._block_sizes[model.id] = worker.facts.block_size
            if model.id in self._tokenizers or len(self._tokenizers) >= _MAX_MODELS:
                continue
            try:
                await self._load(worker, model)
            except Exception as error:
                log.warning("no tokenizer", model=model.id, worker=worker.id, error=repr(error))

    async def _load(self, worker: Worker, model: ModelInfo) -> None:
        folder = worker.spec.tokenizer or model.root or ""
        if (model.id, folder) in self._tried:
            return
        candidates: list[Tokenizer]
        if worker.facts.engine == "helium":
            candidates = [EngineTokenizer()]
        else:
            candidates = await asyncio.to_thread(_local_tokenizers, folder)  # large ones take a second to load
        if not candidates:
            return
        for probe in _PROBES:
            status, theirs = await self._ask(worker, model.id, probe)
            if theirs is None and (status != 400 or probe is _PROBES[0]):
                return  # no `/tokenize`, or no answer: tried again with the next worker
            candidates = [c for c in candidates if _tokens_of(c, probe) == theirs]
        if not candidates:
            self._tried.add((model.id, folder))
            log.warning("tokenizer differs from the worker's; prompts are hashed as text", model=model.id)
            return
        self._tokenizers[model.id] = candidates[0]
        log.info("tokenizer verified", model=model.id, worker=worker.id)

    async def _ask(self, worker: Worker, model: str, probe: dict[str, Any]) -> tuple[int, list[int] | None]:
        """The status (0: no answer) and, of a 200, the ids."""
        body = orjson.dumps({"model": model, **probe})
        try:
            answer = await self._client.send(
                worker,
                "POST",
                "/tokenize",
                headers={"Content-Type": "application/json"},
                body=body,
                timeout_s=10.0,
            )
            payload = await answer.read()
        except SendFailed:
            return 0, None
        if answer.status != 200:
            return answer.status, None
        tokens = orjson.loads(payload).get("tokens")
        return 200, tokens if isinstance(tokens, list) else None


def _local_tokenizers(folder: str) -> list[Tokenizer]:
    path = Path(folder)
    if not folder or not path.is_dir():
        return []
    return [LocalTokenizer(path), LocalTokenizer(path, as_parts=True)]


def _tokens_of(tokenizer: Tokenizer, probe: dict[str, Any]) -> list[int] | None:
    try:
        return list(tokenizer.request("/v1/chat/completions", probe))
    except CannotTokenize:
        return None
