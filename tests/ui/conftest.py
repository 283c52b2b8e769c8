"""Fixtures of the page's tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from .chromium import WINDOW, Complaints, chromium, served
from .fixture import Fixture


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Of a module, not of the session: while Playwright's own event loop runs no asynchronous test can."""
    with chromium() as running:
        yield running


class Stage:
    """A page on a fixture server whose clock the test sets."""

    def __init__(self, browser: Any, scheme: str = "dark", key: str | None = None) -> None:
        self.now = 0.0
        self.fixture = Fixture(lambda: self.now, key)
        self._server = served(self.fixture.app())
        self.base = self._server.__enter__()
        self.context = browser.new_context(viewport=WINDOW, color_scheme=scheme, reduced_motion="reduce")
        self.page = self.context.new_page()
        self.page.set_default_timeout(15_000)
        self.complaints = Complaints()
        self.complaints.listen(self.page)

    def open(self, view: str = "runs") -> Any:
        self.page.goto(f"{self.base}/helium/#/{view}")
        return self.page

    def kinds(self) -> dict[str, str]:
        """Node → kind, as the graph shows them."""
        nodes = self.page.locator(".node").evaluate_all(
            "all => all.map(node => [node.dataset.id, node.dataset.kind])"
        )
        return {name.split("-", 2)[2]: kind for name, kind in nodes}

    def close(self) -> None:
        self.context.close()
        self._server.__exit__(None, None, None)


@pytest.fixture
def stage(browser: Any, request: pytest.FixtureRequest) -> Iterator[Stage]:
    """Parametrize indirectly with keyword arguments of `Stage`."""
    made = Stage(browser, **getattr(request, "param", {}))
    yield made
    made.close()
