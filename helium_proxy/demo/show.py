"""What the demo prints."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from helium_proxy.demo import Comparison


def engines(console: Console, count: int, profile: str, kv_tokens: int) -> None:
    console.print(
        f"{count} embedded engines: vLLM's scheduling, simulated, at the speed of a small model on one CPU core each "
        f"({profile}), {kv_tokens:,} tokens of KV each. Their answers are made up: equal prompts, equal answers.",
        soft_wrap=True,
    )


def workload(console: Console, batch: int, calls: int) -> None:
    console.print(
        f"Agents: for each of {batch} incident reports, 14 experts and a summarizer (map-reduce), and a debate of 3 "
        f"sides over 2 rounds; all at once, {calls} calls.",
        soft_wrap=True,
    )


def watch(console: Console, port: int, *, once: bool) -> None:
    console.print(f"proxy: http://127.0.0.1:{port}/v1" + ("" if once else f", watch it: {page(port)}"))


def page(port: int) -> str:
    return f"http://127.0.0.1:{port}/helium/"


@contextlib.contextmanager
def progress(console: Console, name: str, total: int) -> Iterator[Callable[[], None]]:
    """Yields what to call after every call; a bar on a terminal, one line at the end elsewhere."""
    columns = (TextColumn("{task.description:20}"), BarColumn(), MofNCompleteColumn(), TextColumn("calls"),
               TimeElapsedColumn())  # fmt: skip
    began = time.monotonic()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=total)
        yield lambda: bar.advance(task)
    if not console.is_terminal:
        console.print(f"{name}: {total} calls in {time.monotonic() - began:.1f} s")


def comparison(console: Console, compared: Comparison, *, embedded: bool) -> None:
    direct, proxied = compared.direct, compared.proxied
    table = Table(title="The same calls on the same engines, both times from empty caches", title_justify="left")
    table.add_column("")
    table.add_column("direct, round robin", justify="right")
    table.add_column("through the proxy", justify="right")
    table.add_column("", justify="right")
    table.add_row("makespan", _s(direct.seconds), _s(proxied.seconds), _change(direct.seconds, proxied.seconds))
    tokens = direct.tokens, proxied.tokens
    table.add_row("prompt tokens sent", *(f"{t.prompt:,.0f}" for t in tokens), "")
    table.add_row(
        "prompt tokens computed",
        *(f"{t.computed:,.0f}" for t in tokens),
        _change(tokens[0].computed, tokens[1].computed),
    )
    table.add_row("prefix hit rate", *(f"{t.hit_rate:.0%}" for t in tokens), "")
    total = len(direct.answers)
    table.add_row("outputs equal", "", f"{total - len(compared.differing)} of {total}", "")
    console.print()
    console.print(table)
    if compared.differing:
        some = ", ".join("/".join(call) for call in compared.differing[:3])
        console.print(f"[red]{len(compared.differing)} answers differ[/], e.g. of {some}.")
        if not embedded:
            console.print(
                "On a real engine greedy answers depend on what else is in the batch unless it computes in float32 "
                "(--dtype float32); compare two direct runs to see how many differ without the proxy.",
                soft_wrap=True,
            )


def invitation(console: Console, port: int, model: str) -> None:
    """What to do now."""
    base = f"http://127.0.0.1:{port}"
    own = "" if port == 8080 else f" --url {base}"
    console.print()
    for what, how in (
        ("Serving on: the runs as graphs and timelines", page(port)),
        ("The same in the terminal", f"helium-proxy runs{own}"),
        ("Your own agents", f"OPENAI_BASE_URL={base}/v1 OPENAI_API_KEY=none python …  (model {model!r})"),
    ):
        console.print(f"{what + ':':46} [b]{escape(how)}[/]", soft_wrap=True)
    console.print("Ctrl-C ends it.")


def _s(seconds: float) -> str:
    return f"{seconds:.1f} s"


def _change(before: float, after: float) -> str:
    return f"{(after - before) / before:+.0%}" if before else ""
