"""The request's ``Cache-Control`` (RFC 9111, section 5.2.1), as far as it concerns the prompt cache."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CacheControl:
    """What the client allows.

    Directives that are unknown or malformed are ignored, as the RFC asks; an unreadable ``max-age`` counts as 0.
    """

    no_store: bool = False
    no_cache: bool = False
    only_if_cached: bool = False
    max_age: float | None = None
    """Oldest answer the client takes, in seconds; None: any."""

    @property
    def may_read(self) -> bool:
        """A stored answer may be served (one no older than `max_age`)."""
        return not (self.no_store or self.no_cache)

    @property
    def may_store(self) -> bool:
        """The answer may be kept for others."""
        return not self.no_store

    @property
    def may_join(self) -> bool:
        """An equal call in flight may be joined: it began before this request was made."""
        return self.may_read and self.max_age != 0


_ANYTHING = CacheControl()


def parse(value: str | None) -> CacheControl:
    """Read a ``Cache-Control`` request header; None or empty allows everything."""
    if not value:
        return _ANYTHING
    no_store = no_cache = only_if_cached = False
    max_age: float | None = None
    for directive in value.lower().split(","):
        name, _, argument = directive.strip().partition("=")
        match name.strip():
            case "no-store":
                no_store = True
            case "no-cache":
                no_cache = True
            case "only-if-cached":
                only_if_cached = True
            case "max-age":
                digits = argument.strip().strip('"')
                age = float(digits) if digits.isascii() and digits.isdigit() else 0.0
                max_age = age if max_age is None else min(age, max_age)
    return CacheControl(no_store, no_cache, only_if_cached, max_age)
