"""Take the pictures of the documentation from a real proxy: ``python tests/ui/screenshots.py [FOLDER]``.

Three Trading runs are done first, so that templates are learnt and prefixes pinned; the pictures show a fourth, live.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import httpx
from chromium import chromium
from live import behind, crowd, proxy

FOLDER = Path(__file__).parents[2] / "docs" / "images"
PLAN = 'document.querySelector("main button.primary").click()'


def take(page: Any, base: str, view: str, path: Path, wait: str, script: str = "", height: int = 1120) -> None:
    page.set_viewport_size({"width": 1440, "height": height})
    page.goto(f"{base}/helium/#/{view}")
    page.locator("main").wait_for()
    if script:
        page.locator("main button").first.wait_for()
        page.evaluate(script)
    page.locator(wait).first.wait_for()
    page.wait_for_timeout(1200)
    page.screenshot(path=path)
    print(path)


def until_done(base: str, run: str, calls: int) -> None:
    """Wait until `calls` calls of the run have ended."""
    while True:
        found = httpx.get(f"{base}/helium/runs/{run}")
        if found.status_code == 200 and sum(node["state"] == "done" for node in found.json()["nodes"]) >= calls:
            return
        time.sleep(0.02)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with chromium() as browser, proxy() as base:
        with behind(crowd, base, output=96, words=140):
            pass
        for scheme in ("dark", "light"):
            context = browser.new_context(color_scheme=scheme, reduced_motion="reduce")
            page = context.new_page()
            run = f"live-{scheme}"
            with behind(lambda load, run=run: load.trading(run), base, output=260, words=140):
                until_done(base, run, 12)
                take(page, base, "workers", folder / f"workers-{scheme}.png", "section.card", height=520)
                take(page, base, "templates", folder / f"templates-{scheme}.png", ".node")
                until_done(base, run, 40)
                take(page, base, f"runs/{run}", folder / f"run-{scheme}.png", ".g-bar", height=1640)
        for scheme in ("dark", "light"):
            page = browser.new_context(color_scheme=scheme, reduced_motion="reduce").new_page()
            take(page, base, "plans", folder / f"plan-{scheme}.png", ".g-bar", PLAN)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
