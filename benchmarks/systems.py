"""The systems under test: direct round robin, the peers that a user would pick instead, and helium-proxy.

Every system is started fresh for every measurement, on a free port, with the settings its documentation gives for
the purpose; nothing is tuned to the workloads, ours no more than theirs. `helium+KEY=VALUE+KEY=VALUE` is helium-proxy
with the settings ``HELIUM_KEY=VALUE`` in its environment.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import aiohttp
import orjson
import yaml

from helium_proxy.local import free_port

from . import build_peers
from .client import Decorate, leave_alone
from .engines import Engines
from .process import Server, StartFailed
from .workloads import Call

Family = Literal["direct", "peer", "helium"]


@dataclass(frozen=True)
class System:
    """One system: how it is started and what its clients add to a body."""

    name: str
    family: Family
    command: Callable[[Engines, int], list[str]] | None = None
    """(engines, port) -> command line; None: the client goes to the engines itself."""
    env: Mapping[str, str] = field(default_factory=dict)
    ready: str = "/health"
    registered: str | None = None
    """Path that lists the workers, for a system that says it is ready before it knows them all."""
    decorate: Decorate = leave_alone
    plan: bool = False
    """Submit the batch as a plan instead of running the client program."""
    peer: str | None = None
    """The environment of `build_peers` it needs."""
    needs_events: bool = False
    """Only with engines that publish KV events."""


def tag(body: dict[str, Any], call: Call) -> None:
    """Helium's own tags."""
    body["helium"] = {
        "workflow": call.workflow,
        "run": call.run,
        "node": call.node,
        "parents": list(call.parents),
    }


def program(body: dict[str, Any], call: Call) -> None:
    """vllm-router's program scheduling: the run is the program; the context is a JSON *string*.

    An ``agent_id`` of its own would make the call a sub-program's and needs a ``parent_program_id``."""
    context = orjson.dumps({"program_id": call.run}).decode()
    body["vllm_xargs"] = {"agentic_context": context}


def _helium(engines: Engines, port: int) -> list[str]:
    command = [str(Path(sys.executable).with_name("helium-proxy")), "serve"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    for url in engines.urls:
        command += ["--worker", url]
    return command


def _vllm_router(*extra: str, events: bool = False) -> Callable[[Engines, int], list[str]]:
    def command(engines: Engines, port: int) -> list[str]:
        python = build_peers.python_of("vllm-router")
        line = [str(python.with_name("vllm-router")), "--host", "127.0.0.1", "--port", str(port)]
        line += ["--worker-urls", *engines.urls, "--worker-startup-check-interval", "1", "--log-level", "warning"]
        line += ["--prometheus-port", str(free_port())]
        if events:
            for url, endpoint in zip(engines.urls, engines.events, strict=True):
                line += ["--kv-event-source", f"{url}={endpoint}"]
            line += ["--kv-event-block-size", str(engines.block_size), "--kv-event-model", engines.model]
        return [*line, *extra]

    return command


def _sglang_router(*extra: str) -> Callable[[Engines, int], list[str]]:
    def command(engines: Engines, port: int) -> list[str]:
        python = build_peers.python_of("sglang-router")
        line = [str(python), "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", str(port)]
        line += ["--worker-urls", *engines.urls, "--policy", "cache_aware", "--log-level", "warn"]
        line += ["--worker-startup-check-interval", "1", "--prometheus-host", "127.0.0.1"]
        return [*line, "--prometheus-port", str(free_port()), *extra]

    return command


_BALANCED = ("--balance-abs-threshold", "4", "--balance-rel-threshold", "1.1")
"""By default both routers balance from 64 calls of difference on, and half as many again: more than are in flight
where two small engines are all there is."""


def _litellm(engines: Engines, port: int) -> list[str]:
    models = [
        {
            "model_name": engines.model,
            "litellm_params": {
                "model": f"hosted_vllm/{engines.model}",
                "api_base": f"{url}/v1",
                "api_key": "none",
            },
        }
        for url in engines.urls
    ]
    config = {"model_list": models, "router_settings": {"routing_strategy": "simple-shuffle", "num_retries": 2}}
    path = Path(tempfile.gettempdir()) / f"bench-litellm-{port}.yaml"
    path.write_text(yaml.safe_dump(config))
    python = build_peers.python_of("litellm")
    line = [str(python.with_name("litellm")), "--config", str(path)]
    return [*line, "--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"]


ABLATIONS: dict[str, dict[str, str]] = {
    "passthrough": {"MODE": "passthrough"},
    "no-placement": {"DISPATCH__PLACEMENT": "least-loaded"},
    "no-ordering": {"DISPATCH__ORDERING": "fifo"},
    "no-admission": {"DISPATCH__ADMISSION": "false"},
    "no-reuse": {"REUSE__ENABLED": "false", "REUSE__COALESCE": "false"},
    "no-templates": {"WORKFLOW__TEMPLATES": "false"},
    "no-places": {"DISPATCH__KEEP_PLACES": "false"},
    "no-working-sets": {"DISPATCH__WORKING_SETS": "false"},
    "no-lookahead": {"DIRECTIVES__LOOKAHEAD": "false"},
    "no-events": {"POOL__KV_EVENTS": "false"},
}
"""Settings that turn one thing off, by what is turned off; `passthrough` turns off everything."""

_OURS = System("helium", "helium", _helium, ready="/ready", decorate=tag)

SYSTEMS: dict[str, System] = {
    system.name: system
    for system in (
        System("rr", "direct"),
        System("vllm-router", "peer", _vllm_router("--policy", "cache_aware"), peer="vllm-router"),
        System(
            "vllm-router-kv",
            "peer",
            _vllm_router("--policy", "kv_aware", events=True),
            peer="vllm-router",
            needs_events=True,
        ),
        System(
            "vllm-router-program",
            "peer",
            _vllm_router("--policy", "cache_aware", "--enable-program-scheduling"),
            decorate=program,
            peer="vllm-router",
        ),
        System("sglang", "peer", _sglang_router(), registered="/workers", peer="sglang-router"),
        System("sglang-balanced", "peer", _sglang_router(*_BALANCED), registered="/workers", peer="sglang-router"),
        System(
            "litellm",
            "peer",
            _litellm,
            env={"LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true", "LITELLM_LOG": "ERROR"},
            ready="/health/readiness",
            peer="litellm",
        ),
        _OURS,
        replace(_OURS, name="helium-untagged", decorate=leave_alone),
        replace(_OURS, name="helium-plan", plan=True),
        *(
            replace(_OURS, name=f"helium-{name}", env={f"HELIUM_{key}": value for key, value in settings.items()})
            for name, settings in ABLATIONS.items()
        ),
    )
}
"""Round robin counts as a peer when the best peer is sought: it is what a plain load balancer does."""


_SETTLE_S = 2.0
"""After a system has said that it is ready, before it is measured: what starts lazily in it has started then."""


async def start(system: System, engines: Engines, session: aiohttp.ClientSession) -> tuple[Server, str]:
    """Start a system that is a server; it and its base URL, once it serves and knows every engine.

    Raises:
        StartFailed: it did not come up (it is stopped again).
    """
    assert system.command is not None
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    server = Server(system.name, system.command(engines, port), system.env, f"{url}{system.ready}")
    try:
        await server.wait_ready(session)
        for _ in range(300 if system.registered else 0):
            async with session.get(f"{url}{system.registered}") as response:
                if (await response.text()).count('"is_healthy":true') == len(engines.urls):
                    break
            await asyncio.sleep(0.1)
        else:
            if system.registered:
                raise StartFailed(f"{system.name} does not know all engines:\n{server.log_tail()}")
        await asyncio.sleep(_SETTLE_S)
    except BaseException:
        server.stop()
        raise
    return server, url


def find(name: str) -> System:
    """The system of this name; ``NAME+KEY=VALUE`` adds settings to one of helium-proxy's.

    Raises:
        ValueError: there is none of this name.
    """
    base, *settings = name.split("+")
    if base not in SYSTEMS:
        raise ValueError(f"no system {base!r}; there are {', '.join(SYSTEMS)}")
    system = SYSTEMS[base]
    if not settings:
        return system
    if system.family != "helium":
        raise ValueError(f"{base} takes no settings")
    pairs = dict(setting.split("=", 1) for setting in settings)
    env = {key if key.startswith("HELIUM_") else f"HELIUM_{key}": value for key, value in pairs.items()}
    return replace(system, name=name, env={**system.env, **env})
