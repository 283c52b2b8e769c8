"""What a live call is expected to cost, before it is sent."""

from __future__ import annotations

from typing import Any, cast

import pytest

from helium_proxy.planner.estimate import Estimator, expected_output
from helium_proxy.residency.registry import Tokenizers
from helium_proxy.types import CallRequest, Hints
from helium_proxy.workers.upstream import UpstreamClient


@pytest.mark.parametrize(
    ("body", "learned", "expected"),
    [
        ({}, None, 100),
        ({"n": 3}, None, 300),
        ({"n": 3}, 60.0, 60),  # what was learned counts all choices
        ({"n": 3, "max_tokens": 10}, 60.0, 30),
        ({"n": 3, "max_tokens": 10, "ignore_eos": True}, 5.0, 30),
        ({"max_completion_tokens": 20}, None, 20),
        ({"max_tokens": 500}, 40.0, 40),
        ({"n": "many", "max_tokens": -1}, None, 100),
    ],
)
def test_output_tokens(body: dict[str, Any], learned: float | None, expected: float) -> None:
    assert expected_output(body, Hints(output_tokens=learned), 100) == expected


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/v1/embeddings", {"input": "x" * 400}),
        ("/v1/embeddings", {"input": ["x" * 100] * 4}),
        ("/v1/rerank", {"query": "x" * 100, "documents": ["x" * 150] * 2}),
        ("/v1/score", {"text_1": "x" * 100, "text_2": ["x" * 300]}),
    ],
)
async def test_what_generates_nothing_costs_its_texts(route: str, body: dict[str, Any]) -> None:
    tokenizers = Tokenizers(cast(UpstreamClient, None))  # nobody is asked
    request = CallRequest("c", "t", route, "demo", body, {})
    call = await Estimator(tokenizers, default_output_tokens=256).estimate(request, Hints(), now=0.0)
    assert call.prompt_tokens == int(400 / tokenizers.chars_per_token("demo"))
    assert call.output_tokens == 0.0
