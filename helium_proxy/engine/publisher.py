"""KV events over ZMQ in vLLM's format: PUB frames (topic, sequence number, msgpack batch), and a replay socket."""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from queue import Empty, SimpleQueue
from typing import Any

import msgspec
import zmq

from helium_proxy.errors import ConfigError

from .blocks import AllBlocksCleared, BlockRemoved, BlockStored, KVEvent
from .config import EngineConfig

_END = (-1).to_bytes(8, "big", signed=True)
_KEPT = 10_000


class Publisher:
    """Publishes batches from a thread of its own, so that a slow subscriber never delays a step.

    `endpoint` and `replay` are what was bound, the port filled in where it was 0. Raises `ConfigError` for what
    cannot be bound.
    """

    def __init__(self, config: EngineConfig) -> None:
        assert config.kv_events is not None
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._pub = context.socket(zmq.PUB)
        self._pub.setsockopt(zmq.SNDHWM, 100_000)
        self._router = context.socket(zmq.ROUTER)
        self.replay = None
        try:
            self.endpoint = _bind(self._pub, "kv_events", config.kv_events)
            if config.kv_events_replay is not None:
                self.replay = _bind(self._router, "kv_events_replay", config.kv_events_replay)
        except ConfigError:
            self._pub.close(linger=0)
            self._router.close(linger=0)
            raise
        self.topic = config.kv_events_topic
        self._block_size = config.block
        # -- all mutable state ------------------------------------------------------------------------------
        self._queue: SimpleQueue[bytes | None] = SimpleQueue()  # encoded batches; None ends the thread
        self._kept: deque[tuple[int, bytes]] = deque(maxlen=_KEPT)  # (sequence number, batch), for replay
        # ---------------------------------------------------------------------------------------------------
        self._thread = threading.Thread(target=self._run, daemon=True, name="kv-events")
        self._thread.start()

    def __repr__(self) -> str:
        return f"<Publisher {self.endpoint}>"

    def publish(self, events: list[KVEvent]) -> None:
        """Queue one batch."""
        self._queue.put(msgspec.msgpack.encode([time.time(), [self._event(e) for e in events], 0]))

    def close(self) -> None:
        """Send what is queued and stop."""
        self._queue.put(None)
        self._thread.join(timeout=2.0)

    def describe(self) -> dict[str, Any]:
        """What ``/kv_event_sources`` says of it."""
        return {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": self.endpoint,
            "replay_endpoint": self.replay,
            "buffer_steps": _KEPT,
            "hwm": 100_000,
            "max_queue_size": 100_000,
            "topic": self.topic,
        }

    def _event(self, event: KVEvent) -> dict[str, Any]:
        """vLLM's map: a type, and the fields that are not at their default."""
        if isinstance(event, BlockStored):
            return {
                "type": "BlockStored",
                "block_hashes": event.hashes,
                "parent_block_hash": event.parent,
                "token_ids": event.tokens,
                "block_size": self._block_size,
                "lora_id": None,
                "medium": "GPU",
                "lora_name": None,
                # Per block, what its hash covers besides tokens: the salt stands with a prompt's first.
                "extra_keys": [(event.salt,) if event.salt and not i else None for i in range(len(event.hashes))],
                "group_idx": 0,
            }
        if isinstance(event, BlockRemoved):
            return {"type": "BlockRemoved", "block_hashes": event.hashes, "medium": "GPU", "group_idx": 0}
        assert isinstance(event, AllBlocksCleared)
        return {"type": "AllBlocksCleared"}

    def _run(self) -> None:
        topic = self.topic.encode()
        numbers = itertools.count()
        while True:
            if self._router.poll(0):
                self._answer(self._router.recv_multipart(), topic)
            try:
                batch = self._queue.get(timeout=0.05)
            except Empty:
                continue
            if batch is None:
                break
            number = next(numbers)
            self._pub.send_multipart((topic, number.to_bytes(8, "big"), batch))
            self._kept.append((number, batch))
        self._pub.close(linger=200)
        self._router.close(linger=200)

    def _answer(self, frames: list[bytes], topic: bytes) -> None:
        if len(frames) != 3:
            return
        client, _, start = frames
        first = int.from_bytes(start, "big")
        for number, batch in self._kept:
            if number >= first:
                self._router.send_multipart((client, b"", topic, number.to_bytes(8, "big"), batch))
        self._router.send_multipart((client, b"", b"", _END, b""))


def _bind(socket: zmq.Socket[bytes], setting: str, endpoint: str) -> str:
    """Bind, and return the endpoint with the port the system chose, if it did."""
    try:
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        reason = f"{zmq.strerror(error.errno or 0)} (one is like tcp://127.0.0.1:5557)"
        raise ConfigError(f"{setting}: {endpoint!r} cannot be bound: {reason}") from None
    bound = socket.getsockopt_string(zmq.LAST_ENDPOINT)
    return bound if endpoint.endswith(":0") else endpoint
