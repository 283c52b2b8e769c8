"""Imports point downwards only: the rooms in their order, read from the source."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import helium_proxy

PACKAGE = Path(helium_proxy.__file__).parent

# Lowest first. What stands together on a line does not import each other.
LEVELS: tuple[frozenset[str], ...] = tuple(
    frozenset(names.split())
    for names in (
        "errors metrics types logs ui client vllm_plugin",
        "engine",
        "workers",
        "residency",
        "dispatch",
        "planner",
        "reuse plan",
        "workflow",
        "config",
        "gateway local",
        "terminal demo",
        "cli",
    )
)
ALONE = {"client": set[str](), "ui": set[str](), "vllm_plugin": set[str](), "plan": {"planner"}, "engine": {"errors"}}
"""Parts that run, or are used, without the rest, and what they may import all the same."""


def part_of(module: str) -> str:
    return module.split(".")[1]


def imports() -> dict[str, set[tuple[str, str]]]:
    """Part of the package → (file, other part it imports), wherever in the file the import stands."""
    found: dict[str, set[tuple[str, str]]] = {}
    for file in PACKAGE.rglob("*.py"):
        inside = file.relative_to(PACKAGE)
        part = inside.parts[0].removesuffix(".py")
        edges = found.setdefault(part, set())
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            for module in modules(node, inside):
                if module.startswith("helium_proxy.") and (other := part_of(module)) != part:
                    edges.add((str(inside), other))
    return found


def modules(node: ast.AST, inside: Path) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ""
    if node.level:
        package = ["helium_proxy", *inside.parts[:-1]]
        base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [base])])
    if base == "helium_proxy":
        return [f"helium_proxy.{alias.name}" for alias in node.names if alias.name != "__version__"]
    return [base]


FOUND = imports()


def level(part: str) -> int:
    found = [i for i, names in enumerate(LEVELS) if part in names]
    assert found, f"helium_proxy.{part} has no place in the order yet"
    return found[0]


@pytest.mark.parametrize("part", sorted(FOUND.keys() - {"__init__", "__main__"}))
def test_imports_point_down(part: str) -> None:
    upward = [f"{file} imports {other}" for file, other in sorted(FOUND[part]) if level(other) >= level(part)]
    assert not upward


@pytest.mark.parametrize("part", sorted(ALONE))
def test_what_stands_alone_does(part: str) -> None:
    assert {other for _, other in FOUND.get(part, set())} <= ALONE[part]


def test_the_plugin_imports_vllm_and_the_standard_library_alone() -> None:
    """It runs inside the worker, where nothing of ours is installed."""
    allowed = {*sys.stdlib_module_names, "vllm", "helium_proxy"}
    for file in (PACKAGE / "vllm_plugin").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            for module in modules(node, file.relative_to(PACKAGE)):
                assert module.split(".")[0] in allowed, f"{file.name} imports {module}"


def test_the_order_names_nothing_that_is_not_there() -> None:
    there = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    named = frozenset[str]().union(*LEVELS)
    assert there - {"__init__", "__main__"} <= named
    assert named <= there


def test_no_name_is_given_twice() -> None:
    """A constant, function or class that a module binds a second time: left over from a merge, and read by nobody."""
    for file in PACKAGE.rglob("*.py"):
        names: list[str] = []
        for node in ast.parse(file.read_text("utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.append(node.name)
            elif isinstance(node, ast.Assign):
                names += [target.id for target in node.targets if isinstance(target, ast.Name)]
        assert len(names) == len(set(names)), file.name
