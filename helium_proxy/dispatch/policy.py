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
    # Workers that may take more. One leaves when the call that is next there does not fit: nobody passes it.
    roomy = {w.id: w for w in workers if not w.saturated(settings)}
    waiting = 0  # calls at the head that were looked at and wait
    while roomy and waiting < settings.window:
        head = queue.head(settings.window)[waiting:]
        if not head:
            break
        for call in head:
            allowed = [w for w in workers if w.id not in call.exclude] or workers if call.exclude else workers
            worker, reason = _place(state, call, allowed, promised)
            if worker.id not in roomy or not worker.has_room(call, settings):
                roomy.pop(worker.id, None)
                promised[worker.id] += _work(call, worker)
                idle = [w for w in roomy.values() if not w.running and w in allowed] if reason != "state" else []
                if not idle:
                    waiting += 1
                    if not roomy:
                        break
                    continue
                promised[worker.id] -= _work(call, worker)
                worker, reason = max(idle, key=lambda w: w.hit(call)), "idle"
            assignment = _assign(call, worker, reason, now)
            queue.remove(call)
            queue.charge(call, assignment.work_s)
            worker.admit(assignment)
            assignments.append(assignment)
            if worker.saturated(settings):
                roomy.pop(worker.id, None)
                if not roomy:
                    break
    return assignments


def _place(
    state: DispatchState, call: QueuedCall, workers: list[WorkerState], promised: dict[str, float]
) -> tuple[WorkerState, Reason]:
    settings = state.settings
    if len(workers) == 1:
        return workers[0], "only"
    if call.prefer is not None:
        for worker in workers:
            if worker.id == call.prefer:
                return worker, "state"
    if settings.placement == "round-robin":
        return workers[state.next_turn() % len(workers)], "round-robin"
    if settings.placement == "least-loaded":
        return min(workers, key=lambda w: (w.backlog_s + promised[w.id], len(w.running))), "least-loaded"
    best, best_cost, best_hit, most = workers[0], float("inf"), 0, 0
    prompt, size, weight, known = call.prompt_tokens, call.block_size, settings.recompute_weight, call.hits
    for worker in workers:  # the hot loop of every decision
        name = worker.id
        seen = known.get(name)
        hit = seen[1] if seen is not None and seen[0] == worker.version else worker.hit(call)
        cost = worker.backlog_s + promised[name] + weight * (prompt - hit * size) * worker.rates.prefill_s
        if name == call.suggestion:
            cost -= prompt * worker.rates.prefill_s
        if cost < best_cost:
            best, best_cost, best_hit = worker, cost, hit
        most = max(most, hit)
    return best, "prefix" if most and best_hit == most else "balance"


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
