"""``/v1/embeddings``, ``/v1/rerank`` and ``/v1/score``: vectors from the hashes of a text's tokens.

Texts that share tokens come out alike, so that ranking by them means something. They bypass the scheduler.
"""

from __future__ import annotations

import base64
import math
import time
from array import array
from collections.abc import Iterable
from typing import Any

from .core import EmbeddedEngine
from .http import ApiError, Call, integer, token_list
from .openai import request_id

_DIMENSIONS = 256


def embed(tokens: Iterable[int], dimensions: int = _DIMENSIONS) -> list[float]:
    """A unit vector: each token adds to two of its components."""
    vector = [0.0] * dimensions
    for token in tokens:
        vector[token % dimensions] += 1.0
        vector[token // dimensions % dimensions] -= 0.5
    norm = math.sqrt(sum(x * x for x in vector)) or 1.0
    return [x / norm for x in vector]


def similarity(a: list[float], b: list[float]) -> float:
    """From 0 to 1."""
    return (1.0 + sum(x * y for x, y in zip(a, b, strict=True))) / 2.0


def _tokens(engine: EmbeddedEngine, value: Any, name: str) -> array[int]:
    if isinstance(value, dict):
        value = value.get("text")
    tokens = engine.tokenizer.encode(value) if isinstance(value, str) else token_list(value)
    if tokens is None:
        raise ApiError(400, f"{name} must be text or token ids, or a list of either.", param=name)
    return tokens


def _many(engine: EmbeddedEngine, body: dict[str, Any], name: str) -> list[array[int]]:
    value = body.get(name)
    if isinstance(value, list) and token_list(value) is None:
        return [_tokens(engine, item, name) for item in value]
    return [_tokens(engine, value, name)]


def _usage(count: int) -> dict[str, Any]:
    return {"prompt_tokens": count, "total_tokens": count, "completion_tokens": 0, "prompt_tokens_details": None}


async def embeddings(engine: EmbeddedEngine, call: Call) -> None:
    texts = _many(engine, call.body, "input")
    dimensions = integer(call.body, "dimensions", _DIMENSIONS, 1, 4096)
    form = call.body.get("encoding_format") or "float"
    if form not in ("float", "base64"):
        raise ApiError(400, "encoding_format must be float or base64.", param="encoding_format")
    data = []
    for i, tokens in enumerate(texts):
        vector: Any = embed(tokens, dimensions)
        if form == "base64":
            vector = base64.b64encode(array("f", vector).tobytes()).decode()
        data.append({"index": i, "object": "embedding", "embedding": vector})
    await call.json(
        {
            "id": f"embd-{request_id(call)}",
            "object": "list",
            "created": int(time.time()),
            "model": engine.config.model,
            "data": data,
            "usage": _usage(sum(map(len, texts))),
        }
    )


async def rerank(engine: EmbeddedEngine, call: Call) -> None:
    query = _tokens(engine, call.body.get("query"), "query")
    given = call.body.get("documents")
    if not isinstance(given, list) or not given:
        raise ApiError(400, "documents must be a list of texts.", param="documents")
    documents = [_tokens(engine, d, "documents") for d in given]
    target = embed(query)
    scores = [similarity(target, embed(d)) for d in documents]
    order = sorted(range(len(given)), key=lambda i: (-scores[i], i))
    top = integer(call.body, "top_n", 0, 0) or len(order)
    count = sum(len(query) + len(d) for d in documents)
    await call.json(
        {
            "id": f"rerank-{request_id(call)}",
            "model": engine.config.model,
            "usage": {"prompt_tokens": count, "total_tokens": count},
            "results": [
                {
                    "index": i,
                    "document": {"text": given[i], "multi_modal": None},
                    "relevance_score": scores[i],
                }
                for i in order[:top]
            ],
        }
    )


async def score(engine: EmbeddedEngine, call: Call) -> None:
    body = call.body
    left_name = "queries" if "queries" in body else "text_1"
    right_name = "documents" if "documents" in body else "text_2"
    left, right = _many(engine, body, left_name), _many(engine, body, right_name)
    if len(left) == 1:
        left = left * len(right)
    if len(left) != len(right):
        raise ApiError(400, "there must be as many texts on both sides, or one on the first.", param=left_name)
    await call.json(
        {
            "id": f"embd-{request_id(call)}",
            "object": "list",
            "created": int(time.time()),
            "model": engine.config.model,
            "data": [
                {"index": i, "object": "score", "score": similarity(embed(a), embed(b))}
                for i, (a, b) in enumerate(zip(left, right, strict=True))
            ],
            "usage": _usage(sum(map(len, left)) + sum(map(len, right))),
        }
    )
