"""Seeded text of realistic words: the same (seed, key, length) gives the same text on every machine.

Lengths are asked for in tokens. A tokenizer's tokens per word are measured once per engine (`Writer.sample`) and
given to the writer, so that a prompt of 512 tokens is one within a few per cent, whichever tokenizer the engine has.
"""

from __future__ import annotations

import random
from pathlib import Path

_WORDS = Path(__file__).with_name("words.txt").read_text().split()


class Writer:
    """Writes text of a wanted length; stateless, so that the order of asking does not matter."""

    def __init__(self, seed: int, tokens_per_word: float = 1.2) -> None:
        self.seed = seed
        self.tokens_per_word = tokens_per_word

    def __repr__(self) -> str:
        return f"Writer(seed={self.seed}, tokens_per_word={self.tokens_per_word:.3f})"

    def text(self, tokens: int, key: str) -> str:
        """About `tokens` tokens of sentences; equal for equal (seed, key, tokens)."""
        return self.words(max(1, round(tokens / self.tokens_per_word)), key)

    def words(self, count: int, key: str) -> str:
        """Exactly `count` words in sentences of 6 to 16."""
        rng = random.Random(f"{self.seed}/{key}")
        sentences = []
        while count > 0:
            length = min(count, rng.randint(6, 16))
            words = rng.choices(_WORDS, k=length)
            words[0] = words[0].capitalize()
            sentences.append(" ".join(words) + ".")
            count -= length
        return " ".join(sentences)

    @classmethod
    def sample(cls) -> tuple[str, int]:
        """A text to measure a tokenizer with, and its number of words."""
        return cls(0).words(2000, "sample"), 2000
