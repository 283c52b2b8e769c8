"""Build the environment of checkov, which pins too much to share ours: ``python tests/operate/build_checkov.py``.

It lies in ``.cache/checkov-venv``, is built once, and again when the version below changes.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

VERSION = "3.3.30"
HOME = Path(__file__).parents[2] / ".cache" / "checkov-venv"
STAMP = HOME / f"installed-{VERSION}"


def build() -> Path:
    """The path of the checkov command. Raises CalledProcessError when it cannot be installed."""
    command = HOME / "bin" / "checkov"
    if not STAMP.exists():
        venv.create(HOME, clear=True, with_pip=True)
        pip = [str(HOME / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check", f"checkov=={VERSION}"]
        subprocess.run(pip, check=True, stdout=sys.stderr, timeout=900)
        STAMP.touch()
    return command


if __name__ == "__main__":
    print(build())
