"""What the workflow room tells of itself: runs that ended, calls still expected, counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Expected:
    """Calls of one place in the template that a live run should still make. Lengths in tokens; None: not known."""

    node: str
    iteration: int
    calls: int
    prompt_tokens: float | None
    output_tokens: float | None


@dataclass(frozen=True, slots=True)
class RunEnd:
    """A run that has ended."""

    run: str
    tenant: str
    workflow: str
    template: str
    reason: str
    """final, idle, api, evicted or replaced."""
    calls: int
    seconds: float
    """From its first call's arrival to its last event."""


@dataclass(frozen=True, slots=True)
class WorkflowStatistics:
    """Counts since start, and sizes now."""

    calls: int
    runs_started: int
    runs_ended: int
    runs_live: int
    runs_kept: int
    calls_kept: int
    merged_runs: int
    retries: int
    edges_tag: int
    edges_native: int
    edges_inferred: int
    tag_conflicts: int
    tags_ignored: int
    conflicts_by_field: Mapping[str, int]
    ignored_by_field: Mapping[str, int]
    tags_by_source: Mapping[str, int]
    """A field of `tags.FIELDS`, an alias's, or `session` for unusable session headers."""
    failures: int
    """Calls that could not be placed because of an error of ours."""
    replies: int
    messages: int
    identities: int
    templates: int
