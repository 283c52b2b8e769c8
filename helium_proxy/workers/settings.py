"""Settings of the workers room."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator


class WorkerSpec(BaseModel):
    """One worker: the base URL of an OpenAI-compatible engine."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str = Field(description="Base URL, without `/v1`.")
    api_key: SecretStr | None = Field(None, description="Sent to this worker as `Authorization: Bearer`.")
    tokenizer: str | None = Field(
        None,
        description="Folder with the model's `tokenizer.json` and chat template. By default the model folder the "
        "worker names is used if it exists here; without one, prompts are compared as text.",
    )
    kv_blocks: int | None = Field(
        None, ge=1, description="KV capacity in blocks, where the worker's `/metrics` does not tell."
    )
    block_size: int | None = Field(None, ge=1, description="Tokens per KV block, likewise.")

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        """A worker may be given by its URL alone."""
        return {"url": value} if isinstance(value, str) else value

    @field_validator("url")
    @classmethod
    def _base(cls, url: str) -> str:
        if not url.startswith(("http://", "https://")):
            raise ValueError("must start with http:// or https://")
        parts = urlsplit(url)
        if not parts.hostname or parts.port == 0:  # (reading a port that is none raises ValueError)
            raise ValueError("must name a host, and a port if any, as in http://gpu-1:8000")
        return url.rstrip("/").removesuffix("/v1")


class WorkersSettings(BaseModel):
    """How workers are watched and called."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    health_interval_s: float = Field(5.0, gt=0, description="Between health checks of a worker that is up.")
    health_timeout_s: float = Field(5.0, gt=0, description="A health check that takes longer has failed.")
    unhealthy_after: int = Field(3, ge=1, description="Failed checks in a row before a worker is down.")
    retry_down_s: float = Field(
        0.5, gt=0, description="Between health checks of a worker that is down or failed its last one."
    )
    metrics_interval_s: float = Field(1.0, gt=0, description="Between readings of a worker's `/metrics`.")
    models_interval_s: float = Field(30.0, gt=0, description="Between readings of a worker's `/v1/models`.")
    connect_timeout_s: float = Field(5.0, gt=0, description="To open a connection to a worker.")
    read_timeout_s: float = Field(
        3600.0,
        gt=0,
        description="Longest silence of a worker in an answer; one that is no stream is silent until it is whole.",
    )
    keepalive_s: float = Field(
        4.0, gt=0, description="Idle connections are dropped after this; below the engine's own limit (vLLM: 5)."
    )
    max_attempts: int = Field(3, ge=1, description="Sends of one call in all, before its first byte.")
    retry_budget: float = Field(
        0.2, ge=0, description="Retries of 5xx answers, as a share of recent calls (lost connections are free)."
    )
    retry_backoff_s: float = Field(0.05, ge=0, description="Before a retry; doubled each time, up to half less.")
    breaker_failures: int = Field(5, ge=1, description="Failed sends within the window that may open the breaker.")
    breaker_window_s: float = Field(10.0, gt=0, description="The breaker's window.")
    breaker_cooldown_s: float = Field(1.0, gt=0, description="Before an open breaker lets a call through again.")
    probe: bool = Field(
        True,
        description="Find out by one call of a token whether a vLLM worker takes priorities and has the plugin.",
    )
    calibrate: bool = Field(
        True,
        description="Time a vLLM worker that was probed and is idle with some short calls, to know its rates.",
    )
    kv_events: bool = Field(
        True, description="Follow the KV events of workers that publish them, instead of guessing what is evicted."
    )
    max_workers: int = Field(256, ge=1, description="Workers at the most.")
