"""A faithful, deterministic simulation of vLLM: in a process, over HTTP, or under virtual time."""

from __future__ import annotations

from .blocks import block_hashes
from .config import EngineConfig
from .core import EmbeddedEngine, Generation
from .profile import PROFILES, Profile
from .request import Request, Statistics, StepResult
from .scheduler import Scheduler
from .server import create_app, run_engine
from .text import Tokenizer, render

__all__ = [
    "PROFILES",
    "EmbeddedEngine",
    "EngineConfig",
    "Generation",
    "Profile",
    "Request",
    "Scheduler",
    "Statistics",
    "StepResult",
    "Tokenizer",
    "block_hashes",
    "create_app",
    "render",
    "run_engine",
]
