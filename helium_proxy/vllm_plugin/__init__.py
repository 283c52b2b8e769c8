"""Pinned prefixes on stock vLLM: a KV connector that obeys directives in ``kv_transfer_params.helium``.

Runs inside the vLLM worker and imports vLLM and the standard library only. Loaded with one flag::

    --kv-transfer-config '{"kv_connector": "HeliumConnector",
                           "kv_connector_module_path": "helium_proxy.vllm_plugin", "kv_role": "kv_producer"}'

``HeliumConnector`` is imported when asked for, so that the bookkeeping in `pins` can be used without vLLM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .connector import HeliumConnector

__all__ = ["HeliumConnector"]


def __getattr__(name: str) -> type[HeliumConnector]:
    if name != "HeliumConnector":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .versions import TESTED, vllm_version

    try:
        from .connector import HeliumConnector
    except ImportError as error:
        raise ImportError(
            f"HeliumConnector works with vLLM {', '.join(TESTED)}; this is {vllm_version()}, which lacks what it"
            f" needs: {error}"
        ) from error
    return HeliumConnector
