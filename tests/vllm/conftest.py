"""Two real vLLM CPU engines for the whole session, built and started when a test first asks for them.

``HELIUM_VLLM_URLS=http://host:port,http://host:port`` uses engines that already run instead. Where the environment
cannot be built the tests are skipped, each by its name and with the reason.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import build_env
from engines import EngineClient, VllmEngine, start_engines
from pinner import pinning_pair

from helium_proxy.local import free_port

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Real-engine tests are timed without their fixtures: the first one waits for a build and a start."""
    for item in items:
        if HERE in item.path.parents and item.get_closest_marker("vllm") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(300, func_only=True))


@pytest.fixture(scope="session")
def vllm_env() -> None:
    """The environment and the model are built, or the test is skipped."""
    try:
        build_env.ensure()
    except build_env.Unsupported as reason:
        pytest.skip(f"no vLLM CPU build here: {reason}")


@pytest.fixture(scope="session")
def vllm_engines(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[EngineClient]]:
    """Two engines of the same model (96 KV blocks of 128 tokens each), one core each."""
    if urls := os.environ.get("HELIUM_VLLM_URLS"):
        yield [EngineClient(url.strip()) for url in urls.split(",")]
        return
    request.getfixturevalue("vllm_env")
    logs = tmp_path_factory.mktemp("vllm")
    cores = os.cpu_count() or 1
    engines = [VllmEngine(free_port(), core=index % cores, log=logs / f"engine-{index}.log") for index in range(2)]
    start_engines(engines)
    try:
        yield list(engines)
    finally:
        for engine in engines:
            engine.stop()


@pytest.fixture(scope="module")
def pinning_engines(
    vllm_env: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[VllmEngine, VllmEngine]]:
    """An engine with the pinning connector and one that composes it with another; see `pinner`."""
    engines = pinning_pair(tmp_path_factory.mktemp("pinning"))
    start_engines(engines)
    try:
        yield engines
        logs = [engine.log.read_text() for engine in engines]
    finally:
        for engine in engines:
            engine.stop()
    assert not any("Traceback" in log for log in logs), "\n".join(logs)
