"""The page in headless Chromium, against the recorded run."""

from __future__ import annotations

import re
from typing import Any

import pytest

from helium_proxy.gateway.run_metrics import critical_path_s
from helium_proxy.ui import assets

from .conftest import Stage
from .fixture import RUN, duration, recorded, run_at


def test_a_live_run_appears_and_its_nodes_change_state(stage: Stage) -> None:
    stage.now = 1.0
    page = stage.open()
    page.locator(".node").nth(3).wait_for()
    assert page.locator("h1").inner_text() == "trading"
    assert stage.kinds() == {
        "analyst_market": "running",
        "analyst_news": "running",
        "analyst_fundamentals": "running",
        "analyst_social": "hit",
    }
    stage.now = 5.0
    page.locator('.node[data-id$="-research_manager"][data-kind="running"]').wait_for()
    assert stage.kinds()["bull"] == "computed"
    stage.now = duration()
    page.locator('.node[data-id$="-fund_manager"][data-kind="computed"]').wait_for()
    kinds = stage.kinds()
    assert kinds == {step.node: step.fate for step in recorded()}
    assert page.locator(".title .pill").inner_text() == "done"
    assert not stage.complaints


def test_the_timeline_has_a_row_for_each_worker_and_one_for_what_was_not_computed(stage: Stage) -> None:
    stage.now = duration()
    page = stage.open()
    page.locator(".g-bar").nth(87).wait_for()
    assert page.locator(".row-label").all_text_contents() == [
        "worker-0",
        "worker-1",
        "not computed",
    ]
    placed = page.locator(".g-bar").evaluate_all("all => all.map(bar => [bar.dataset.id, bar.dataset.row])")
    expected = {f"{RUN}-{step.node}": step.worker or "~reuse" for step in recorded()}
    assert dict(placed) == expected
    overlaps = page.evaluate(
        """() => {
          const boxes = [...document.querySelectorAll('.g-bar .outline')].map(bar => bar.getBoundingClientRect());
          return boxes.filter((a, i) => boxes.some((b, j) => j > i && a.left < b.right - 1 && b.left < a.right - 1
            && a.top < b.bottom - 1 && b.top < a.bottom - 1)).length;
        }"""
    )
    assert overlaps == 0, "bars of one worker must not cover each other"
    assert not stage.complaints


def test_numbers_are_the_runs_own(stage: Stage) -> None:
    stage.now = duration()
    page = stage.open()
    page.locator(".g-bar").nth(87).wait_for()
    total = sum(step.prompt for step in recorded() if step.fate != "error")
    computed = sum(step.prompt - step.cached for step in recorded() if step.fate == "computed")
    tiles = dict(
        zip(page.locator(".tile dt").all_inner_texts(), page.locator(".tile dd").all_inner_texts(), strict=True)
    )
    assert tiles["Prompt reused"] == f"{100 * (1 - computed / total):.0f}%"
    assert re.sub(r"\s+", " ", tiles["Calls"]) == "88 of 88 · 1 failed"
    assert tiles["Makespan"] == f"{duration():.1f} s"
    assert page.locator("tbody tr").count() == 88


def test_the_critical_path_is_that_of_the_metric(stage: Stage) -> None:
    stage.now = duration()
    page = stage.open()
    page.locator(".g-bar").nth(87).wait_for()
    tile = page.locator(".tile", has_text="Critical path").locator("dd")
    assert tile.inner_text() == f"{critical_path_s(run_at(duration())):.1f} s"
    assert 6 <= page.locator(".node.critical").count() < 20


def call(name: str, queued: float, finished: float | None, started: float | None = None) -> dict[str, Any]:
    state = "done" if finished is not None else "running"
    return {"call": name, "state": state, "queued_at": queued, "started_at": started, "finished_at": finished}


HIT_AT_THE_END: dict[str, Any] = {
    "state": "done",
    "nodes": [call("long", 0, 5, 1), call("short", 0, 6, 5), call("after", 5, 9, 8), call("hit", 10, 10)],
    "edges": [{"from": f, "to": t} for f, t in (("long", "after"), ("short", "after"), ("gone", "after"))],
}
STILL_RUNNING: dict[str, Any] = {
    "state": "live",
    "nodes": [call("a", 0, 2), call("b", 0, 3), call("c", 2, None, 3), call("d", 3, 6)],
    "edges": [{"from": f, "to": t} for f, t in (("a", "c"), ("a", "c"), ("b", "d"))],
}
IN_CIRCLES: dict[str, Any] = {
    "state": "done",
    "nodes": [call("a", 0, 2), call("b", 2, 5), call("c", 0, 1)],
    "edges": [{"from": f, "to": t} for f, t in (("a", "b"), ("b", "a"))],
}


@pytest.mark.parametrize(
    ("run", "path", "seconds"),
    [
        (HIT_AT_THE_END, {"after": "short", "short": None}, 10),
        (STILL_RUNNING, {"c": "a", "a": None}, 2 + 18),
        (IN_CIRCLES, {"c": None}, 1),
        ({"state": "live", "nodes": [], "edges": []}, {}, 0),
    ],
    ids=["hit-at-the-end", "still-running", "in-circles", "empty"],
)
def test_the_critical_path_is_the_longest_chain_by_time(
    stage: Stage, run: dict[str, Any], path: dict[str, str | None], seconds: float
) -> None:
    found = stage.open().evaluate(
        """async ([url, json]) => {
          const { criticalSeconds, readRun } = await import(url);
          const run = readRun(json, 20);
          return [Object.fromEntries(run.critical), criticalSeconds(run)];
        }""",
        [f"{stage.base}/helium/assets/{assets().version}/model.js", run],
    )
    assert found == [path, seconds]
    if run is HIT_AT_THE_END:
        assert critical_path_s(run) == seconds


def test_long_run_ids_leave_room_for_state_and_calls(stage: Stage) -> None:
    stage.fixture.others = ("trading-" + "0123456789abcdef" * 3, "t" * 128)
    stage.now = duration()
    page = stage.open()
    page.locator(".item").nth(2).wait_for()
    side = page.locator(".side").bounding_box()
    assert page.locator(".side").evaluate("side => side.scrollWidth - side.clientWidth") == 0
    for item in page.locator(".item").all():
        box = item.bounding_box()
        assert box["x"] + box["width"] <= side["x"] + side["width"]
        for part in (item.locator(".pill"), item.locator("small").nth(1)):
            inner = part.bounding_box()
            assert inner["x"] + inner["width"] <= box["x"] + box["width"]
            assert part.evaluate("e => e.scrollWidth <= e.clientWidth + 1"), "it is cut"


def test_a_call_is_inspected_by_mouse_and_by_keyboard(stage: Stage) -> None:
    stage.now = duration()
    page = stage.open()
    page.locator('.g-bar[data-id$="-bull"]').click()
    page.locator(".inspector strong", has_text="bull").wait_for()
    page.get_by_label("Close").click()
    page.locator(".inspector").wait_for(state="hidden")
    page.locator(".node[tabindex='0']").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    name = page.locator(".inspector strong").inner_text()
    assert name == page.evaluate("document.activeElement.dataset.id").split("-", 2)[2]
    assert name == "bull"


def test_focus_survives_a_poll(stage: Stage) -> None:
    stage.now = 5.0
    page = stage.open()
    page.locator('.node[data-id$="-bear"]').focus()
    asked = len(stage.fixture.asked)
    stage.now = 6.0
    page.wait_for_function("() => true")
    page.locator('.node[data-id$="-research_manager"]').wait_for()
    while len(stage.fixture.asked) < asked + 4:
        page.wait_for_timeout(50)
    assert page.evaluate("document.activeElement.dataset.id") == f"{RUN}-bear"


def test_everything_is_reached_with_the_tab_key(stage: Stage) -> None:
    stage.now = duration()
    page = stage.open()
    page.locator(".g-bar").nth(87).wait_for()
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate("(() => { const e = document.activeElement; return e.id || e.className.baseVal || "
                          "e.getAttribute('aria-label') || e.textContent; })()")
        )  # fmt: skip
    text = " | ".join(map(str, reached))
    for stop in ("Skip to content", "Workers", "pause", "theme", "key", "Filter by workflow", "Zoom in", "Fit",
                 "node c-", "g-bar c-", "Table of calls"):  # fmt: skip
        assert stop in text, f"{stop} is not reached: {text}"


@pytest.mark.parametrize("stage", [{"key": "secret"}], indirect=True)
def test_the_key_is_asked_for_sent_and_forgotten_with_the_tab(stage: Stage) -> None:
    stage.now = 2.0
    page = stage.open()
    page.get_by_label("Key", exact=True).fill("wrong")
    page.keyboard.press("Enter")
    page.locator("#key-dialog[open]").wait_for()
    page.get_by_label("Key", exact=True).fill("secret")
    page.keyboard.press("Enter")
    page.locator(".node").first.wait_for()
    assert not page.locator("#key-dialog").is_visible()
    assert page.evaluate("sessionStorage.getItem('helium-key')") == "secret"
    assert "secret" not in page.evaluate("JSON.stringify(localStorage)") + page.url
    # Chromium itself logs each 401 as a failed load; nothing else may be said.
    assert all("401" in line for line in stage.complaints)


def test_in_passthrough_the_page_says_why_it_shows_no_run(stage: Stage) -> None:
    stage.fixture.mode = "passthrough"
    page = stage.open()
    page.get_by_text("No run is seen in passthrough mode").wait_for()
    assert page.locator(".empty:visible").count() == 1
    page.get_by_label("Filter by workflow").fill("trading")
    asked = len(stage.fixture.asked)
    while len(stage.fixture.asked) < asked + 3:
        page.wait_for_timeout(50)
    assert page.locator(".empty:visible").count() == 1
    assert not stage.complaints


def test_a_run_that_has_ended_is_not_asked_for_again(stage: Stage) -> None:
    stage.now = duration()
    page = stage.open()
    page.locator(".g-bar").first.wait_for()
    while len(stage.fixture.asked) < 6:
        page.wait_for_timeout(50)
    assert [path for path, _ in stage.fixture.asked].count(f"/helium/runs/{RUN}") == 1


def test_pause_stops_the_polls(stage: Stage) -> None:
    page = stage.open()
    page.locator(".item").first.wait_for()
    page.locator("#pause").click()
    page.locator("#status", has_text="paused").wait_for()
    asked = len(stage.fixture.asked)
    page.wait_for_timeout(1500)
    assert len(stage.fixture.asked) == asked


@pytest.mark.parametrize("view", ["workers", "templates", "plans"])
def test_the_other_views_draw_and_say_nothing_wrong(stage: Stage, view: str) -> None:
    stage.now = 9.0
    page = stage.open(view)
    expected: dict[str, Any] = {
        "workers": ("section.card h2", ["worker-0", "worker-1"]),
        "templates": (".item strong", ["trading"]),
        "plans": ("h1", ["Plans"]),
    }
    selector, texts = expected[view]
    page.locator(selector).nth(len(texts) - 1).wait_for()
    assert page.locator(selector).all_inner_texts() == texts
    assert page.locator(f'nav a[data-view="{view}"]').get_attribute("aria-current") == "page"
    if view == "templates":
        page.locator(".node").nth(11).wait_for()
        assert page.locator(".node").count() == 12
        page.get_by_role("link", name=RUN).first.wait_for()
    assert not stage.complaints


def test_a_plan_is_explained_and_a_submitted_one_opened(stage: Stage) -> None:
    page = stage.open("plans")
    page.get_by_label("Workflow as JSON").fill("{")
    page.get_by_role("button", name="Explain").click()
    page.get_by_role("alert").wait_for()
    page.get_by_label("Workflow as JSON").fill("{}")
    page.get_by_role("button", name="Explain").click()
    page.locator(".g-bar").nth(4).wait_for()
    assert page.get_by_role("alert").count() == 0
    warning = "Warning: no worker that is up serves model 'demo', which 5 operators will ask for"
    assert page.get_by_role("status").filter(has_text="Warning").inner_text() == warning
    assert page.locator("a.item small").nth(1).inner_text() == "5 of 8 operators · 1 input"
    assert page.locator(".row-label").all_text_contents() == ["worker-0", "worker-1"]
    assert stage_kinds(page)["expert_law[0]"] == "hit"
    assert page.locator(".tree .pill").all_inner_texts() == ["× 5", "× 2"]
    page.locator("a.item").click()
    page.wait_for_url("**/#/plans/wf-1")
    assert not stage.complaints


def stage_kinds(page: Any) -> dict[str, str]:
    return dict(page.locator(".node").evaluate_all("all => all.map(node => [node.dataset.id, node.dataset.kind])"))


def test_what_is_still_expected_of_a_live_run_is_said(stage: Stage) -> None:
    stage.now = 5.0
    page = stage.open()
    page.locator(".upcoming li").first.wait_for()
    shown = page.locator(".upcoming li").all_text_contents()
    assert shown == ["trader × 8", "risky × 24", "safe × 24", "neutral × 24", "fund_manager × 1"]
    stage.now = duration()
    page.locator(".upcoming").wait_for(state="hidden")


@pytest.mark.parametrize("stage", [{"scheme": "light"}, {"scheme": "dark"}], indirect=True, ids=["light", "dark"])
def test_text_can_be_read_in_both_themes(stage: Stage) -> None:
    """WCAG AA: 4.5 : 1 for body text, table heads, pills and the muted tone on their own backgrounds."""
    stage.now = duration()
    page = stage.open()
    page.locator(".g-bar").nth(87).wait_for()
    ratios = page.evaluate(CONTRAST)
    low = {name: ratio for name, ratio in ratios.items() if ratio < 4.5}
    assert not low
    assert len(ratios) > 8


CONTRAST = """() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const paint = (colours) => {
    canvas.clearRect(0, 0, 1, 1);
    for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (rgb) => rgb.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const found = {};
  for (const selector of ['h1', 'nav a', 'nav a[aria-current]', 'th', 'td', 'td .pill.computed', 'td .pill.hit',
      'td .pill.coalesced', 'td .pill.error', '.tile dt', '.tile dd', '.tile.good dd', '.legend li', '.item small']) {
    const element = document.querySelector(selector);
    const behind = [];
    for (let e = element; e; e = e.parentElement) behind.unshift(getComputedStyle(e).backgroundColor);
    const back = paint(behind), front = paint([...behind, getComputedStyle(element).color]);
    const [a, b] = [light(back), light(front)].sort((x, y) => y - x);
    found[selector] = (a + 0.05) / (b + 0.05);
  }
  return found;
}"""
