"""Dashboards and rules: built from their source, laid out, and speaking of metrics that exist."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml

import helium_proxy
from helium_proxy import metrics

from .compose import DOCKER, ROOT
from .dashboards import DASHBOARDS, RULES, Query, base, names, panel_queries, rules
from .test_containers import check, tool

FILES = sorted(DASHBOARDS.glob("*.json"))
ALL = [*panel_queries(), *rules("record"), *rules("alert")]


def ours() -> set[str]:
    """Every series name that the proxy can expose, histograms without their suffix."""
    found = set()
    for family in metrics.REGISTRY.collect():
        found.add(f"{family.name}_total" if family.type == "counter" else family.name)
    return found


def vllms() -> set[str]:
    """vLLM's own names, as the embedded engine speaks them; the real engine's are compared in tests/vllm."""
    text = (ROOT / "helium_proxy" / "engine" / "metrics.py").read_text()
    return set(re.findall(r'"(vllm:\w+)"', text)) | {
        f"vllm:{name}{suffix}"
        for name in re.findall(r'\("(\w+)", "', text)
        for suffix in ("", "_total")
    } | {"vllm:prompt_tokens_by_source_total", "vllm:request_success_total"}  # fmt: skip


def test_dashboards_are_what_their_source_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCKER / "grafana"))
    module = runpy.run_path(str(DOCKER / "grafana" / "build.py"), run_name="build")
    built = {one.uid: one.json() for one in (module["SAVINGS"], module["WORKFLOWS"], module["WORKERS"])}
    written = {(found := json.loads(path.read_text()))["uid"]: found for path in FILES}
    assert built == written, "run python docker/grafana/build.py"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_panels_do_not_overlap_and_fit(path: Path) -> None:
    taken: dict[tuple[int, int], str] = {}
    panels = json.loads(path.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, f"{panel['title']} lies on {taken[x, y]}"
                taken[x, y] = panel["title"]


@pytest.mark.parametrize("query", ALL, ids=lambda query: query.where)
def test_every_metric_named_exists(query: Query) -> None:
    known = ours() | vllms()
    for name in names(query.expr):
        assert {name, base(name)} & known, f"{name} is no metric of the proxy or of vLLM"


def test_old_vllm_names_are_not_used() -> None:
    text = "".join(query.expr for query in ALL)
    assert "gpu_cache_usage_perc" not in text
    assert "gpu_prefix_cache" not in text


def test_every_alert_has_a_cause_and_a_page() -> None:
    manual = (ROOT / "docs" / "operations.md").read_text()
    anchors = {
        re.sub(r"[^\w -]", "", line.lower()).strip().replace(" ", "-")
        for line in re.findall(r"^#+ (.+)$", manual, re.M)
    }
    for group in yaml.safe_load((RULES / "alerts.yml").read_text())["groups"]:
        for rule in group["rules"]:
            assert rule["labels"]["severity"] in ("page", "ticket")
            assert rule["annotations"]["summary"]
            page, anchor = rule["annotations"]["runbook"].split("#")
            assert page == "docs/operations.md"
            assert anchor in anchors, f"{rule['alert']}: no section {anchor}"
            assert rule["alert"] in manual, f"{rule['alert']} is not in the manual"


def test_rules_pass_promtool() -> None:
    check(tool("promtool"), "check", "rules", *sorted(RULES.glob("*.yml")))
    check(tool("promtool"), "check", "config", DOCKER / "prometheus" / "prometheus.yml")
    check(tool("promtool"), "test", "rules", DOCKER / "prometheus" / "rules_test.yml")


def test_every_alert_is_tested() -> None:
    tested = (DOCKER / "prometheus" / "rules_test.yml").read_text()
    missing = [rule.where for rule in rules("alert") if f"alertname: {rule.where}" not in tested]
    assert not missing


def test_provisioning_names_what_compose_mounts() -> None:
    services: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    grafana = " ".join(services["grafana"]["volumes"])
    folder = DOCKER / "grafana" / "provisioning"
    provider = yaml.safe_load((folder / "dashboards" / "helium.yaml").read_text())["providers"][0]
    source = yaml.safe_load((folder / "datasources" / "prometheus.yaml").read_text())["datasources"][0]
    assert provider["options"]["path"] in grafana
    assert source["url"] == "http://prometheus:9090"


def test_every_room_that_can_fail_starts_at_none() -> None:
    """`HeliumFailOpen` sees a first failure only where the counter was there before."""
    source = "".join(path.read_text() for path in Path(helium_proxy.__file__).parent.rglob("*.py"))
    named = set(re.findall(r'(?:FAIL_OPEN\.labels|failing_open)\("(\w+)"\)', source))
    started = {sample.labels["room"] for family in metrics.FAIL_OPEN.collect() for sample in family.samples}
    assert len(named) >= 6
    assert named <= started
