"""The planner's settings: bounds on untrusted plans, defaults for estimates, and the ablation switches."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field


class PlanSettings(BaseModel):
    """Submitted plans and the Batch API. Every table they fill is bounded here."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_body_bytes: int = Field(
        default=16 << 20, ge=1024, description="Largest body of POST /v1/workflows, bytes; above it: 413."
    )
    max_operators: int = Field(
        default=20_000,
        ge=1,
        description="Most operators of one plan: its nodes times its inputs, or a batch's lines.",
    )
    max_prompt_chars: int = Field(
        default=4 << 20,
        ge=1,
        description="Longest prompt of one operator, characters, outputs of other operators excluded.",
    )
    max_total_chars: int = Field(
        default=256 << 20,
        ge=1,
        description="All prompts of one plan together, characters, after expansion over the inputs.",
    )
    max_elements: int = Field(
        default=500_000,
        ge=1,
        description="Messages, texts and placeholders of all prompts together, after expansion over the inputs.",
    )
    default_output_tokens: float = Field(
        default=256.0,
        gt=0,
        description="Expected output tokens of an operator without max_tokens and without a profile.",
    )
    default_kv_tokens: int = Field(
        default=32_768, ge=1, description="KV capacity assumed for planning while no worker is known, tokens."
    )
    prune: bool = Field(default=True, description="Rewrite rule: drop operators that no output depends on.")
    cse: bool = Field(default=True, description="Rewrite rule: merge deterministic operators of equal signature.")
    cache_fetch: bool = Field(
        default=True, description="Rewrite rule: answer operators from the prompt cache while planning."
    )
    placement: bool = Field(default=True, description="Pass the plan's worker to the dispatcher as a preference.")
    ordering: bool = Field(default=True, description="Pass the plan's order and critical paths to the dispatcher.")
    effort: int = Field(
        default=45_000,
        ge=0,
        description="Scheduling effort: operator evaluations spent on improving the first schedule.",
    )
    max_in_flight: int = Field(
        default=2_048, ge=1, description="Calls of one job handed to the dispatcher at a time."
    )
    refused_wait_s: float = Field(
        default=1.0, gt=0, description="Seconds a job waits after the queue refused its only call in flight (429)."
    )
    max_refusals: int = Field(
        default=300, ge=0, description="Times in a row that a job waits so before the refused operator fails."
    )
    max_jobs: int = Field(
        default=256, ge=1, description="Jobs remembered; the oldest finished one makes room, else: 429."
    )
    max_live_operators: int = Field(
        default=200_000, ge=1, description="Operators of all unfinished jobs together; above it: 429."
    )
    max_jobs_per_tenant: int = Field(default=64, ge=1, description="Unfinished jobs of one tenant; above it: 429.")
    job_ttl_s: float = Field(default=3_600.0, gt=0, description="Seconds a finished job's results are kept.")
    max_kept_bytes: int = Field(
        default=512 << 20,
        ge=1,
        description="Results of all finished jobs together, bytes; the oldest are dropped.",
    )
    max_events: int = Field(default=4_096, ge=16, description="Progress events kept per job for late readers.")
    heartbeat_s: float = Field(default=15.0, gt=0, description="Seconds between comments on an idle event stream.")
    max_wait_s: float = Field(default=60.0, gt=0, description="Longest wait_s of GET /v1/workflows/{id}, seconds.")
    analyze_timeout_s: float = Field(
        default=3_600.0, gt=0, description="Longest run of POST /v1/workflows/explain?analyze=true, seconds."
    )
    files_dir: Path | None = Field(default=None, description="Folder for uploaded and result files; none: in memory.")
    max_file_bytes: int = Field(default=64 << 20, ge=1, description="Largest uploaded file, bytes; above it: 413.")
    max_files_bytes: int = Field(
        default=512 << 20, ge=1, description="All files together, bytes; expired ones are dropped first, then: 429."
    )
    max_files: int = Field(default=1_024, ge=1, description="Files kept in all; above it: 429.")
    file_ttl_s: float = Field(default=86_400.0 * 7, gt=0, description="Seconds an uploaded or result file is kept.")
