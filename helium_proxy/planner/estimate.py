"""A live call as the dispatcher wants it: its prompt as a chain of blocks, and how much it is expected to cost."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from helium_proxy import metrics
from helium_proxy.dispatch.state import QueuedCall
from helium_proxy.residency.chain import text_chain, token_chain
from helium_proxy.residency.kv_book import salt_of
from helium_proxy.residency.registry import Tokenizers
from helium_proxy.residency.tokens import CannotTokenize, prompt_pieces
from helium_proxy.types import POOLED_ROUTES, CallRequest, Hints

_INLINE_CHARS = 8_192
"""Longer prompts are encoded in a thread: the encoder lets go of the interpreter's lock."""

_CALIBRATED_BY = 4
"""One in so many calls is enough to follow a ratio that hardly changes."""

_POOLED_FIELDS = ("input", "query", "documents", "text_1", "text_2")
"""What the texts of `POOLED_ROUTES` are in."""

_LIMITS = ("max_completion_tokens", "max_tokens", "max_output_tokens")


class Estimator:
    """Turns requests into `QueuedCall`s. Never raises on a client's input: what cannot be tokenized is hashed as
    text, what has no prompt gets an empty chain."""

    def __init__(self, tokenizers: Tokenizers, *, default_output_tokens: int) -> None:
        self._tokenizers = tokenizers
        self._default_output = default_output_tokens
        # -- state
        self._measured = 0

    async def estimate(
        self,
        request: CallRequest,
        hints: Hints,
        *,
        now: float,
        salt: str = "",
        group: str = "",
        share: str = "",
        node: str = "",
        prefer: str | None = None,
        suggestion: str | None = None,
    ) -> QueuedCall:
        """`salt` separates prompts that must not share blocks (the tenant's, where tenants are isolated)."""
        model, body = request.model, request.body
        size = self._tokenizers.block_size(model)
        salt = salt_of(model, salt or body.get("cache_salt") or "")
        chain: tuple[int, ...] = ()
        prompt_tokens = 0
        exact = False
        output_tokens = expected_output(body, hints, self._default_output)
        pieces = prompt_pieces(request.route, body)
        if request.route in POOLED_ROUTES:
            chars = sum(len(text) for name in _POOLED_FIELDS for text in _texts(body.get(name)))
            prompt_tokens = max(1, int(chars / self._tokenizers.chars_per_token(model)))
            output_tokens = 0.0
        elif pieces:
            tokenizer = self._tokenizers.get(model)
            if tokenizer is not None:
                try:
                    if sum(map(len, pieces)) > _INLINE_CHARS:
                        tokens = await asyncio.to_thread(tokenizer.request, request.route, body)
                    else:
                        tokens = tokenizer.request(request.route, body)
                    chain, prompt_tokens, exact = token_chain(tokens, size, salt), len(tokens), True
                except CannotTokenize:
                    pass
                except Exception:
                    metrics.FAIL_OPEN.labels("tokenizer").inc()
            if not prompt_tokens:
                per_token = self._tokenizers.chars_per_token(model)
                prompt_tokens = max(1, int(sum(map(len, pieces)) / per_token))
                chain = text_chain(pieces, max(1, int(size * per_token)), salt)[: prompt_tokens // size]
        return QueuedCall(
            id=request.id,
            model=model,
            tenant=request.tenant,
            chain=chain,
            block_size=size,
            exact=exact,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            arrived_at=now,
            hints=hints,
            group=group,
            share=share,
            node=node,
            prefer=prefer,
            suggestion=suggestion,
        )

    def unknown(self, request: CallRequest, *, now: float, prefer: str | None) -> QueuedCall:
        """The call without any knowledge of it: no prefix, the default length."""
        return QueuedCall(
            id=request.id,
            model=request.model,
            tenant=request.tenant,
            chain=(),
            block_size=self._tokenizers.block_size(request.model),
            prompt_tokens=1,
            output_tokens=float(self._default_output),
            arrived_at=now,
            prefer=prefer,
        )

    def measured(self, call: QueuedCall, request: CallRequest, prompt_tokens: int) -> None:
        """What the worker counted: corrects the characters per token of the text fallback."""
        if self._tokenizers.get(call.model) is not None or prompt_tokens <= 32:
            return
        self._measured += 1
        if self._measured % _CALIBRATED_BY == 1:
            chars = sum(map(len, prompt_pieces(request.route, request.body)))
            self._tokenizers.calibrate(call.model, chars / prompt_tokens)


def _texts(value: Any) -> list[str]:
    """The strings in a field that holds one or a list of them."""
    values = value if isinstance(value, list) else [value]
    return [text for text in values if isinstance(text, str)]


def expected_output(body: Mapping[str, Any], hints: Hints, default: int) -> float:
    """Expected output tokens of all choices: the asked-for length where it is forced, else the node's profile (which
    counts all of them, too), else a default for each; never more than the client's limit."""
    limit = next((body[f] for f in _LIMITS if isinstance(body.get(f), int) and 0 < body[f] < 2**31), None)
    choices = body.get("n") if isinstance(body.get("n"), int) else 1
    choices = max(1, min(128, choices or 1))
    if limit is not None and (body.get("ignore_eos") is True or body.get("min_tokens") == limit):
        return float(limit * choices)
    expected = hints.output_tokens if hints.output_tokens is not None else float(default * choices)
    return min(expected, float(limit * choices)) if limit is not None else expected
