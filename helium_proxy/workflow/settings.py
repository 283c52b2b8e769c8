"""The workflow room's settings: what is read from requests, how much is remembered, and for how long."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class WorkflowSettings(BaseModel):
    """Every table named here is bounded by the setting beside it; the oldest entry leaves first."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    strict: bool = Field(
        False, description="Refuse a request with bad or contradictory tags (400) instead of ignoring the tag."
    )
    inference: bool = Field(True, description="Recover parents and runs of untagged calls from their content.")
    native_headers: bool = Field(True, description="Read session headers of known agents and proxies.")
    templates: bool = Field(True, description="Learn templates from runs and predict live runs from them.")
    lookahead: bool = Field(True, description="Predict the calls that follow a call, for `directives.lookahead`.")
    lookahead_min_probability: float = Field(
        0.5, ge=0.0, le=1.0, description="Less likely ones are not predicted at all (`directives.min_probability`)."
    )

    run_idle_s: float = Field(
        300.0, gt=0, description="Seconds without a call in flight or arriving after which a run has ended."
    )
    max_runs: int = Field(2_000, ge=1, description="Runs remembered, live and done together.")
    max_calls: int = Field(100_000, ge=1, description="Calls remembered over all runs.")
    max_calls_per_run: int = Field(10_000, ge=1, description="Calls remembered in one run.")
    max_placeholders: int = Field(
        256, ge=0, description="Parents of one run that were named and have not arrived yet."
    )
    max_tenants: int = Field(1_024, ge=1, description="Tenants whose recent replies are remembered.")

    max_replies: int = Field(10_000, ge=1, description="Recent replies remembered per tenant for inference.")
    max_messages: int = Field(
        20_000, ge=16, description="Distinct messages whose digests are cached, over all tenants."
    )
    max_identities: int = Field(2_000, ge=1, description="Learned node identities remembered per tenant.")
    scan_chars: int = Field(
        65_536, ge=1_024, description="Characters of new text searched for earlier replies, per call."
    )

    max_templates: int = Field(1_000, ge=1, description="Templates kept, in memory and in the store.")
    max_template_nodes: int = Field(512, ge=1, description="Nodes of one template.")
    max_static_chars: int = Field(
        65_536, ge=0, description="Characters of leading messages in which a node's static prefix is sought."
    )
    template_refresh_s: float = Field(
        0.25,
        ge=0,
        description="Least time between two compilations of a live template, per 64 edges; after 5 runs 8 times it.",
    )
    save_interval_s: float = Field(
        5.0, ge=0, description="Least time between two writes of one template to the store."
    )

    max_tag_chars: int = Field(128, ge=1, le=4_096, description="Longest workflow, run, node or parent name.")
    max_parents: int = Field(64, ge=1, le=4_096, description="Most parents one call may name.")
