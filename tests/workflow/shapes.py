"""Workflow shapes to drive with: Trading (88 calls), map-reduce, debate, as lists of calls with their parents."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from .driver import Driver, system, user


@dataclass
class Step:
    """One call of a shape: its own key, its node, the keys of the calls whose replies it reads."""

    key: str
    node: str
    parents: tuple[str, ...] = ()
    prompt_tokens: int = 1_000
    output_tokens: int = 100
    extra: dict[str, Any] = field(default_factory=dict)


def trading() -> list[Step]:
    """4 analysts; bull, bear and their manager; 8 branches of a trader and 3 risk roles in 3 rounds; a fund manager:
    88 calls. Branches repeat the same nodes."""
    steps = [
        Step(role, role, (), 1_200 + 100 * at, 150 + 20 * at)
        for at, role in enumerate(("fundamentals", "sentiment", "news", "technical"))
    ]
    analysts = tuple(step.key for step in steps)
    steps.append(Step("bull", "bull", analysts, 2_000, 200))
    steps.append(Step("bear", "bear", (*analysts, "bull"), 2_200, 180))
    steps.append(Step("manager", "research_manager", ("bull", "bear"), 900, 250))
    ends = []
    for branch in range(8):
        steps.append(Step(f"trader{branch}", "trader", (*analysts, "manager"), 2_500, 120))
        said = [f"trader{branch}"]
        for turn in range(3):
            for role in ("risky", "safe", "neutral"):
                key = f"{role}{branch}.{turn}"
                steps.append(Step(key, role, tuple(said[-3:] if turn else said), 800 + 300 * turn, 80 + 10 * turn))
                said.append(key)
        ends.append(said[-1])
    steps.append(Step("fund", "fund_manager", tuple(ends), 3_000, 300))
    assert len(steps) == 88
    return steps


def map_reduce(width: int = 7) -> list[Step]:
    experts = [Step(f"expert{at}", f"expert{at}", (), 500, 60) for at in range(width)]
    return [*experts, Step("summary", "summary", tuple(step.key for step in experts), 900, 90)]


WORDS = (
    *("margin", "yield", "tariff", "quarter", "revenue", "demand", "risk", "supply", "forecast", "position"),
    *("hedge", "volume", "signal", "growth", "debt", "price", "cash", "index", "bond", "sector", "momentum"),
    *("liquidity", "exposure", "inflation", "rate", "dividend", "outlook", "guidance", "shares", "option"),
)


def sentence(dice: random.Random, words: int = 12) -> str:
    return " ".join(dice.choices(WORDS, k=words)).capitalize() + f" {dice.randint(10, 99)} percent."


class Play:
    """Plays runs of a shape: every call arrives when its parents are done, in an order that `dice` chooses."""

    def __init__(self, driver: Driver, seed: int = 0, *, tagged: bool = True, workflow: str = "shape") -> None:
        self.driver = driver
        self.dice = random.Random(seed)
        self.tagged = tagged
        self.workflow = workflow
        self.calls: dict[tuple[str, str], str] = {}
        """(run, key) → call id"""
        self.replies: dict[tuple[str, str], str] = {}
        self.true: set[tuple[str, str]] = set()

    def run(self, run: str, steps: Sequence[Step], each: Callable[[str, list[Step]], None] | None = None) -> None:
        for _ in self.stepwise(run, steps, each):
            pass

    def stepwise(
        self, run: str, steps: Sequence[Step], each: Callable[[str, list[Step]], None] | None = None
    ) -> Iterator[None]:
        """One event (arrival or end of a call) per item; `each` sees the steps still to come after an arrival."""
        left, flying, done = list(steps), [], set()
        question = f"Company {run}: {sentence(self.dice)}"
        while left or flying:
            ready = [step for step in left if done.issuperset(step.parents)]
            choice = self.dice.randrange(len(ready) + len(flying))
            if choice < len(ready):
                step = ready[choice]
                left.remove(step)
                self._arrive(run, step, question, last=not left)
                flying.append(step)
                if each is not None:
                    each(run, left)
            else:
                step = flying.pop(choice - len(ready))
                self._finish(run, step)
                done.add(step.key)
            yield

    def _arrive(self, run: str, step: Step, question: str, *, last: bool) -> None:
        read = "\n\n".join(self.replies[(run, parent)] for parent in step.parents)
        messages = [
            system(f"You are the {step.node}. Follow the house rules of the {step.node} desk."),
            user(f"{question}\n{read}" if step.parents else question),
        ]
        tags: dict[str, Any] = {}
        if self.tagged:
            parents = [self.calls[(run, parent)] for parent in step.parents]
            tags = {"workflow": self.workflow, "run": run, "node": step.node, "parents": parents, "final": last}
        arrival = self.driver.arrive(messages, **tags)
        self.calls[(run, step.key)] = arrival.call
        self.true |= {(self.calls[(run, parent)], arrival.call) for parent in step.parents}

    def _finish(self, run: str, step: Step) -> None:
        reply = " ".join(sentence(self.dice) for _ in range(4))
        self.replies[(run, step.key)] = reply
        self.driver.finish(
            self.calls[(run, step.key)],
            reply,
            prompt_tokens=round(step.prompt_tokens * self.dice.uniform(0.95, 1.05)),
            output_tokens=round(step.output_tokens * self.dice.uniform(0.8, 1.2)),
        )


def interleave(dice: random.Random, runs: Sequence[Iterator[None]]) -> None:
    """Advance the runs in random turns until all are done."""
    going = list(runs)
    while going:
        at = dice.randrange(len(going))
        if next(going[at], StopIteration) is StopIteration:
            going.pop(at)
