"""A little of everything that the dashboards show: Trading runs of 88 calls, repeats, streams, errors, a plan.

From code: ``await Load(base_url).everything()``. By hand: ``python tests/operate/load.py URL [RUNS]``.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

ANALYSTS = ("market", "news", "social", "fundamentals")
ROLES = ("risky", "safe", "neutral")


def _role(name: str, words: int) -> dict[str, str]:
    return {
        "role": "system",
        "content": f"You are the {name}. " + " ".join(f"{name} rule {i}." for i in range(words)),
    }


@dataclass
class Load:
    """Calls to one proxy. `words` sets the size of system prompts, `output` the tokens of an answer."""

    base: str
    model: str = "demo"
    words: int = 40
    output: int = 12
    traders: int = 8
    rounds: int = 3
    headers: dict[str, str] = field(default_factory=dict)

    def client(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=200, keepalive_expiry=2.0)
        return httpx.AsyncClient(base_url=self.base, timeout=120, limits=limits, headers=self.headers)

    async def call(
        self,
        client: httpx.AsyncClient,
        run: str,
        node: str,
        text: str,
        parents: Sequence[str] = (),
        **more: Any,
    ) -> str:
        """One tagged call; its text. Roles of one kind share a system prompt."""
        role = node.split("#", maxsplit=1)[0].rstrip("0123456789").rstrip("_")
        tags = {"workflow": more.pop("workflow", "trading"), "run": run, "node": node, "parents": list(parents)}
        if more.pop("final", False):
            tags["final"] = True
        answer = await client.post(
            "/v1/chat/completions",
            json={
                "model": self.model,
                "messages": [_role(role, self.words), {"role": "user", "content": text}],
                "max_tokens": self.output,
                "temperature": 0,
                "ignore_eos": True,
                "helium": tags,
                **more,
            },
        )
        answer.raise_for_status()
        text = answer.json()["choices"][0]["message"]["content"]
        return str(text)

    async def trading(self, run: str) -> None:
        """Four analysts, a debate, eight traders with a risk debate each, a fund manager: 88 calls."""
        async with self.client() as client:

            async def ask(node: str, text: str, parents: Sequence[str] = (), **more: Any) -> str:
                return await self.call(client, run, node, f"{run}: {text}", parents, **more)

            reports = await asyncio.gather(*(ask(f"analyst_{name}", name) for name in ANALYSTS))
            known = [f"analyst_{name}" for name in ANALYSTS]
            bull = await ask("bull", " ".join(reports), known)
            bear = await ask("bear", " ".join(reports) + bull, [*known, "bull"])
            briefing = await ask("manager", bull + bear, ["bull", "bear"])

            async def branch(index: int) -> list[str]:
                trader = f"trader_{index}"
                said = [await ask(trader, f"{index} {briefing}", ["manager"])]
                before = [trader]
                for turn in range(self.rounds):
                    names = [f"{role}_{index}_{turn}" for role in ROLES]
                    said = await asyncio.gather(*(ask(name, " ".join(said) + name, before) for name in names))
                    before = names
                return before

            last = await asyncio.gather(*(branch(index) for index in range(self.traders)))
            await ask("fund_manager", briefing, [name for names in last for name in names], final=True)

    async def repeats(self) -> None:
        """Equal calls at once (coalesced) and again (from the prompt cache)."""
        async with self.client() as client:
            same = "What was asked before, word for word?"
            await asyncio.gather(
                *(self.call(client, f"repeat-{i}", "ask", same, workflow="repeat") for i in range(6))
            )
            await self.call(client, "repeat-again", "ask", same, workflow="repeat", final=True)

    async def stream(self, node: str = "teller") -> None:
        """A stream read to its end, and one left after its first bytes."""
        async with self.client() as client:
            body = {
                "model": self.model,
                "messages": [{"role": "user", "content": "Tell me."}],
                "max_tokens": self.output,
                "stream": True,
                "ignore_eos": True,
                "helium": {"workflow": "stream", "node": node},
            }
            for whole in (True, False):
                async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                    async for _ in answer.aiter_bytes():
                        if not whole:
                            break

    async def errors(self) -> None:
        """A model that nobody serves, and a body that is not JSON."""
        async with self.client() as client:
            unknown = {"model": "nobody", "messages": [{"role": "user", "content": "?"}]}
            assert (await client.post("/v1/chat/completions", json=unknown)).status_code == 404
            assert (await client.post("/v1/chat/completions", content=b"{")).status_code == 400

    async def untagged(self) -> None:
        """Two calls whose edge can only be inferred from content."""
        async with self.client() as client:
            first: dict[str, Any] = {
                "model": self.model,
                "messages": [_role("writer", self.words), {"role": "user", "content": "Write a verse."}],
                "max_tokens": self.output,
            }
            reply = (await client.post("/v1/chat/completions", json=first)).json()["choices"][0]["message"]
            again = {"role": "user", "content": "Now another."}
            await client.post("/v1/chat/completions", json={**first, "messages": [*first["messages"], reply, again]})

    async def everything(self, runs: int = 1, name: str = "trading") -> None:
        """Equal `name`s give equal prompts, which the prompt cache answers."""
        await self.errors()
        await asyncio.gather(
            *(self.trading(f"{name}-{index}") for index in range(runs)),
            self.repeats(),
            self.stream(),
            self.untagged(),
        )


if __name__ == "__main__":
    asyncio.run(Load(sys.argv[1]).everything(int(sys.argv[2]) if len(sys.argv) > 2 else 1))
