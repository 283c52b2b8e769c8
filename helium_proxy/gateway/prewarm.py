"""A prewarm: one token of a prompt that is nothing but a prefix, straight to a worker."""

from __future__ import annotations

import asyncio
import itertools
from array import array
from collections.abc import Mapping
from typing import Any

import msgspec
import orjson
import structlog

from helium_proxy import metrics
from helium_proxy.dispatch.state import DispatchState
from helium_proxy.residency.index import Chain
from helium_proxy.residency.registry import Tokenizers
from helium_proxy.residency.tokens import CannotTokenize
from helium_proxy.workers.upstream import SendFailed, UpstreamClient
from helium_proxy.workers.worker import Worker

log = structlog.get_logger(__name__)

_LAST = 2_000_000_000
"""The engine's priority of a prewarm: after everything else."""
_TIMEOUT_S = 120.0


class Source(msgspec.Struct, frozen=True):
    """What a prefix's tokens can be made from: a call that begins with it."""

    route: str
    model: str
    body: Mapping[str, Any]
    salt: str
    block_size: int


class Prewarmer:
    """Sends them; a worker's mirror knows what it is filling."""

    def __init__(self, client: UpstreamClient, state: DispatchState, tokenizers: Tokenizers) -> None:
        self._client = client
        self._state = state
        self._tokenizers = tokenizers
        # -- state
        self._ids = itertools.count()

    def __repr__(self) -> str:
        return "<Prewarmer>"

    async def ask(
        self,
        worker: Worker,
        chain: Chain,
        source: Source,
        tokens: array[int] | None,
        reason: str,
        directive: dict[str, Any] | None = None,
    ) -> Mapping[str, Any] | None:
        """Has `worker` prefill `chain`; returns its word on `directive`. Its mirror holds the prefix meanwhile."""
        known = self._state.workers.get(worker.id)
        if tokens is None:
            tokens = await self.tokens(source, source.body)
        length = len(chain) * source.block_size
        if known is None or tokens is None or len(tokens) < length:
            return None
        # One token more, where there is one: the last block of a prompt that it fills would be computed again.
        body: dict[str, Any] = {"model": source.model, "prompt": tokens[: length + 1].tolist()}
        if source.salt:
            body["cache_salt"] = source.salt
        if directive is not None:
            body |= transfer(directive)
        name, residency = f"ahead-{next(self._ids)}", known.residency
        hit = residency.admit(name, chain, 1, exact=True)
        known.version += 1
        answer = None
        try:
            answer = await self.post(worker, body)
        finally:
            residency.finish(name)
            if answer is None:
                residency.correct(chain, hit)
            known.version += 1
            metrics.DIRECTIVES.labels("prewarm", "ok" if answer is not None else "error").inc()
        if answer is not None:
            metrics.PREWARM_TOKENS.labels(reason).inc(length)
        return report_of(answer)

    async def post(self, worker: Worker, body: dict[str, Any]) -> dict[str, Any] | None:
        """The worker's answer to a prewarm; None unless it is a 200."""
        body |= {"max_tokens": 1, "temperature": 0}
        if worker.facts.has_priority:
            body["priority"] = _LAST
        worker.ahead += 1
        worker.sent += 1
        try:
            upstream = await self._client.send(
                worker,
                "POST",
                "/v1/completions",
                headers={"Content-Type": "application/json"},
                body=orjson.dumps(body),
                timeout_s=_TIMEOUT_S,
            )
            try:
                payload = await upstream.read()
            finally:
                upstream.close()
            answer = orjson.loads(payload) if upstream.status == 200 else None
        except (SendFailed, ValueError) as error:
            log.info("prewarm failed", worker=worker.id, error=str(error))
            return None
        finally:
            worker.ahead -= 1
        return answer if isinstance(answer, dict) else None

    async def tokens(self, source: Source, body: Mapping[str, Any]) -> array[int] | None:
        """The ids of `body`'s prompt, None where they cannot be known here."""
        tokenizer = self._tokenizers.get(source.model)
        if tokenizer is None:
            return None
        try:
            return await asyncio.to_thread(tokenizer.request, source.route, body)
        except CannotTokenize:
            return None


def transfer(directive: Mapping[str, Any]) -> dict[str, Any]:
    """The field of a request that carries a directive."""
    return {"kv_transfer_params": {"helium": directive}}


def report_of(answer: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """An answer's word on the directive."""
    params = (answer or {}).get("kv_transfer_params")
    report = params.get("helium") if isinstance(params, dict) else None
    return report if isinstance(report, dict) else None
