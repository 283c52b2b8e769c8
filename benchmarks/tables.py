"""What the terminal shows: a line per measurement, then medians, spreads and ratios."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from .stats import Measurement, Row, geometric_mean, rows, speedups


def line(results: Sequence[Measurement], took: float) -> str:
    """One measurement, all its phases, in a line."""
    parts = []
    for m in results:
        failed = f" [red]{m.failed_calls} failed[/]" if m.failed_calls else ""
        parts.append(
            f"{m.makespan:6.2f} s  {m.calls} calls  x{m.over_minimum:.2f} min  busiest {m.balance:.2f}{failed}"
        )
    head = results[0]
    return f"{head.shape:16} {head.system:22} #{head.repeat}  {' | '.join(parts)}  [dim]({took:.0f} s in all)"


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _row(row: Row, ratio: float | None) -> tuple[str, ...]:
    name = row.shape if row.phase == 0 else f"{row.shape} day {row.phase + 1}"
    return (
        name,
        row.system,
        f"{row.makespan:.2f} ({row.makespan_low:.2f}-{row.makespan_high:.2f})",
        _number(ratio),
        _number(row.run_p95),
        f"{_number(row.call_p50)}/{_number(row.call_p95)}",
        _number(row.ttft_p50),
        _number(row.over_minimum),
        _number(row.balance),
        f"{row.preemptions:.0f}",
        "-" if row.outputs_differ is None else str(row.outputs_differ),
        f"{row.reused_calls:.0f}",
        _number(row.proxy_cpu),
        str(row.failed_calls),
    )


def show(console: Console, measurements: Sequence[Measurement]) -> None:
    """The whole table, then each system's geometric mean over the best peer of each shape."""
    table = rows(measurements)
    ratios = speedups(table)
    view = Table(title="medians over the repeats", header_style="bold", expand=False)
    for heading in (
        "shape",
        "system",
        "makespan s (low-high)",
        "x best peer",
        "run p95",
        "call p50/p95",
        "ttft p50",
        "tokens/min",
        "busiest/mean",
        "preempt",
        "differ",
        "reused",
        "proxy CPU s",
        "failed",
    ):
        view.add_column(heading, no_wrap=True)
    last = None
    for row in table:
        if last not in (None, (row.shape, row.phase)):
            view.add_section()
        last = (row.shape, row.phase)
        ratio = ratios.get(row.system, {}).get((row.shape, row.phase))
        style = "bold" if row.family == "helium" else None
        view.add_row(*_row(row, ratio), style=style)
    console.print(view)
    for system, by_shape in ratios.items():
        mean = geometric_mean(by_shape.values())
        worst = min(by_shape, key=lambda key: by_shape[key])
        console.print(
            f"{system:24} geometric mean over the best peer {mean:.3f} x, least {by_shape[worst]:.3f} x on {worst[0]}"
        )
