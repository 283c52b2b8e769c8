"""What the programs share: the four workflows one after the other, each under a base URL of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


def main(**workflows: Callable[[str], None]) -> None:
    """``program.py URL TENANT NUMBER TOPIC``: only the base URL tells a framework of the proxy."""
    url, tenant, number, topic = sys.argv[1:5]
    for name, workflow in workflows.items():
        base = f"{url}/{tenant}/{tenant}.{name}.{number}/v1"
        os.environ["OPENAI_BASE_URL"] = os.environ["OPENAI_API_BASE"] = base
        workflow(topic)
