"""The process: uvicorn around the application, signals, and an orderly end."""

from __future__ import annotations

import asyncio
import gc
import signal
import socket
from collections.abc import Callable
from types import FrameType

import structlog
import uvicorn
from fastapi import FastAPI

from helium_proxy.config import Settings
from helium_proxy.errors import ConfigError, InvalidRequest
from helium_proxy.gateway.app import create_app, prepare
from helium_proxy.gateway.auth import Keyring
from helium_proxy.gateway.protocol import bounded_protocol
from helium_proxy.gateway.services import Services

log = structlog.get_logger(__name__)

_POLL_S = 0.02


class Server(uvicorn.Server):
    """uvicorn's server whose first SIGTERM or SIGINT drains: `/ready` fails at once, a moment later new calls get
    503, calls in flight finish, and after `drain_s` at the latest the process ends, with status 0. A second signal
    ends it at once."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, settings: Settings) -> None:
        super().__init__(config)
        self._app = app
        self._settings = settings
        # -- state
        self._drain: asyncio.Task[None] | None = None
        self.bound: tuple[str, int] | None = None
        """Host and port, once listening."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._drain is not None or not hasattr(self._app.state, "services"):
            self.should_exit = True
            self.force_exit = True
            return
        self._drain = asyncio.get_running_loop().create_task(self._drain_then_exit(signal.Signals(sig).name))

    async def _drain_then_exit(self, name: str) -> None:
        services: Services = self._app.state.services
        server = self._settings.server
        services.stopping = True
        log.info("draining", signal=name, in_flight=services.in_flight)
        await asyncio.sleep(server.ready_grace_s)
        services.draining = True
        deadline = services.clock() + server.drain_s
        while services.in_flight and services.clock() < deadline:  # noqa: ASYNC110 -- bounded, and once a life
            await asyncio.sleep(_POLL_S)
        if services.in_flight:
            log.warning("drain deadline passed", cut=services.in_flight)
            services.watches.cut()
            self.config.timeout_graceful_shutdown = 1  # what is not a call is cut by uvicorn
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        # What has been loaded lives as long as the process: the collector need not look at it again, nor run as often
        # as its defaults would have it in a process that holds tables of many thousands of small objects.
        gc.collect()
        gc.freeze()
        gc.set_threshold(20_000, 20, 20)
        for server in getattr(self, "servers", []):
            for sock in server.sockets:
                self.bound = sock.getsockname()[:2]


async def serve(
    settings: Settings,
    *,
    reload: Callable[[], Settings] | None = None,
    started: Callable[[Server], None] | None = None,
) -> None:
    """Serves until a signal. `reload` is called on SIGHUP for new settings, of which workers and keys are taken over;
    `started` once the server listens. Raises ConfigError when a setting cannot be followed, or the address not be
    had."""
    app = create_app(settings)
    try:
        await prepare(app, settings)
    except OSError as error:
        raise ConfigError(f"cannot start: {error}") from error
    except InvalidRequest as error:
        raise ConfigError(error.message) from error
    config = uvicorn.Config(
        app,
        host=settings.server.host,
        port=settings.server.port,
        http=bounded_protocol(settings.server.max_header_bytes),
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=5,
        backlog=4096,
    )
    server = Server(config, app, settings)
    if reload is not None and hasattr(signal, "SIGHUP"):
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, lambda: loop.create_task(_reload(app.state.services, reload)))
    watcher = asyncio.create_task(_announce(server, started)) if started is not None else None
    try:
        await server.serve()
    except SystemExit as error:  # uvicorn's way to say that it could not bind
        raise ConfigError(f"cannot listen on {settings.server.host}:{settings.server.port}") from error
    finally:
        if watcher is not None:
            watcher.cancel()


async def _announce(server: Server, started: Callable[[Server], None]) -> None:
    while not server.started:  # noqa: ASYNC110 -- uvicorn offers no event
        await asyncio.sleep(_POLL_S)
    started(server)


async def _reload(services: Services, reload: Callable[[], Settings]) -> None:
    """Workers and keys of the new settings; everything else needs a restart. Bad settings change nothing."""
    try:
        settings = reload()
        keyring = Keyring(settings.auth)
        services.pool.check(settings.workers)
    except InvalidRequest as error:
        log.error("reload refused", error=error.message)
        return
    except Exception as error:  # its words may be the settings', with keys among them
        log.error("reload failed", error=type(error).__name__)
        return
    services.keyring = keyring
    if settings.workers:
        await services.pool.sync(settings.workers)
    log.info("reloaded", workers=len(services.pool))
