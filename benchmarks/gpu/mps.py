"""CUDA's Multi-Process Service: engines that share a GPU run at the same time, each on its part of it.

Without it processes on one GPU take turns, so that what one engine leaves idle the other has. With it, and with each
held to its part of the multiprocessors, two engines behave much like two smaller GPUs; memory bandwidth stays common.
The daemon runs beside the engines and changes none of the device's settings.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator

CONTROL = "nvidia-cuda-mps-control"


def part(engines: int) -> dict[str, str]:
    """The environment of one of `engines` that share a GPU equally."""
    return {"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": f"{100 / engines:g}"}


@contextlib.contextmanager
def service() -> Iterator[dict[str, str]]:
    """Runs the daemon; yields the environment of its clients, to which each adds its `part`.

    Raises:
        OSError: there is no such program here.
        subprocess.CalledProcessError: it does not start.
    """
    with tempfile.TemporaryDirectory(prefix="mps-") as folder:
        where = {"CUDA_MPS_PIPE_DIRECTORY": f"{folder}/pipe", "CUDA_MPS_LOG_DIRECTORY": f"{folder}/log"}
        for path in where.values():
            os.mkdir(path)
        env = {**os.environ, **where}
        subprocess.run([CONTROL, "-d"], env=env, check=True, timeout=30)
        try:
            yield where
        finally:
            subprocess.run([CONTROL], input="quit\n", text=True, env=env, check=False, timeout=60)
