"""Build one virtual environment per agent framework under ``.cache/frameworks-venv/``.

    python tests/frameworks/build_env.py [NAME…]      # all of them when none is named

Each framework pins its own dependencies, some against each other, hence an environment each; uv's cache lets
them share files on disk. A stamp holds the requirement line an environment was built from, so a second run is
instant. A framework that will not install leaves ``NAME.failed`` with the reason, which the tests show as
their skip reason; a later run tries it again.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2] / ".cache" / "frameworks-venv"

REQUIREMENTS: dict[str, tuple[str, ...]] = {
    "langgraph": ("langgraph>=0.4", "langchain-openai>=0.3"),
    "openai_agents": ("openai-agents>=0.1",),
    "pydantic_ai": ("pydantic-ai-slim[openai]>=0.4",),
    "autogen": ("autogen-agentchat>=0.6", "autogen-ext[openai]>=0.6"),
    "crewai": ("crewai>=0.130",),
    "llama_index": ("llama-index-core>=0.12", "llama-index-llms-openai-like>=0.4"),
    "smolagents": ("smolagents[openai]>=1.18",),
    "dspy": ("dspy>=2.6",),
}
"""Framework → what its environment holds."""


def python_of(name: str) -> Path:
    """The interpreter of a framework's environment (which may not exist)."""
    return ROOT / name / "bin" / "python"


def failure_of(name: str) -> str | None:
    """Why a framework's tests cannot run here; None when its environment is ready."""
    stamp = ROOT / name / "built.txt"
    if stamp.exists() and stamp.read_text().split() == list(REQUIREMENTS[name]):
        return None
    failed = ROOT / f"{name}.failed"
    if failed.exists():
        return f"{name} did not install: {failed.read_text().strip()[-300:]}"
    return f"{name}: no environment; run python tests/frameworks/build_env.py {name}"


def _uv() -> list[str]:
    if importlib.util.find_spec("uv") is not None:
        return [sys.executable, "-m", "uv"]
    found = shutil.which("uv")
    if found is None:
        raise SystemExit("uv is needed to build the frameworks' environments (pip install uv)")
    return [found]


def build(name: str, timeout_s: float = 900.0) -> str | None:
    """Build one environment unless it is up to date; returns why it failed, or None."""
    if failure_of(name) is None:
        return None
    ROOT.mkdir(parents=True, exist_ok=True)
    failed = ROOT / f"{name}.failed"
    failed.unlink(missing_ok=True)
    steps = (
        [*_uv(), "venv", "--quiet", "--clear", "--python", sys.executable, str(ROOT / name)],
        [*_uv(), "pip", "install", "--quiet", "--python", str(python_of(name)), *REQUIREMENTS[name]],
    )
    for step in steps:
        try:
            done = subprocess.run(step, capture_output=True, text=True, timeout=timeout_s, check=False)
            error = done.stderr if done.returncode else None
        except subprocess.TimeoutExpired:
            error = f"timed out after {timeout_s:.0f} s"
        if error is not None:
            failed.write_text(error)
            return error
    (ROOT / name / "built.txt").write_text("\n".join(REQUIREMENTS[name]))
    return None


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in REQUIREMENTS]
    if unknown:
        raise SystemExit(f"unknown: {', '.join(unknown)}; known: {', '.join(REQUIREMENTS)}")
    errors = {name: build(name) for name in names or REQUIREMENTS}
    for name, error in errors.items():
        print(f"{name:14} {'ready' if error is None else 'FAILED: ' + error.strip().splitlines()[-1]}")
    return 1 if any(errors.values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
