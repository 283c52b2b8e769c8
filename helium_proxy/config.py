"""The settings: one typed tree, from a YAML file, the environment (``HELIUM_SECTION__KEY``) and flags.

Later sources win: defaults, file, environment, flags. A key that does not exist is an error that names the nearest
one that does.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from helium_proxy.dispatch.settings import DispatchSettings
from helium_proxy.errors import ConfigError
from helium_proxy.planner.settings import PlanSettings
from helium_proxy.reuse.settings import ReuseSettings
from helium_proxy.workers.settings import WorkerSpec, WorkersSettings
from helium_proxy.workflow.settings import WorkflowSettings

PREFIX = "HELIUM_"
DELIMITER = "__"
_OTHERS = re.compile(r"HELIUM_(CONFIG|URL|API_KEY|SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_\w+)")
"""Variables that are no settings: the command line's own, and what Kubernetes sets for a Service named `helium`."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ApiKey(_Section):
    """One client key. Calls of different tenants share nothing: no cache entry, no run, no inferred edge."""

    key: SecretStr = Field(
        min_length=1, description="What the client sends as `Authorization: Bearer` or `x-api-key`."
    )
    tenant: str = Field("default", min_length=1, max_length=64, description="Whose key it is.")
    admin: bool = Field(False, description="May use the operator's routes (`/helium/…`). A lone key always may.")


class AuthSettings(_Section):
    """Who may call. With no key at all the proxy is open, and says so when it starts."""

    keys: list[ApiKey] = Field(default_factory=list, description="Client keys.")
    keys_file: Path | None = Field(
        None, description="YAML file with a list of keys in the same form; read again on SIGHUP."
    )
    salt_tenants: bool = Field(
        False, description="Give each tenant a `cache_salt`, so that not even KV blocks are shared between tenants."
    )


class ServerSettings(_Section):
    """The HTTP server."""

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8080, ge=0, le=65535, description="Port to listen on; 0 lets the system choose.")
    max_body_bytes: int = Field(32 * 2**20, ge=1024, description="Larger request bodies are answered 413.")
    max_header_bytes: int = Field(65536, ge=4096, description="Larger request heads are answered 431.")
    request_timeout_s: float = Field(3600.0, gt=0, description="A call that takes longer is ended with 504.")
    drain_s: float = Field(
        60.0, ge=0, description="After SIGTERM, how long calls in flight may take before they are cut."
    )
    ready_grace_s: float = Field(
        0.5, ge=0, description="After SIGTERM, how long `/ready` fails before new calls are refused."
    )


class DirectiveSettings(_Section):
    """Pins and prewarming."""

    pins: bool = Field(True, description="Pin static prefixes on workers that have the plugin.")
    pin_share: float = Field(0.3, ge=0, le=0.9, description="Share of a worker's KV that pins may take.")
    pin_ttl_s: float = Field(300.0, gt=0, description="A pin lapses after this unless it is renewed.")
    prewarm: bool = Field(True, description="Prefill expected prefixes on idle capacity.")
    lookahead: bool = Field(True, description="Prefill what the template says comes next while the client thinks.")
    min_think_s: float = Field(0.2, ge=0, description="Shorter think times leave nothing to gain by lookahead.")
    min_probability: float = Field(0.7, ge=0, le=1, description="Of a next call, to prefill for it.")
    busy_calls: int = Field(
        0, ge=0, description="A worker that runs more calls than this is not idle: nothing is sent ahead to it."
    )
    min_tokens: int = Field(256, ge=1, description="Prefixes shorter than this are not worth a directive.")


class LogSettings(_Section):
    """Logs go to standard error."""

    level: Literal["debug", "info", "warning", "error"] = Field("info", description="The least level written.")
    format: Literal["auto", "json", "console"] = Field(
        "auto", description="`auto`: console on a terminal, JSON lines otherwise."
    )
    access: bool = Field(False, description="Write one line per call.")


class TracingSettings(_Section):
    """OpenTelemetry, with the extra `otel` installed."""

    enabled: bool = Field(False, description="Send spans: a run is a trace, a call a span.")
    endpoint: str | None = Field(None, description="OTLP/HTTP endpoint; default: `OTEL_EXPORTER_OTLP_ENDPOINT`.")
    service_name: str = Field("helium-proxy", description="`service.name` of the spans.")


class StoreSettings(_Section):
    """What survives a restart."""

    path: Path | None = Field(
        None, description="SQLite file for templates and profiles; none: they are kept in memory only."
    )


class EngineSettings(_Section):
    """The embedded engines that serve when no worker is configured."""

    count: int = Field(2, ge=0, le=64, description="How many; 0: none, workers are added at run time.")
    model: str = Field("demo", description="The model's name.")
    profile: Literal["cpu-tiny", "h100-8b", "h200-8b", "instant"] = Field(
        "cpu-tiny",
        description="Speed: a CPU's, a GPU's with a model of 8B parameters, or none to wait for.",
    )


class Settings(BaseSettings):
    """The whole tree."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_nested_delimiter=DELIMITER,
        extra="forbid",
        frozen=True,
        nested_model_default_partial_update=True,
    )

    mode: Literal["full", "passthrough"] = Field(
        "full", description="`passthrough` turns everything off but routing by load: for comparison and in trouble."
    )
    workers: list[WorkerSpec] = Field(default_factory=list, description="Workers to start with.")
    server: ServerSettings = Field(default_factory=ServerSettings)
    auth: AuthSettings = Field(default_factory=AuthSettings)
    pool: WorkersSettings = Field(default_factory=WorkersSettings)
    dispatch: DispatchSettings = Field(default_factory=DispatchSettings)
    workflow: WorkflowSettings = Field(default_factory=WorkflowSettings)
    reuse: ReuseSettings = Field(default_factory=ReuseSettings)
    plans: PlanSettings = Field(default_factory=PlanSettings)
    directives: DirectiveSettings = Field(default_factory=DirectiveSettings)
    engine: EngineSettings = Field(default_factory=EngineSettings)
    store: StoreSettings = Field(default_factory=StoreSettings)
    log: LogSettings = Field(default_factory=LogSettings)
    tracing: TracingSettings = Field(default_factory=TracingSettings)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)  # `load` merges the sources itself, so that each can be checked and named


def load(
    file: Path | None = None,
    *,
    overrides: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Settings:
    """The settings from `file`, the environment and `overrides` (flags, as a nested dict). Raises ConfigError."""
    environ = os.environ if environ is None else environ
    merged: dict[str, Any] = {}
    if file is not None:
        merged = read_yaml(file)
        _check_keys(merged, str(file))
    _merge(merged, _environment(environ))
    _merge(merged, dict(overrides or {}))
    try:
        settings = Settings(**merged)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from error
    if settings.mode == "passthrough":
        settings = _passthrough(settings)
    return settings


def read_yaml(file: Path) -> dict[str, Any]:
    """A YAML file's mapping. Raises ConfigError."""
    try:
        content = yaml.safe_load(file.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not YAML: {yaml_problem(error)}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: must be a mapping of settings")
    return content


def yaml_problem(error: yaml.YAMLError | UnicodeDecodeError) -> str:
    """What is wrong and where, without the line itself: keys may stand in it."""
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 at byte {error.start}"
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or type(error).__name__
    return f"{problem} in line {mark.line + 1}" if mark is not None else str(problem)


def known_keys() -> dict[str, tuple[Any, str]]:
    """Every setting as ``section.key`` → (default, description); what the documentation is checked against."""
    return dict(_walk(Settings))


def _walk(model: type[BaseModel], prefix: str = "") -> list[tuple[str, tuple[Any, str]]]:
    found: list[tuple[str, tuple[Any, str]]] = []
    for name, info in model.model_fields.items():
        annotation = info.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            found += _walk(annotation, f"{prefix}{name}.")
        else:
            found.append((prefix + name, (info.get_default(call_default_factory=True), info.description or "")))
    return found


def _passthrough(settings: Settings) -> Settings:
    """Everything off: calls go to the least loaded worker as they come."""
    return settings.model_copy(
        update={
            "dispatch": settings.dispatch.model_copy(
                update={
                    "placement": "least-loaded",
                    "ordering": "fifo",
                    "admission": False,
                    "keep_places": False,
                    "working_sets": False,
                }
            ),
            "workflow": settings.workflow.model_copy(
                update={"inference": False, "templates": False, "lookahead": False}
            ),
            "pool": settings.pool.model_copy(update={"probe": False, "calibrate": False, "kv_events": False}),
            "reuse": settings.reuse.model_copy(update={"enabled": False, "coalesce": False}),
            "directives": settings.directives.model_copy(
                update={"pins": False, "prewarm": False, "lookahead": False}
            ),
            "plans": settings.plans.model_copy(
                update=dict.fromkeys(("prune", "cse", "cache_fetch", "placement", "ordering"), False)
            ),
        }
    )


def _merge(into: dict[str, Any], more: Mapping[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = dict(value) if isinstance(value, Mapping) else value


class _Environment(EnvSettingsSource):
    """pydantic-settings' reading of nested variables and JSON values, over a given environment."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = {k.lower(): v for k, v in environ.items()}
        super().__init__(Settings)

    def _load_env_vars(self) -> Mapping[str, str | None]:
        return self._environ


def _environment(environ: Mapping[str, str]) -> dict[str, Any]:
    keys = {PREFIX + k.upper().replace(".", DELIMITER): k for k in known_keys()}
    sections = {PREFIX + name.upper() for name in Settings.model_fields}
    for name, value in environ.items():
        if not name.startswith(PREFIX) or name in keys or name in sections or _OTHERS.fullmatch(name):
            continue
        if name == "HELIUM_PORT" and "://" in value:
            continue  # Kubernetes', as in `_OTHERS`
        near = [key for key in keys if key.endswith(DELIMITER + name.removeprefix(PREFIX))]
        near = near or difflib.get_close_matches(name, keys, n=1, cutoff=0.8)
        if near or DELIMITER in name:  # what has neither may be another program's
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"environment variable {name} is no setting{hint}")
    try:
        return dict(_Environment(environ)())
    except Exception as error:
        for name, value in environ.items():
            if name in sections or name in keys:
                _check_json(name, value)
        raise ConfigError(f"environment: {error}") from error


def _check_json(name: str, value: str) -> None:
    """Raises ConfigError if `value` looks like JSON that is none; the value itself may be secret."""
    if name not in (PREFIX + "WORKERS", f"{PREFIX}AUTH{DELIMITER}KEYS") and value[:1] not in ("[", "{"):
        return
    try:
        json.loads(value)
    except ValueError:
        example = '[{"key": "sk-…"}]' if name.endswith("KEYS") else '[{"url": "http://gpu-1:8000"}]'
        raise ConfigError(f"environment variable {name}: not JSON, as in {example}") from None


def _check_keys(content: Mapping[str, Any], where: str, model: type[BaseModel] = Settings, path: str = "") -> None:
    for key, value in content.items():
        info = model.model_fields.get(str(key))
        if info is None:
            raise ConfigError(f"{where}: {path}{key} is no setting{_nearest(str(key), model, path)}")
        annotation = info.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel) and isinstance(value, Mapping):
            _check_keys(value, where, annotation, f"{path}{key}.")


def _nearest(key: str, model: type[BaseModel], path: str) -> str:
    everywhere = [k for k in known_keys() if k.rsplit(".", 1)[-1] == key]
    near = difflib.get_close_matches(key, list(model.model_fields), n=1, cutoff=0.5)
    found = everywhere or [path + name for name in near]
    return f"; did you mean {found[0]}?" if found else ""


def _explain(error: ValidationError) -> str:
    lines = []
    for problem in error.errors(include_url=False, include_input=False):
        where = ".".join(str(part) for part in problem["loc"])
        lines.append(f"{where}: {problem['msg']}")
        if problem["type"] == "extra_forbidden":
            last = str(problem["loc"][-1])
            names = [*WorkerSpec.model_fields, *ApiKey.model_fields, *(k.rsplit(".", 1)[-1] for k in known_keys())]
            near = difflib.get_close_matches(last, names, n=1, cutoff=0.5)
            lines[-1] = f"{where} is no setting" + (f"; did you mean {near[0]}?" if near else "")
    return "; ".join(lines)
