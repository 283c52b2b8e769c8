"""The few Grafana panels that the dashboards are made of, as plain dictionaries of its JSON model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

SOURCE = {"type": "prometheus", "uid": "${source}"}
SCHEMA = 41  # Grafana 12
FATES = {
    "computed": "blue",
    "kv_hit": "#2dd4bf",
    "coalesced": "purple",
    "prompt_cache": "green",
    "hit": "green",
    "error": "red",
}

Panel = dict[str, Any]
Query = tuple[str, str]
"""(PromQL, legend)."""


def _targets(queries: Iterable[Query], **common: Any) -> list[dict[str, Any]]:
    letters = "ABCDEFGHIJ"
    return [
        {
            "refId": letters[index],
            "datasource": SOURCE,
            "expr": " ".join(expr.split()),
            "legendFormat": legend,
            **common,
        }
        for index, (expr, legend) in enumerate(queries)
    ]


def _panel(
    kind: str, title: str, about: str, queries: Iterable[Query], width: int, height: int, unit: str, **common: Any
) -> Panel:
    return {
        "type": kind,
        "title": title,
        "description": about,
        "datasource": SOURCE,
        "targets": _targets(queries, **common),
        "gridPos": {"w": width, "h": height},
        "fieldConfig": {
            "defaults": {"unit": unit, "custom": {}},
            "overrides": [_coloured(*fate) for fate in FATES.items()],
        },
        "options": {},
    }


def _coloured(name: str, colour: str) -> dict[str, Any]:
    return {
        "matcher": {"id": "byName", "options": name},
        "properties": [{"id": "color", "value": {"mode": "fixed", "fixedColor": colour}}],
    }


def stat(title: str, about: str, expr: str, unit: str = "short", *, width: int = 4, good: bool = False) -> Panel:
    """One number over the chosen range."""
    panel = _panel("stat", title, about, [(expr, "")], width, 4, unit, instant=True)
    panel["fieldConfig"]["defaults"]["color"] = {"mode": "fixed", "fixedColor": "green" if good else "text"}
    panel["options"] = {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "value", "graphMode": "none"}
    return panel


def lines(
    title: str,
    about: str,
    *queries: Query,
    unit: str = "short",
    width: int = 12,
    stacked: bool = False,
    top: float | None = None,
) -> Panel:
    """Time series."""
    panel = _panel("timeseries", title, about, queries, width, 8, unit)
    defaults = panel["fieldConfig"]["defaults"]
    defaults["min"] = 0
    if top is not None:
        defaults["max"] = top
    defaults["custom"] = {
        "lineWidth": 1 if stacked else 2,
        "fillOpacity": 40 if stacked else 5,
        "showPoints": "never",
        "stacking": {"mode": "normal" if stacked else "none", "group": "A"},
    }
    panel["options"] = {
        "legend": {"displayMode": "table", "placement": "bottom", "calcs": ["mean", "lastNotNull"]},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    return panel


def bars(title: str, about: str, *queries: Query, unit: str = "short", width: int = 12, height: int = 9) -> Panel:
    """Horizontal gauges, one per series."""
    panel = _panel("bargauge", title, about, queries, width, height, unit, instant=True)
    panel["fieldConfig"]["defaults"]["min"] = 0
    panel["options"] = {
        "orientation": "horizontal",
        "displayMode": "gradient",
        "reduceOptions": {"calcs": ["lastNotNull"]},
    }
    return panel


def heat(title: str, about: str, expr: str, unit: str = "s", *, width: int = 12) -> Panel:
    """A histogram over time; `expr` is by (le)."""
    panel = _panel("heatmap", title, about, [(expr, "{{le}}")], width, 8, unit, format="heatmap")
    panel["options"] = {
        "calculate": False,
        "yAxis": {"unit": unit},
        "color": {"mode": "scheme", "scheme": "Turbo", "steps": 64},
        "cellGap": 1,
    }
    return panel


@dataclass(frozen=True)
class Column:
    """`title`, in Grafana's `unit`, of what `expr` gives per key of the table."""

    title: str
    expr: str
    unit: str = "short"


def table(title: str, about: str, keys: tuple[str, ...], *columns: Column, width: int = 24, height: int = 9) -> Panel:
    """One row per value of the labels `keys`, one column per query."""
    panel = _panel(
        "table",
        title,
        about,
        [(c.expr, c.title) for c in columns],
        width,
        height,
        "short",
        instant=True,
        format="table",
    )
    names = {f"Value #{target['refId']}": c.title for target, c in zip(panel["targets"], columns, strict=True)}
    panel["transformations"] = [
        {"id": "merge", "options": {}},
        {"id": "organize", "options": {"excludeByName": {"Time": True}, "renameByName": names}},
    ]
    panel["fieldConfig"]["overrides"] = [
        {"matcher": {"id": "byName", "options": c.title}, "properties": [{"id": "unit", "value": c.unit}]}
        for c in columns
    ]
    panel["options"] = {"showHeader": True, "sortBy": [{"displayName": columns[0].title, "desc": True}]}
    assert keys, "a table needs a key"
    return panel


def waterfall(
    title: str, about: str, phases: Mapping[str, Query], *, hidden: str, width: int = 24, height: int = 12
) -> Panel:
    """Stacked horizontal bars, one per node: each phase is a query by the same label, `hidden` is drawn transparent."""
    queries = [(expr, phase) for phase, (expr, _) in phases.items()]
    panel = _panel("barchart", title, about, queries, width, height, "s", instant=True, format="table")
    label = next(iter(phases.values()))[1]
    names = {f"Value #{target['refId']}": phase for target, phase in zip(panel["targets"], phases, strict=True)}
    panel["transformations"] = [
        {"id": "merge", "options": {}},
        {"id": "organize", "options": {"excludeByName": {"Time": True}, "renameByName": names}},
        {"id": "sortBy", "options": {"sort": [{"field": hidden}]}},
    ]
    panel["fieldConfig"]["defaults"]["custom"] = {"fillOpacity": 80, "lineWidth": 0}
    panel["fieldConfig"]["overrides"] = [
        {
            "matcher": {"id": "byName", "options": hidden},
            "properties": [
                {"id": "color", "value": {"mode": "fixed", "fixedColor": "transparent"}},
                {"id": "custom.hideFrom", "value": {"legend": True, "tooltip": True, "viz": False}},
            ],
        }
    ]
    panel["options"] = {"orientation": "horizontal", "stacking": "normal", "xField": label, "showValue": "never",
                        "legend": {"displayMode": "list", "placement": "bottom"}}  # fmt: skip
    return panel


def text(markdown: str, *, width: int = 24, height: int = 3) -> Panel:
    return {
        "type": "text",
        "title": "",
        "gridPos": {"w": width, "h": height},
        "options": {"mode": "markdown", "content": markdown},
    }


def variable(name: str, label: str, query: str) -> dict[str, Any]:
    """A choice of label values, all by default."""
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": query, "refId": name},
        "definition": query,
        "refresh": 2,
        "includeAll": True,
        "allValue": ".*",
        "multi": True,
        "current": {"text": "All", "value": "$__all"},
        "sort": 1,
    }


@dataclass(frozen=True)
class Dashboard:
    """`rows`: (heading, panels); panels flow left to right on Grafana's 24 columns."""

    uid: str
    title: str
    about: str
    rows: tuple[tuple[str, tuple[Panel, ...]], ...]
    variables: tuple[dict[str, Any], ...] = field(default=())

    def json(self) -> dict[str, Any]:
        panels: list[Panel] = []
        y = 0
        for heading, row in self.rows:
            panels.append(
                {
                    "type": "row",
                    "title": heading,
                    "collapsed": False,
                    "gridPos": {"x": 0, "y": y, "w": 24, "h": 1},
                    "panels": [],
                }
            )
            y, x, height = y + 1, 0, 0
            for panel in row:
                place = panel["gridPos"]
                if x + place["w"] > 24:
                    y, x, height = y + height, 0, 0
                panels.append({**panel, "gridPos": {"x": x, "y": y, **place}})
                x, height = x + place["w"], max(height, place["h"])
            y += height
        source = {"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus", "hide": 0}
        return {
            "uid": self.uid,
            "title": self.title,
            "description": self.about,
            "tags": ["helium"],
            "schemaVersion": SCHEMA,
            "editable": True,
            "graphTooltip": 1,
            "refresh": "10s",
            "time": {"from": "now-30m", "to": "now"},
            "templating": {"list": [source, *self.variables]},
            "links": [
                {
                    "type": "dashboards",
                    "tags": ["helium"],
                    "title": "Helium",
                    "asDropdown": False,
                    "includeVars": True,
                    "keepTime": True,
                }
            ],
            "panels": [{"id": index, **panel} for index, panel in enumerate(panels, 1)],
        }
