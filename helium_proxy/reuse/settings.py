"""Settings of the prompt cache and of coalescing."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator


class ReuseSettings(BaseModel):
    """Never ask twice: the prompt cache and the coalescing of equal calls in flight."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    enabled: bool = Field(True, description="Serve deterministic calls from the prompt cache.")
    backend: Literal["memory", "sqlite", "redis"] = Field("memory", description="Where answers are kept.")
    bytes: int = Field(
        256 * 1024 * 1024, ge=1024, description="Most bytes held (memory, SQLite); the least recently used go."
    )
    entries: int = Field(100_000, ge=1, description="Most answers held (memory, SQLite).")
    ttl_s: float = Field(24 * 3600.0, gt=0, description="Seconds after which an answer is no longer served.")
    max_entry_bytes: int = Field(1024 * 1024, ge=256, description="Larger answers are not kept.")
    sqlite_path: Path = Field(Path("helium-cache.db"), description="The SQLite backend's file.")
    redis_url: SecretStr | None = Field(None, description="The Redis backend's URL, e.g. redis://cache:6379/0.")
    redis_namespace: str = Field("helium", min_length=1, description="Prefix of every Redis key.")
    redis_timeout_s: float = Field(0.05, gt=0, description="Longest a call waits for Redis; then it is a miss.")
    coalesce: bool = Field(True, description="Join equal deterministic calls that are in flight.")
    coalesce_window_bytes: int = Field(
        8 * 1024 * 1024, ge=1024, description="Bytes of one answer in flight kept for those who join late."
    )

    @model_validator(mode="after")
    def _redis_needs_a_url(self) -> Self:
        if self.backend == "redis" and self.redis_url is None:
            raise ValueError("redis_url is required with backend: redis")
        return self
