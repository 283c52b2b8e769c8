"""Draw the dashboards for the documentation: ``python tests/operate/pictures.py [FOLDER]``, four minutes.

Grafana itself is in no package registry. What is drawn is what it would be given: the panels of the dashboards' own
JSON, in their places, with their titles, units and legends, and the answers of a real Prometheus that scrapes a proxy
and two embedded engines under load.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import matplotlib

sys.path.insert(0, str(Path(__file__).parents[1]))
from ui.live import proxy

from operate.dashboards import DASHBOARDS, Query
from operate.load import Load
from operate.scrape import Prometheus, prometheus

matplotlib.use("agg")
import matplotlib.pyplot as plt

FOLDER = Path(__file__).parents[2] / "docs" / "images"
SECONDS = 180
RATE = "15s"
UNTIL = {"savings": 31, "workers": 31, "workflows": 26}
"""Rows of Grafana's grid that are drawn."""
COLOURS = [
    "#73bf69",
    "#f2cc0c",
    "#5794f2",
    "#ff780a",
    "#f2495c",
    "#b877d9",
    "#37872d",
    "#8ab8ff",
    "#ffa6b0",
    "#ca95e5",
]
NAMED = {"blue": "#5794f2", "purple": "#b877d9", "green": "#73bf69", "red": "#f2495c", "text": "#ccccdc"}
TEXT, DIM, PANEL, PAGE = "#ccccdc", "#8e8f96", "#181b1f", "#111217"
SERIES = 8


def said(value: float, unit: str) -> str:
    """A figure as Grafana says it."""
    if math.isnan(value):
        return "–"
    if unit == "percentunit":
        return f"{100 * value:.3g}%"
    if unit == "s":
        if value >= 100:
            return f"{value / 60:.3g} min"
        return f"{1e3 * value:.3g} ms" if value < 1 else f"{value:.3g} s"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:.3g}"


class Drawing:
    """One dashboard, up to a row of its grid."""

    def __init__(self, name: str, until: int, prometheus: Prometheus, begin: float, end: float) -> None:
        dashboard = json.loads((DASHBOARDS / f"{name}.json").read_text())
        self._prometheus = prometheus
        self._begin, self._end = begin, end
        self._size = (15.0, 0.36 * until + 0.6)
        self._figure = plt.figure(figsize=self._size, facecolor=PAGE)
        self._figure.text(0.008, 1 - 0.35 / self._size[1], dashboard["title"], color=TEXT, fontsize=13, weight="bold")
        for panel in dashboard["panels"]:
            if panel["gridPos"]["y"] < until:
                self._panel(panel)

    def save(self, path: Path) -> None:
        self._figure.savefig(path, dpi=80, facecolor=PAGE)
        plt.close(self._figure)
        print(path)

    def _axes(self, place: dict[str, int], pad: tuple[float, float, float, float]) -> Any:
        """`pad`: inches left, below, right, above."""
        width, height = self._size
        left, top = place["x"] * width / 24, 0.5 + 0.36 * place["y"]
        wide, high = place["w"] * width / 24, 0.36 * place["h"]
        box = plt.Rectangle(
            ((left + 0.05) / width, 1 - (top + high - 0.05) / height),
            (wide - 0.1) / width,
            (high - 0.1) / height,
            color=PANEL,
            zorder=-1,
        )
        self._figure.add_artist(box)
        return self._figure.add_axes(
            (
                (left + pad[0]) / width,
                1 - (top + high - pad[1]) / height,
                (wide - pad[0] - pad[2]) / width,
                (high - pad[1] - pad[3]) / height,
            ),
            facecolor="none",
        )

    def _panel(self, panel: dict[str, Any]) -> None:
        place, kind = panel["gridPos"], panel["type"]
        height = self._size[1]
        if kind == "row":
            at = 1 - (0.5 + 0.36 * place["y"] + 0.24) / height
            self._figure.text(0.008, at, panel["title"], color=TEXT, fontsize=10, weight="bold")
            return
        draw = getattr(self, f"_{kind}", None)
        if draw is None:
            return
        pads = {"stat": (0.1, 0.1, 0.1, 0.35), "timeseries": (0.7, 0.85, 0.15, 0.4)}
        axes = self._axes(place, pads.get(kind, (1.6, 0.5, 0.2, 0.4)))
        axes.set_title(panel["title"], loc="left", color=TEXT, fontsize=9, pad=6)
        axes.tick_params(colors=DIM, labelsize=7, length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        draw(axes, panel, panel["fieldConfig"]["defaults"]["unit"])

    # -- queries

    def _ask(self, target: dict[str, Any], path: str, **parameters: str) -> list[tuple[str, dict[str, str], Any]]:
        """(legend, labels, values) of every series."""
        expr = Query("", target["expr"]).resolved(RATE, f"{round(self._end - self._begin)}s")
        found = []
        for one in self._prometheus.get(path, query=expr, **parameters)["result"]:
            labels = one["metric"]
            legend = re.sub(
                r"{{(\w+)}}", lambda match, labels=labels: labels.get(match[1], ""), target["legendFormat"]
            )
            found.append((legend or target["refId"], labels, one.get("values") or one.get("value")))
        return found

    def _now(self, target: dict[str, Any]) -> list[tuple[str, dict[str, str], float]]:
        return [(a, b, float(v[1])) for a, b, v in self._ask(target, "query", time=f"{self._end:.3f}")]

    def _colour(self, panel: dict[str, Any], legend: str, index: int) -> str:
        for override in panel["fieldConfig"]["overrides"]:
            if override["matcher"]["options"] == legend:
                colour = override["properties"][0]["value"]["fixedColor"]
                return NAMED.get(colour, colour)
        return COLOURS[index % len(COLOURS)]

    # -- kinds of panels

    def _stat(self, axes: Any, panel: dict[str, Any], unit: str) -> None:
        axes.axis("off")
        values = [value for _, _, value in self._now(panel["targets"][0])]
        colour = NAMED[panel["fieldConfig"]["defaults"]["color"]["fixedColor"]]
        shown = said(values[0], unit) if values else "No data"
        axes.text(0.5, 0.45, shown, color=colour, fontsize=22, ha="center", va="center", transform=axes.transAxes)

    def _timeseries(self, axes: Any, panel: dict[str, Any], unit: str) -> None:
        span = {"start": f"{self._begin:.3f}", "end": f"{self._end:.3f}", "step": "2s"}
        series = [one for target in panel["targets"] for one in self._ask(target, "query_range", **span)]
        defaults = panel["fieldConfig"]["defaults"]
        stacked = defaults["custom"]["stacking"]["mode"] == "normal"
        below: dict[float, float] = {}
        for index, (legend, _, values) in enumerate(series[:SERIES]):
            times = [float(at) - self._begin for at, _ in values]
            heights = [float(value) for _, value in values]
            colour = self._colour(panel, legend, index)
            if stacked:
                floor = [below.get(at, 0.0) for at in times]
                heights = [h + f for h, f in zip(heights, floor, strict=True)]
                axes.fill_between(times, floor, heights, color=colour, alpha=0.4, linewidth=0)
                below |= dict(zip(times, heights, strict=True))
            axes.plot(times, heights, color=colour, linewidth=1 if stacked else 1.6, label=legend[:40])
        axes.set_xlim(0, self._end - self._begin)
        axes.set_ylim(0, defaults.get("max", None if series else 1))
        axes.grid(axis="y", color="#2c3235", linewidth=0.6)
        axes.xaxis.set_major_formatter(lambda at, _: f"{int(at) // 60}:{int(at) % 60:02}")
        axes.yaxis.set_major_formatter(lambda value, _: said(value, unit))
        if series:
            columns = 4 if panel["gridPos"]["w"] > 8 else 2
            place = {"loc": "upper left", "bbox_to_anchor": (-0.08, -0.1), "ncols": columns}
            axes.legend(**place, fontsize=7, labelcolor=TEXT, frameon=False)

    def _barchart(self, axes: Any, panel: dict[str, Any], unit: str) -> None:
        label = panel["options"]["xField"]
        phases = [(t["legendFormat"], {b[label]: v for _, b, v in self._now(t)}) for t in panel["targets"]]
        first = phases[0][1]
        rows = sorted(first, key=lambda name: first[name], reverse=True)[-24:]
        left = [0.0] * len(rows)
        for index, (phase, values) in enumerate(phases):
            width = [values.get(row, 0.0) for row in rows]
            if index:
                axes.barh(rows, width, left=left, color=COLOURS[index + 1], label=phase, height=0.7)
            left = [a + b for a, b in zip(left, width, strict=True)]
        axes.xaxis.set_major_formatter(lambda value, _: said(value, unit))
        axes.legend(loc="lower right", fontsize=7, labelcolor=TEXT, frameon=False)


async def work(base: str, until: float) -> None:
    """Trading runs, two at a time, some of which repeat earlier ones, and a little of everything else."""
    load = Load(base, words=160, output=48)
    turn = 0
    while time.time() < until:
        turn += 1
        await asyncio.gather(
            load.trading(f"desk-{turn}"),
            load.trading(f"desk-{turn // 3}"),
            load.repeats(),
            load.untagged(),
            load.stream(),
        )


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with proxy() as base, tempfile.TemporaryDirectory() as scratch:
        workers = [worker["id"] for worker in httpx.get(f"{base}/helium/workers").json()["workers"]]
        targets = {"helium-proxy": [base.removeprefix("http://")], "vllm": workers}
        with prometheus(Path(scratch), targets) as asked:
            begin = time.time()
            asyncio.run(work(base, begin + SECONDS))
            end = time.time()
            for name, until in UNTIL.items():
                Drawing(name, until, asked, begin, end).save(folder / f"dashboard-{name}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
