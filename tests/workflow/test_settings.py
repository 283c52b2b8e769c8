"""The settings: documented, bounded, strict about names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from helium_proxy.workflow import WorkflowSettings

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_every_setting_says_what_it_is() -> None:
    for name, field in WorkflowSettings.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name


@pytest.mark.parametrize(
    "bad", [{"max_runz": 1}, {"max_runs": 0}, {"run_idle_s": 0}, {"lookahead_min_probability": 2}]
)
def test_bad_settings_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        WorkflowSettings.model_validate(bad)


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        WorkflowSettings().strict = True  # type: ignore[misc]


def test_settings_named_in_the_docs_exist() -> None:
    text = "".join((DOCS / page).read_text() for page in ("workflows.md", "tagging.md"))
    named = set(re.findall(r"`workflow\.(\w+)", text))
    assert named
    assert named <= set(WorkflowSettings.model_fields)
