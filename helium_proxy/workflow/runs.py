"""The table of runs: which one a call belongs to, when they merge, and when they end."""

from __future__ import annotations

import re
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence

import xxhash

from helium_proxy.errors import InvalidRequest
from helium_proxy.types import UNNAMED, CallRequest
from helium_proxy.workflow.graph import Call, Run, below
from helium_proxy.workflow.infer import Link
from helium_proxy.workflow.settings import WorkflowSettings
from helium_proxy.workflow.tags import Tags
from helium_proxy.workflow.templates import Templates

_OCCURRENCE = re.compile(r"(.+)#\d+")
_LEAKED = 10
"""Idle times after which a run ends although the end of a call of its own was never reported."""
_MAX_ALIASES = 1_000
"""Names of one run: of programs that it spawns, of sessions that turn out to be its own."""


class Runs:
    """Live and remembered runs, bounded in runs and in calls; `forgetting` is told of each that leaves."""

    def __init__(self, settings: WorkflowSettings, templates: Templates, forgetting: Callable[[Run], None]) -> None:
        self._settings = settings
        self._templates = templates
        self._forgetting = forgetting
        # Mutable state.
        self._all: OrderedDict[int, Run] = OrderedDict()  # by seq: oldest first
        self._live: OrderedDict[int, Run] = OrderedDict()  # by seq: least recently active first
        self._done: OrderedDict[int, None] = OrderedDict()  # seqs of ended runs: first to end first
        self._names: dict[tuple[str, str], Run] = {}  # (tenant, id or another of its names) → newest run
        self._aliases: dict[int, list[tuple[str, str]]] = {}  # seq → its keys in _names
        self._calls: dict[str, Call] = {}  # every remembered call by id
        self._agents: OrderedDict[tuple[str, str, str, str], Call] = OrderedDict()  # agent → its latest call
        self._ended: deque[Run] = deque(maxlen=settings.max_runs)
        self._seq = 0
        self._started = self._finished = self._merged = 0

    def __repr__(self) -> str:
        return f"<Runs {len(self._live)} live of {len(self._all)}, {len(self._calls)} calls>"

    @property
    def sizes(self) -> dict[str, int]:
        return {
            "runs_started": self._started,
            "runs_ended": self._finished,
            "runs_live": len(self._live),
            "runs_kept": len(self._all),
            "calls_kept": len(self._calls),
            "merged_runs": self._merged,
        }

    # -- looking up --------------------------------------------------------------------------------------

    def call(self, call: str) -> Call | None:
        return self._calls.get(call)

    def of(self, tenant: str, run: str) -> Run | None:
        return self._names.get((tenant, run))

    def find(self, run: str, tenant: str | None = None) -> Run | None:
        """The newest run of that id, of `tenant` or of any."""
        if tenant is not None:
            return self.of(tenant, run)
        return next((found for found in self.newest() if found.id == run), None) or next(
            (found for (_, name), found in self._names.items() if name == run), None
        )

    def newest(self) -> Iterator[Run]:
        return reversed(self._all.values())

    def named(self, tenant: str, read: Tags, now: float) -> Run | None:
        """The live run that tags or session headers name, made when a tag names a new one."""
        run = None
        if read.run is not None:
            run = self._live_of(tenant, read.run)
            if run is None and read.spawned_by is not None:
                run = self._live_of(tenant, read.spawned_by)
                if run is not None:
                    self._alias(run, read.run)
            return run
        if read.session is not None:
            session = read.session
            name = f"{session.client}:{session.session}"
            run = self._live_of(tenant, name)
            if session.parent_session is not None:
                spawner = self._live_of(tenant, f"{session.client}:{session.parent_session}")
                if spawner is not None and run is None:
                    self._alias(spawner, name)
                    run = spawner
        return run

    def _live_of(self, tenant: str, name: str) -> Run | None:
        run = self._names.get((tenant, name))
        return run if run is not None and run.state == "live" else None

    def parents_named(self, call: Call, name: str, shown: Mapping[str, bool]) -> list[Call]:
        """The calls that a parent's name means.

        A response id or a name with its occurrence means that call. A bare node name that occurs several times
        means those occurrences whose replies the prompt shows; else those that no call of this node has used;
        else the latest.
        """
        run = call.run
        named = run.calls.get(name)
        if named is None and _OCCURRENCE.fullmatch(name):
            named = run.names.get(name)
        if named is not None:
            return [] if named is call else [named]
        same = [other for other in run.occurrences.get(name, ()) if other is not call]
        if not same:
            other = run.names.get(name)
            return [other] if other is not None and other is not call else []
        if len(same) == 1:
            return same
        visible = [other for other in same if other.id in shown]
        if visible:
            return visible
        unused = [other for other in same if all(child.base != call.base for child in other.children)]
        return unused or same[-1:]

    def ambiguous(self, run: Run | None, names: Sequence[str]) -> bool:
        """Whether content is needed to tell which calls of `run` these parents' names mean."""
        return run is not None and any(len(run.occurrences.get(name, ())) > 1 for name in names)

    def check_parents(self, run: Run | None, base: str, names: Sequence[str]) -> None:
        """Raise `InvalidRequest` when a new call of node `base` with these parents would be its own ancestor."""
        occurrences = run.occurrences.get(base, ()) if run is not None else ()
        if base in names and not occurrences:
            raise InvalidRequest(f"helium.parents: {base} names itself", param="helium.parents")
        if run is None:
            return
        number = run.counts.get(base, 0) + 1
        children = run.waiting.get(base if number == 1 else f"{base}#{number}", ())
        descendants = {child.id for child in children} | below(children)
        for name in names:
            parent = run.find(name)
            if parent is not None and parent.id in descendants:
                raise InvalidRequest(f"helium.parents: {base} and {name} make a cycle", param="helium.parents")

    # -- entering ----------------------------------------------------------------------------------------

    def choose(
        self, request: CallRequest, read: Tags, base: str, home: Run | None, links: Sequence[Link], *, now: float
    ) -> Run:
        """The run a call joins: the one named, else the largest that its content shows, else a new one.

        Runs that content shows to be one are merged, unless tags tell them apart.
        """
        runs = list({link.parent.run.seq: link.parent.run for link in links}.values())
        if home is None and read.run is None and runs:
            home = min(runs, key=lambda run: (not run.explicit, -len(run.calls), run.seq))
        if home is None:
            home = self._start(request, read, base, now)
        for run in runs:
            if run is not home and not run.explicit and run.state == "live":
                self._merge(run, home)
        if read.session is not None and read.run is None:
            name = f"{read.session.client}:{read.session.session}"
            other = self._live_of(home.tenant, name)
            if other is None:
                self._alias(home, name)
        if read.workflow is not None and not home.named:
            self._rename(home, read.workflow)
        return home

    def _start(self, request: CallRequest, read: Tags, base: str, now: float) -> Run:
        self._seq += 1
        self._started += 1
        session = read.session
        if read.run is not None:
            id_ = read.run
        elif session is not None and session.client != "traceparent":
            id_ = session.session
        else:
            id_ = f"run-{xxhash.xxh3_64_hexdigest(request.id.encode())}"
        template, workflow = self._template(request.tenant, read.workflow, base)
        run = Run(
            id=id_,
            tenant=request.tenant,
            workflow=workflow,
            template=template,
            seq=self._seq,
            explicit=read.run is not None,
            named=read.workflow is not None,
            created_at=now,
            last_at=now,
        )
        self._all[run.seq] = run
        self._live[run.seq] = run
        self._alias(run, id_)
        while len(self._all) > self._settings.max_runs:
            self._evict(run)
        return run

    def _template(self, tenant: str, workflow: str | None, base: str) -> tuple[str, str]:
        """Key and workflow name: as tagged, or the one that this node was last seen in."""
        if workflow is None:
            known = self._templates.home(tenant, base)
            if known is not None and (template := self._templates.peek(known)) is not None:
                return known, template.workflow
            workflow = f"{UNNAMED}{base}"
        return (f"{tenant}/{workflow}" if tenant else workflow), workflow

    def _alias(self, run: Run, name: str) -> None:
        key = (run.tenant, name)
        self._names[key] = run
        keys = self._aliases.setdefault(run.seq, [])
        keys.append(key)
        if len(keys) > _MAX_ALIASES:
            oldest = keys.pop(1)  # the first is its id
            if self._names.get(oldest) is run:
                del self._names[oldest]

    def _rename(self, run: Run, workflow: str) -> None:
        """An untagged run turns out to be of a named workflow."""
        self._withdraw(run)
        run.template, run.workflow = self._template(run.tenant, workflow, "")
        run.named = True
        self._adopt(run, list(run.calls.values()))

    def enter(self, call: Call, read: Tags, now: float) -> None:
        """Add `call` to its run."""
        run = call.run
        match = _OCCURRENCE.fullmatch(call.base)
        if match is not None:
            call.base = match[1]
        if len(run.calls) >= self._settings.max_calls_per_run:
            self._forget_one(run)
        run.add(call)
        run.in_flight += 1
        run.final = run.final or read.final
        self._calls[call.id] = call
        if not run.named:
            self._templates.settle(run.tenant, call.base, run.template)
        self.touch(run, now)
        while len(self._calls) > self._settings.max_calls and len(self._all) > 1:
            self._evict(run)

    def spawner(self, call: Call, read: Tags) -> Call | None:
        """The call that caused a new agent or session to be: the latest of the one that its headers name as
        parent, when this is the new one's first."""
        session, tenant = read.session, call.run.tenant
        if session is None:
            if read.spawned_by is None or len(call.run.occurrences[call.base]) > 1:
                return None
            return next((c for c in reversed(call.run.calls.values()) if c is not call), None)
        own = (tenant, session.client, session.session, session.agent or "")
        first = own not in self._agents
        parent = None
        if first and session.parent_session is not None:
            parent = self._agents.get((tenant, session.client, session.parent_session, ""))
        elif first and session.agent is not None:
            parent = self._agents.get((tenant, session.client, session.session, session.parent_agent or ""))
        self._agents[own] = call
        self._agents.move_to_end(own)
        while len(self._agents) > 4 * self._settings.max_runs:
            self._agents.popitem(last=False)
        return parent if parent is not None and parent.run is call.run else None

    def touch(self, run: Run, now: float) -> None:
        run.last_at = now
        if run.seq in self._live:
            self._live.move_to_end(run.seq)

    def left(self, run: Run, now: float) -> None:
        """A call of `run` has ended."""
        run.in_flight = max(0, run.in_flight - 1)
        self.touch(run, now)
        if run.final and run.in_flight == 0 and run.state == "live":
            self.end(run, "final", now)

    # -- merging -----------------------------------------------------------------------------------------

    def _withdraw(self, run: Run) -> None:
        template = self._templates.peek(run.template)
        if template is not None:
            template.withdraw(run)
            if template.empty:
                self._templates.drop(template.key)

    def _adopt(self, run: Run, calls: Sequence[Call]) -> None:
        """Teach `run`'s template calls that were counted elsewhere."""
        if not self._settings.templates:
            return
        template = self._templates.get(run.template, run.workflow, run.tenant)
        for call in calls:
            template.arrive(call)
            if call.state == "done":
                template.finish(call)
            if not run.named:
                self._templates.settle(run.tenant, call.base, run.template)

    def _merge(self, source: Run, target: Run) -> None:
        """Make `source`'s calls `target`'s."""
        self._merged += 1
        self._withdraw(source)
        moved = list(source.calls.values())
        for call in moved:
            target.add(call)
        for name, waiting in source.waiting.items():
            target.waiting.setdefault(name, []).extend(waiting)
        for mine, theirs in (
            (target.key_counts, source.key_counts),
            (target.finished_keys, source.finished_keys),
            (target.sibling_counts, source.sibling_counts),
        ):
            for key, count in theirs.items():
                mine[key] = mine.get(key, 0) + count
        target.in_flight += source.in_flight
        target.created_at = min(target.created_at, source.created_at)
        target.last_at = max(target.last_at, source.last_at)
        target.final = target.final or source.final
        for key in self._aliases.pop(source.seq, ()):
            if self._names.get(key) is source:
                self._alias(target, key[1])
        source.state, source.ended_by = "done", "merged"
        self._all.pop(source.seq, None)
        self._live.pop(source.seq, None)
        self._adopt(target, moved)

    # -- ending ------------------------------------------------------------------------------------------

    def end(self, run: Run, reason: str, now: float) -> None:
        """End a live run; its template learns from the whole of it."""
        run.state, run.ended_by = "done", reason
        self._live.pop(run.seq, None)
        self._done[run.seq] = None
        self._finished += 1
        self._ended.append(run)
        template = self._templates.peek(run.template)
        if template is not None:
            template.close(run)
            if not run.named and template.single:
                self._templates.drop(run.template)  # a call is no workflow until it recurs
            else:
                self._templates.touch(run.template, now)

    def end_idle(self, now: float) -> None:
        idle = self._settings.run_idle_s
        for run in list(self._live.values()):
            if now - run.last_at < idle:
                break
            if run.in_flight == 0 or now - run.last_at >= _LEAKED * idle:
                self.end(run, "idle", now)

    def take_ended(self) -> list[Run]:
        """Runs ended since this was last asked."""
        ended = list(self._ended)
        self._ended.clear()
        return ended

    def _evict(self, spare: Run) -> None:
        """Forget the oldest run, a done one if there is any."""
        if not self._done:
            oldest = next(run for run in self._live.values() if run is not spare)
            self.end(oldest, "evicted", oldest.last_at)
        victim = self._all.pop(self._done.popitem(last=False)[0])
        for key in self._aliases.pop(victim.seq, ()):
            if self._names.get(key) is victim:
                del self._names[key]
        for call in victim.calls:
            self._calls.pop(call, None)
        self._forgetting(victim)
        victim.scatter()

    def _forget_one(self, run: Run) -> None:
        victim = next((call for call in run.calls.values() if not call.live), None)
        if victim is None:
            return
        template = self._templates.peek(run.template)
        if template is not None:
            template.close_call(victim)
        run.forget(victim)
        self._calls.pop(victim.id, None)
