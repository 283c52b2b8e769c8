"""Submitted plans' way into the pipeline of live calls: the same reuse, dispatch and bookkeeping, without HTTP."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import partial
from typing import Any

import orjson

from helium_proxy.errors import Draining, HeliumError, InvalidRequest, ModelNotFound, UpstreamFailed
from helium_proxy.gateway.afterwards import report
from helium_proxy.gateway.auth import Principal
from helium_proxy.gateway.llm import LlmRoutes
from helium_proxy.gateway.replies import Reply, read_reply
from helium_proxy.gateway.services import Services
from helium_proxy.gateway.workflows import PlanDeps
from helium_proxy.planner.cost import PlanWorker
from helium_proxy.planner.port import CallResult, reply_text
from helium_proxy.reuse import cache_key, cacheable
from helium_proxy.types import Fate, Hints

_FATES: Mapping[str, Fate] = {"hit": "hit", "coalesced": "coalesced"}
_DECODE_BATCH = 16
"""Calls that share a decode step when the planner turns decode throughput into a step's duration."""


class PlanPort:
    """`CallPort` over the gateway's own call path."""

    def __init__(self, services: Services, llm: LlmRoutes) -> None:
        self._services = services
        self._llm = llm

    async def call(
        self,
        body: dict[str, Any],
        *,
        tenant: str,
        headers: Mapping[str, str],
        hints: Hints | None,
        worker: str | None,
    ) -> CallResult:
        """The answer to one operator's call. Raises HeliumError."""
        services = self._services
        if services.draining:
            raise Draining("the proxy is shutting down", retry_after=1)
        services.dispatcher.check_room()  # before anything is noted of a call that will be tried again
        services.in_flight += 1
        try:
            return await self._call(body, tenant, headers, hints, worker)
        finally:
            services.in_flight -= 1

    async def _call(
        self, body: dict[str, Any], tenant: str, headers: Mapping[str, str], hints: Hints | None, worker: str | None
    ) -> CallResult:
        services = self._services
        route = _route(body)
        model = body.get("model")
        if not isinstance(model, str):
            raise ModelNotFound(f"The model `{model}` does not exist.", param="model")
        ticket = self._llm.ticket(
            route,
            route,
            orjson.dumps(body),
            body,
            model,
            {"content-type": "application/json", **headers},
            Principal(tenant),
            services.clock(),
            hints=hints,
            suggestion=worker,
        )
        try:
            served = await self._llm.calls.serve(ticket)
            try:
                content = await served.read()
            finally:
                served.close()
        except HeliumError as error:
            report(services, ticket, "error", Reply(), status=error.status)
            raise
        except BaseException:
            report(services, ticket, "error", Reply(), status=499)
            raise
        try:
            answer = orjson.loads(content)
        except orjson.JSONDecodeError:
            report(services, ticket, "error", Reply(), status=served.status)
            raise UpstreamFailed(f"the worker answered {served.status} with what is no JSON") from None
        if served.status >= 400:
            report(services, ticket, "error", Reply(), status=served.status)
        reply = read_reply(answer)
        return CallResult(
            served.status,
            answer,
            fate=_FATES.get(served.cache, "computed") if served.status < 400 else "error",
            worker=ticket.worker,
            prompt_tokens=reply.prompt_tokens,
            cached_tokens=reply.cached_tokens,
            output_tokens=reply.output_tokens,
        )


def plan_deps(services: Services, llm: LlmRoutes) -> PlanDeps:
    """What submitted plans and batches need of the proxy."""

    def workers() -> list[PlanWorker]:
        known = services.dispatcher.state.workers
        found = []
        for worker in services.pool:
            state = known.get(worker.id)
            if state is None or not state.open:
                continue
            rates = state.rates.statistics()
            tokens = (state.capacity or 0) * (state.block_size or 16)
            found.append(
                PlanWorker(
                    worker.id,
                    models=state.models,
                    kv_tokens=tokens or services.settings.plans.default_kv_tokens,
                    prefill_tokens_s=rates.prefill,
                    decode_step_s=_DECODE_BATCH / rates.decode,
                )
            )
        return found

    async def cached(tenant: str, body: Mapping[str, Any]) -> str | None:
        route = _route(body)
        if services.cache is None or not cacheable(body, route):
            return None
        key = cache_key(tenant, services.pool.weights(str(body.get("model"))), route, body)
        entry = await services.cache.get(key, services.wall())
        return reply_text(orjson.loads(entry.body)) if entry is not None else None

    def count(text: str, model: str) -> int:
        tokenizer = services.tokenizers.get(model)
        if tokenizer is None:
            return int(len(text) / services.tokenizers.chars_per_token(model)) + 1
        return len(tokenizer.text(text))

    sequence = itertools.count(-1, -1)  # live runs count upwards: the two never meet
    return PlanDeps(
        port=PlanPort(services, llm),
        settings=services.settings.plans,
        workers=workers,
        cache_lookup=cached,
        count=count,
        profile=lambda tenant: partial(services.workflows.output_tokens, tenant),
        next_run_seq=lambda: next(sequence),
        clock=services.clock,
        wall=services.wall,
        draining=lambda: services.draining,
        watches=services.watches,
        tenant_of=lambda request: services.keyring.authenticate(dict(request.headers)).tenant,
    )


def _route(body: Mapping[str, Any]) -> str:
    if "messages" in body:
        return "/v1/chat/completions"
    if "prompt" in body:
        return "/v1/completions"
    raise InvalidRequest("an operator has messages or a prompt")
