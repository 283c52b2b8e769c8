"""Ask a running Prometheus, and see that every query of ours has an answer."""

from __future__ import annotations

import contextlib
import math
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from helium_proxy.local import free_port

from .compose import DOCKER
from .dashboards import base, names, panel_queries, rules

RATE, SPAN = "20s", "2m"
"""What $__rate_interval and $__range stand for here."""


def fast_copy(folder: Path) -> Path:
    """docker/prometheus with its intervals cut short, so that a test need not wait; nothing else is changed."""
    copy = folder / "prometheus"
    shutil.copytree(DOCKER / "prometheus", copy)
    folder.chmod(0o755)
    config = copy / "prometheus.yml"
    text = config.read_text()
    for key, value in (
        ("scrape_interval", "1s"),
        ("scrape_timeout", "1s"),
        ("evaluation_interval", "2s"),
        ("refresh_interval", "1s"),
    ):
        text, found = re.subn(rf"\b{key}: \S+", f"{key}: {value}", text)
        assert found, key
    config.write_text(text)
    for path in (copy / "rules").glob("*.yml"):
        path.write_text(re.sub(r"interval: 15s", "interval: 2s", path.read_text()))
    return copy


@dataclass
class Prometheus:
    """Its HTTP API. With `at`, queries are of that moment (Unix seconds), however long they take."""

    base: str
    at: float | None = None

    def get(self, path: str, **parameters: str) -> Any:
        answer = httpx.get(f"{self.base}/api/v1/{path}", params=parameters, timeout=20)
        body = answer.json()
        assert body["status"] == "success", f"{parameters}: {body.get('error')}"
        return body["data"]

    def query(self, expr: str) -> list[float]:
        """The values of an instant query, NaN left out. Raises AssertionError where Prometheus refuses it."""
        when = {} if self.at is None else {"time": f"{self.at:.3f}"}
        values = [float(one["value"][1]) for one in self.get("query", query=expr, **when)["result"]]
        return [value for value in values if not math.isnan(value)]

    def targets(self) -> dict[str, str]:
        """Instance → health."""
        return {one["labels"]["instance"]: one["health"] for one in self.get("targets")["activeTargets"]}

    def until(self, expr: str, timeout: float = 40) -> None:
        end = time.monotonic() + timeout
        while not self.query(expr):
            assert time.monotonic() < end, f"no data: {expr}"
            time.sleep(0.5)


@contextlib.contextmanager
def prometheus(folder: Path, targets: dict[str, list[str]]) -> Iterator[Prometheus]:
    """Debian's Prometheus with our configuration; the jobs' targets are `targets`, everything else is compose's."""
    path = fast_copy(folder) / "prometheus.yml"
    config = yaml.safe_load(path.read_text())
    for job in config["scrape_configs"]:
        for discovery in ("static_configs", "dns_sd_configs", "relabel_configs"):
            job.pop(discovery, None)
        job["static_configs"] = [{"targets": targets[job["job_name"]]}]
    path.write_text(yaml.safe_dump(config))
    port = free_port()
    command = [
        "prometheus",
        f"--config.file={path}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        end = time.monotonic() + 30
        while time.monotonic() < end:
            assert process.poll() is None, (folder / "prometheus.log").read_text()
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"http://127.0.0.1:{port}/-/ready").status_code == 200:
                    break
            time.sleep(0.2)
        yield Prometheus(f"http://127.0.0.1:{port}")
    finally:
        process.terminate()
        process.wait(20)


def unanswered(prometheus: Prometheus) -> list[str]:
    """Panels, recording rules and alerts without data. An alert's comparison may rightly select nothing: then the
    series it compares must be there."""
    empty = [
        f"panel {query.where}: {expr}"
        for query in panel_queries()
        if not prometheus.query(expr := query.resolved(RATE, SPAN))
    ]
    empty += [f"record {rule.where}" for rule in rules("record") if not prometheus.query(rule.where)]
    loaded = {rule["name"]: rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]}
    for alert in rules("alert"):
        found = loaded[alert.where]
        if found["health"] != "ok":
            empty.append(f"alert {alert.where}: {found['health']} {found.get('lastError', '')}")
        prometheus.query(alert.expr)
        for name in names(alert.expr):
            if not prometheus.query(name) and not prometheus.query(f"{base(name)}_bucket"):
                empty.append(f"alert {alert.where}: {name} has no series")
        for recorded in rules("record"):
            if recorded.where in alert.expr and not prometheus.query(recorded.where):
                empty.append(f"alert {alert.where}: {recorded.where} has no series")
    return empty
