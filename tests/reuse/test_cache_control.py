from __future__ import annotations

import pytest

from helium_proxy.reuse import CacheControl, parse_cache_control


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (None, CacheControl()),
        ("", CacheControl()),
        ("no-store", CacheControl(no_store=True)),
        ("No-Cache", CacheControl(no_cache=True)),
        ("only-if-cached, max-age=60", CacheControl(only_if_cached=True, max_age=60)),
        ("max-age=60,max-age=5", CacheControl(max_age=5)),
        ('max-age="30"', CacheControl(max_age=30)),
        ("max-age=", CacheControl(max_age=0)),
        ("max-age=-1", CacheControl(max_age=0)),
        ("max-age=\u0662", CacheControl(max_age=0)),
        ("max-stale=5, private, =, ,", CacheControl()),
    ],
)
def test_parse(header: str | None, expected: CacheControl) -> None:
    assert parse_cache_control(header) == expected


@pytest.mark.parametrize(
    ("header", "read", "store", "join"),
    [
        ("", True, True, True),
        ("no-store", False, False, False),
        ("no-cache", False, True, False),
        ("max-age=0", True, True, False),
        ("max-age=10", True, True, True),
    ],
)
def test_what_is_allowed(header: str, read: bool, store: bool, join: bool) -> None:
    control = parse_cache_control(header)
    assert (control.may_read, control.may_store, control.may_join) == (read, store, join)
