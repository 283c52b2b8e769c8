"""Untagged agent programs of real frameworks: what is inferred against what is true."""

from __future__ import annotations

import pytest

from .build_env import REQUIREMENTS, failure_of
from .measure import measure, table
from .truth import TRUTH, Score, Truth, edge_score, grouped

pytestmark = [pytest.mark.frameworks, pytest.mark.timeout(600)]


@pytest.mark.parametrize("name", REQUIREMENTS)
def test_inference_on(name: str) -> None:
    reason = failure_of(name)
    if reason is not None:
        pytest.skip(reason)
    result = measure(name)
    assert result.errors == []
    score = result.score
    assert score.calls == 3 * (4 + 4 + 5 + 4), "every program made the calls that its truth speaks of"
    assert score.precision >= 0.95, result.details
    assert score.recall >= 0.90, result.details
    assert score.grouping >= 0.95, result.details
    assert score.foreign == 0


def test_scores() -> None:
    truth = Truth(frozenset({("a", "b"), ("b", "c")}), frozenset({("a", "c")}))
    score = edge_score([("a", "b"), ("a", "c"), ("x", "c")], truth)
    assert (score.right, score.wrong, score.missed, score.required) == (2, 1, 1, 2)
    assert (score.precision, score.recall) == (2 / 3, 0.5)


def test_grouping_counts_splits_and_mergers_as_wrong() -> None:
    assert grouped([("A", "x"), ("A", "x"), ("B", "y")]) == 3
    assert grouped([("A", "x"), ("A", "x"), ("A", "z"), ("B", "y")]) == 3
    assert grouped([("A", "x"), ("A", "x"), ("B", "x")]) == 2


def test_truths_are_acyclic_and_apart() -> None:
    for truth in TRUTH.values():
        assert not truth.required & truth.allowed
        assert not {(b, a) for a, b in truth.required} & (truth.required | truth.allowed)


def test_the_table_names_what_was_not_measured() -> None:
    text = table({"good": table_row(), "bad": "bad did not install: no wheel\nmore"})
    assert "| good | 17 | 1.000 | 1.000 | 1.000 | 0 |" in text
    assert "not measured: bad did not install: no wheel" in text


def table_row():  # type: ignore[no-untyped-def]
    from .measure import Result

    return Result(Score(right=19, required=16, grouped=17, calls=17))
