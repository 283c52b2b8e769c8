"""docs/metrics.md is what the code says, and docs/operations.md names things that exist."""

from __future__ import annotations

import re
import runpy

import yaml

from helium_proxy.config import known_keys

from .compose import COMPOSE, ROOT, load

DOCS = ROOT / "docs"
MANUAL = (DOCS / "operations.md").read_text()


def test_the_table_of_metrics_is_the_codes() -> None:
    module = runpy.run_path(str(DOCS / "build_metrics.py"), run_name="build_metrics")
    page = (DOCS / "metrics.md").read_text()
    assert module["filled"](page) == page, "run python docs/build_metrics.py"
    assert page.count("| `helium_") == len(module["families"]()) > 50


def test_caps_are_as_documented() -> None:
    from helium_proxy import metrics

    page = (DOCS / "metrics.md").read_text()
    for label, cap in metrics._CAPS.items():
        assert f"{cap} {label}s" in page


def test_settings_named_exist() -> None:
    known = set(known_keys())
    named = set(re.findall(r"`((?:server|reuse|dispatch|store|workflow|directives|log|tracing)\.\w+)`", MANUAL))
    assert named
    assert named <= known, named - known
    for variable in re.findall(r"HELIUM_(\w+)=", MANUAL):
        assert variable.lower().replace("__", ".") in known, variable


def test_profiles_and_pictures_named_exist() -> None:
    profiles = {profile for service in load()["services"].values() for profile in service["profiles"]}
    assert set(re.findall(r"--profile (\w+)", MANUAL)) == profiles
    for picture in re.findall(r"!\[.*?\]\((.+?)\)", MANUAL):
        assert (DOCS / picture).is_file(), picture


def test_versions_and_grace_are_those_of_the_compose_file() -> None:
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    pinned = re.search(r":-(v[\d.]+)}", services["worker"]["image"])
    assert pinned is not None
    assert f"pinned to {pinned[1]}" in MANUAL
    assert f"stop_grace_period: {services['proxy']['stop_grace_period']}" in MANUAL
