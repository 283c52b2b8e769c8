"""The fewest prompt tokens that any schedule must compute for a set of calls.

Engines cache a prompt's *full* blocks of `block` tokens, keyed by everything before them; a prompt never hits its
own last token, so that one whose length is an exact multiple of the block computes its last block itself. With the
union of all prompts as a trie of full blocks, the fewest tokens that a deployment with unlimited KV could compute are

    distinct full blocks × block  +  the tail (length mod block) of every distinct prompt.

Equal calls are counted once: greedy replies can be reused whole (`reuse=True`). Without reuse of replies
(`reuse=False`) each repeat computes its tail again, and a whole block where there is no tail. The exact-multiple
rule costs nothing more among distinct prompts: two cannot end in the same block, and the one that ends there goes
first. Blocks completed by *generated* tokens are cached too, and need no prefill in a prompt that carries the reply
on: `outputs` (generated ids per prompt) takes those out. Where only a reply's text is known, its tokenization stands
in for the ids: if the engine generated others, it computes more, so that the figure stays a lower bound.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def minimum_tokens(
    prompts: Iterable[tuple[Sequence[int], int]],
    block: int,
    *,
    reuse: bool = True,
    outputs: Sequence[Sequence[int]] = (),
) -> int:
    """The minimum for `prompts`, pairs of (token ids, times sent), with blocks of `block` tokens.

    `prompts` are distinct. O(total tokens): a block's identity is its parent's number and its own ids.
    """
    # (parent's number, ids of the block) -> number; 0 is the root
    numbers: dict[tuple[int, tuple[int, ...]], int] = {}
    total = 0
    chains: list[tuple[int, Sequence[int], int]] = []
    for ids, times in prompts:
        parent = 0
        full = len(ids) // block
        for index in range(full):
            key = (parent, tuple(ids[index * block : (index + 1) * block]))
            if key not in numbers:
                numbers[key] = len(numbers) + 1
            parent = numbers[key]
        chains.append((parent, ids, full))
        tail = len(ids) - full * block
        total += tail
        if not reuse:
            total += (times - 1) * (tail or block)
    decoded: set[int] = set()
    for (last, ids, full), generated in zip(chains, outputs, strict=False):
        parent = last
        rest = [*ids[full * block :], *generated[:-1]]  # the last token's KV is never computed
        for index in range(len(rest) // block):
            number = numbers.get((parent, tuple(rest[index * block : (index + 1) * block])))
            if number is None:
                break
            decoded.add(number)
            parent = number
    return total + (len(numbers) - len(decoded)) * block
