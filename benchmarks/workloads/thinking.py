"""Shapes whose client pauses for half a second before every call that has parents, as a tool or a person would."""

from __future__ import annotations

from dataclasses import replace

from . import debate, iterative
from .base import Workload


def with_pauses(workload: Workload, seconds: float = 0.5) -> Workload:
    return replace(workload, name=f"{workload.name}_think", think_s=seconds, batch=8, planned=False)


ITERATIVE = with_pauses(iterative.WORKLOAD)
DEBATE = with_pauses(debate.WORKLOAD)
