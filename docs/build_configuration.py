"""Write the tables of `docs/configuration.md` from the code: ``python docs/build_configuration.py``."""

from __future__ import annotations

import re
import types
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from helium_proxy.config import DELIMITER, PREFIX, ApiKey, Settings
from helium_proxy.workers.settings import WorkerSpec

PAGE = Path(__file__).parent / "configuration.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"

LISTS: dict[str, type[BaseModel]] = {"workers": WorkerSpec, "auth.keys": ApiKey}
"""Settings that are lists, and the form of their items."""


def tables() -> str:
    """A section for each part of the tree, in the order of the code."""
    alone = {name: info for name, info in Settings.model_fields.items() if not _is_section(info)}
    parts = ["## At the top", _table(alone, "")]
    for name, info in Settings.model_fields.items():
        if _is_section(info):
            model: type[BaseModel] = info.annotation  # type: ignore[assignment]
            parts += [f"## `{name}`", (model.__doc__ or "").strip(), _table(model.model_fields, f"{name}.")]
    for name, model in LISTS.items():
        parts += [f"## Each of `{name}`", (model.__doc__ or "").strip(), _table(model.model_fields, None)]
    return "\n\n".join(parts)


def filled(page: str) -> str:
    """`page` with the present tables between its marks."""
    return re.sub(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}\n{tables()}\n{END}", page, flags=re.S)


def _is_section(info: FieldInfo) -> bool:
    return isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)


def _table(fields: dict[str, FieldInfo], prefix: str | None) -> str:
    """`prefix`: of the keys; None: items of a list, which no variable of the environment names."""
    rows = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    for name, info in fields.items():
        meaning = (info.description or "").replace("|", r"\|")
        rows.append(f"| `{prefix or ''}{name}` | {_kind(info)} | {_default(info)} | {meaning} |")
    return "\n".join(rows)


def _kind(info: FieldInfo) -> str:
    kind = _name(info.annotation)
    bounds = [f"{sign} {value:g}" for sign, value in _bounds(info)]
    return f"{kind}, {', '.join(bounds)}" if bounds else kind


def _bounds(info: FieldInfo) -> list[tuple[str, float]]:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    return [
        (sign, value)
        for constraint in info.metadata
        for name, sign in signs.items()
        if (value := getattr(constraint, name, None)) is not None
    ]


def _name(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in get_args(annotation))
    if origin in (Union, types.UnionType):
        return " or ".join(_name(part) for part in get_args(annotation) if part is not type(None))
    if origin is list:
        return "list"
    names = {
        int: "integer",
        float: "number",
        str: "text",
        bool: "`true` or `false`",
        Path: "path",
        SecretStr: "secret",
    }
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    value = info.get_default(call_default_factory=True)
    if value is None or value is PydanticUndefined or value == []:
        return "none"
    if isinstance(value, bool):
        value = str(value).lower()
    return f"`{value.value if isinstance(value, Enum) else value}`"


def example() -> str:
    """The variable that the page's introduction names, made as the code makes it."""
    return f"{PREFIX}SERVER{DELIMITER}PORT"


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text("utf-8")), "utf-8")
