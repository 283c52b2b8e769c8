"""The dispatcher's state: calls that wait, workers and what they run. Plain data and its invariants; `policy.decide`
moves calls from the one to the other."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import InitVar, dataclass, field
from math import inf

from helium_proxy.dispatch.calls import Assignment, QueuedCall, Rank
from helium_proxy.dispatch.flights import Flights
from helium_proxy.dispatch.queue import Queue
from helium_proxy.dispatch.rates import DECODE_WEIGHT, Rates
from helium_proxy.dispatch.returns import Returns
from helium_proxy.dispatch.room import KvForecast
from helium_proxy.dispatch.settings import DispatchSettings
from helium_proxy.residency.index import Chain, Holders, WorkerResidency

__all__ = ["Assignment", "DispatchState", "QueuedCall", "WorkerState"]

_RUNS_REMEMBERED = 100_000
_LEAST_LEFT = 0.1
"""Of the work of what runs, what is taken to be left however long it has run."""
_PREEMPTED = 3.0
"""Blocks lost for each block of a call that is preempted: its own, and cached ones that it pushed out. In virtual
time, at an H100's rates, 2 to 4 are alike with three calls in a batch; with twenty, less than 3 gains nothing."""
UNBOUNDED_BLOCKS = 1 << 20
"""The mirror's size for a worker whose KV capacity is not known."""


@dataclass(slots=True, eq=False)
class WorkerState:
    """What the dispatcher knows of one worker."""

    id: str
    models: frozenset[str]
    block_size: int | None
    capacity: int | None
    """KV blocks; None: not known."""
    open: bool = True
    allowance: int | None = None
    """Calls that it may be given until it has shown that it is well; None: any number."""
    epoch: int = 0
    # -- state
    residency: WorkerResidency = field(init=False)
    rates: Rates = field(default_factory=Rates)
    running: dict[str, Assignment] = field(default_factory=dict)
    work: float = 0.0
    """Sum of `work` of what runs: prompt tokens."""
    worked_s: float = 0.0
    """Seconds that the engine has spent on it by `_worked_at`."""
    _worked_at: float = 0.0
    forecast: KvForecast = field(default_factory=KvForecast)
    version: int = 0
    """Increases when blocks may have become resident or been lost."""
    sought: tuple[object, tuple[float, QueuedCall] | None] = (None, None)
    """In which state of this worker and of another's lane a call to take over was last looked for, and the one found,
    with the work by which it would cost more here than there."""
    holders: InitVar[Holders | None] = None
    """Of the state that this is a worker of."""

    def __post_init__(self, holders: Holders | None) -> None:
        self.residency = WorkerResidency(self.capacity or UNBOUNDED_BLOCKS, holders)

    def __repr__(self) -> str:
        return f"<WorkerState {self.id} running={len(self.running)} work={self.work:.0f} {self.residency!r}>"

    def matches(self, call: QueuedCall, resident: int | None = None) -> tuple[int, int]:
        """Leading blocks of `call` that are resident here (where they are known already, `resident`), and those of
        them that running calls hold; remembered until the residency changes."""
        known = call.hits.get(self.id)
        if known is not None:
            version, before, held = known
            if version == self.version:
                return before, held
            if self.residency.still(call.chain, before, held):
                call.hits[self.id] = (self.version, before, held)
                return before, held
        now, held = self.residency.matches(call.chain, resident)
        call.hits[self.id] = (self.version, now, held)
        return now, held

    @property
    def block_step(self) -> float:
        """What it costs to keep a KV block from others for one step, in prompt tokens."""
        return self.rates.step_s / self.rates.prefill_s / self.capacity if self.capacity else 0.0

    def cost(self, call: QueuedCall, resident: int, held: int) -> float:
        """The work of `call` here if its first `resident` blocks are cached and running calls hold `held`, in prompt
        tokens: the engine could prefill so many in the same time.

        Prefill of what is not cached, plus its part of the decode steps: what the engine computes for it, or, where
        the KV limits the batch, the time for which it keeps its own part of the KV from others, whichever is more
        (the paper's token usage, section on the cost model, counts the same: tokens held times steps).
        """
        prefill = max(0, call.prompt_tokens - resident * call.block_size)
        step = DECODE_WEIGHT
        if self.capacity:
            own = len(call.chain) - held + self.anonymous_blocks(call)
            step = max(step, self.block_step * own)
        return prefill + step * call.output_tokens

    def backlog_s(self, now: float) -> float:
        """Engine seconds until what runs is done: its work less what has passed, for a busy engine does a second of
        work in a second. Calls of one batch end at nearly the same time, so that by their number alone a worker would
        look busy until the last of its answers has been delivered."""
        whole = self.work * self.rates.prefill_s
        return max(_LEAST_LEFT * whole, whole - self.worked_s - max(0.0, now - self._worked_at))

    def _settle(self, now: float) -> None:
        self.worked_s = self.work * self.rates.prefill_s - self.backlog_s(now)
        self._worked_at = now

    def anonymous_blocks(self, call: QueuedCall) -> int:
        """Blocks that `call` needs here beyond its chain."""
        return call.own_blocks(self.block_size or call.block_size)

    def room_for(self, call: QueuedCall) -> int:
        """Blocks that `call` needs here beside those that running calls hold."""
        return len(call.chain) - self.matches(call)[1] + self.anonymous_blocks(call)

    def saturated(self, settings: DispatchSettings) -> bool:
        """Whether no call at all would fit."""
        if self.allowance == 0:
            return True
        running = len(self.running)
        if not settings.admission or running == 0 or self.capacity is None:
            return running >= (settings.max_running if self.capacity or not running else settings.default_running)
        most = (settings.kv_share + settings.overcommit) * self.capacity
        return running >= settings.max_running or self.residency.referenced >= most

    def has_room(self, call: QueuedCall, settings: DispatchSettings, now: float, kept: int = 0) -> bool:
        """Whether the worker has room to run `call` to its end beside what runs and `kept` blocks that others may
        come back to, without preemption unless that costs little; an idle one always has."""
        running = len(self.running)
        if not settings.admission or running == 0:
            return running < settings.max_running
        if self.capacity is None:
            return running < settings.default_running
        if running >= settings.max_running:
            return False
        held = self.matches(call)[1]
        pinned = self.residency.pinned_beside(call.chain, held)
        prompt, own = len(call.chain) - held, self.anonymous_blocks(call)
        limit = min(settings.kv_share * self.capacity, self.capacity - pinned) - kept
        if not pinned:  # the engine would give up its pins rather than let a call wait
            limit += settings.overcommit * self.capacity * self.worth_preempting(call, prompt + own)
        prompts = self.residency.referenced + prompt
        if prompts + own + self.forecast.reserved <= limit:
            return True
        size, rates = self.block_size or call.block_size, self.rates
        end = now + rates.duration(0, call.output_tokens)
        return prompts + self.forecast.peak(now, 1 / (rates.step_s * size), own, end) <= limit

    def worth_preempting(self, call: QueuedCall, blocks: int) -> float:
        """From 0 to 1, how little it matters if `call` has to be preempted and its `blocks` are computed again.

        That stalls all that runs (`_PREEMPTED`). What is gained is the call's place in steps that take as long
        without it: where memory bandwidth bounds a step and prefill is fast, as on accelerators, and batches are
        small, this is more by far.
        """
        rates = self.rates
        gain_s = rates.bare_step_s * call.output_tokens
        loss_s = _PREEMPTED * rates.stall_s * blocks * (self.block_size or call.block_size) * len(self.running)
        return max(0.0, 1 - loss_s / gain_s) if gain_s else 0.0

    def full_batch(self, call: QueuedCall, losing: float) -> float:
        """From how many running calls on cached prefixes are worth more than a larger batch, if a share of `losing`
        of all calls comes back to one that is gone: a batch of twice the size would save half of a call's part of the
        steps, and a prefix that is lost costs its prefill. Not known before both have been measured: a batch is
        never full then."""
        rates = self.rates
        own = self.room_for(call) * (self.block_size or call.block_size)
        loss_s = losing * rates.stall_s * own
        return rates.bare_step_s * call.output_tokens / 2 / loss_s if rates.bare_step_s and loss_s else inf

    def admit(self, assignment: Assignment) -> None:
        call, now = assignment.call, assignment.started_at
        own = self.anonymous_blocks(call)
        self.residency.admit(call.id, call.chain, own, exact=call.exact)
        if self.allowance:
            self.allowance -= 1
        self.running[call.id] = assignment
        self.forecast.add(call.id, now + assignment.predicted_s, own)
        self._settle(now)
        self.work += assignment.work
        self.version += 1
        self.rates.started(call.id, call.prompt_tokens - assignment.cached_tokens, call.output_tokens, now)

    def release(self, call: str, now: float, extension: Chain = ()) -> tuple[Assignment, int] | None:
        """The call no longer runs here; its assignment, and how many of its prompt's blocks nobody holds any more.
        None when it was not known (the worker was cleared meanwhile)."""
        assignment = self.running.pop(call, None)
        if assignment is None:
            return None
        before = self.residency.referenced
        self.residency.finish(call, extension)
        self.forecast.remove(call)
        self._settle(now)
        self.work = max(0.0, self.work - assignment.work) if self.running else 0.0
        self.worked_s = max(0.0, self.worked_s - assignment.work * self.rates.prefill_s)
        self.version += 1
        return assignment, before - self.residency.referenced

    def clear(self) -> None:
        """The engine restarted: nothing is resident."""
        held = [a.call for a in self.running.values()]
        self.residency.clear()
        self.version += 1
        for call in held:
            self.residency.admit(call.id, (), self.anonymous_blocks(call))


class DispatchState:
    """Everything `decide` reads and writes."""

    def __init__(self, settings: DispatchSettings) -> None:
        self.settings = settings
        # -- state
        self.workers: dict[str, WorkerState] = {}  # changed by `join` and `leave`
        self.holders = Holders()
        self.queues: dict[str, Queue] = {}  # by model; an empty queue is removed
        self._run_started: OrderedDict[int, float] = OrderedDict()  # run_seq → its first arrival here
        self.started: set[int] = set()  # those of these runs of which a call was assigned
        self.returns = Returns()
        self.flights = Flights()
        self.unfinished = False  # the last decision has left calls that it could have placed
        self.decisions = 0
        self._sequence = 0
        self._turn = 0  # for round robin

    def __repr__(self) -> str:
        return f"<DispatchState {self.queued} queued, {len(self.workers)} workers>"

    def join(
        self,
        worker: str,
        models: frozenset[str],
        block_size: int | None,
        capacity: int | None,
        *,
        epoch: int = 0,
    ) -> WorkerState:
        """A worker that was not known. `capacity`: KV blocks; None: not known."""
        known = WorkerState(worker, models, block_size, capacity, epoch=epoch, holders=self.holders)
        self.workers[worker] = known
        return known

    def leave(self, worker: str) -> None:
        """A worker is gone, known or not; so are the calls that it runs."""
        self.lost(worker)
        known = self.workers.pop(worker, None)
        if known is not None:
            known.residency.close()
            for assignment in known.running.values():
                self.flights.withdrawn(assignment.call.flight)

    def lost(self, worker: str) -> None:
        """The cache of `worker` is gone."""
        self.returns.gone(worker)
        self.flights.gone(worker)

    @property
    def queued(self) -> int:
        return sum(len(q) for q in self.queues.values())

    def serving(self, model: str) -> list[WorkerState]:
        """Workers of `model`, open or not."""
        return [w for w in self.workers.values() if model in w.models]

    def awaits_its_own(self, call: QueuedCall) -> bool:
        """Whether the only worker that could answer `call` takes no calls now."""
        own = self.workers.get(call.prefer) if call.prefer is not None else None
        return own is not None and not own.open and call.model in own.models

    def enqueue(self, call: QueuedCall, now: float) -> None:
        call.rank = self._rank(call, now)
        if self.settings.keep_places:
            call.home = self.returns.arrived(call.chain, now)
        if self.settings.working_sets:
            self.flights.arrived(call.flight, call.workflow, now)
        queue = self.queues.get(call.model)
        if queue is None:
            queue = self.queues[call.model] = Queue()
        queue.push(call)

    def withdraw(self, call: QueuedCall) -> bool:
        """Takes a call out of the queue that nobody wants any more; False when it was no longer there."""
        if not self.take(call):
            return False
        self.flights.withdrawn(call.flight)
        return True

    def take(self, call: QueuedCall) -> bool:
        """Takes a call out of the queue; False when it was no longer there."""
        queue = self.queues.get(call.model)
        if queue is None or not queue.remove(call):
            return False
        if not queue:
            del self.queues[call.model]
        return True

    def release(self, worker: str, call: str, now: float, extension: Chain = (), *, ok: bool = True) -> bool:
        """`call` no longer runs on `worker`; where it is `ok`, its next one may be waited for. False when it was not
        known there."""
        known = self.workers.get(worker)
        released = known.release(call, now, extension) if known is not None else None
        if known is None or released is None:
            return False
        assignment, freed = released
        done = assignment.call
        self.flights.left(done.flight, now, last=ok and done.hints.last)
        if ok and self.settings.keep_places and known.capacity:
            whole_s = known.capacity * done.block_size * known.rates.stall_s
            freed = 0 if done.hints.last else freed
            self.returns.finished((done.group, done.node), done.chain, worker, freed, whole_s, now)
        return True

    def measure(self, assignment: Assignment, computed_tokens: float, output_tokens: float, now: float) -> None:
        """A call that has been released was answered with so many tokens."""
        worker = self.workers[assignment.worker]
        if worker.rates.finished(assignment.call.id, computed_tokens, output_tokens, now):
            peers = self.serving(assignment.call.model)
            busy, tokens = sum(w.rates.busy_s for w in peers), sum(w.rates.work for w in peers)
            for peer in peers:
                peer.rates.believe(busy / tokens)

    def begin(self, call: QueuedCall, worker: WorkerState, resident: int, blocks: int) -> None:
        """`call` was assigned to `worker`, where its first `resident` blocks are cached; it will write `blocks`."""
        run = call.hints.run_seq
        if run in self._run_started:
            self.started.add(run)
        self.flights.started(call.flight, worker.id, call.chain, resident, blocks)

    def begins_all(self, call: QueuedCall, worker: WorkerState) -> bool:
        """Whether calls like `call` may start on `worker` whatever runs are in flight there."""
        settings, running = self.settings, len(worker.running)
        limited = settings.working_sets and settings.admission and settings.ordering == "run"
        if not limited or not running or worker.capacity is None:
            return True
        return running < worker.full_batch(call, self.flights.habits(call.workflow).losing)

    def may_begin(self, call: QueuedCall, worker: WorkerState) -> bool:
        """Whether the run of `call` may begin on `worker` beside those in flight there, where not all may."""
        known = self.flights.habits(call.workflow).known
        blocks = 0 if known else len(call.chain) - worker.matches(call)[0] + worker.anonymous_blocks(call)
        return self.flights.fits(call.workflow, worker.id, blocks, worker.capacity or 0)

    def expire(self, now: float) -> None:
        """Gives up what has been waited for long enough."""
        self.returns.expire(now)
        self.flights.expire(now)

    def next_end(self) -> float | None:
        """When something is given up next."""
        ends = [end for end in (self.returns.next_end(), self.flights.next_end()) if end is not None]
        return min(ends, default=None)

    def next_turn(self) -> int:
        self._turn += 1
        return self._turn

    def _rank(self, call: QueuedCall, now: float) -> Rank:
        """(client's priority, virtual time, run, −remaining path, arrival): smaller is earlier.

        The virtual time is when the call's run began: older runs finish first, and the set of prefixes in use stays
        small. A deadline moves a call forward to the moment by which it must start.
        """
        self._sequence += 1
        hints = call.hints
        virtual, path = now, 0.0
        if self.settings.ordering == "run" and hints.run_seq:
            virtual = self._run_started.setdefault(hints.run_seq, now)
            while len(self._run_started) > _RUNS_REMEMBERED:
                self.started.discard(self._run_started.popitem(last=False)[0])
            path = -(hints.path_output_tokens + 0.25 * hints.path_prompt_tokens)
            if hints.plan_rank is not None:
                path = float(hints.plan_rank)  # a submitted plan has weighed paths against prefixes already
        if hints.deadline_s is not None:
            durations = [w.rates.duration(call.prompt_tokens, call.output_tokens) for w in self.serving(call.model)]
            latest = call.arrived_at + hints.deadline_s - 2 * min(durations, default=0.0)
            virtual = min(virtual, latest)
        return (hints.priority, virtual, hints.run_seq, path, self._sequence)
