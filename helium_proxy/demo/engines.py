"""What the demo asks of the engines themselves: their models, their counters, an empty cache."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import httpx
from prometheus_client.parser import text_string_to_metric_families

_START_S = 30.0
_SETTLE_S = 5.0
_COUNTERS = {
    "vllm:prompt_tokens_total": "prompt",
    "vllm:prompt_tokens_cached_total": "cached",
    "vllm:generation_tokens_total": "generated",
}


class DemoFailed(Exception):
    """The demo cannot go on; the message says why."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """What engines have counted since they started, in tokens."""

    prompt: float = 0.0
    cached: float = 0.0
    generated: float = 0.0

    @property
    def computed(self) -> float:
        """Prompt tokens that were not in the prefix cache."""
        return self.prompt - self.cached

    @property
    def hit_rate(self) -> float:
        return self.cached / self.prompt if self.prompt else 0.0

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens(self.prompt + other.prompt, self.cached + other.cached, self.generated + other.generated)

    def __sub__(self, other: Tokens) -> Tokens:
        return Tokens(self.prompt - other.prompt, self.cached - other.cached, self.generated - other.generated)


def read_counters(exposition: str) -> Tokens:
    """The counters in an engine's `/metrics`. Raises DemoFailed where vLLM's are missing."""
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            if name := _COUNTERS.get(sample.name):
                sums[name] = sums.get(name, 0.0) + sample.value
    if "prompt" not in sums:
        raise DemoFailed("no vllm:prompt_tokens_total in the worker's /metrics: is it vLLM?")
    return Tokens(**sums)


class Engines:
    """Some running engines, by URL."""

    def __init__(self, urls: list[str], client: httpx.AsyncClient, api_key: str | None = None) -> None:
        self.urls = urls
        self._client = client
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}

    async def models(self) -> list[str]:
        """The models that every one of them serves, waiting for those that are still starting."""
        served = await asyncio.gather(*map(self._models, self.urls))
        common = [model for model in served[0] if all(model in others for others in served)]
        if not common:
            raise DemoFailed("the workers have no model in common")
        return common

    async def _models(self, url: str) -> list[str]:
        deadline = time.monotonic() + _START_S
        while True:
            try:
                response = await self._client.get(f"{url}/v1/models", headers=self._headers)
                response.raise_for_status()
                return [str(card["id"]) for card in response.json()["data"]]
            except (httpx.TransportError, httpx.HTTPStatusError) as error:
                starting = isinstance(error, httpx.TransportError) or error.response.status_code >= 500
                if not starting or time.monotonic() > deadline:
                    raise DemoFailed(f"{url} does not answer: {error}") from None
            await asyncio.sleep(0.1)

    async def counters(self) -> Tokens:
        """The sum over all engines."""
        pages = await asyncio.gather(*(self._client.get(f"{url}/metrics") for url in self.urls))
        return sum((read_counters(page.text) for page in pages), Tokens())

    async def settle(self) -> None:
        """Returns once they have computed nothing for a moment: a proxy that has come up times its workers."""
        before, deadline = None, time.monotonic() + _SETTLE_S
        while (now := await self.counters()) != before and time.monotonic() < deadline:
            before = now
            await asyncio.sleep(0.5)

    async def forget(self) -> bool:
        """Empties all prefix caches; False if an engine does not offer that (vLLM does in its development mode)."""
        answers = await asyncio.gather(*(self._client.post(f"{url}/reset_prefix_cache") for url in self.urls))
        return all(answer.is_success for answer in answers)
