"""A campaign: systems × shapes × repeats on one kind of engines, measured and saved."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import aiohttp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from . import build_peers, engines, systems, tables
from .engines import EngineOptions
from .harness import Harness, Outputs, Plan, compare
from .process import ROOT, StartFailed
from .stats import Measurement
from .workingset import working_set
from .workloads import SIZES, WORKLOADS

RESULTS = Path(__file__).resolve().parent / "results"
_MEASUREMENT_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Campaign:
    """Everything a benchmark run is told."""

    engines: str
    options: EngineOptions
    shapes: tuple[str, ...]
    systems: tuple[str, ...]
    sizes: str
    repeats: int = 3
    batches: tuple[tuple[str, int], ...] = ()
    """(shape, runs in a batch); others: the shape's own × `scale`."""
    scale: float = 1.0
    kv_divisor: float | None = None
    """Give the engines together the batch's working set over this, shape by shape (embedded engines)."""
    seed: int = 1
    time_scale: float = 1.0
    stream_every: int = 8
    warmup: int = 0
    decode_cost: float = 3.0

    def batch(self, shape: str) -> int:
        return dict(self.batches).get(shape) or max(1, round(WORKLOADS[shape].batch * self.scale))


def order(names: Sequence[str], turn: int) -> list[str]:
    """The systems' order in this turn: rotated by one each time."""
    shift = turn % len(names)
    return [*names[shift:], *names[:shift]]


def here_and_now() -> dict[str, Any]:
    """When, where and of which code something is measured."""
    commit = ""
    with contextlib.suppress(OSError):  # no git here
        line = ["git", "describe", "--always", "--dirty", "--exclude=*"]
        commit = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, check=False).stdout.strip()
    info = Path("/proc/cpuinfo")
    models = (
        [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    )
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "version": metadata.version("helium-proxy"),
        "cpu": models[0].partition(":")[2].strip() if models else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }


def describe(campaign: Campaign, running: engines.Engines) -> dict[str, Any]:
    """What a reader must know to judge the figures."""
    return {
        **here_and_now(),
        "peers": {name: list(pins) for name, pins in build_peers.REQUIREMENTS.items()},
        "engine_versions": list(engines.versions(campaign.engines)),
        "block_size": running.block_size,
        "num_blocks": running.num_blocks,
        "campaign": asdict(campaign),
        "prompt_sizes": asdict(SIZES[campaign.sizes]),
    }


@dataclass
class _Progress:
    """The two bars: measurements, and the calls of the current one."""

    bars: Progress
    overall: TaskID
    current: TaskID

    def begin(self, label: str, calls: int | None) -> None:
        self.bars.reset(self.current, total=calls, description=label)

    def calls(self, done: int) -> None:
        self.bars.update(self.current, completed=done)

    def end(self) -> None:
        self.bars.advance(self.overall)


class Execution:
    """One campaign under way."""

    def __init__(self, campaign: Campaign, console: Console, checkpoint: Callable[[dict[str, Any]], object]) -> None:
        self._campaign = campaign
        self._console = console
        self._checkpoint = checkpoint
        self._systems = {name: systems.find(name) for name in campaign.systems}
        # All mutable state: what has been measured, what was noted, systems that do not start here.
        self._measured: list[Measurement] = []
        self._notes: list[str] = []
        self._left_out: set[str] = set()
        self._about: dict[str, Any] = {}

    def result(self) -> dict[str, Any]:
        """The result file's content."""
        return {
            "about": self._about,
            "notes": list(dict.fromkeys(self._notes)),
            "measurements": [m.to_json() for m in self._measured],
        }

    async def run(self) -> dict[str, Any]:
        """Measure everything.

        Raises:
            StartFailed: engines did not come up. A *system* that does not is noted and left out.
        """
        campaign = self._campaign
        build_peers.ensure({s.peer for s in self._systems.values() if s.peer is not None})
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
            with Progress(*columns, console=self._console, transient=True) as bars:
                total = campaign.repeats * len(campaign.shapes) * len(self._systems)
                progress = _Progress(
                    bars, bars.add_task("measurements", total=total), bars.add_task("calls", total=1)
                )
                if campaign.kv_divisor is None:
                    await self._with_engines(campaign.shapes, campaign.options, session, progress)
                else:
                    for shape in campaign.shapes:
                        options = await asyncio.to_thread(self._fitted, shape)
                        await self._with_engines((shape,), options, session, progress)
        return self.result()

    def _fitted(self, shape: str) -> EngineOptions:
        """Engines whose KV is the batch's working set over `kv_divisor`."""
        campaign = self._campaign
        assert campaign.kv_divisor is not None
        count = int(campaign.engines.partition(":")[2])
        block = campaign.options.block_size or 16
        tokens = working_set(WORKLOADS[shape], SIZES[campaign.sizes], campaign.batch(shape), block)
        return replace(campaign.options, blocks=round(tokens / campaign.kv_divisor / count / block) + 1)

    async def _with_engines(
        self, shapes: Sequence[str], options: EngineOptions, session: aiohttp.ClientSession, progress: _Progress
    ) -> None:
        campaign = self._campaign
        self._console.print(f"starting {campaign.engines}, {options.blocks} blocks each")
        running = await engines.start(campaign.engines, options, session)
        try:
            harness = Harness(running, session)
            await harness.learn()
            if not self._about:
                self._about = describe(campaign, running) | {"tokens_per_word": harness.writer_scale, "blocks": {}}
            self._about["blocks"] |= dict.fromkeys(shapes, running.num_blocks)
            for name, system in self._systems.items():
                if system.needs_events and not running.events:
                    self._left_out.add(name)
                    self._notes.append(f"{name} left out: the engines publish no KV events")
            for repeat in range(campaign.repeats):
                for number, shape in enumerate(shapes):
                    await self._group(harness, shape, repeat, repeat + number, progress)
                    self._checkpoint(self.result())
        finally:
            await asyncio.to_thread(running.close)

    async def _group(self, harness: Harness, shape: str, repeat: int, turn: int, progress: _Progress) -> None:
        """Every system once on one shape."""
        campaign, workload = self._campaign, WORKLOADS[shape]
        plan = Plan(
            workload=workload,
            sizes=SIZES[campaign.sizes],
            batch=campaign.batch(shape),
            seed=campaign.seed + repeat,
            repeat=repeat,
            time_scale=campaign.time_scale,
            stream_every=campaign.stream_every,
            warmup=campaign.warmup,
            decode_cost=campaign.decode_cost,
        )
        outputs: dict[str, Outputs] = {}
        group: list[Measurement] = []
        calls = workload.calls_per_run
        for name in order(list(self._systems), turn):
            system = self._systems[name]
            if name not in self._left_out and (workload.planned or not system.plan):
                progress.begin(f"{shape} {name}", calls * plan.batch if calls else None)
                began = time.perf_counter()
                try:
                    async with asyncio.timeout(_MEASUREMENT_TIMEOUT_S):
                        results, outputs[name] = await harness.measure(system, plan, progress.calls)
                except StartFailed as failure:
                    self._left_out.add(name)
                    self._notes.append(f"{name} left out: it did not start")
                    self._console.print(f"[red]{failure}")
                except (TimeoutError, aiohttp.ClientError) as failure:
                    self._notes.append(f"{shape} {name} #{repeat}: no measurement, {failure!r}")
                    self._console.print(f"[red]{self._notes[-1]}")
                else:
                    group += results
                    self._console.print(tables.line(results, time.perf_counter() - began))
                    self._notes += [
                        f"{shape} {name} #{repeat}: {m.first_failure}" for m in results if m.first_failure
                    ]
            progress.end()
        if outputs:
            compare(outputs, group)
        self._measured += group


async def execute(
    campaign: Campaign, console: Console, checkpoint: Callable[[dict[str, Any]], object] = lambda result: None
) -> dict[str, Any]:
    """Run the whole campaign; the result file's content. `checkpoint` is given what there is after every group."""
    return await Execution(campaign, console, checkpoint).run()


def save(result: dict[str, Any], name: str, folder: Path = RESULTS) -> Path:
    """Writes the result file; one of the same name from an earlier day is kept beside it, in `before`."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.json"
    old = json.loads(path.read_text()) if path.exists() else {}
    if "measurements" in old and old["about"]["date"][:10] != result["about"]["date"][:10]:
        before = folder / "before"
        before.mkdir(exist_ok=True)
        path.replace(before / path.name)
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path
