"""One worker: what it is, what has been learned of it, and whether it may be called."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from urllib.parse import urlsplit

from helium_proxy.workers.breaker import Breaker
from helium_proxy.workers.settings import WorkerSpec, WorkersSettings

WorkerState = Literal["starting", "up", "down", "draining"]


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model as `/v1/models` lists it."""

    id: str
    max_model_len: int | None
    root: str | None
    raw: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Facts:
    """What a worker says of itself. Counts are blocks or calls; `kv_usage` is 0–1, live requests only."""

    models: tuple[ModelInfo, ...] = ()
    engine: str = "unknown"
    """``vllm``, ``helium`` (the embedded engine) or ``unknown``."""
    block_size: int | None = None
    num_blocks: int | None = None
    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    preemptions: int = 0
    prompt_tokens: int = 0
    """Prompt tokens since the engine started: a count that falls tells of a restart."""
    pinned_blocks: int | None = None
    pin_budget_blocks: int | None = None
    has_plugin: bool = False
    has_priority: bool = False
    """Whether it takes `priority` (vLLM with --scheduling-policy fcfs ignores it, or, before 0.32, refuses it)."""
    alone_s: tuple[float, float] | None = None
    """Seconds that it took, with nothing else to do, for a prefilled token and for a decode step."""

    @property
    def max_model_len(self) -> int | None:
        """The largest context of its models, in tokens."""
        return max((m.max_model_len for m in self.models if m.max_model_len), default=None)


def worker_id(url: str) -> str:
    """A short, stable id: host and port, e.g. ``10.0.0.7:8000``."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    path = parts.path.strip("/").replace("/", "-")
    return f"{parts.hostname}:{port}" + (f"-{path}" if path else "")


@dataclass(slots=True)
class Worker:
    """A worker and its mutable state; changed only on the event loop."""

    spec: WorkerSpec
    settings: WorkersSettings
    # -- state
    state: WorkerState = "starting"
    facts: Facts = field(default_factory=Facts)
    epoch: int = 0
    """Increases whenever the engine has (or may have) lost its KV cache: it came back from being down."""
    inflight: int = 0
    ahead: int = 0
    """Prewarms it is at; they are not among those in flight."""
    sent: int = 0
    """Calls and prewarms ever sent to it."""
    foreign_waiting: int = 0
    """Calls that waited in the engine when it was last asked, and cannot have been ours."""
    tells_cached: bool = False
    """Whether its answers say how much of a prompt was cached, where any was."""
    failed_checks: int = 0
    last_error: str | None = None
    breaker: Breaker = field(init=False)
    id: str = field(init=False)

    def __post_init__(self) -> None:
        self.id = worker_id(self.spec.url)
        self.breaker = Breaker(
            failures=self.settings.breaker_failures,
            window_s=self.settings.breaker_window_s,
            cooldown_s=self.settings.breaker_cooldown_s,
        )
        self.facts = replace(self.facts, block_size=self.spec.block_size, num_blocks=self.spec.kv_blocks)

    def __repr__(self) -> str:
        return f"<Worker {self.id} {self.state} inflight={self.inflight}>"

    @property
    def headers(self) -> dict[str, str]:
        """Headers every request to this worker carries."""
        key = self.spec.api_key
        return {"Authorization": f"Bearer {key.get_secret_value()}"} if key else {}

    def serves(self, model: str) -> bool:
        return any(m.id == model for m in self.facts.models)

    def available(self, now: float) -> bool:
        """Whether new calls may go here."""
        return self.state == "up" and self.breaker.allows(now)


# -- reading what the engine says

_SAMPLE = re.compile(
    rb"""^([a-zA-Z_:][\w:]*)(?:\{((?:[^"}]|"(?:[^"\\]|\\.)*")*)\})? ([-+]?[0-9][0-9.eE+-]*)""", re.MULTILINE
)
_LABEL = re.compile(rb'(\w+)="((?:[^"\\]|\\.)*)"')
_WANTED = {
    b"vllm:num_requests_running": "running",
    b"vllm:num_requests_waiting": "waiting",
    b"vllm:kv_cache_usage_perc": "kv_usage",
    b"vllm:num_preemptions_total": "preemptions",
    b"vllm:prompt_tokens_total": "prompt_tokens",
}


def read_metrics(facts: Facts, text: bytes, spec: WorkerSpec) -> Facts:
    """`facts` brought up to date from an exposition text; a metric it lacks leaves its field as it was.

    Values of several engines behind one URL (data parallelism) are added up, except the usage, of which the
    largest counts.
    """
    sums: dict[str, float] = {}
    block_size, num_blocks = facts.block_size, facts.num_blocks
    pinned, budget = facts.pinned_blocks, facts.pin_budget_blocks
    for match in _SAMPLE.finditer(text):
        name, labels, value = match.groups()
        key = _WANTED.get(name)
        if key is not None:
            number = float(value)
            if not math.isfinite(number):
                continue
            sums[key] = max(sums.get(key, 0.0), number) if key == "kv_usage" else sums.get(key, 0.0) + number
        elif name == b"vllm:cache_config_info":
            info = dict(_LABEL.findall(labels or b""))
            block_size = _whole(info.get(b"block_size")) or block_size
            num_blocks = _whole(info.get(b"num_gpu_blocks")) or num_blocks
        elif name.endswith(b"helium_pinned_blocks"):
            pinned = int(float(value))
        elif name.endswith(b"helium_pin_budget_blocks"):
            budget = int(float(value))
    return replace(
        facts,
        running=int(sums.get("running", facts.running)),
        waiting=int(sums.get("waiting", facts.waiting)),
        kv_usage=sums.get("kv_usage", facts.kv_usage),
        preemptions=int(sums.get("preemptions", facts.preemptions)),
        prompt_tokens=int(sums.get("prompt_tokens", facts.prompt_tokens)),
        block_size=spec.block_size or block_size,
        num_blocks=spec.kv_blocks or num_blocks,
        pinned_blocks=pinned,
        pin_budget_blocks=budget,
    )


def _whole(raw: bytes | None) -> int | None:
    return int(raw) if raw is not None and raw.isdigit() else None


def read_models(facts: Facts, payload: Any) -> Facts:
    """`facts` with the models of a `/v1/models` answer. Raises ValueError on an answer of another shape."""
    if not isinstance(payload, dict) or not isinstance(payload.get("data"), list):
        raise ValueError("not a list of models")
    models = tuple(
        ModelInfo(str(m["id"]), m.get("max_model_len"), m.get("root"), m)
        for m in payload["data"]
        if isinstance(m, dict) and "id" in m
    )
    owners = {m.raw.get("owned_by") for m in models}
    engine = "helium" if "helium-engine" in owners else "vllm" if "vllm" in owners else "unknown"
    return replace(facts, models=models, engine=engine)
