"""Build the peers' virtual environments, so that they run side by side with us: `python -m benchmarks.build_peers`.

Each peer has its own environment under ``.cache/peers-venv/NAME`` (their pins conflict with ours and with one
another). A stamp file holds the pinned requirements it was built from; one whose stamp matches is left alone.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent / ".cache" / "peers-venv"

REQUIREMENTS: dict[str, tuple[str, ...]] = {
    "vllm-router": ("vllm-router==0.1.17",),
    "sglang-router": ("sglang-router==0.3.2",),
    "litellm": ("litellm[proxy]==1.106.2",),
}


def python_of(peer: str) -> Path:
    """The interpreter of the peer's environment."""
    return ROOT / peer / "bin" / "python"


def stamp_of(peer: str) -> Path:
    return ROOT / peer / "built-from"


def is_built(peer: str) -> bool:
    """Whether the environment is there and was built from today's requirements."""
    stamp = stamp_of(peer)
    return stamp.exists() and stamp.read_text() == "\n".join(REQUIREMENTS[peer])


def build(peer: str) -> None:
    """Build one environment from scratch.

    Raises:
        subprocess.CalledProcessError: an install failed; no stamp is left, so that the next call tries again.
    """
    target = ROOT / peer
    if target.exists():
        shutil.rmtree(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "uv", "venv", "--quiet", str(target)], check=True)
    install = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", str(python_of(peer))]
    subprocess.run([*install, *REQUIREMENTS[peer]], check=True)
    stamp_of(peer).write_text("\n".join(REQUIREMENTS[peer]))


def ensure(peers: Iterable[str]) -> None:
    """Build what is missing of these peers."""
    for peer in peers:
        if not is_built(peer):
            print(f"building {peer} in {ROOT / peer}", flush=True)
            build(peer)


if __name__ == "__main__":
    ensure(sys.argv[1:] or REQUIREMENTS)
