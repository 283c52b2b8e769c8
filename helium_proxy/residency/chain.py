"""Prompts as chains of block hashes: from token ids where they are known, from text where they are not."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from struct import iter_unpack

import xxhash

_hash = xxhash.xxh3_64_intdigest


def token_chain(
    tokens: Sequence[int] | array[int], block_size: int, salt: str = "", *, parent: int | None = None
) -> tuple[int, ...]:
    """One hash per *full* block of `block_size` tokens, each seeded by the one before (vLLM never caches a shorter
    tail). `salt` separates what must not be shared: model, adapter, tenant's `cache_salt`. With `parent` the chain
    goes on after that block, whose salt holds."""
    data = memoryview(tokens if isinstance(tokens, array) else array("I", tokens)).cast("B")
    seed = parent if parent is not None else _hash(salt.encode()) if salt else 0
    return _chain(data, block_size * 4, seed)


def text_chain(pieces: Sequence[str], block_chars: int, salt: str = "") -> tuple[int, ...]:
    """The fallback without a tokenizer: blocks of `block_chars` characters of the pieces (role and text of each
    message) put together. Equal prefixes give equal leading hashes, which is all that placement needs."""
    text = "\x1e".join(pieces).encode("utf-8", "surrogatepass")
    return _chain(memoryview(text), block_chars, _hash(salt.encode()) if salt else 0)


def _chain(data: memoryview, width: int, seed: int) -> tuple[int, ...]:
    whole = data[: len(data) // width * width]
    # (`iter_unpack` cuts in less than half the time that slices take.)
    return tuple([seed := _hash(block, seed) for (block,) in iter_unpack(f"{width}s", whole)])
