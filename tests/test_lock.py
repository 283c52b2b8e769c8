"""The lock file: it holds what pyproject.toml asks for, and nothing of the machine that made it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK = (ROOT / ".ci/requirements.txt").read_text()


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_requirement_is_locked():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(line for lines in extras.values() for line in lines)]
    names = {normal(re.match(r"[\w.-]+", line)[0]) for line in wanted} - {"helium-proxy"}  # type: ignore[index]
    locked = {normal(name) for name in re.findall(r"^([\w.-]+)==", LOCK, re.M)}
    assert names <= locked
    assert {"hatchling", "editables"} <= locked  # what an editable install is built with


def test_the_lock_names_versions_and_no_place():
    for line in LOCK.splitlines():
        assert re.fullmatch(r"[\w.-]+==[\w.!+]+( ; .+)?", line), line
