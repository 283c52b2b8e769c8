"""`docs/caching.md` says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prometheus_client import Metric
from pydantic_core import PydanticUndefined

from helium_proxy import metrics
from helium_proxy.reuse import ReuseSettings
from helium_proxy.reuse.key import IRRELEVANT, NESTED_IRRELEVANT
from helium_proxy.reuse.routes import _FAMILIES, Family

TEXT = (Path(__file__).parents[2] / "docs" / "caching.md").read_text(encoding="utf-8")
ROWS = dict(re.findall(r"^\| `(\w+)` \| (\S+) \|", TEXT, re.MULTILINE))


@pytest.mark.parametrize("name", sorted(ReuseSettings.model_fields))
def test_every_setting_is_documented_with_its_default(name: str) -> None:
    default = ReuseSettings.model_fields[name].default
    assert default is not PydanticUndefined
    shown = "none" if default is None else f"`{str(default).lower() if isinstance(default, bool) else default}`"
    assert ROWS.get(name) == shown


def test_no_setting_is_documented_that_is_not_there() -> None:
    section = TEXT.split("## Settings")[1].split("##")[0]
    assert set(re.findall(r"^\| `(\w+)`", section, re.MULTILINE)) == set(ReuseSettings.model_fields)


def test_the_fields_left_out_of_the_key_are_all_named() -> None:
    section = TEXT.split("**apart from** these fields:")[1].split("Any other field")[0]
    nested = {f"{outer}.{inner}" for outer, inners in NESTED_IRRELEVANT.items() for inner in inners}
    assert set(re.findall(r"`([\w.]+)`", section)) == IRRELEVANT | nested


def test_the_routes_are_named() -> None:
    assert not {route for route in _FAMILIES if f"`{route}`" not in TEXT}
    assert Family.OTHER not in _FAMILIES.values()


def test_the_metrics_exist() -> None:
    known: set[str] = set()
    family: Metric
    for family in metrics.REGISTRY.collect():
        known |= {family.name, f"{family.name}_total"}
    named = set(re.findall(r"`(helium_\w+)", TEXT))
    assert named
    assert named <= known
