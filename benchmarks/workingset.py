"""How many tokens a batch touches, found without an engine: to size engines' KV to the batch."""

from __future__ import annotations

import asyncio
import zlib

from helium_proxy.engine import Tokenizer, render

from .minimum import minimum_tokens
from .workloads import Call, Roles, Run, Sizes, Workload, Writer


class _Answers:
    """Answers calls with text of the length asked for and keeps the prompts' tokens."""

    def __init__(self) -> None:
        self._tokenizer = Tokenizer()
        sample, words = Writer.sample()
        self.tokens_per_word = len(self._tokenizer.encode(sample)) / words
        self._writer = Writer(7, self.tokens_per_word)
        self.prompts: dict[bytes, tuple[list[int], int]] = {}
        self.generated = 0

    async def complete(self, call: Call) -> str:
        tokens = render(self._tokenizer, list(call.messages))
        key = tokens.tobytes()
        known = self.prompts.get(key)
        self.prompts[key] = (list(tokens), 1 if known is None else known[1] + 1)
        self.generated += call.max_tokens
        return self._writer.text(call.max_tokens, str(zlib.crc32(key)))


def working_set(workload: Workload, sizes: Sizes, batch: int, block: int) -> int:
    """Distinct prompt tokens in blocks of `block`, plus all generated tokens."""
    answers = _Answers()
    writer = Writer(1, answers.tokens_per_word)

    async def play() -> None:
        roles = Roles(workload.name, sizes, writer)
        for phase, runs in enumerate(workload.make_inputs(writer, sizes, batch)):
            for index, inputs in enumerate(runs):
                run = Run(answers, workload.name, f"{phase}-{index}", inputs=inputs, roles=roles, time_scale=0)
                await workload.program_of(inputs)(run)

    asyncio.run(play())
    return minimum_tokens(answers.prompts.values(), block) + answers.generated
