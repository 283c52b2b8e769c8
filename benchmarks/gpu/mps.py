"""CUDA's Multi-Process Service: engines that share a GPU run at the same time, each on its part of it.

Without it processes on one GPU take turns, so that what one engine leaves idle the other has. With it, and with each
held to its part of the multiprocessors, two engines behave much like two smaller GPUs; memory bandwidth stays common.
The daemon runs beside the engines and changes none of the device's settings.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator

CONTROL = "nvidia-cuda-mps-control"


@contextlib.contextmanager
def service(parts: int) -> Iterator[dict[str, str]]:
    """Runs the daemon; yields the environment of a process that gets one of `parts` equal parts.

    Raises:
        OSError: there is no such program here.
        subprocess.CalledProcessError: it does not start.
    """
    with tempfile.TemporaryDirectory(prefix="mps-") as folder:
        where = {"CUDA_MPS_PIPE_DIRECTORY": f"{folder}/pipe", "CUDA_MPS_LOG_DIRECTORY": f"{folder}/log"}
        for path in where.values():
            os.mkdir(path)
        control = shutil.which(CONTROL) or CONTROL
        env = {**os.environ, **where}
        subprocess.run([control, "-d"], env=env, check=True, timeout=30)
        try:
            yield {**where, "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": f"{100 / parts:g}"}
        finally:
            subprocess.run([control], input="quit\n", text=True, env=env, check=False, timeout=60)
