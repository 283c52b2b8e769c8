"""What docs/plans.md and the example plans say, checked against the code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from helium_proxy.plan import Plan
from helium_proxy.planner.cost import PlanWorker
from helium_proxy.planner.explain import explain_text
from helium_proxy.planner.pipeline import Planning, make_physical
from helium_proxy.planner.plan import load_plan, parse_plan
from helium_proxy.planner.settings import PlanSettings

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "plans.md").read_text(encoding="utf-8")
EXAMPLES = sorted((ROOT / "configs" / "workflows").glob("*.yaml"))


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_settings_named_in_the_page_exist() -> None:
    named = set(re.findall(r"`plans\.(\w+)`", PAGE))
    assert len(named) > 8
    assert named <= set(PlanSettings.model_fields)


def test_every_setting_is_described() -> None:
    for name, field in PlanSettings.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name


def test_routes_named_in_the_page_are_those_served(sites: Any) -> None:
    served = {
        (method, re.sub(r"\{\w+\}", "{id}", path))
        for path, methods in sites().app.openapi()["paths"].items()
        for method in (name.upper() for name in methods)
        if path.startswith("/v1/workflows")
    }
    named = {
        tuple(found.split()) for found in re.findall(r"^\| `((?:GET|POST|DELETE) /v1/workflows[^` ]*)`", PAGE, re.M)
    }
    assert named == served


def test_the_json_in_the_page_is_a_plan() -> None:
    import json

    (raw,) = blocks("json")
    assert parse_plan(json.loads(raw)).outputs == ("editor",)


def test_the_first_plan_builds(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ran: list[dict[str, Any]] = []

    def run(self: Plan, rows: list[dict[str, str]], *, base_url: str) -> list[dict[str, str]]:
        ran.append(self.to_dict(rows))
        return [{"editor": row["question"]} for row in rows]

    monkeypatch.setattr(Plan, "run", run)
    exec(blocks("python")[0], {})
    assert len(ran[0]["nodes"]) == 4
    assert "blue" in capsys.readouterr().out


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_can_be_planned(path: Path) -> None:
    plan = load_plan(path)
    assert plan.spec.workflow == path.stem
    assert len(plan.spec.nodes) >= 4
    physical = make_physical(plan, Planning())
    assert physical.submitted == len(plan.spec.nodes) * len(plan.spec.inputs)


def test_the_explanation_in_the_page_is_what_is_printed() -> None:
    (shown,) = blocks("text")
    planning = Planning(workers=[PlanWorker("w0")])
    printed = explain_text(make_physical(load_plan(ROOT / "configs/workflows/map-reduce.yaml"), planning))
    timing = re.compile(r"planned in \d+ ms")
    assert timing.sub("", printed).startswith(timing.sub("", shown))


def test_examples_are_plain_yaml() -> None:
    assert len(EXAMPLES) >= 3
    for path in EXAMPLES:
        assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)
