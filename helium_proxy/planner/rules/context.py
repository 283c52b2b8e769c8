"""What rules may ask about the world beside the graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Lookup = Callable[[Mapping[str, Any]], str | None]
"""The prompt cache: a call's whole request body (its signature, once its inputs are known) → the output text."""


@dataclass(frozen=True, slots=True)
class RuleContext:
    lookup: Lookup | None = None
