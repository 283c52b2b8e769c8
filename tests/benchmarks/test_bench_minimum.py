"""The fewest prompt tokens: against a brute-force engine of unlimited KV, and the rules one by one."""

from __future__ import annotations

import itertools
import random

import pytest

from benchmarks.minimum import minimum_tokens

BLOCK = 4


def computed_by_engine(prompts: list[tuple[int, ...]]) -> int:
    """What one engine of unlimited KV computes, the calls one after the other, as vLLM does: the longest cached
    chain of full blocks, never all of the prompt."""
    cached: set[tuple[int, ...]] = set()
    total = 0
    for ids in prompts:
        hit = 0
        while (hit + 1) * BLOCK < len(ids) and tuple(ids[: (hit + 1) * BLOCK]) in cached:
            hit += 1
        total += len(ids) - hit * BLOCK
        cached |= {tuple(ids[: end * BLOCK]) for end in range(1, len(ids) // BLOCK + 1)}
    return total


def test_distinct_prompts_share_full_blocks_only() -> None:
    prompts = [((1, 2, 3, 4, 5, 6, 7, 8, 9), 1), ((1, 2, 3, 4, 5, 6, 7, 0, 9), 1)]
    assert minimum_tokens(prompts, BLOCK) == (4 + 4 + 1) + (4 + 1)


def test_a_repeat_costs_nothing_with_reuse_and_its_tail_without() -> None:
    assert minimum_tokens([((1, 2, 3, 4, 5, 6), 3)], BLOCK) == 6
    assert minimum_tokens([((1, 2, 3, 4, 5, 6), 3)], BLOCK, reuse=False) == 6 + 2 * 2


def test_exact_multiple_computes_its_last_block_again() -> None:
    assert minimum_tokens([((1, 2, 3, 4, 5, 6, 7, 8), 2)], BLOCK, reuse=False) == 8 + 4


def test_a_block_completed_by_decoding_is_not_prefilled() -> None:
    first, second = (1, 2, 3, 4, 5, 6), (1, 2, 3, 4, 5, 6, 7, 8, 9)
    prompts = [(first, 1), (second, 1)]
    assert minimum_tokens(prompts, BLOCK) == 4 + 2 + 4 + 1
    assert minimum_tokens(prompts, BLOCK, outputs=[(7, 8, 8), ()]) == 4 + 2 + 1
    assert minimum_tokens(prompts, BLOCK, outputs=[(7, 8), ()]) == 4 + 2 + 4 + 1, "the last token has no KV"


@pytest.mark.parametrize("seed", range(40))
def test_no_order_beats_the_minimum_and_one_reaches_it(seed: int) -> None:
    rng = random.Random(seed)
    prompts = list({tuple(rng.choices((1, 2), k=rng.randint(1, 13))) for _ in range(5)})
    least = min(computed_by_engine(list(p)) for p in itertools.permutations(prompts))
    assert minimum_tokens([(ids, 1) for ids in prompts], BLOCK) == least
    least = min(computed_by_engine([*p, *p]) for p in itertools.permutations(prompts))
    assert minimum_tokens([(ids, 2) for ids in prompts], BLOCK, reuse=False) == least
