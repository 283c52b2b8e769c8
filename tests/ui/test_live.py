"""The page on a real proxy: a live run of Trading appears, its nodes change state, both workers have a row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from .chromium import WINDOW, Complaints
from .live import behind, crowd, proxy


@pytest.fixture(scope="module")
def base() -> Iterator[str]:
    with proxy() as running:
        yield running


def test_trading_is_seen_as_it_runs(browser: Any, base: str) -> None:
    context = browser.new_context(viewport=WINDOW, reduced_motion="reduce")
    page = context.new_page()
    page.set_default_timeout(60_000)
    complaints = Complaints()
    complaints.listen(page)
    page.goto(f"{base}/helium/")
    page.get_by_text("No run yet").wait_for()
    with behind(crowd, base, output=32):
        page.locator("a.item", has_text="desk-0").click()
        page.locator(".title", has_text="desk-0").wait_for()  # until then the newest run is shown
        page.locator(".title .pill.live").wait_for()
        page.locator('.node[data-kind="running"]').first.wait_for()
        running = page.locator('.node[data-kind="running"]').first.get_attribute("data-id")
        own = f'.node[data-id="{running}"]'
        page.locator(f'{own}[data-kind="computed"], {own}[data-kind="coalesced"]').wait_for()
        page.locator(".title .pill.done").wait_for()
    page.locator(".node").nth(87).wait_for()
    assert page.locator(".node").count() == 88
    kinds = page.locator(".node").evaluate_all("all => [...new Set(all.map(node => node.dataset.kind))]")
    assert set(kinds) <= {"computed", "coalesced", "hit"}
    workers = {worker["id"] for worker in httpx.get(f"{base}/helium/workers").json()["workers"]}
    rows = set(page.locator(".g-bar").evaluate_all("all => all.map(bar => bar.dataset.row)"))
    assert rows - {"~reuse"} == workers
    assert not complaints
    context.close()


@pytest.mark.parametrize("view", ["workers", "templates", "plans"])
def test_the_other_views_read_what_the_proxy_says(browser: Any, base: str, view: str) -> None:
    context = browser.new_context(viewport=WINDOW, reduced_motion="reduce")
    page = context.new_page()
    complaints = Complaints()
    complaints.listen(page)
    page.goto(f"{base}/helium/#/{view}")
    page.locator(".status.live").wait_for()
    if view == "workers":
        assert page.locator("section.card").count() == 2
        assert page.locator("section.card .pill.ok").count() == 2
    elif view == "templates":
        page.locator(".item strong", has_text="trading").wait_for()
        page.locator(".node").nth(87).wait_for()
    else:
        page.get_by_role("button", name="Explain").click()
        page.locator(".g-bar").first.wait_for()
        assert page.locator(".node").count() == 6, "unused is pruned: two inputs × two experts and a summary"
    assert not complaints
    context.close()
