"""The queries of dashboards, recording rules and alerts, as lists."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

import yaml

from .compose import DOCKER

DASHBOARDS = DOCKER / "grafana" / "dashboards"
RULES = DOCKER / "prometheus" / "rules"
_NAME = re.compile(r"\b((?:helium|vllm)[_:]\w+)")
_SUFFIX = re.compile(r"_(bucket|sum|count)$")


@dataclass(frozen=True)
class Query:
    """A PromQL expression and where it stands."""

    where: str
    expr: str

    def resolved(self, rate: str, span: str) -> str:
        """With Grafana's variables filled in: everything chosen, the given windows."""
        expr = self.expr.replace("$__rate_interval", rate).replace("$__range", span)
        return re.sub(r"\$(workflow|worker|node)\b", ".*", expr)


def panel_queries() -> Iterator[Query]:
    for path in sorted(DASHBOARDS.glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel.get("targets", []):
                yield Query(
                    f"{path.stem} / {panel['title']} / {target['legendFormat'] or target['refId']}", target["expr"]
                )


def rules(kind: str) -> Iterator[Query]:
    """`kind`: record or alert."""
    for path in sorted(RULES.glob("*.yml")):
        for group in yaml.safe_load(path.read_text())["groups"]:
            for rule in group["rules"]:
                if kind in rule:
                    yield Query(rule[kind], rule["expr"])


def names(expr: str) -> set[str]:
    """Metrics of ours and vLLM's in an expression, histograms without their suffix. Recorded series are left out."""
    recorded = {rule.where for rule in rules("record")}
    for name in recorded:
        expr = expr.replace(name, " ")
    return set(_NAME.findall(expr))


def base(name: str) -> str:
    return _SUFFIX.sub("", name)
