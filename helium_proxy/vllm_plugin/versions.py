"""The vLLM versions that the connector is tested on."""

from __future__ import annotations

TESTED = ("0.30", "0.31", "0.32")  # minor versions; the connector API is experimental and changes between them


class UnsupportedVersion(RuntimeError):
    """The running vLLM is not one of those tested."""


def vllm_version() -> str:
    """The running vLLM's version, or "not installed"."""
    try:
        import vllm
    except ImportError:
        return "not installed"
    return str(getattr(vllm, "__version__", "not installed"))  # a folder of that name is not vLLM


def check_version(version: str, allow_untested: bool = False) -> None:
    """Raise `UnsupportedVersion` unless `version` is a release of a tested minor version."""
    if allow_untested or ".".join(version.split(".")[:2]) in TESTED:
        return
    raise UnsupportedVersion(
        f"HeliumConnector is tested on vLLM {', '.join(TESTED)} and this is {version}. Use one of those, start vLLM"
        ' without the connector, or set "allow_untested_version": true in kv_connector_extra_config.'
    )
