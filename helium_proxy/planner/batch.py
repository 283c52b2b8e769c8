"""Batches in OpenAI's form: the lines of a file as the independent operators of one plan.

Equal deterministic lines are computed once, known ones come from the prompt cache, and the rest are ordered and
placed by their shared prefixes.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson
import structlog
from pydantic import ValidationError

from helium_proxy.errors import HeliumError, InvalidRequest, NotFound, QueueFull
from helium_proxy.planner.files import FileStore
from helium_proxy.planner.graph import NodeTemplate, Operator, OperatorGraph, make_template
from helium_proxy.planner.jobs import Job, JobStore
from helium_proxy.planner.plan import Message

log = structlog.get_logger(__name__)

ENDPOINTS = ("/v1/chat/completions", "/v1/completions")
_MAX_ERRORS = 100
_ENDED = ("completed", "failed", "cancelled")


@dataclass(frozen=True, slots=True)
class LineError:
    """What is wrong with a line of the input file; `line` counts from 1."""

    line: int
    message: str
    code: str = "invalid_request"
    param: str | None = None

    def view(self) -> dict[str, Any]:
        return {"code": self.code, "message": self.message, "param": self.param, "line": self.line}


class InvalidLines(InvalidRequest):
    """The input file cannot be run; the lines that are wrong, the first ones at least."""

    def __init__(self, errors: list[LineError]) -> None:
        super().__init__(f"{len(errors)} invalid lines")
        self.errors = errors


@dataclass(slots=True)
class Batch:
    """One batch. Times in seconds since the epoch."""

    id: str
    tenant: str
    endpoint: str
    input_file_id: str
    completion_window: str
    metadata: Mapping[str, str]
    created_at: int
    expires_at: int
    # Mutable from here on.
    status: str = "validating"
    errors: list[LineError] = field(default_factory=list)
    custom_ids: list[str] = field(default_factory=list)
    job: Job | None = None
    task: asyncio.Task[None] | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    times: dict[str, int] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<Batch {self.id} {self.status}>"

    counts: tuple[int, int, int] = (0, 0, 0)
    """Requests in all, completed, failed; of a running batch from its job."""

    def view(self) -> dict[str, Any]:
        """OpenAI's batch object."""
        total, completed, failed = self.counts
        if self.job is not None:
            states = [row.state for row in self.job.run.rows]
            total, completed, failed = len(states), states.count("completed"), states.count("failed")
        stamps = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "errors": {"object": "list", "data": [e.view() for e in self.errors]} if self.errors else None,
            "input_file_id": self.input_file_id,
            "completion_window": self.completion_window,
            "status": self.status,
            "output_file_id": self.output_file_id,
            "error_file_id": self.error_file_id,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            **{f"{stamp}_at": self.times.get(stamp) for stamp in stamps},
            "request_counts": {"total": total, "completed": completed, "failed": failed},
            "metadata": dict(self.metadata),
        }


def parse_lines(data: bytes, endpoint: str, max_lines: int) -> tuple[list[str], OperatorGraph]:
    """The custom ids and operators of an input file. Raises `InvalidLines`."""
    lines = data.splitlines()
    if len(lines) > max_lines:
        raise InvalidLines([LineError(max_lines + 1, f"{len(lines):,} lines: at most {max_lines:,} are taken")])
    errors: list[LineError] = []
    custom_ids: list[str] = []
    operators: dict[int, Operator] = {}
    seen: set[str] = set()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            custom_id, template = _line(line, endpoint)
            if custom_id in seen:
                raise InvalidRequest(f"custom_id {custom_id[:64]!r} is used twice", param="custom_id")
        except InvalidRequest as error:
            errors.append(LineError(number, error.message, param=error.param))
            if len(errors) >= _MAX_ERRORS:
                break
            continue
        seen.add(custom_id)
        operators[len(custom_ids)] = Operator(len(custom_ids), template, len(custom_ids), {}, {})
        custom_ids.append(custom_id)
    if not errors and not custom_ids:
        errors.append(LineError(1, "the file has no requests", code="empty_file"))
    if errors:
        raise InvalidLines(errors)
    outputs = tuple({"response": id_} for id_ in operators)
    return custom_ids, OperatorGraph("batch", operators, outputs)


def _line(line: bytes, endpoint: str) -> tuple[str, NodeTemplate]:
    try:
        raw = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise InvalidRequest("a line is a JSON object")
    custom_id, body = raw.get("custom_id"), raw.get("body")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= 512:
        raise InvalidRequest("'custom_id' must be a string of 1 to 512 characters", param="custom_id")
    if raw.get("method", "POST") != "POST":
        raise InvalidRequest("'method' must be POST", param="method")
    if raw.get("url") != endpoint:
        raise InvalidRequest(f"'url' must be the batch's endpoint, {endpoint}", param="url")
    if not isinstance(body, dict):
        raise InvalidRequest("'body' must be an object", param="body")
    params = {key: value for key, value in body.items() if key not in ("model", "messages", "prompt")}
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise InvalidRequest("'model' must be a string", param="body.model")
    if params.get("stream"):
        raise InvalidRequest("a batch request cannot stream", param="body.stream")
    if endpoint == "/v1/completions":
        if not isinstance(body.get("prompt"), str):
            raise InvalidRequest("'prompt' must be a string", param="body.prompt")
        return custom_id, make_template("request", model, params, None, body["prompt"], literal=True)
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest("'messages' must be a list of messages", param="body.messages")
    try:
        checked = [Message.model_validate(message) for message in messages]
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise InvalidRequest(f"messages: {first['msg']}", param="body.messages") from None
    return custom_id, make_template("request", model, params, checked, None, literal=True)


def result_lines(custom_ids: list[str], job: Job) -> tuple[bytes, bytes]:
    """The output and the error file of a batch that has ended."""
    used: set[str] = set()  # ids given out: equal requests share an answer, but not its id
    good: list[bytes] = []
    bad: list[bytes] = []
    for index, (custom_id, row) in enumerate(zip(custom_ids, job.run.rows, strict=True)):
        line: dict[str, Any] = {"id": f"batch_req_{job.id[-12:]}_{index}", "custom_id": custom_id}
        if row.state == "completed":
            result = row.bodies["response"]
            body = dict(result.body)
            if (given := body.get("id")) in used:
                body["id"] = f"{given}-{index}"
            used.add(str(given))
            line["response"] = {"status_code": result.status, "request_id": body.get("id"), "body": body}
            line["error"] = None
            good.append(orjson.dumps(line))
        elif row.state == "failed":
            id_ = job.plan.graph.outputs[index]["response"]
            response = {"status_code": job.run.operators[id_].status, "request_id": None}
            line["response"] = {**response, "body": {"error": row.errors["response"]}}
            line["error"] = None
            bad.append(orjson.dumps(line))
        else:
            line["response"] = None
            line["error"] = {"code": "batch_cancelled", "message": "the batch was cancelled before this request ran"}
            bad.append(orjson.dumps(line))
    return b"".join(line + b"\n" for line in good), b"".join(line + b"\n" for line in bad)


class Batches:
    """Every batch the process remembers, and the files."""

    def __init__(self, jobs: JobStore) -> None:
        self._jobs = jobs
        self._settings = jobs.deps.settings
        self._wall = jobs.deps.wall
        self.files = FileStore(self._settings, self._wall)
        # All mutable state: batches, oldest first.
        self._batches: OrderedDict[str, Batch] = OrderedDict()

    def __repr__(self) -> str:
        return f"<Batches {len(self._batches)} {self.files!r}>"

    def create(self, tenant: str, raw: Any) -> Batch:
        """Start a batch; its file is checked in the background. Raises `InvalidRequest`, `NotFound`, `QueueFull`."""
        if not isinstance(raw, dict):
            raise InvalidRequest("a batch is a JSON object")
        endpoint, window, metadata = raw.get("endpoint"), raw.get("completion_window", "24h"), raw.get("metadata")
        if endpoint not in ENDPOINTS:
            raise InvalidRequest(f"'endpoint' must be one of {', '.join(ENDPOINTS)}", param="endpoint")
        if window != "24h":
            raise InvalidRequest("'completion_window' must be 24h", param="completion_window")
        metadata = {} if metadata is None else metadata
        if (
            not isinstance(metadata, dict)
            or len(metadata) > 16
            or not all(isinstance(v, str) and len(k) <= 64 and len(v) <= 512 for k, v in metadata.items())
        ):
            raise InvalidRequest("'metadata' holds at most 16 short strings", param="metadata")
        input_file_id = raw.get("input_file_id")
        if not isinstance(input_file_id, str):
            raise InvalidRequest("'input_file_id' must be a file's id", param="input_file_id")
        self.files.get(tenant, input_file_id)
        self.files.check_room()
        self._make_room(tenant)
        now = int(self._wall())
        batch = Batch(
            f"batch_{secrets.token_hex(12)}",
            tenant,
            endpoint,
            input_file_id,
            window,
            metadata,
            created_at=now,
            expires_at=now + 24 * 3600,
        )
        self._batches[batch.id] = batch
        batch.task = asyncio.create_task(self._drive(batch))
        return batch

    def _make_room(self, tenant: str) -> None:
        live = [batch for batch in self._batches.values() if batch.status not in _ENDED]
        if sum(batch.tenant == tenant for batch in live) >= self._settings.max_jobs_per_tenant:
            raise QueueFull("too many unfinished batches", retry_after=60)
        while len(self._batches) >= self._settings.max_jobs:
            oldest = next((batch.id for batch in self._batches.values() if batch.status in _ENDED), None)
            if oldest is None:
                raise QueueFull("too many unfinished batches", retry_after=60)
            del self._batches[oldest]

    def _turn(self, batch: Batch, status: str) -> None:
        batch.status = status
        batch.times[status] = int(self._wall())

    async def _drive(self, batch: Batch) -> None:
        """A batch's life. A cancellation asked for by the tenant goes to the job, not to this task."""
        try:
            data = await self.files.content(batch.tenant, batch.input_file_id)

            def make() -> OperatorGraph:
                batch.custom_ids, graph = parse_lines(data, batch.endpoint, self._settings.max_operators)
                return graph

            if batch.status == "validating":
                batch.job = await self._jobs.submit_graph(batch.tenant, make, "batch")
                if batch.status == "validating":
                    self._turn(batch, "in_progress")
                else:  # cancelled meanwhile
                    await self._jobs.cancel(batch.job)
                await batch.job.done.wait()
                await self._finalize(batch, batch.job)
            if batch.status == "cancelling":
                self._turn(batch, "cancelled")
        except InvalidLines as error:
            batch.errors = error.errors
            self._turn(batch, "failed")
        except HeliumError as error:
            batch.errors = [LineError(0, error.message, code=error.code or error.type, param=error.param)]
            self._turn(batch, "failed")
        except Exception:
            log.exception("batch.failed", batch=batch.id)
            batch.errors = [LineError(0, "internal error", code="internal_error")]
            self._turn(batch, "failed")
        finally:
            if batch.status in _ENDED:  # the files hold the results from here on
                batch.job = None
                batch.custom_ids = []

    async def _finalize(self, batch: Batch, job: Job) -> None:
        cancelled = batch.status == "cancelling"
        if not cancelled:
            self._turn(batch, "finalizing")
        good, bad = await asyncio.to_thread(result_lines, batch.custom_ids, job)
        states = [row.state for row in job.run.rows]
        batch.counts = (len(states), states.count("completed"), states.count("failed"))
        if good:
            stored = await self.files.put(batch.tenant, f"{batch.id}_output.jsonl", "batch_output", good, own=True)
            batch.output_file_id = stored.id
        if bad:
            stored = await self.files.put(batch.tenant, f"{batch.id}_error.jsonl", "batch_output", bad, own=True)
            batch.error_file_id = stored.id
        self._turn(batch, "cancelled" if cancelled else "completed")

    async def cancel(self, batch: Batch) -> None:
        """Ask for the end of a batch; what has been answered is kept."""
        if batch.status in ("validating", "in_progress"):
            self._turn(batch, "cancelling")
            if batch.job is not None and batch.job.task is not None:
                batch.job.task.cancel()

    def get(self, tenant: str, id_: str) -> Batch:
        batch = self._batches.get(id_)
        if batch is None or batch.tenant != tenant:
            raise NotFound(f"no batch {id_[:64]!r}", param="batch_id")
        return batch

    def mine(self, tenant: str) -> list[Batch]:
        """The tenant's batches, newest first."""
        return [batch for batch in reversed(self._batches.values()) if batch.tenant == tenant]

    async def close(self) -> None:
        """Stop every batch; called before the jobs are closed."""
        tasks = [batch.task for batch in self._batches.values() if batch.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
