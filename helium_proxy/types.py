"""The values that pass between the rooms, from the request down to the worker.

A call's life: `CallRequest` (gateway) → `Arrival` with `Hints` (workflow) → `Estimate` (planner) → queued and
assigned (dispatch) → sent (workers) → `Outcome`, which travels back up and corrects every prediction.
Everything here is plain data: no room's logic, so that each room can be tested with values alone. What is made anew
for every call and has many fields is a struct of msgspec: a frozen dataclass takes several times as long to make.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

Fate = Literal["computed", "hit", "coalesced", "error"]
"""What became of a call: computed by a worker, answered from the prompt cache, joined to an equal call in
flight, or failed."""


class CallRequest(msgspec.Struct, frozen=True):
    """One call as the client sent it."""

    id: str
    """The response id, e.g. ``chatcmpl-…``; unique."""
    tenant: str
    route: str
    """The path, e.g. ``/v1/chat/completions``."""
    model: str
    body: Mapping[str, Any]
    """The parsed JSON body, Helium's own fields still in it. Never mutated."""
    headers: Mapping[str, str]
    """Names in lower case."""


@dataclass(frozen=True, slots=True)
class Hints:
    """What the workflow knows about a call beyond its own text. Every field has a neutral default, so that an
    untagged first call is simply one with no hints."""

    output_tokens: float | None = None
    """Expected output length from the node's profile; None: never seen."""
    path_calls: int = 0
    """Calls that must still follow this one in sequence (longest chain) before the run ends."""
    path_output_tokens: float = 0.0
    """Expected output tokens along that chain, this call's own excluded."""
    path_prompt_tokens: float = 0.0
    """Expected prompt tokens along that chain, this call's own excluded."""
    siblings_to_come: int = 0
    """Calls sharing this call's parents (its fan-out) that the template expects and that have not arrived."""
    last: bool = False
    """(Almost) nothing ever follows this call, as runs that have ended show, or the plan says."""
    run_seq: int = 0
    """Arrival order of the run within the process: smaller is older. 0: no run."""
    row: int | None = None
    """The input of a submitted plan that it works on; None: not part of one."""
    plan_rank: int | None = None
    """Place in the order of a submitted plan (0 is first); None: not part of one."""
    priority: int = 0
    """The client's; lower is earlier."""
    deadline_s: float | None = None
    """Seconds from arrival within which the client wants the answer."""


POOLED_ROUTES = frozenset({"/v1/embeddings", "/v1/rerank", "/v1/score"})
"""Routes whose calls generate nothing."""

UNNAMED = "~"
"""What the names of workflows begin with that nobody has named."""


class Arrival(msgspec.Struct, frozen=True):
    """What the workflow room says of a call that has just arrived."""

    call: str
    """`CallRequest.id`, or the id of the original when this is a client's retry of it."""
    run: str
    workflow: str
    node: str
    """With its occurrence, e.g. ``critic#2``."""
    template: str
    """Key of the template (workflow name or learned fingerprint) this run follows."""
    hints: Hints = msgspec.field(default_factory=Hints)
    retry: bool = False
    tenant: str = ""

    @property
    def share(self) -> str:
        """Whose turn its calls wait for among the tenant's: its workflow's. What nobody has named takes turns as one:
        until their edges show, the parts of one workflow look like several, and to take turns would be to run all of
        it side by side, each part evicting what the others come back to."""
        return UNNAMED if self.workflow.startswith(UNNAMED) else self.template


class Outcome(msgspec.Struct, frozen=True):
    """How a call ended, in tokens and seconds (monotonic clock, same as every `now`)."""

    fate: Fate
    worker: str | None = None
    status: int = 200
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    predicted_cached_tokens: int | None = None
    output_tokens: int | None = None
    queued_at: float = 0.0
    started_at: float | None = None
    first_token_at: float | None = None
    finished_at: float = 0.0
    reply_text: str | None = None
    """The assistant's text when small enough to keep: what inference matches later prompts against."""
    reply_tool_calls: tuple[str, ...] = ()
    """Ids of the tool calls in the reply."""
    reply_id: str | None = None
    """The response id the client saw (parents may name it)."""
