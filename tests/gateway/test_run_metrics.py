"""A call's time by phase."""

from __future__ import annotations

from typing import Any

import pytest

from helium_proxy.gateway.run_metrics import phases


@pytest.mark.parametrize(
    ("started", "first", "spent"),
    [
        (12.0, 15.0, {"before": 1.0, "queue": 1.0, "first_token": 3.0, "decode": 5.0}),
        (12.0, None, {"before": 1.0, "queue": 1.0, "first_token": 8.0, "decode": 0.0}),
        (None, 15.0, {"before": 1.0, "queue": 4.0, "first_token": 0.0, "decode": 5.0}),  # joined another call
        (None, None, {"before": 1.0, "queue": 9.0, "first_token": 0.0, "decode": 0.0}),
    ],
)
def test_phases_add_up(started: float | None, first: float | None, spent: dict[str, float]) -> None:
    node: dict[str, Any] = {"queued_at": 11.0, "started_at": started, "first_token_at": first, "finished_at": 20.0}
    assert phases(node, 10.0) == spent
    assert sum(spent.values()) == 10.0
