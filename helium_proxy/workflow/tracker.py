"""The facade: calls go in as they arrive, start and finish; runs, hints and predictions come out.

Single-threaded and synchronous, driven by the caller's clock. Any unexpected failure while a call is placed is
counted and costs that call its place in a run, never its answer.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from helium_proxy.errors import InvalidRequest
from helium_proxy.types import Arrival, CallRequest, Outcome
from helium_proxy.workflow import export, tags
from helium_proxy.workflow.forecast import Forecast, Prediction, fill
from helium_proxy.workflow.graph import Call, Run
from helium_proxy.workflow.infer import Link, infer
from helium_proxy.workflow.nodes import Identities
from helium_proxy.workflow.prompt import Message, MessageCache, Prompt
from helium_proxy.workflow.recall import Recall
from helium_proxy.workflow.reply_index import ReplyIndex
from helium_proxy.workflow.runs import Runs
from helium_proxy.workflow.settings import WorkflowSettings
from helium_proxy.workflow.skeleton import Rendered
from helium_proxy.workflow.store import TemplateStore
from helium_proxy.workflow.tags import Tags
from helium_proxy.workflow.templates import Templates
from helium_proxy.workflow.told import Expected, RunEnd, WorkflowStatistics

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Tenant:
    replies: ReplyIndex
    identities: Identities


class Workflows:
    """All runs and templates of one proxy."""

    def __init__(
        self,
        settings: WorkflowSettings,
        store: TemplateStore | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.settings = settings
        self._offset = wall() - clock()
        # Mutable state, each bounded by the setting of its name.
        self._templates = Templates(settings, store)
        self._runs = Runs(settings, self._templates, self._forgetting)
        self._messages = MessageCache(settings.max_messages)
        self._tenants: OrderedDict[str, _Tenant] = OrderedDict()
        self._pending: dict[str, tuple[Message, ...]] = {}  # call in flight → its prompt
        self._recall = Recall()
        self._bodies: OrderedDict[tuple[Any, ...], str] = OrderedDict()  # what a retry repeats → its first call
        self._conflicts: Counter[str] = Counter()  # by field, of which there are a fixed few
        self._ignored: Counter[str] = Counter()
        self._sources: Counter[str] = Counter()  # where accepted tag values came from
        self._counts: dict[str, int] = dict.fromkeys(
            (
                "calls",
                "retries",
                "edges_tag",
                "edges_native",
                "edges_inferred",
                "failures",
            ),
            0,
        )

    def __repr__(self) -> str:
        return f"<Workflows {self._runs!r}, {self._templates!r}>"

    # -- a call's life -----------------------------------------------------------------------------------

    def arrive(self, request: CallRequest, now: float) -> Arrival:
        """Place a call in its run and say what is known about it.

        Raises `InvalidRequest` in strict mode for bad or contradictory tags, and nothing else.
        """
        self._counts["calls"] += 1
        try:
            return self._arrive(request, now)
        except InvalidRequest:
            raise
        except Exception:
            self._counts["failures"] += 1
            _log.exception("call %s could not be placed in a run", request.id)
            return Arrival(request.id, request.id, workflow="", node="call", template="", tenant=request.tenant)

    def _arrive(self, request: CallRequest, now: float) -> Arrival:
        read = tags.read(request.body, request.headers, self.settings)
        for source in read.sources.values():
            self._sources[source] += 1
        if read.conflicts or read.ignored:
            self._conflicts.update(read.conflicts)
            self._ignored.update(read.ignored)
        prompt = self._messages.read(request.tenant, request.route, request.model, request.body, now)
        if "x-stainless-retry-count" in request.headers and (
            again := self._retried(request, prompt, (prompt.whole, read.run, read.node), now)
        ):
            return again
        tenant = self._tenant(request.tenant)
        base = read.node or tenant.identities.name(prompt, request.body)

        home = self._runs.named(request.tenant, read, now)
        links: list[Link] = []
        if self.settings.inference and (read.parents is None or read.parents):
            known = read.parents is not None and not self._runs.ambiguous(home, read.parents)
            links = infer(tenant.replies, prompt, home, read.workflow, prefix_only=known)
            if read.parents is None and prompt.previous is not None:
                links = self._previous(request, tenant, prompt, home, links)
        if self.settings.strict and read.parents:
            self._runs.check_parents(home, base, read.parents)
        run = self._runs.choose(request, read, base, home, links if read.parents is None else [], now=now)
        call = Call(request.id, run, base, base, arrived_at=now, queued_at=now, prompt=prompt.whole)
        self._runs.enter(call, read, now)
        self._join(call, read, links)
        forecast, siblings = self._learn(call, prompt, request, now)
        self._pending[call.id] = prompt.messages
        hints = fill(
            forecast,
            call,
            siblings=siblings,
            output_tokens=read.output_tokens,
            priority=read.priority,
            deadline_s=read.deadline_s,
        )
        return Arrival(call.id, run.id, run.workflow, call.node, run.template, hints, tenant=run.tenant)

    def _retried(self, request: CallRequest, prompt: Prompt, key: tuple[Any, ...], now: float) -> Arrival | None:
        """The arrival of a retry: the same call once more. `key`: its prompt (tenant and model in it) and tags."""
        original = self._runs.call(self._bodies.get(key, ""))
        if request.headers["x-stainless-retry-count"].strip() in ("", "0") or original is None:
            self._bodies[key] = request.id
            self._bodies.move_to_end(key)
            while len(self._bodies) > self.settings.max_calls:
                self._bodies.popitem(last=False)
            return None
        run = original.run
        if run.state != "live":
            return None
        self._counts["retries"] += 1
        original.retries += 1
        if not original.live:
            original.state, original.fate = "queued", None
            self._pending[original.id] = prompt.messages
            run.in_flight += 1
            self._runs.touch(run, now)
        forecast = self._forecast(run, now)
        hints = fill(forecast, original, siblings=1, output_tokens=None, priority=None, deadline_s=None)
        return Arrival(
            original.id, run.id, run.workflow, original.node, run.template, hints, retry=True, tenant=run.tenant
        )

    def _tenant(self, name: str) -> _Tenant:
        tenant = self._tenants.get(name)
        if tenant is None:
            tenant = self._tenants[name] = _Tenant(
                ReplyIndex(self.settings.max_replies, self.settings.scan_chars),
                Identities(self.settings.max_identities),
            )
            if len(self._tenants) > self.settings.max_tenants:
                self._tenants.popitem(last=False)
        else:
            self._tenants.move_to_end(name)
        return tenant

    def _forgetting(self, run: Run) -> None:
        """Nothing can be linked to a forgotten run's calls, but their replies would hold them and it."""
        tenant = self._tenants.get(run.tenant)
        for call in run.calls:
            self._pending.pop(call, None)
            if tenant is not None:
                tenant.replies.forget(call)

    def _previous(
        self, request: CallRequest, tenant: _Tenant, prompt: Prompt, home: Run | None, links: list[Link]
    ) -> list[Link]:
        """A Responses call's `previous_response_id` names its parent outright."""
        assert prompt.previous is not None
        parent = self._runs.call(prompt.previous)
        if parent is None or parent.run.tenant != request.tenant:
            parent = tenant.replies.by_response(prompt.previous)
        if parent is None or parent.run.state != "live":
            return links
        if home is not None and home.explicit and parent.run is not home and parent.run.explicit:
            return links
        return [Link(parent, extends=True), *(link for link in links if link.parent is not parent)]

    def _join(self, call: Call, read: Tags, links: Iterable[Link]) -> None:
        """Add the call's incoming edges: named ones, or those that content shows."""
        run = call.run
        if read.parents is None:
            for link in links:
                if link.parent.run is run and run.link(link.parent, call, "data", "inferred", link.extends):
                    self._counts["edges_inferred"] += 1
        else:
            shown = {link.parent.id: link.extends for link in links}
            for name in read.parents:
                found = self._runs.parents_named(call, name, shown)
                if not found and not (
                    name not in (call.base, call.id) and run.wait(name, call, self.settings.max_placeholders)
                ):
                    self._ignored["parents"] += 1
                for parent in found:
                    linked = run.link(parent, call, "data", "tag", shown.get(parent.id, False))
                    if linked:
                        self._counts["edges_tag"] += 1
                    else:
                        self._ignored["parents"] += 1
        spawner = self._runs.spawner(call, read)
        if spawner is not None and run.link(spawner, call, "spawn", "native"):
            self._counts["edges_native"] += 1

    def _learn(self, call: Call, prompt: Prompt, request: CallRequest, now: float) -> tuple[Forecast | None, int]:
        """Teach the template this call; returns its forecast and how many siblings have arrived so far."""
        run = call.run
        run.place(call)
        if not self.settings.templates:
            return None, 1
        template = self._templates.get(run.template, run.workflow, run.tenant)
        template.arrive(call)
        template.static(call, prompt, request.body)
        forecast = self._forecast(run, now)
        if forecast is None:
            return None, 1
        family = (frozenset(parent.id for parent in call.parents), forecast.group(call))
        siblings = run.sibling_counts[family] = run.sibling_counts.get(family, 0) + 1
        return forecast, siblings

    def _forecast(self, run: Run, now: float) -> Forecast | None:
        return self._templates.forecast(run.template, now) if self.settings.templates else None

    def started(self, call: str, worker: str, now: float) -> None:
        """A worker has been given the call."""
        found = self._runs.call(call)
        if found is not None and found.live:
            found.state, found.worker, found.started_at = "running", worker, now

    def finished(self, call: str, outcome: Outcome, now: float) -> None:
        """The call has ended; unknown calls and second endings are ignored."""
        try:
            self._finished(call, outcome, now)
        except Exception:
            self._counts["failures"] += 1
            _log.exception("the end of call %s was not recorded", call)

    def _finished(self, id_: str, outcome: Outcome, now: float) -> None:
        messages = self._pending.pop(id_, ())
        call = self._runs.call(id_)
        if call is None or not call.live:
            return
        run = call.run
        call.state = "error" if outcome.fate == "error" else "done"
        call.fate, call.status = outcome.fate, outcome.status
        call.worker = outcome.worker or call.worker
        call.prompt_tokens, call.output_tokens = outcome.prompt_tokens, outcome.output_tokens
        call.cached_tokens = outcome.cached_tokens
        call.predicted_cached_tokens = outcome.predicted_cached_tokens
        call.queued_at = outcome.queued_at or call.queued_at
        call.started_at = outcome.started_at if outcome.started_at is not None else call.started_at
        call.first_token_at = outcome.first_token_at
        call.finished_at = now
        if outcome.reply_id and outcome.reply_id != call.id:
            call.reply_id = outcome.reply_id
            run.names.setdefault(outcome.reply_id, call)
        if call.state == "done":
            key = (call.base, call.iteration)
            run.finished_keys[key] = run.finished_keys.get(key, 0) + 1
            template = self._templates.peek(run.template)
            if template is not None:
                template.finish(call)
            if self.settings.inference:
                self._tenant(run.tenant).replies.remember(
                    call, messages, outcome.reply_text, outcome.reply_tool_calls, now
                )
        self._runs.left(run, now)

    def expected_next(self, call: str, now: float) -> list[Prediction]:
        """The calls that should follow now that `call` has finished, likeliest first."""
        found = self._runs.call(call)
        if not self.settings.lookahead or found is None or found.run.state != "live":
            return []
        try:
            forecast = self._forecast(found.run, now)
            if forecast is None:
                return []
            return forecast.expected_next(found, self.settings.lookahead_min_probability)
        except Exception:
            self._counts["failures"] += 1
            _log.exception("no prediction after call %s", call)
            return []

    def study(self, call: str, body: Mapping[str, Any], reply: str | None) -> None:
        """Learn what a finished chat call's prompt is made of: some time after `finished`, when nobody waits."""
        found = self._runs.call(call)
        template = None if found is None else self._templates.peek(found.run.template)
        if not self.settings.lookahead or found is None or template is None or found.state != "done":
            return
        try:
            self._recall.learn(found, body, reply, template)
        except Exception:
            self._counts["failures"] += 1
            _log.exception("the prompt of call %s was not learned", call)

    def output_tokens(self, tenant: str, workflow: str, node: str) -> float | None:
        """How long a node's replies were in this workflow's runs so far; None: not known. May be asked from any
        thread."""
        template = self._templates.peek(f"{tenant}/{workflow}" if tenant else workflow)
        stats = template.nodes.get((node, 1)) if template is not None else None
        return stats.output.mean if stats is not None and stats.output.n else None

    def rendered(self, call: str, prediction: Prediction) -> Rendered | None:
        """The prompt of a call that is expected after `call`, as far as it is known now."""
        found = self._runs.call(call)
        template = None if found is None else self._templates.peek(found.run.template)
        if found is None or template is None:
            return None
        try:
            return self._recall.render(found, template, (prediction.node, prediction.iteration))
        except Exception:
            self._counts["failures"] += 1
            _log.exception("no prompt of what follows call %s", call)
            return None

    def expected(self, run_id: str, now: float, tenant: str | None = None) -> list[Expected]:
        """The calls that a live run is still expected to make; of `tenant`'s run of that id, or of anybody's."""
        run = self._runs.find(run_id, tenant)
        forecast = None if run is None or run.state != "live" else self._forecast(run, now)
        if run is None or forecast is None:
            return []
        return [Expected(*key, calls, *forecast.lengths(key)) for key, calls in forecast.remaining(run).items()]

    # -- runs --------------------------------------------------------------------------------------------

    def tick(self, now: float) -> list[RunEnd]:
        """End idle runs, save templates that changed; returns the runs ended since the last tick."""
        self._runs.end_idle(now)
        self._templates.save(now)
        return [self._ended(run) for run in self._runs.take_ended()]

    def _ended(self, run: Run) -> RunEnd:
        return RunEnd(
            run.id,
            run.tenant,
            run.workflow,
            run.template,
            run.ended_by or "",
            len(run.calls) + run.dropped,
            run.last_at - run.created_at,
        )

    def end_run(self, run: str, tenant: str | None = None) -> bool:
        """End a live run by the API; False when there is none of that id. Of several tenants' it is the newest."""
        found = self._runs.find(run, tenant)
        if found is None or found.state != "live":
            return False
        self._runs.end(found, "api", found.last_at)
        return True

    def _clock(self, when: float) -> float:
        return round(when + self._offset, 6)

    def runs(
        self, limit: int = 100, workflow: str | None = None, state: str | None = None, tenant: str | None = None
    ) -> list[dict[str, Any]]:
        """Summaries of the newest runs first."""
        found = (
            run
            for run in self._runs.newest()
            if (workflow is None or run.workflow == workflow)
            and (state is None or run.state == state)
            and (tenant is None or run.tenant == tenant)
        )
        return [export.run_summary(run, self._clock) for run, _ in zip(found, range(limit), strict=False)]

    def run(self, run_id: str, tenant: str | None = None) -> dict[str, Any] | None:
        """One run's JSON: its calls and edges."""
        run = self._runs.find(run_id, tenant)
        return None if run is None else export.run_json(run, self._clock)

    def mermaid(self, run_id: str, tenant: str | None = None) -> str | None:
        """One run as a Mermaid flowchart."""
        run = self._runs.find(run_id, tenant)
        return None if run is None else export.mermaid(run)

    def dot(self, run_id: str, tenant: str | None = None) -> str | None:
        """One run as Graphviz DOT."""
        run = self._runs.find(run_id, tenant)
        return None if run is None else export.dot(run)

    def templates(self, tenant: str | None = None) -> list[dict[str, Any]]:
        """All templates' statistics, the most recently used first."""
        return [
            export.template_json(template)
            for template in self._templates.all()
            if tenant is None or template.tenant == tenant
        ]

    def statistics(self) -> WorkflowStatistics:
        """Counts and sizes."""
        return WorkflowStatistics(
            **self._counts,
            tag_conflicts=self._conflicts.total(),
            tags_ignored=self._ignored.total(),
            conflicts_by_field=dict(self._conflicts),
            ignored_by_field=dict(self._ignored),
            tags_by_source=dict(self._sources),
            **self._runs.sizes,
            replies=sum(len(tenant.replies) for tenant in self._tenants.values()),
            messages=len(self._messages),
            identities=sum(len(tenant.identities) for tenant in self._tenants.values()),
            templates=len(self._templates),
        )

    def close(self) -> None:
        """Save templates and close the store."""
        self._templates.close()
