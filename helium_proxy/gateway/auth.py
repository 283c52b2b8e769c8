"""Who is calling: API keys, each of a tenant, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass

import yaml
from pydantic import TypeAdapter, ValidationError

from helium_proxy.config import ApiKey, AuthSettings, yaml_problem
from helium_proxy.errors import ConfigError, Unauthorized


@dataclass(frozen=True, slots=True)
class Principal:
    """A caller: its tenant, and whether the operator's routes are its to use."""

    tenant: str = "default"
    admin: bool = True


_ANYBODY = Principal()
NOBODY = Principal("", admin=False)
"""Who has not said who it is, and is answered nothing that is somebody's."""


class Keyring:
    """The configured keys. `open`: there is none, and everybody is the tenant ``default``."""

    def __init__(self, settings: AuthSettings) -> None:
        keys = [*settings.keys, *_from_file(settings)]
        lone = len(keys) == 1
        self._keys = [(_digest(k.key.get_secret_value()), Principal(k.tenant, k.admin or lone)) for k in keys]

    def __repr__(self) -> str:
        return f"<Keyring {len(self._keys)} keys>"

    @property
    def open(self) -> bool:
        return not self._keys

    def authenticate(self, headers: Mapping[str, str]) -> Principal:
        """The caller with these headers (names in lower case). Raises Unauthorized.

        All keys are compared, by digests of equal length, so that the time taken tells nothing of any of them.
        """
        if not self._keys:
            return _ANYBODY
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = headers.get("x-api-key", "")
        given = given.strip()
        digest = _digest(given)
        found: Principal | None = None
        for known, principal in self._keys:
            if hmac.compare_digest(known, digest):
                found = principal
        if found is None or not given:
            raise Unauthorized("Incorrect or missing API key.")
        return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _from_file(settings: AuthSettings) -> list[ApiKey]:
    if settings.keys_file is None:
        return []
    try:
        content = yaml.safe_load(settings.keys_file.read_text("utf-8"))
        return TypeAdapter(list[ApiKey]).validate_python(content or [])
    except OSError as error:
        raise ConfigError(f"auth.keys_file: {error.strerror or 'cannot be read'}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"auth.keys_file: not YAML: {yaml_problem(error)}") from None
    except ValidationError as error:
        # The message of pydantic would quote the keys.
        raise ConfigError(f"auth.keys_file: {error.error_count()} entries are not of the form key, tenant") from None
