"""A running proxy, seen from the terminal: its workers, its runs, one run as a DAG, a plan explained."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import click
import httpx
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from helium_proxy.errors import InvalidRequest
from helium_proxy.planner.plan import read_plan
from helium_proxy.planner.words import counted

_TIMEOUT_S = 10.0
_ANALYZE_TIMEOUT_S = 3600.0
_BAR = 32
_FATES = {"computed": "green", "hit": "cyan", "coalesced": "blue", "error": "red"}

Json = dict[str, Any]


def show_workers(url: str, api_key: str | None) -> None:
    """A table of the workers."""
    listed: list[Json] = _get(url, api_key, "/helium/workers")["workers"]
    if not listed:
        _console().print("No workers. Add one: POST /helium/workers, or --worker when the proxy starts.")
        return
    table = _table(
        "worker", "state", "models", ">running", ">waiting", ">KV resident", ">prefill", ">decode", "engine"
    )
    for worker in listed:
        state = (
            worker["state"] if worker["breaker"] == "closed" else f"{worker['state']}, breaker {worker['breaker']}"
        )
        table.add_row(
            escape(worker["id"]),
            Text(state, "green" if worker["state"] == "up" else "red"),
            escape(", ".join(worker["models"]) or "?"),
            str(worker["running"]),
            str(worker["waiting"]),
            _share(worker["resident_blocks"], worker["capacity_blocks"]),
            _rate(worker["prefill_tokens_per_s"]),
            _rate(worker["decode_tokens_per_s"]),
            escape(str(worker["engine"] or "?")) + (", pins" if worker["plugin"] else ""),
        )
    console = _console()
    console.print(table)
    for worker in listed:
        if worker["error"] and worker["state"] != "up":
            console.print(f"{worker['id']}: {worker['error']}", style="red", markup=False, soft_wrap=True)


def show_runs(url: str, api_key: str | None, *, limit: int, workflow: str | None) -> None:
    """A table of the newest runs."""
    answer = _get(url, api_key, "/helium/runs", limit=limit, workflow=workflow)
    found: list[Json] = answer["runs"]
    if not found:
        none = "No run matches." if workflow else "No runs yet."
        _console().print("No run is seen in passthrough mode." if answer["mode"] == "passthrough" else none)
        return
    table = _table("run", "workflow", "state", ">calls", "answered", ">prompt", ">cached", ">output", ">took", ">age")
    now = time.time()
    for run in found:
        table.add_row(
            escape(run["run"]),
            escape(run["workflow"] or "-"),
            Text(run["state"], "yellow" if run["state"] == "live" else "green"),
            str(run["calls"]),
            _fates(run["fates"]),
            f"{run['prompt_tokens']:,}",
            _percent(run["cached_tokens"], run["prompt_tokens"]),
            f"{run['output_tokens']:,}",
            _seconds(run["last_at"] - run["started_at"]),
            _seconds(now - run["started_at"]),
        )
    _console().print(table)


def show_run(url: str, api_key: str | None, name: str) -> None:
    """One run: its calls in layers, each with the calls it waited for, what became of it, and when."""
    run = _get(url, api_key, f"/helium/runs/{quote(name, safe='')}")
    calls: list[Json] = run["nodes"]
    console = _console()
    console.print(
        Text.assemble(
            (run["workflow"] or "(no workflow)", "bold"),
            f"  {run['run']}  {run['state']}  {counted(len(calls), 'call')}, ",
            f"{_percent(_sum(calls, 'cached_tokens'), _sum(calls, 'prompt_tokens'))} of "
            f"{counted(_sum(calls, 'prompt_tokens'), 'prompt token')} cached, "
            f"{counted(_sum(calls, 'output_tokens'), 'output token')}",
        )
    )
    if not calls:
        return
    begin = min(call["queued_at"] for call in calls)
    end = max(_last(call) for call in calls)
    table = _table(
        "call", "after", "answered", "worker", ">prompt", ">cached", ">output", ">queued", ">took", "timeline"
    )
    parents = parents_of(calls, run["edges"])
    layers = layers_of(calls, parents)
    for depth, layer in enumerate(layers):
        for place, call in enumerate(layer):
            started = call["started_at"]
            table.add_row(
                _bracket(place, len(layer)) + escape(_label(call)),
                escape(_after(call, parents, layers[depth - 1] if depth else [], calls)),
                Text(call["fate"] or call["state"], _FATES.get(call["fate"] or "", "yellow")),
                escape(call["worker"] or "-"),
                _count(call["prompt_tokens"]),
                _count(call["cached_tokens"]),
                _count(call["output_tokens"]),
                _seconds((started or _last(call)) - call["queued_at"]),
                _seconds(_last(call) - call["queued_at"]),
                timeline(call, begin, end, _BAR),
            )
        if depth + 1 < len(layers):
            table.add_section()
    console.print(table)
    console.print(
        f"timeline: {_seconds(end - begin)} wide; · queued, ░ until the first byte, █ streaming, ━ not computed",
        style="dim",
    )


def explain(url: str, api_key: str | None, file: Path, *, analyze: bool) -> None:
    """Prints the plan of a workflow file; with `analyze` runs it, and prints the plan beside what happened: then with
    exit status 1 when operators failed."""
    try:
        plan = read_plan(file)
    except (OSError, InvalidRequest) as error:
        raise click.ClickException(str(error)) from None
    params = {"analyze": str(analyze).lower(), "format": "text"}
    timeout = _ANALYZE_TIMEOUT_S if analyze else 60.0
    answer = _request("POST", url, api_key, "/v1/workflows/explain", timeout, params, plan)
    click.echo(answer.text, nl=False)
    if answer.headers.get("x-helium-failed-operators", "0") != "0":
        raise click.exceptions.Exit(1)


# -- a run's shape


def parents_of(calls: Sequence[Json], edges: Sequence[Json]) -> dict[str, list[str]]:
    """Call → the calls it came after. Edges to calls that are not listed are left out."""
    parents: dict[str, list[str]] = {call["call"]: [] for call in calls}
    for edge in edges:
        if edge["from"] in parents and edge["to"] in parents:
            parents[edge["to"]].append(edge["from"])
    return parents


def layers_of(calls: Sequence[Json], parents: Mapping[str, Sequence[str]]) -> list[list[Json]]:
    """Calls by the length of the longest path that leads to them, each layer in order of arrival."""
    depths: dict[str, int] = {}
    pending = sorted(calls, key=lambda call: call["queued_at"])
    while pending:
        later = []
        for call in pending:
            above = parents[call["call"]]
            if all(parent in depths for parent in above):
                depths[call["call"]] = 1 + max((depths[parent] for parent in above), default=-1)
            else:
                later.append(call)
        if len(later) == len(pending):  # no DAG: cannot be, but must not hang
            depths.update((call["call"], 0) for call in later)
            break
        pending = later
    layers: list[list[Json]] = [[] for _ in range(1 + max(depths.values(), default=-1))]
    for call in sorted(calls, key=lambda call: call["queued_at"]):
        layers[depths[call["call"]]].append(call)
    return [layer for layer in layers if layer]


def timeline(call: Json, begin: float, end: float, width: int) -> Text:
    """The call's life on a scale of `width` cells from `begin` to `end`, Unix seconds."""

    def cell(when: float | None) -> int:
        share = 0.0 if when is None or end <= begin else (when - begin) / (end - begin)
        return min(width, max(0, round(share * width)))

    queued, last = cell(call["queued_at"]), cell(_last(call))
    if call["fate"] in ("hit", "coalesced"):
        return Text(" " * queued + "━" * max(1, last - queued), _FATES[call["fate"]])
    started = cell(call["started_at"]) if call["started_at"] is not None else last
    first = cell(call["first_token_at"]) if call["first_token_at"] is not None else last
    bar = " " * queued + "·" * (started - queued) + "░" * (first - started) + "█" * (last - first)
    return Text(bar if bar.strip() else " " * min(queued, width - 1) + "█", _FATES.get(call["fate"] or "", "yellow"))


def _after(call: Json, parents: Mapping[str, Sequence[str]], above: Sequence[Json], calls: Sequence[Json]) -> str:
    mine = parents[call["call"]]
    if len(mine) > 1 and set(mine) == {other["call"] for other in above}:
        return f"all {len(mine)} above"
    names = {other["call"]: _label(other) for other in calls}
    shown = [names[parent] for parent in mine[:3]]
    return ", ".join(shown) + (f" and {len(mine) - 3} more" if len(mine) > 3 else "")


def _label(call: Json) -> str:
    return (
        str(call["node"])
        if call.get("iteration", 1) == 1 or "#" in call["node"]
        else f"{call['node']}#{call['iteration']}"
    )


def _bracket(place: int, size: int) -> str:
    if size == 1:
        return "─ "
    return "╭ " if place == 0 else "╰ " if place == size - 1 else "├ "


def _last(call: Json) -> float:
    """The latest that is known of a call."""
    times = (call["finished_at"], call["first_token_at"], call["started_at"], call["queued_at"])
    return next(float(when) for when in times if when is not None)


# -- numbers as text


def _sum(calls: Sequence[Json], field: str) -> int:
    return sum(call[field] or 0 for call in calls)


def _percent(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole else "-"


def _share(part: int, whole: int | None) -> str:
    return f"{part:,} of {whole:,}" if whole else f"{part:,}"


def _count(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def _rate(tokens: float | None) -> str:
    return "-" if tokens is None else f"{tokens:,.0f}/s"


def _seconds(seconds: float) -> str:
    if seconds < 0.0995:
        return f"{max(0.0, seconds) * 1e3:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d}" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d}"


def _fates(fates: Mapping[str, int]) -> Text:
    parts = [(f"{count} {fate}", _FATES[fate]) for fate, count in fates.items() if count]
    return Text(", ").join(Text(text, style) for text, style in parts)


# -- the proxy


def _get(url: str, api_key: str | None, path: str, **params: object) -> Json:
    given = {key: str(value) for key, value in params.items() if value is not None}
    answer: Json = _request("GET", url, api_key, path, _TIMEOUT_S, given).json()
    return answer


def _request(
    method: str, url: str, api_key: str | None, path: str, timeout: float, params: dict[str, str], body: Any = None
) -> httpx.Response:
    """The proxy's answer. Raises ClickException with a sentence a person can act on."""
    base = url.rstrip("/").removesuffix("/v1")
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        response = httpx.request(method, base + path, params=params, json=body, headers=headers, timeout=timeout)
    except httpx.ConnectError:
        raise click.ClickException(f"no proxy answers at {base}; start one, or name it with --url") from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise click.ClickException(f"{base}: {error or type(error).__name__}") from None
    if response.status_code == 401:
        raise click.ClickException(f"{base} wants an API key that it knows: --api-key, or HELIUM_API_KEY")
    if response.is_error:
        raise click.ClickException(_message(response))
    return response


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{response.url}: {response.status_code} {response.reason_phrase}"


def _console() -> Console:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200  # piped: nothing is cut
    return console


def _table(*headers: str) -> Table:
    """A table of these columns; a header that begins with ``>`` is for numbers."""
    table = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    for header in headers:
        number = header.startswith(">")
        table.add_column(
            header.lstrip(">"), justify="right" if number else "left", no_wrap=number or header == "timeline"
        )
    return table
