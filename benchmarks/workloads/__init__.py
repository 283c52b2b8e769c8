"""The shapes: the paper's six, its two-day variant, and agent traffic that it lacks. One module each."""

from __future__ import annotations

from . import (
    debate,
    iterative,
    map_reduce,
    mixed,
    open_loop,
    parallel_chains,
    reflection,
    retrieval,
    thinking,
    tool_loop,
    trading,
    tree_search,
    two_day,
)
from .base import SIZES, Call, Caller, Inputs, Message, Roles, Run, Sizes, Workload, export_plan
from .text import Writer

PAPER_SHAPES = ("map_reduce", "debate", "reflection", "iterative", "parallel_chains", "trading")

WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        map_reduce.WORKLOAD,
        map_reduce.WIDE,
        debate.WORKLOAD,
        reflection.WORKLOAD,
        iterative.WORKLOAD,
        parallel_chains.WORKLOAD,
        trading.WORKLOAD,
        two_day.WORKLOAD,
        tool_loop.WORKLOAD,
        tree_search.WORKLOAD,
        retrieval.WORKLOAD,
        mixed.WORKLOAD,
        mixed.STREAM,
        open_loop.POISSON,
        open_loop.BURSTS,
        thinking.ITERATIVE,
        thinking.DEBATE,
    )
}

__all__ = [
    "PAPER_SHAPES",
    "SIZES",
    "WORKLOADS",
    "Call",
    "Caller",
    "Inputs",
    "Message",
    "Roles",
    "Run",
    "Sizes",
    "Workload",
    "Writer",
    "export_plan",
]
