"""What placing a call in its run costs: `Workflows.arrive` + `finished`, with a full reply memory.

    python benchmarks/workflow.py [--replies 10000] [--calls 3000] [--chars 4096]

Five kinds of 4 kB calls, all with 14 ordinary headers: *fresh* (every character never seen before), *agent* (a
known system prompt of half the size, the rest new and quoting an earlier reply), *turn* (a conversation grown by
one turn), *tagged* (as agent, with workflow, run, node and parents) and *same* (one body over and
over). Prints microseconds of CPU per call, garbage collection included.
"""

from __future__ import annotations

import argparse
import gc
import random
import time
from collections.abc import Callable
from typing import Any

from helium_proxy.types import CallRequest, Outcome
from helium_proxy.workflow import Workflows, WorkflowSettings

HEADERS = {
    "host": "proxy", "accept": "application/json", "content-type": "application/json", "user-agent": "OpenAI/Python",
    "x-stainless-lang": "python", "x-stainless-package-version": "1", "x-stainless-os": "Linux",
    "x-stainless-arch": "x64", "x-stainless-runtime": "CPython", "x-stainless-runtime-version": "3.11",
    "x-stainless-retry-count": "0", "x-stainless-read-timeout": "600", "content-length": "4096",
    "accept-encoding": "gzip",
}  # fmt: skip


class Text:
    """English-like text: sentences of 6 to 20 words."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.words = [
            "".join(self.random.choices("etaoinshrdlucm", k=self.random.randint(2, 9))) for _ in range(3_000)
        ]

    def make(self, chars: int) -> str:
        out, size = [], 0
        while size < chars:
            sentence = " ".join(self.random.choices(self.words, k=self.random.randint(6, 20))) + "."
            out.append(sentence)
            size += len(sentence) + 1
        return " ".join(out)[:chars]


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--replies", type=int, default=10_000)
    options.add_argument("--calls", type=int, default=3_000)
    options.add_argument("--chars", type=int, default=4_096)
    chosen = options.parse_args()
    text = Text(1)
    workflows = Workflows(WorkflowSettings(max_replies=chosen.replies))
    count = 0
    replies: list[str] = []

    def run(messages: list[dict[str, Any]], reply: str, **body: Any) -> float:
        nonlocal count
        count += 1
        request = CallRequest(
            f"c{count}", "t", "/v1/chat/completions", "m", {"model": "m", "messages": messages, **body}, dict(HEADERS)
        )
        outcome = Outcome("computed", reply_text=reply, prompt_tokens=1_000, output_tokens=200, finished_at=count)
        now = count / 100.0
        begun = time.thread_time()
        arrival = workflows.arrive(request, now)
        workflows.finished(arrival.call, outcome, now + 0.005)
        took = time.thread_time() - begun
        replies.append(reply)
        return took * 1e6

    systems = [f"You are expert {name}. {text.make(chosen.chars // 2)}" for name in ("Ada", "Bob", "Cy", "Dee")]
    talk: list[dict[str, Any]] = []

    def fresh() -> float:
        return run([{"role": "user", "content": text.make(chosen.chars)}], text.make(1_000))

    def agent(**body: Any) -> float:
        place = count % 20  # runs of 20 calls
        quoted = text.random.choice(replies[-place:]) if place else ""
        rest = max(0, chosen.chars // 2 - len(quoted))
        messages = [
            {"role": "system", "content": text.random.choice(systems)},
            {"role": "user", "content": f"{text.make(rest)}\n\nThe draft:\n{quoted}"},
        ]
        return run(messages, text.make(1_000), **body)

    def turn() -> float:
        if len(talk) < 2 or sum(len(message["content"]) for message in talk) > chosen.chars:
            talk[:] = [{"role": "system", "content": systems[0]}, {"role": "user", "content": text.make(300)}]
        reply = text.make(300)
        took = run(list(talk), reply)
        talk.extend(({"role": "assistant", "content": reply}, {"role": "user", "content": text.make(200)}))
        return took

    def tagged() -> float:
        tags = {"workflow": "bench", "run": f"r{count // 20}", "node": f"n{count % 20}"}
        return agent(helium={**tags, "parents": [f"n{count % 20 - 1}"] if count % 20 else []})

    def same() -> float:
        return run(
            [{"role": "system", "content": systems[0]}, {"role": "user", "content": systems[1]}], systems[2][:500]
        )

    for _ in range(chosen.replies):
        fresh()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)  # as the gateway does
    kinds: dict[str, Callable[[], float]] = {
        "fresh": fresh,
        "agent": agent,
        "turn": turn,
        "tagged": tagged,
        "same": same,
    }
    print("| call | p10 | p50 | p90 | p99 |\n|---|---|---|---|---|")
    for name, kind in kinds.items():
        took = [kind() for _ in range(chosen.calls)]
        figures = (f"{percentile(took, share):.0f}" for share in (0.1, 0.5, 0.9, 0.99))
        print(f"| {name} | {' | '.join(figures)} |")
    print(workflows.statistics())


if __name__ == "__main__":
    main()
