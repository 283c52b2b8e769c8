"""Which waiting call goes to which worker, and which waits: `decide`.

Each call at the head of the queue is put, in its turn, where it would be done cheapest:

    cost(call, worker) = backlog of the worker + weight · prefill of what is not resident there   (seconds)

- the backlog counts what runs there and what this decision has already meant for it, waiting or not: so siblings
  gather where their prefix is until the queue there costs more than computing the prefix a second time; then, and
  only then, they are split;
- the weight is above 1 because a recomputed token also evicts one that somebody else will want.

If the cheapest worker has room the call goes; if not, it waits for that worker, unless another worker is idle. Late
binding: what waits is decided again at the next event, with what is known then.

Cost model after the paper's section on cost-based scheduling (token usage and precedence delay), made incremental.
"""

from __future__ import annotations

from helium_proxy.dispatch.settings import DispatchSettings
from helium_proxy.dispatch.state import Assignment, DispatchState, Queue, QueuedCall, Reason, WorkerState


def decide(state: DispatchState, now: float) -> list[Assignment]:
    """Assigns what can start now; the assigned calls have left the queue and are running in `state`.

    O(window · workers) table look-ups; a worker's residency is matched again only after it changed.
    """
    assignments: list[Assignment] = []
    for model in list(state.queues):
        queue = state.queues[model]
        workers = [w for w in state.workers.values() if w.open and model in w.models]
        if workers:
            assignments += _decide_model(state, queue, workers, now)
        if not queue:
            del state.queues[model]
    return assignments


def _decide_model(state: DispatchState, queue: Queue, workers: list[WorkerState], now: float) -> list[Assignment]:
    settings = state.settings
    assignments: list[Assignment] = []
    promised = dict.fromkeys((w.id for w in workers), 0.0)  # engine seconds meant for a worker, still waiting
    full: set[str] = set()  # workers that have no room for the call that is next there: nobody passes it
    skip = 0  # calls at the head that wait
    while len(full) < len(workers):
        head = queue.head(settings.window)[skip:]
        if not head:
            break
        for call in head:
            worker, reason = _choose(state, call, workers, promised, full)
            if worker is None:
                skip += 1
                if len(full) == len(workers):
                    break
                continue
            assignment = _assign(call, worker, reason, now)
            queue.remove(call)
            queue.charge(call, assignment.work_s)
            worker.admit(assignment)
            assignments.append(assignment)
    return assignments


def _choose(
    state: DispatchState,
    call: QueuedCall,
    workers: list[WorkerState],
    promised: dict[str, float],
    full: set[str],
) -> tuple[WorkerState | None, Reason]:
    """Where `call` starts now; None: it waits (noted in `promised` and `full`)."""
    settings = state.settings
    allowed = [w for w in workers if w.id not in call.exclude] or workers
    worker, reason = _place(state, call, allowed, promised)
    if worker.id not in full and worker.has_room(call, settings):
        return worker, reason
    full.add(worker.id)
    idle = _idle(call, allowed, settings)
    if idle is not None:
        return idle, "idle"
    promised[worker.id] += _work(call, worker)
    return None, reason


def _place(
    state: DispatchState, call: QueuedCall, workers: list[WorkerState], promised: dict[str, float]
) -> tuple[WorkerState, Reason]:
    settings = state.settings
    if len(workers) == 1:
        return workers[0], "only"
    if settings.placement == "round-robin":
        return workers[state.next_turn() % len(workers)], "round-robin"
    if settings.placement == "least-loaded":
        return min(workers, key=lambda w: (w.backlog_s + promised[w.id], len(w.running))), "least-loaded"
    if call.prefer is not None:
        for worker in workers:
            if worker.id == call.prefer:
                return worker, "state"
    best, best_cost, most = workers[0], float("inf"), 0
    for worker in workers:
        hit = worker.hit(call)
        uncached = call.prompt_tokens - hit * call.block_size
        cost = worker.backlog_s + promised[worker.id] + settings.recompute_weight * worker.rates.work(uncached, 0)
        if worker.id == call.suggestion:
            cost -= worker.rates.work(call.prompt_tokens, 0)
        if cost < best_cost:
            best, best_cost = worker, cost
        most = max(most, hit)
    return best, "prefix" if most and best.hit(call) == most else "balance"


def _idle(call: QueuedCall, workers: list[WorkerState], settings: DispatchSettings) -> WorkerState | None:
    """A worker with nothing at all to do, the one with the most of the call's prefix."""
    idle = [w for w in workers if not w.running and w.has_room(call, settings)]
    return max(idle, key=lambda w: w.hit(call)) if idle else None


def _work(call: QueuedCall, worker: WorkerState) -> float:
    """Engine seconds of `call` on `worker`, given what is resident there."""
    uncached = max(0, call.prompt_tokens - worker.hit(call) * call.block_size)
    return worker.rates.work(uncached, call.output_tokens)


def _assign(call: QueuedCall, worker: WorkerState, reason: Reason, now: float) -> Assignment:
    hit = worker.hit(call)
    if hit and hit * call.block_size >= call.prompt_tokens:
        hit -= 1  # the engine recomputes the last block of a prompt that is all full blocks
    cached = hit * call.block_size
    return Assignment(
        call=call,
        worker=worker.id,
        cached_tokens=cached,
        reason=reason,
        engine_priority=_engine_priority(call),
        started_at=now,
        work_s=_work(call, worker),
        predicted_s=worker.rates.duration(call.prompt_tokens - cached, call.output_tokens),
    )


def _engine_priority(call: QueuedCall) -> int:
    """The rank as one integer: the client's priority first, then the virtual time in tenths of a second."""
    priority, virtual = call.rank[:2]
    return max(-1000, min(1000, priority)) * 1_000_000 + int(virtual * 10) % 1_000_000
