"""KV events as a subscriber sees them: vLLM's frames, maps with a type, replay from a sequence number."""

from __future__ import annotations

import asyncio
from array import array

import msgspec
import zmq
import zmq.asyncio

from helium_proxy.engine import block_hashes
from helium_proxy.residency.kv_book import BlockView, EventBook

from .conftest import Serve


async def test_events_are_published_and_replayed(serve: Serve) -> None:
    local = "tcp://127.0.0.1:0"
    context = zmq.asyncio.Context()
    async with serve(kv_events=local, kv_events_replay=local, num_blocks=9) as client:
        source = (await client.get("/kv_event_sources"))["0"]
        assert source["topic"] == "kv-events"
        subscriber = context.socket(zmq.SUB)
        subscriber.connect(source["endpoint"])
        subscriber.subscribe(source["topic"])
        prompt = list(range(1000, 1040))
        seen: list[tuple[int, list[dict[str, object]]]] = []
        async with asyncio.timeout(5):
            while not seen:  # a subscription takes effect some time after connect()
                await client.post("/v1/completions", {"prompt": prompt, "max_tokens": 1})
                await client.session.post(client.url + "/reset_prefix_cache")
                while await subscriber.poll(50):
                    topic, number, batch = await subscriber.recv_multipart()
                    assert topic == b"kv-events"
                    _, found, rank = msgspec.msgpack.decode(batch)
                    assert rank == 0
                    seen.append((int.from_bytes(number, "big"), found))
        stored = [e for _, batch in seen for e in batch if e["type"] == "BlockStored"]
        assert stored[0]["block_hashes"] == list(block_hashes(array("I", prompt), 16))
        assert stored[0]["parent_block_hash"] is None
        assert stored[0]["token_ids"] == prompt[:32]
        assert stored[0]["block_size"] == 16

        await client.post("/v1/completions", {"prompt": list(range(120)), "max_tokens": 1})
        await client.post("/v1/completions", {"prompt": list(range(500, 620)), "max_tokens": 1})
        dealer = context.socket(zmq.DEALER)
        dealer.connect(source["replay_endpoint"])
        await dealer.send_multipart([b"", (0).to_bytes(8, "big")])
        numbers, kinds = [], set()
        async with asyncio.timeout(5):
            while True:
                _, _, number, batch = await dealer.recv_multipart()
                if int.from_bytes(number, "big", signed=True) == -1:
                    break
                numbers.append(int.from_bytes(number, "big"))
                kinds |= {e["type"] for e in msgspec.msgpack.decode(batch)[1]}
        assert numbers == list(range(len(numbers)))
        assert kinds == {"BlockStored", "BlockRemoved", "AllBlocksCleared"}
        subscriber.close(0)
        dealer.close(0)
    context.term()


async def test_a_salted_call_is_mirrored_as_salted(serve: Serve) -> None:
    """Read as the proxy reads it: by residency's book and view."""
    local = "tcp://127.0.0.1:0"
    context = zmq.asyncio.Context()
    salted, plain = list(range(1000, 1040)), list(range(3000, 3040))
    async with serve(kv_events=local, kv_events_replay=local, max_num_batched_tokens=16, max_num_seqs=8) as client:
        for fields in ({"prompt": salted, "cache_salt": "tenant"}, {"prompt": plain}):
            await client.post("/v1/completions", {"max_tokens": 1, **fields})
        dealer = context.socket(zmq.DEALER)
        dealer.connect((await client.get("/kv_event_sources"))["0"]["replay_endpoint"])
        view = BlockView("demo", 16)
        async with asyncio.timeout(10):
            while not view.resident_tokens(plain):  # a batch is published some time after its step
                book, view = EventBook(), BlockView("demo", 16)
                await dealer.send_multipart([b"", (0).to_bytes(8, "big")])
                while int.from_bytes((frames := await dealer.recv_multipart())[2], "big", signed=True) != -1:
                    events = book.live(int.from_bytes(frames[2], "big"), frames[3])
                    assert isinstance(events, list)
                    for event in events:
                        view.apply(event)
        dealer.close(0)
    context.term()
    assert book.statistics().undecodable == 0
    assert view.resident_tokens(plain) == 2
    assert (view.resident_tokens(salted), view.resident_tokens(salted, "tenant")) == (0, 2)
