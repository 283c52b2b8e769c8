"""Fixtures of all rooms."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from serving import Stack


@pytest.fixture
async def stack() -> AsyncIterator[Stack]:
    """Starts engines, fake workers and proxies; ends them with the test."""
    made = Stack()
    try:
        yield made
    finally:
        await made.close()
