"""Drive a batch as a submitted plan: one ``POST /v1/workflows``, then its events until the job has ended.

Every node is asked for as an output, so that all replies can be compared with the direct run's. (No shape has a node
that nothing consumes, so that this keeps no rule from pruning.) The prompts that were sent are found afterwards, by
running the client program once more with the replies that came back.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import orjson

from .client import CallFailed, CallRecord, HttpCaller
from .workloads import Call, Roles, Run, Sizes, Workload, Writer, export_plan


class _Replay:
    """Answers a program with known replies; notes the prompts in the caller that measured them."""

    def __init__(self, caller: HttpCaller, replies: dict[str, str]) -> None:
        self._caller = caller
        self._replies = replies

    async def complete(self, call: Call) -> str:
        reply = self._replies[call.node]
        self._caller.note(call, reply)
        return reply


async def drive(
    caller: HttpCaller,
    workload: Workload,
    sizes: Sizes,
    runs: Sequence[dict[str, str]],
    *,
    writer: Writer,
    name: str,
) -> dict[str, float]:
    """Submit the batch and wait for it; the inputs' latencies by run id. Inputs that failed are in
    `caller.failures`."""
    plan = await export_plan(workload, sizes, writer, inputs=runs, model=caller.model)
    plan["outputs"] = [node["id"] for node in plan["nodes"]]
    began = time.perf_counter()
    job = await caller.post_json("/v1/workflows", plan)
    latencies: dict[str, float] = {}
    rows: dict[int, dict[str, Any]] = {}
    async for event, data in caller.events(f"/v1/workflows/{job['id']}/events"):
        if event == "input":
            rows[data["input"]] = data
            latencies[f"{name}-{data['input']}"] = time.perf_counter() - began
    for row in (await caller.get_json(f"/v1/workflows/{job['id']}"))["results"]:
        rows.setdefault(row["input"], row)
    caller.finished = time.perf_counter()
    roles = Roles(workload.name, sizes, Writer(0, writer.tokens_per_word))
    for index, inputs in enumerate(runs):
        run_id = f"{name}-{index}"
        replies = rows[index]["outputs"]
        missing = len(plan["nodes"]) - len(replies)
        if rows[index]["status"] != "completed" or missing:
            caller.failures.append(f"{run_id}: {orjson.dumps(rows[index].get('errors')).decode()[:300]}")
            latencies.pop(run_id, None)
            continue
        try:
            run = Run(_Replay(caller, replies), workload.name, run_id, inputs=inputs, roles=roles, time_scale=0)
            await workload.program(run)
        except KeyError as node:
            raise CallFailed(f"{run_id}: the plan answered nothing for {node}") from None
        caller.records += [
            CallRecord(
                workflow=workload.name,
                run=run_id,
                node=node,
                start=0.0,
                first_token=None,
                end=latencies[run_id],
                reply=reply,
                retries=0,
                cache=None,
            )
            for node, reply in replies.items()
        ]
    return latencies
