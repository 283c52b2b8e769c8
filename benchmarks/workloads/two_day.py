"""Two-day Trading: the same companies again on the next day.

On the second day every input is as before for half of the companies, and the fundamentals are for all of them.
"""

from __future__ import annotations

from . import trading
from .base import Inputs, Sizes, Workload
from .text import Writer


def make_inputs(writer: Writer, sizes: Sizes, batch: int) -> list[list[Inputs]]:
    first = [trading.company(writer, sizes, index, 0) for index in range(batch)]
    second = [
        trading.company(writer, sizes, index, 1, trading.ANALYSTS if index % 2 == 0 else ("fundamentals",))
        for index in range(batch)
    ]
    return [first, second]


WORKLOAD = Workload("two_day", trading.program, make_inputs, calls_per_run=88, batch=4)
