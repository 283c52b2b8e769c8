"""A port that answers as an engine would, at once or when told to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from helium_proxy.planner.execute import CallResult
from helium_proxy.types import Hints


@dataclass(frozen=True)
class Seen:
    """One call as the port got it."""

    body: dict[str, Any]
    tenant: str
    headers: Mapping[str, str]
    hints: Hints | None
    worker: str | None

    @property
    def node(self) -> str:
        return self.headers["x-helium-node"]

    @property
    def text(self) -> str:
        """The last message's content, or the prompt."""
        return str(self.body["prompt"] if "prompt" in self.body else self.body["messages"][-1]["content"])


def answer(text: str, call: int = 0, **fields: Any) -> CallResult:
    body = {"id": f"chatcmpl-{call}", "object": "chat.completion", "choices": [{"message": {"content": text}}]}
    return CallResult(200, body, "computed", "w0", prompt_tokens=10, cached_tokens=4, output_tokens=3, **fields)


class FakePort:
    """Answers ``node(text)``; `reply` may return another result or raise. With `hold`, every call waits for its turn
    until `release`; `running` and `cancelled` count calls."""

    def __init__(self, reply: Callable[[Seen], CallResult | str] | None = None, *, hold: bool = False) -> None:
        self.reply = reply or (lambda seen: f"{seen.node}({seen.text})")
        self.seen: list[Seen] = []
        self.running = 0
        self.most_running = 0
        self.cancelled = 0
        self.gate = asyncio.Event()
        if not hold:
            self.gate.set()

    def release(self) -> None:
        self.gate.set()

    async def call(
        self,
        body: dict[str, Any],
        *,
        tenant: str,
        headers: Mapping[str, str],
        hints: Hints | None,
        worker: str | None,
    ) -> CallResult:
        seen = Seen(body, tenant, headers, hints, worker)
        self.seen.append(seen)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        number = len(self.seen)
        try:
            await self.gate.wait()
            await asyncio.sleep(0)
            found = self.reply(seen)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        return answer(found, number) if isinstance(found, str) else found
