"""Bodies of requests: read as engines read them, and written again so that an engine reads what the client wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from hashlib import blake2b
from typing import Any

import orjson

from helium_proxy.errors import InvalidRequest
from helium_proxy.workflow import strip_tags

_DIGITS = bytes.maketrans(b"123456789", b"000000000")
_MANY = b"0" * 19
"""So many digits may be an integer of more than 64 bits, which the fast parser makes a float of."""
_REPORT = "kv_cache_report_mode"
"""Has an engine publish KV events of blocks that it holds already: whoever follows them would count those twice."""
_SALT_CHARS = 128
_NOT_IN_SALTS = frozenset("@/\\\0")


def parse(raw: bytes) -> dict[str, Any] | None:
    """The JSON object in `raw`, or None. Raises InvalidRequest where engines may read what is not read here."""
    body = None
    if _MANY not in raw.translate(_DIGITS):
        with suppress(ValueError):
            body = orjson.loads(raw)
    try:
        if body is None:
            body = json.loads(raw)  # large integers, NaN, a lone surrogate
    except ValueError:
        return None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None
    return body if isinstance(body, dict) else None


def as_utf8(raw: bytes) -> bytes:
    """JSON in another of Unicode's encodings, or with a byte order mark, as engines read it too, without either."""
    if raw[:1] == b"{" and raw[1:2] != b"\0":
        return raw
    encoding = json.detect_encoding(raw)
    if encoding == "utf-8":
        return raw
    try:
        return raw.decode(encoding, "surrogatepass").encode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return raw


def odd(raw: bytes) -> bool:
    """Whether the fast encoder would make something else of what `raw` says: NaN and infinities among its numbers."""
    if b"NaN" not in raw and b"Infinity" not in raw:
        return False
    try:
        orjson.loads(raw)
    except ValueError:
        return True
    return False  # they are words of a text


def encoded(body: Mapping[str, Any], raw: bytes) -> bytes:
    """`body`, which came as `raw`, or most of it."""
    if odd(raw):
        return json.dumps(body).encode()
    try:
        return orjson.dumps(body)
    except TypeError:  # an integer of more than 64 bits, a lone surrogate, deep nesting
        return json.dumps(body).encode()


def extended(raw: bytes, body: Mapping[str, Any], new: Mapping[str, Any]) -> bytes:
    """`raw`, which reads `body`, with `new` fields at its end: every number and every escape reaches the engine as
    the client wrote it, and where it names a column in an error, it is the client's."""
    if not new:
        return raw
    head, brace, rest = raw.rpartition(b"}")
    return head + (b"," if body else b"") + orjson.dumps(new)[1:-1] + brace + rest


def stripped(body: Mapping[str, Any]) -> tuple[Mapping[str, Any], bool]:
    """`body` without what is the proxy's alone to say, and whether anything of that was in it."""
    kept, changed = strip_tags(body)
    xargs = kept.get("vllm_xargs")
    if isinstance(xargs, dict) and _REPORT in xargs:
        left = {name: value for name, value in xargs.items() if name != _REPORT}
        others = {name: value for name, value in kept.items() if name != "vllm_xargs"}
        return ({**others, "vllm_xargs": left} if left else others), True
    return kept, changed


def tenant_salt(tenant: str, own: Any) -> str:
    """A tenant's `cache_salt`, with the client's own in it, so that none chooses its way into another's blocks; in a
    form that vLLM takes."""
    salt = f"{len(tenant)}:{tenant}" + (f":{own}" if isinstance(own, str) else "")
    if len(salt) > _SALT_CHARS or not _NOT_IN_SALTS.isdisjoint(salt):
        return blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=32).hexdigest()
    return salt
