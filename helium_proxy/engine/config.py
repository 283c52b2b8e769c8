"""What an embedded engine is told at start. Names follow vLLM's flags."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from helium_proxy.errors import ConfigError

from .profile import PROFILES, Profile

Policy = Literal["fcfs", "priority"]


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """An engine's settings; what is None follows the profile. Raises `ConfigError` on settings that cannot work."""

    model: str = "demo"
    profile: str | Profile = "instant"
    block_size: int | None = None
    num_blocks: int | None = None
    """Blocks in the pool. As in vLLM, the first is a placeholder, so that one fewer can be used."""
    max_model_len: int | None = None
    """Prompt and reply together; None: 32,768, or what the KV cache holds if that is less."""
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    policy: Policy = "fcfs"
    pin_budget: float = 0.3
    """The share of the blocks that pins may hold."""
    pin_ttl_s: float = 300.0
    """How long a pin lasts whose directive does not say."""
    seed: int = 0
    """Mixed into the replies, not into block hashes."""
    time_scale: float = 1.0
    """Seconds of the engine's time that pass per second of real time (HTTP face only)."""
    api_key: str | None = None
    kv_events: str | None = None
    """ZMQ endpoint to publish KV events on, e.g. ``tcp://127.0.0.1:5557``; port 0 lets the system choose."""
    kv_events_replay: str | None = None
    kv_events_topic: str = "kv-events"

    def __post_init__(self) -> None:
        if isinstance(self.profile, str) and self.profile not in PROFILES:
            raise ConfigError(f"profile: {self.profile!r} is none of {', '.join(PROFILES)}")
        for name, value in (
            ("block_size", self.block),
            ("num_blocks", self.blocks - 1),
            ("max_num_seqs", self.seqs),
            ("max_model_len", self.context - 1),
        ):
            if value < 1:
                raise ConfigError(f"{name} is too small")
        if self.policy not in ("fcfs", "priority"):
            raise ConfigError(f"policy: {self.policy!r} is neither fcfs nor priority")
        if self.batched_tokens < self.seqs:
            raise ConfigError("max_num_batched_tokens must be at least max_num_seqs")
        if self.context > self.kv_tokens:
            raise ConfigError(f"max_model_len ({self.context}) exceeds the KV cache's {self.kv_tokens} tokens")
        if not 0.0 <= self.pin_budget <= 1.0:
            raise ConfigError("pin_budget is a share, from 0 to 1")
        if self.time_scale <= 0:
            raise ConfigError("time_scale must be positive")

    @property
    def timing(self) -> Profile:
        return self.profile if isinstance(self.profile, Profile) else PROFILES[self.profile]

    @property
    def block(self) -> int:
        """Tokens a block."""
        return self.timing.block_size if self.block_size is None else self.block_size

    @property
    def blocks(self) -> int:
        return self.timing.kv_tokens // max(1, self.block) + 1 if self.num_blocks is None else self.num_blocks

    @property
    def kv_tokens(self) -> int:
        """What the usable blocks hold."""
        return (self.blocks - 1) * self.block

    @property
    def context(self) -> int:
        """The longest sequence served, in tokens."""
        return min(32_768, self.kv_tokens) if self.max_model_len is None else self.max_model_len

    @property
    def seqs(self) -> int:
        return self.timing.max_num_seqs if self.max_num_seqs is None else self.max_num_seqs

    @property
    def batched_tokens(self) -> int:
        if self.max_num_batched_tokens is not None:
            return self.max_num_batched_tokens
        return max(self.timing.max_num_batched_tokens, self.seqs)
