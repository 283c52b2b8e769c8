"""What a vLLM worker's HTTP surface does not tell, found by asking for one token: whether it takes `priority` (some
refuse the field unless they schedule by it), whether it has the pinning connector (without it directives are
ignored), and, with a few short calls, how fast it is while it has nothing else to do."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from math import inf
from typing import Any

import orjson
import structlog

from helium_proxy.workers.upstream import SendFailed, UpstreamClient
from helium_proxy.workers.worker import Worker

log = structlog.get_logger(__name__)

_TIMEOUT_S = 30.0
_WORDS = 96
"""In the prompt whose prefill is timed, a few hundred tokens of no text that was there before."""
_MORE = 8
"""So many times as long a prompt where that one takes no longer than a single step: on accelerators, which read the
weights once for either."""
_STEPS = 8
_ROUNDS = 2
"""The fastest of so many counts."""
_ENGINES = frozenset({"vllm", "helium"})
"""Others know neither; and may charge for a token."""


class Probe:
    """Asks each worker once, and again after it has restarted."""

    def __init__(self, client: UpstreamClient, *, enabled: bool, calibrate: bool) -> None:
        self._client = client
        self._enabled = enabled
        self._calibrate = calibrate
        # -- state
        self._asked: dict[str, int] = {}  # worker → the epoch that was asked, or is being asked
        self._answered: set[str] = set()  # those of them that gave a token, and have not been timed

    def __repr__(self) -> str:
        return f"<Probe of {len(self._asked)} workers>"

    def changed(self, worker: Worker) -> None:
        """What was found holds no longer than the engine's life."""
        asked = self._asked.get(worker.id)
        if asked is not None and asked != worker.epoch:
            self.gone(worker)
            worker.facts = replace(worker.facts, has_priority=False, has_plugin=False, alone_s=None)

    def gone(self, worker: Worker) -> None:
        self._asked.pop(worker.id, None)
        self._answered.discard(worker.id)

    async def learn(self, worker: Worker) -> None:
        """Sets `has_priority` and `has_plugin` of a worker that is up. Never raises; what is not understood (a
        pooling model's refusal, say) leaves both False."""
        if not self._enabled or worker.id in self._asked or worker.facts.engine not in _ENGINES:
            return
        self._asked[worker.id] = epoch = worker.epoch
        try:
            status, answer = await self._ask(worker, priority=1)
            has_priority = status == 200
            if status == 400 and "priority" in str(answer).lower():
                status, answer = await self._ask(worker)
            if status == 429 or status >= 500:
                raise ValueError(f"status {status}")  # of the moment, and not of what it is
        except (SendFailed, ValueError) as error:
            log.info("probe failed", worker=worker.id, error=str(error))
            if self._asked.get(worker.id) == epoch:
                del self._asked[worker.id]  # asked again at its next change
            return
        if status != 200 or worker.epoch != epoch:
            return
        transfer = answer.get("kv_transfer_params") if isinstance(answer, dict) else None
        has_plugin = isinstance(transfer, dict) and isinstance(transfer.get("helium"), dict)
        worker.facts = replace(worker.facts, has_priority=has_priority, has_plugin=has_plugin)
        self._answered.add(worker.id)
        log.info("worker probed", worker=worker.id, priority=has_priority, plugin=has_plugin)

    async def time_alone(self, worker: Worker) -> None:
        """Sets `alone_s` of a worker that `learn` has understood and that has nothing to do. Never raises."""
        epoch, busy = worker.epoch, worker.facts.running or worker.facts.waiting or worker.inflight
        if not self._calibrate or busy or worker.id not in self._answered:
            return
        self._answered.discard(worker.id)
        sent = worker.sent
        try:
            alone_s = await self._time(worker)
        except (SendFailed, ValueError) as error:
            log.info("worker not timed", worker=worker.id, error=str(error))
            return
        if worker.sent != sent:
            self._answered.add(worker.id)  # it was not alone: another time
        elif alone_s is not None and worker.epoch == epoch:
            worker.facts = replace(worker.facts, alone_s=alone_s)
            log.info("worker timed", worker=worker.id, prefill_token_s=alone_s[0], step_s=alone_s[1])

    async def _time(self, worker: Worker) -> tuple[float, float] | None:
        """Seconds for a prefilled token and for a decode step; None where they cannot be told from noise."""
        none = decode = inf
        for _ in range(_ROUNDS):
            none = min(none, (await self._seconds(worker))[0])
            decode = min(decode, (await self._seconds(worker, max_tokens=1 + _STEPS, ignore_eos=True))[0])
        for words in (_WORDS, _MORE * _WORDS):
            prefill, tokens = inf, 0
            for _ in range(_ROUNDS):
                text = " ".join(f"{random.getrandbits(16):x}" for _ in range(words))
                took, tokens = await self._seconds(worker, prompt=text)
                prefill = min(prefill, took)
            if prefill > 2 * none:
                break
        if prefill <= 1.5 * none or decode <= none:
            return None
        return (prefill - none) / tokens, (decode - none) / _STEPS

    async def _seconds(self, worker: Worker, **fields: Any) -> tuple[float, int]:
        """How long an answer takes, and its prompt tokens."""
        began = time.perf_counter()
        status, answer = await self._ask(worker, **fields)
        took = time.perf_counter() - began
        usage = answer.get("usage") if status == 200 and isinstance(answer, dict) else None
        tokens = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        if not isinstance(tokens, int) or tokens < 1:
            raise ValueError(f"status {status} without usage")
        return took, tokens

    async def _ask(self, worker: Worker, **fields: Any) -> tuple[int, Any]:
        body = {
            "model": worker.facts.models[0].id if worker.facts.models else "",
            "prompt": ".",
            "max_tokens": 1,
            "temperature": 0,
            "kv_transfer_params": {"helium": {}},
            **fields,
        }
        upstream = await self._client.send(
            worker,
            "POST",
            "/v1/completions",
            headers={"Content-Type": "application/json"},
            body=orjson.dumps(body),
            timeout_s=_TIMEOUT_S,
        )
        return upstream.status, orjson.loads(await upstream.read())
