"""Which waiting call goes to which worker, and which waits: `decide`.

Three steps, each a function below:

1. *Place* what has arrived into the lane of the worker where it would be done cheapest::

       backlog of the worker + calls in its lane + 2 · (prefill of what is not cached there + decode)

   in engine seconds. Cached counts what is resident and what the calls in the lane will bring, so siblings gather
   where their prefix is until the lane costs more than computing the prefix a second time; then, and only then,
   they are split.
2. *Fill* workers that have room from their own lanes. Within the workflow whose turn it is, the call goes first that
   finds most of its prompt cached, most of all where running calls hold it already: calls that share a prefix then
   run side by side, which takes less KV, so that more of them fit into a batch. Runs under way go well before new
   ones: each that begins takes room from what those will come back to, and where prefill is slow no more begin than
   find what they come back to (`flights.py`). Rank decides among equals. If that call does not fit, smaller ones pass
   it where a fuller batch is worth more than what they push out, and else nobody.
3. *Take over*: a worker with room and an empty lane takes calls from the lane that would be done last, as long as it
   would be done with them earlier.

Late binding: a lane is an intention, and what waits in it can still be taken over when something changes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from heapq import nsmallest
from itertools import islice

from helium_proxy.dispatch.calls import Assignment, QueuedCall, Reason
from helium_proxy.dispatch.placement import Sites, until_done
from helium_proxy.dispatch.queue import Lane, Queue
from helium_proxy.dispatch.state import DispatchState, WorkerState

_HELD_BONUS = 0.3
"""A prompt token that running calls hold counts for so much more than one that is merely cached."""
_STARTED_BONUS = 0.5
"""What a call gains on others, as a share of its prompt, since its run has begun: what that left would be lost."""
_ALONE = 0.5
"""A call of whose blocks running calls hold a smaller share is taken to share none of them that matter."""
_BEHIND = 256
"""Waiting calls of a workflow, among which one that shares is sought behind the window."""
_ALIKE = 4
"""So many of a node."""
_PLACED_AT_ONCE = 256
"""Calls: after a burst of arrivals the rest is left to the next decision, so that nothing else waits long."""
_PASSES = 256
"""So many calls may go before one of lower rank until none may any more."""
_SEARCHED = 4096
"""Waiting calls of a workflow, among which those are sought that may begin."""
_ASKED = 8
"""Of these, runs that are new to a worker: they are much alike, and to see whether one may begin costs more."""
_BACKFILLS = 16
"""So many may go before one that finds no room."""


def decide(state: DispatchState, now: float) -> list[Assignment]:
    """Assigns what can start now; the assigned calls have left the queue and are running in `state`.

    O(workers) table look-ups for a call that has arrived and O(window) for one that starts. `state.unfinished` says
    whether there is more to decide at once.
    """
    assignments: list[Assignment] = []
    state.expire(now)
    state.unfinished = False
    models = list(state.queues)
    state.decisions += 1
    first = state.decisions % max(1, len(models))
    for model in models[first:] + models[:first]:  # else one model could have all places of a worker of several
        queue = state.queues[model]
        workers = [w for w in state.workers.values() if w.open and model in w.models]
        if workers:
            assignments += _decide_model(state, queue, workers, now)
        if not queue:
            del state.queues[model]
    return assignments


def _decide_model(state: DispatchState, queue: Queue, workers: list[WorkerState], now: float) -> list[Assignment]:
    ready = {w.id for w in workers}
    for name in [name for name in queue.lanes if name not in ready]:
        queue.close(name)
    if queue.unplaced:
        sites = Sites(state, queue, workers, now)
        arrived = [call for call in queue.unplaced.values() if not state.awaits_its_own(call)]
        for call in nsmallest(_PLACED_AT_ONCE, arrived, key=lambda c: c.rank):
            sites.place(call)
        state.unfinished = state.unfinished or len(arrived) > _PLACED_AT_ONCE
    assignments: list[Assignment] = []
    for worker in workers:
        lane = queue.lanes.get(worker.id)
        if lane and lane.blocked != _seen(state, lane, worker):
            assignments += _fill(state, queue, lane, worker, now)
    if state.settings.placement == "cost":
        idle = [w for w in workers if not queue.lanes.get(w.id) and not w.saturated(state.settings)]
        behind = {w: until_done(queue, w, now) for w in workers if queue.lanes.get(w.id)} if idle else {}
        longest = max(behind.values(), default=0.0)
        for worker in idle:
            if worker.backlog_s(now) < longest:
                assignments += _take_over(state, queue, behind, worker, now)
                longest = max(behind.values(), default=0.0)
    return assignments


def _seen(state: DispatchState, lane: Lane, worker: WorkerState) -> tuple[int, int, int, int]:
    """Which of the calls of `lane` may run on `worker` has changed when this has."""
    return lane.stamp, worker.version, state.returns.kept(worker.id), state.flights.gone_from(worker.id)


# -- fill


def _fill(state: DispatchState, queue: Queue, lane: Lane, worker: WorkerState, now: float) -> list[Assignment]:
    settings = state.settings
    assignments: list[Assignment] = []
    kept = state.returns.kept(worker.id)
    while lane and not worker.saturated(settings):
        first = queue.turn(lane)[0][1]
        call = _next(state, queue, lane, worker, first)
        if call is not None and not worker.has_room(call, settings, now, kept):
            passed, call = call, _backfill(state, queue, lane, worker, call, now, kept)
            passed.passed += _PASSES // _BACKFILLS if call is not None else 0
        elif call is not None and call is not first:
            first.passed += 1
        if call is None:
            lane.blocked = _seen(state, lane, worker)
            break
        assignments.append(_start(state, queue, call, worker, call.reason, now))
    return assignments


def _next(
    state: DispatchState, queue: Queue, lane: Lane, worker: WorkerState, first: QueuedCall
) -> QueuedCall | None:
    """The call of `lane` that `worker` runs next; None: all of them are of runs that may not begin yet. `first`: the
    one whose turn it is."""
    urgent = first.hints.deadline_s is not None or first.passed >= _PASSES
    if urgent or state.settings.ordering == "fifo":
        return first
    eligible = _eligible(state, queue, lane, worker)
    best = _best(state, worker, eligible)
    if best is None or len(eligible) < state.settings.window or not worker.running:
        return best
    if worker.matches(best)[1] >= _ALONE * len(best.chain):
        return best
    further = _behind(state, lane, worker, best, everyone=state.begins_all(first, worker))
    return _best(state, worker, [best, *further])


def _behind(
    state: DispatchState, lane: Lane, worker: WorkerState, best: QueuedCall, *, everyone: bool
) -> list[QueuedCall]:
    """Calls of the same workflow behind the window, as urgent to their clients: a few of each node, since those are
    much alike. `best`, of the window, would add a prefix of its own to what runs; one of these may not. `everyone`:
    runs that have not begun, too."""
    window = state.settings.window
    seen: Counter[tuple[str, str]] = Counter()
    found: list[QueuedCall] = []
    for rank, call in islice(lane.groups[best.turns], window, window + _BEHIND):
        if rank[0] != best.rank[0] or len(found) == window:
            break
        kind = call.group, call.node
        if seen[kind] < _ALIKE and (everyone or state.flights.has_begun(call.flight, worker.id)):
            seen[kind] += 1
            found.append(call)
    return found


def _backfill(
    state: DispatchState, queue: Queue, lane: Lane, worker: WorkerState, blocked: QueuedCall, now: float, kept: int
) -> QueuedCall | None:
    """A call that has the room which `blocked`, the next one, does not have; None where there is none, and where a
    prefix that it would push out is worth more than a fuller batch.

    Backfilling, as batch schedulers have it (Lifka, "The ANL/IBM SP scheduling system", 1995), without their
    reservation: a call is overtaken so `_BACKFILLS` times at the most, then the lane waits for it.
    """
    settings = state.settings
    needed = worker.room_for(blocked)
    if settings.ordering == "fifo" or blocked.hints.deadline_s is not None or blocked.passed >= _PASSES:
        return None
    if not worker.worth_preempting(blocked, needed):
        return None
    smaller = [call for call in _eligible(state, queue, lane, worker) if worker.room_for(call) < needed]
    smaller.sort(key=lambda call: _score(state, worker, call), reverse=True)
    return next((call for call in smaller if worker.has_room(call, settings, now, kept)), None)


def _eligible(state: DispatchState, queue: Queue, lane: Lane, worker: WorkerState) -> list[QueuedCall]:
    """The calls of `lane` among which the next one is chosen: those of the workflow whose turn it is, as urgent to
    their clients as its first. Where some may not begin beside the runs in flight, whoever may goes before them, and
    where none of the workflow may, it is the next one's turn."""
    window = state.settings.window
    waiting = queue.turn(lane)
    if state.begins_all(waiting[0][1], worker):
        return [call for rank, call in waiting[:window] if rank[0] == waiting[0][0][0]]
    has_begun = state.flights.has_begun
    full: set[tuple[str, str, str]] = set()  # workflows of which none may
    for waiting in queue.in_turn(lane):
        asked = _ASKED
        found: list[QueuedCall] = []
        for rank, call in islice(waiting, _SEARCHED):
            if found and (rank[0] != found[0].rank[0] or len(found) == window):
                break
            if call.hints.deadline_s is not None or has_begun(call.flight, worker.id):
                found.append(call)
            elif asked and call.workflow not in full:
                asked -= 1
                if state.may_begin(call, worker):
                    found.append(call)
                elif state.flights.habits(call.workflow).known:
                    full.add(call.workflow)
        if found:
            return found
    return []


def _score(state: DispatchState, worker: WorkerState, call: QueuedCall) -> float:
    """What speaks for running `call` now, as a share of its prompt."""
    resident, held = worker.matches(call)
    share = (resident + _HELD_BONUS * held) * call.block_size / max(1, call.prompt_tokens)
    return share + _STARTED_BONUS if call.flight[0] in state.started else share


def _best(state: DispatchState, worker: WorkerState, calls: Sequence[QueuedCall]) -> QueuedCall | None:
    """The first of `calls` of which none other has a higher score."""
    best, most = None, -1.0
    for call in calls:
        score = _score(state, worker, call)
        if score > most:
            best, most = call, score
    return best


# -- take over


def _take_over(
    state: DispatchState, queue: Queue, behind: dict[WorkerState, float], worker: WorkerState, now: float
) -> list[Assignment]:
    """`behind`: the workers with calls in their lanes and when they will be done with them, brought up to date."""
    settings = state.settings
    assignments: list[Assignment] = []
    held: set[WorkerState] = set()  # those whose lanes have nothing that may begin here
    while len(held) < len(behind) and not worker.saturated(settings):
        last = max((w for w in behind if w not in held), key=behind.__getitem__)
        backlog_s = worker.backlog_s(now)
        if backlog_s >= behind[last]:
            break
        lane = queue.lanes[last.id]
        found = _seek(state, queue, lane, last, worker)
        if found is None:
            held.add(last)
            continue
        extra, call = found
        if backlog_s + (extra + call.lane_work) * worker.rates.prefill_s >= behind[last]:
            break
        if not worker.has_room(call, settings, now, state.returns.kept(worker.id)):
            break
        assignments.append(_start(state, queue, call, worker, "idle", now))
        if lane:
            behind[last] = until_done(queue, last, now)
        else:
            del behind[last]
    return assignments


def _seek(
    state: DispatchState, queue: Queue, lane: Lane, last: WorkerState, worker: WorkerState
) -> tuple[float, QueuedCall] | None:
    """The call of the lane of `last` that costs `worker` least beside what it costs there; and by how much more."""
    seen = lane.stamp, worker.version, state.flights.gone_from(worker.id)
    if worker.sought[0] != seen:
        found: tuple[float, QueuedCall] | None = None
        for call in _eligible(state, queue, lane, worker):
            if worker.id in call.exclude or call.prefer == last.id:
                continue
            extra = worker.cost(call, *worker.matches(call)) - call.lane_work
            if found is None or extra < found[0]:
                found = extra, call
        worker.sought = seen, found
    return worker.sought[1]


# -- an assignment


def _start(
    state: DispatchState, queue: Queue, call: QueuedCall, worker: WorkerState, reason: Reason, now: float
) -> Assignment:
    resident, held = worker.matches(call)
    cost = worker.cost(call, resident, held)
    if resident and resident * call.block_size >= call.prompt_tokens:
        resident -= 1  # the engine recomputes the last block of a prompt that is all full blocks
    cached = resident * call.block_size
    assignment = Assignment(
        call=call,
        worker=worker.id,
        cached_tokens=cached,
        reason=reason,
        engine_priority=_engine_priority(call),
        started_at=now,
        work=cost,
        predicted_s=worker.rates.duration(call.prompt_tokens - cached, call.output_tokens),
    )
    queue.remove(call)
    queue.charge(call, cost)
    blocks = len(call.chain) - resident + worker.anonymous_blocks(call)
    worker.admit(assignment)
    state.begin(call, worker, resident, blocks)
    return assignment


def _engine_priority(call: QueuedCall) -> int:
    """The rank as one integer: the client's priority first, then the virtual time in tenths of a second."""
    priority, virtual = call.rank[:2]
    return max(-1000, min(1000, priority)) * 1_000_000 + int(virtual * 10) % 1_000_000
