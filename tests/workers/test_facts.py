"""What is read from a worker: `/metrics`, `/v1/models`, its URL."""

from __future__ import annotations

from typing import Any

import aiohttp
import pytest
from pydantic import ValidationError

from helium_proxy.workers.settings import WorkerSpec, WorkersSettings
from helium_proxy.workers.upstream import SendFailed, UpstreamClient
from helium_proxy.workers.worker import Facts, Worker, read_metrics, read_models, worker_id

SPEC = WorkerSpec(url="http://w:8000")

EXPOSITION = b"""# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="demo"} 3.0
vllm:num_requests_waiting{engine="0",model_name="demo"} 2.0
vllm:kv_cache_usage_perc{engine="0",model_name="demo"} 0.25
vllm:prompt_tokens_total{engine="0",model_name="demo"} 1.2e+06
vllm:prompt_tokens_created{engine="0",model_name="demo"} 1.7e+09
vllm:num_preemptions_total{engine="0",model_name="demo"} 4.0
vllm:cache_config_info{block_size="128",cache_dtype="auto",engine="0",num_gpu_blocks="96",odd="a\\"b}c"} 1.0
"""


def test_a_whole_exposition() -> None:
    facts = read_metrics(Facts(), EXPOSITION, SPEC)
    assert (facts.running, facts.waiting, facts.kv_usage) == (3, 2, 0.25)
    assert (facts.prompt_tokens, facts.preemptions) == (1_200_000, 4)
    assert (facts.block_size, facts.num_blocks) == (128, 96)


def test_several_engines_behind_one_url_are_added_up() -> None:
    more = EXPOSITION + EXPOSITION.replace(b'engine="0"', b'engine="1"').replace(b" 0.25", b" 0.75")
    facts = read_metrics(Facts(), more, SPEC)
    assert (facts.running, facts.waiting, facts.kv_usage) == (6, 4, 0.75)


def test_what_is_missing_stays_as_it_was() -> None:
    before = read_metrics(Facts(), EXPOSITION, SPEC)
    assert read_metrics(before, b"", SPEC) == before
    assert read_metrics(before, b"\xff\x00 not an exposition {", SPEC) == before


def test_the_operator_s_word_beats_the_worker_s() -> None:
    spec = WorkerSpec(url="http://w", kv_blocks=1000, block_size=16)
    facts = read_metrics(Facts(), EXPOSITION, spec)
    assert (facts.block_size, facts.num_blocks) == (16, 1000)


def test_the_plugin_s_gauges() -> None:
    text = b"vllm:helium_pinned_blocks 7.0\nvllm:helium_pin_budget_blocks 20.0\n"
    facts = read_metrics(Facts(), text, SPEC)
    assert (facts.pinned_blocks, facts.pin_budget_blocks) == (7, 20)


def test_values_that_are_no_numbers() -> None:
    text = b'vllm:num_requests_running NaN\nvllm:kv_cache_usage_perc +Inf\nvllm:prompt_tokens_total{a="b"} 1e999\n'
    facts = read_metrics(Facts(running=2, prompt_tokens=5), text, SPEC)
    assert facts.running == 2
    assert facts.prompt_tokens == 5


def test_models() -> None:
    payload = {
        "object": "list",
        "data": [
            {"id": "demo", "owned_by": "vllm", "max_model_len": 8192, "root": "/models/demo"},
            {"id": "adapter", "owned_by": "vllm", "parent": "demo"},
            "junk",
            {"no": "id"},
        ],
    }
    facts = read_models(Facts(), payload)
    assert [m.id for m in facts.models] == ["demo", "adapter"]
    assert facts.max_model_len == 8192
    assert facts.engine == "vllm"
    assert read_models(Facts(), {"data": [{"id": "x", "owned_by": "helium-engine"}]}).engine == "helium"
    assert read_models(Facts(), {"data": []}).max_model_len is None


@pytest.mark.parametrize("payload", [None, [], {}, {"data": {}}, "x", {"error": "Unauthorized"}])
def test_answers_that_are_no_list_of_models(payload: Any) -> None:
    with pytest.raises(ValueError, match="not a list"):
        read_models(Facts(), payload)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://10.0.0.7:8000", "10.0.0.7:8000"),
        ("https://gpu.example", "gpu.example:443"),
        ("http://gpu.example/team/a/", "gpu.example:80-team-a"),
        ("http://user:secret@gpu:1", "gpu:1"),
    ],
)
def test_ids(url: str, expected: str) -> None:
    assert worker_id(url) == expected
    assert Worker(WorkerSpec(url=url), WorkersSettings()).id == expected


def test_urls() -> None:
    assert WorkerSpec(url="http://w:8000/v1/").url == "http://w:8000"
    for bad in ("w:8000", "ftp://w", ""):
        with pytest.raises(ValidationError):
            WorkerSpec(url=bad)


def test_keys_are_sent_and_not_shown() -> None:
    worker = Worker(WorkerSpec(url="http://w", api_key="sk-secret"), WorkersSettings())  # type: ignore[arg-type]
    assert worker.headers == {"Authorization": "Bearer sk-secret"}
    assert "secret" not in repr(worker) + repr(worker.spec)
    assert not Worker(SPEC, WorkersSettings()).headers


async def test_a_host_that_does_not_answer_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was sent yet: the call may go elsewhere at no cost."""

    async def request(*_: Any, **__: Any) -> None:
        raise aiohttp.ConnectionTimeoutError("no route")

    client = UpstreamClient(WorkersSettings())
    monkeypatch.setattr(client._session, "request", request)
    try:
        with pytest.raises(SendFailed) as caught:
            await client.send(Worker(SPEC, WorkersSettings()), "GET", "/health", headers={}, body=None)
    finally:
        monkeypatch.undo()
        await client.close()
    assert caught.value.kind == "refused"
