"""Settings of the dispatch room; the switches among them exist for ablations and for operators in trouble."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class DispatchSettings(BaseModel):
    """How queued calls are ordered and placed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    placement: Literal["cost", "round-robin", "least-loaded"] = Field(
        "cost", description="`cost`: by resident prefix and backlog. The others ignore what workers hold."
    )
    ordering: Literal["run", "fifo"] = Field(
        "run", description="`run`: older runs first, within a run the longest remaining path. `fifo`: by arrival."
    )
    admission: bool = Field(True, description="Hold calls back so that engines keep their own queues short.")
    kv_share: float = Field(
        0.95,
        gt=0,
        le=1,
        description="Share of a worker's KV that running calls may fill at their peak; the rest keeps prefixes.",
    )
    overcommit: float = Field(
        0.25,
        ge=0,
        le=1,
        description="By how much of the KV their peak may exceed that where a preemption costs next to nothing.",
    )
    keep_places: bool = Field(
        True, description="Keep room for a finished call's continuation while that pays, and place it where that ran."
    )
    working_sets: bool = Field(
        True,
        description="Begin no more runs on a worker than find what they come back to, while that pays.",
    )
    max_running: int = Field(256, ge=1, description="Calls at once on one worker.")
    default_running: int = Field(32, ge=1, description="The same, for a worker whose KV capacity is not known.")
    max_queue: int = Field(10_000, ge=1, description="Calls waiting at the most; further ones are answered 429.")
    window: int = Field(32, ge=1, description="Calls at the head of a lane among which the next one is chosen.")
    no_worker_wait_s: float = Field(
        10.0, ge=0, description="How long a call waits for a worker of its model to come up before 503."
    )
    default_output_tokens: int = Field(256, ge=1, description="Expected output of a call nothing is known of.")
