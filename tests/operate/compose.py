"""compose.yaml and the Dockerfile as data: variables filled in, what each container would run."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
COMPOSE = DOCKER / "compose.yaml"
DOCKERFILE = DOCKER / "Dockerfile"
_VARIABLE = re.compile(r"\$(?:(\$)|\{(\w+)(?::([-?])([^}]*(?:\[\])?))?\})")


def variables(text: str) -> dict[str, str | None]:
    """Name → default of every variable of a compose file; None: it has none."""
    return {name: default if kind == "-" else None for _, name, kind, default in _VARIABLE.findall(text) if name}


def fill(value: Any, environ: Mapping[str, str]) -> Any:
    """`value` with `${NAME:-default}` replaced throughout, as compose does."""
    if isinstance(value, dict):
        return {key: fill(item, environ) for key, item in value.items()}
    if isinstance(value, list):
        return [fill(item, environ) for item in value]
    if not isinstance(value, str):
        return value
    return _VARIABLE.sub(lambda m: "$" if m[1] else environ.get(m[2]) or (m[4] if m[3] == "-" else ""), value)


def load(environ: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The compose file with anchors merged and variables filled in."""
    filled: dict[str, Any] = fill(yaml.safe_load(COMPOSE.read_text()), environ or {})
    return filled


@dataclass(frozen=True)
class Image:
    """What an image says of how it is started."""

    entrypoint: list[str]
    command: list[str]
    environment: dict[str, str]
    user: int
    health: list[str]


def own_image() -> Image:
    """The last stage of the Dockerfile. Raises KeyError where an instruction that we rely on is missing."""
    text = DOCKERFILE.read_text().replace("\\\n", " ")
    last = text[text.rindex("\nFROM ") :]
    found = {line.split()[0]: line.split(maxsplit=1)[1] for line in last.strip().splitlines() if line[:1].isupper()}
    environment = dict(part.split("=", 1) for part in shlex.split(found["ENV"]))
    health = json.loads(found["HEALTHCHECK"][found["HEALTHCHECK"].index("[") :])
    return Image(
        json.loads(found["ENTRYPOINT"]),
        json.loads(found["CMD"]),
        environment,
        int(found["USER"].split(":")[0]),
        health,
    )


PROMETHEUS = Image(["/usr/bin/prometheus"], [], {}, 65534, [])


def argv(service: Mapping[str, Any], image: Image) -> list[str]:
    """What the container runs."""
    entrypoint = service.get("entrypoint")
    command = service.get("command")
    if entrypoint is None:
        entrypoint, default = image.entrypoint, image.command
    else:
        default = []
    command = default if command is None else shlex.split(command) if isinstance(command, str) else command
    return [*map(str, entrypoint), *map(str, command)]
