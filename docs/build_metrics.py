"""Write the table of `docs/metrics.md` from the code: ``python docs/build_metrics.py``."""

from __future__ import annotations

import re
from pathlib import Path

from prometheus_client import metrics as kinds

from helium_proxy import metrics

PAGE = Path(__file__).parent / "metrics.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


def families() -> list[tuple[str, str, tuple[str, ...], str]]:
    """(name, kind, labels, meaning) of every metric, in the order of the code."""
    found = []
    for variable, family in vars(metrics).items():
        if isinstance(family, kinds.MetricWrapperBase) and not variable.startswith("_"):
            name = f"{family._name}_total" if isinstance(family, kinds.Counter) else family._name
            found.append((name, family._type, tuple(family._labelnames), family._documentation))
    return found


def table() -> str:
    """The table in Markdown."""
    rows = ["| metric | kind | labels | meaning |", "|---|---|---|---|"]
    for name, kind, labels, meaning in families():
        shown = ", ".join(f"`{label}`" for label in labels) or "–"
        rows.append(f"| `{name}` | {kind} | {shown} | {meaning.replace('|', chr(92) + '|')} |")
    return "\n".join(rows)


def filled(page: str) -> str:
    """`page` with the present table between its marks."""
    return re.sub(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}\n{table()}\n{END}", page, flags=re.S)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
