"""The report's section on campaigns that were measured twice, hours or days apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .sections import Results, markdown_table, small_call_ratio, table_of
from .stats import Row, geometric_mean, speedups

BEFORE = "before/"
"""What the names of earlier results begin with."""
_WITHIN = 0.05
_KEPT = ("engines", "options", "sizes", "batches", "scale", "kv_divisor", "time_scale")
"""What two campaigns must have in common to be compared."""

Key = tuple[str, int, str]


def _rows(result: dict[str, Any]) -> dict[Key, tuple[Row, float | None]]:
    """(shape, phase, system) -> its row, and how much faster it was than the best peer."""
    table = table_of(result)
    ratios = speedups(table)
    return {
        (row.shape, row.phase, row.system): (row, ratios.get(row.system, {}).get((row.shape, row.phase)))
        for row in table
    }


def _comparable(old: dict[str, Any], new: dict[str, Any]) -> bool:
    before, now = old["about"]["campaign"], new["about"]["campaign"]
    return all(before.get(field) == now.get(field) for field in _KEPT)


def again(results: Results, folder: Path) -> str:
    """Counted figures and conclusions of both days side by side; empty where nothing was measured twice."""
    days, body, changes, verdicts = [], [], [], []
    for name, new in results.items():
        old = results.get(BEFORE + name)
        if old is None or not _comparable(old, new):
            continue
        days.append(f"{name} {old['about']['date'][:16].replace('T', ' ')} (commit `{old['about']['commit']}`)")
        then = _rows(old)
        for key, (row, ratio) in _rows(new).items():
            if key not in then:
                continue
            was, ratio_then = then[key]
            change = row.over_minimum / was.over_minimum - 1
            changes.append((change, row.family != "helium", f"{row.system} on {row.shape.replace('_', ' ')}"))
            cells = [name, row.shape.replace("_", " ") + (f", day {row.phase + 1}" if row.phase else ""), row.system]
            cells += [f"{was.over_minimum:.2f}", f"{row.over_minimum:.2f}", f"{100 * change:+.0f}%"]
            if row.system == "helium" and ratio is not None and ratio_then is not None:
                verdicts.append((ratio_then, ratio))
                cells += [f"{ratio_then:.2f} ×", f"{ratio:.2f} ×"]
            else:
                cells += ["", ""]
            body.append(cells)
    if not body:
        return ""
    peers = [abs(change) for change, peer, _ in changes if peer]
    ours = [abs(change) for change, peer, _ in changes if not peer]
    most, _, where = max(changes, key=lambda entry: abs(entry[0]))
    before, now = (geometric_mean([pair[i] for pair in verdicts]) if verdicts else 0.0 for i in (0, 1))
    head = ["campaign", "shape", "system", "tokens ÷ fewest then", "now", "change", "helium × best peer then", "now"]
    return (
        "## Measured again\n\nEarlier measurements of the same campaigns beside the present ones: "
        f"{', '.join(days)}. Of the peers' counts of prompt tokens {_share(peers)} are within 5% of what they were, "
        f"of ours, whose code has changed since, {_share(ours)}; the largest change is {100 * most:+.0f}% ({where}). "
        + (f"Over the best peer, geometric mean of all: {before:.2f} × then, {now:.2f} × now. " if verdicts else "")
        + _small_calls(results)
        + f"\n\n<details><summary>Figures</summary>\n\n{markdown_table(head, body)}\n\n</details>"
    )


def _small_calls(results: Results) -> str:
    """How a small call beside a large workflow fared both times."""
    old, new = results.get(BEFORE + "starvation"), results.get("starvation")
    if old is None or new is None:
        return ""
    then, now = small_call_ratio(old), small_call_ratio(new)
    return f"A small call beside a large workflow: {then:.2f} × what it takes first in, first out; now {now:.2f} ×."


def _share(changes: list[float]) -> str:
    return f"{sum(change <= _WITHIN for change in changes)} of {len(changes)}"
