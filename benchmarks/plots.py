"""The report's plots, as SVG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from .stats import Row

_OURS = ("#1b5e9c", "#5b9bd5", "#9dc3e6", "#c9ddf0")
_PEERS = ("#8c8c8c", "#b0b0b0", "#c8a27a", "#d9c2a7", "#d8d8d8")


def _save(figure: Any, path: Path) -> None:
    plt.rcParams["svg.hashsalt"] = "helium-proxy"
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)


def _colors(rows: Sequence[Row]) -> dict[str, str]:
    ours = [s for s in dict.fromkeys(row.system for row in rows) if s.startswith("helium")]
    peers = [s for s in dict.fromkeys(row.system for row in rows) if not s.startswith("helium")]
    return {s: _OURS[i % len(_OURS)] for i, s in enumerate(ours)} | {
        s: _PEERS[i % len(_PEERS)] for i, s in enumerate(peers)
    }


def bars(rows: Sequence[Row], field: str, label: str, path: Path, *, line: float | None = None) -> None:
    """Grouped bars: a group per shape, a bar per system; whiskers show the spread of makespans."""
    shapes = list(dict.fromkeys((row.shape, row.phase) for row in rows))
    systems = list(dict.fromkeys(row.system for row in rows))
    colors = _colors(rows)
    by_key = {(row.shape, row.phase, row.system): row for row in rows}
    figure, axes = plt.subplots(figsize=(1.6 + 1.4 * len(shapes), 3.2))
    width = 0.82 / len(systems)
    for place, system in enumerate(systems):
        xs, ys, low, high = [], [], [], []
        for group, (shape, phase) in enumerate(shapes):
            row = by_key.get((shape, phase, system))
            if row is None:
                continue
            value = float(getattr(row, field))
            xs.append(group + (place - (len(systems) - 1) / 2) * width)
            ys.append(value)
            low.append(value - row.makespan_low if field == "makespan" else 0.0)
            high.append(row.makespan_high - value if field == "makespan" else 0.0)
        spread = [low, high] if field == "makespan" else None
        axes.bar(xs, ys, width, yerr=spread, label=system, color=colors[system], error_kw={"linewidth": 0.8})
    if line is not None:
        axes.axhline(line, color="black", linewidth=0.8, linestyle=":")
    names = [shape if phase == 0 else f"{shape} day {phase + 1}" for shape, phase in shapes]
    axes.set_xticks(range(len(shapes)), [name.replace("_", " ") for name in names])
    axes.set_ylabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False, ncols=min(4, len(systems)), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    _save(figure, path)


def lines(
    series: dict[str, list[tuple[float, float]]],
    *,
    xlabel: str,
    ylabel: str,
    path: Path,
    log_x: bool = False,
    log_y: bool = False,
) -> None:
    """One line per name, of (x, y) points."""
    figure, axes = plt.subplots(figsize=(4.6, 3.0))
    for index, (name, points) in enumerate(series.items()):
        color = (_OURS if name.startswith("helium") else _PEERS)[index % 4] if len(series) < 6 else None
        xs, ys = zip(*sorted(points), strict=True)
        axes.plot(xs, ys, marker="o", markersize=3, label=name, color=color)
    if log_x:
        axes.set_xscale("log", base=2)
        ticks = sorted({x for points in series.values() for x, _ in points})
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    if log_y:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False)
    _save(figure, path)
