"""Never ask twice: answers kept across runs, and equal calls in flight joined."""

from helium_proxy.reuse.assemble import StreamAssembler
from helium_proxy.reuse.cache_control import CacheControl
from helium_proxy.reuse.cache_control import parse as parse_cache_control
from helium_proxy.reuse.coalesce import Answer, Coalescer, CoalesceStatistics, Head, Seat
from helium_proxy.reuse.entry import Entry, make_entry
from helium_proxy.reuse.key import cache_key, cacheable
from helium_proxy.reuse.prompt_cache import Backend, CacheStatistics, PromptCache, build_cache
from helium_proxy.reuse.relay import OwnStream, Push, StreamRenamer, changed, renamed_body
from helium_proxy.reuse.replay import as_json, as_sse
from helium_proxy.reuse.settings import ReuseSettings

__all__ = [
    "Answer",
    "Backend",
    "CacheControl",
    "CacheStatistics",
    "CoalesceStatistics",
    "Coalescer",
    "Entry",
    "Head",
    "OwnStream",
    "PromptCache",
    "Push",
    "ReuseSettings",
    "Seat",
    "StreamAssembler",
    "StreamRenamer",
    "as_json",
    "as_sse",
    "build_cache",
    "cache_key",
    "cacheable",
    "changed",
    "make_entry",
    "parse_cache_control",
    "renamed_body",
]
