"""The pinning connector on a real engine: every guarantee of docs/pinning.md."""

from __future__ import annotations

import http.client
import json
import statistics
import time
from collections.abc import Iterator
from typing import Any

import pytest
from engines import VllmEngine
from pinner import BLOCK, BUDGET, USABLE, Pinner, tokens, wait_until

pytestmark = pytest.mark.vllm


@pytest.fixture
def pinner(pinning_engines: tuple[VllmEngine, VllmEngine]) -> Iterator[Pinner]:
    """The engine with the connector, empty; checked for leaked blocks afterwards."""
    subject = Pinner(pinning_engines[0])
    subject.clear()
    yield subject
    subject.clear()
    assert subject.used_blocks() == 0


@pytest.fixture
def composed(pinning_engines: tuple[VllmEngine, VllmEngine]) -> Iterator[Pinner]:
    subject = Pinner(pinning_engines[1])
    subject.clear()
    yield subject
    subject.clear()
    assert subject.used_blocks() == 0


def test_two_batches_with_a_flood_between_them(pinner: Pinner) -> None:
    """Static prefixes hit whole in the second batch when pinned and not at all otherwise."""
    pinned, control = [tokens(4, seed) for seed in (1, 2, 3, 4)], [tokens(4, seed) for seed in (5, 6, 7, 8)]
    for number, (with_pin, without) in enumerate(zip(pinned, control, strict=True)):
        question = tokens(0.5, 100 + number)
        pin = {"pin": f"role-{number}", "tokens": len(with_pin), "ttl_s": 300}
        assert pinner.ask(with_pin + question, helium=pin).report == {
            "pinned_blocks": 4 * (number + 1),
            "budget_blocks": BUDGET,
        }
        pinner.ask(without + question)
    pinner.flood(5 * USABLE, seed=1000)
    second = [tokens(0.5, 200 + number) for number in range(4)]
    controls = [pinner.ask(prefix + question) for prefix, question in zip(control, second, strict=True)]
    answers = [pinner.ask(prefix + question) for prefix, question in zip(pinned, second, strict=True)]
    assert [answer.cached for answer in answers] == [len(prefix) for prefix in pinned]
    assert [answer.cached for answer in controls] == [0, 0, 0, 0]
    slow, fast = (statistics.median(a.seconds for a in batch) for batch in (controls, answers))
    print(
        f"\nsecond batch, time to first token: control {slow * 1e3:.0f} ms, pinned {fast * 1e3:.0f} ms, "
        f"{slow / fast:.1f} times"
    )
    assert slow > 1.3 * fast


def test_a_pinned_prefix_gives_the_same_answer_as_a_computed_one(pinner: Pinner) -> None:
    prompt = tokens(4.5, 11)
    computed = pinner.ask(prompt, helium={"pin": "exact"}, max_tokens=16)
    from_pin = pinner.ask(prompt, max_tokens=16)
    assert (computed.cached, from_pin.cached) == (0, 4 * BLOCK)
    assert from_pin.text == computed.text


def test_the_budget_is_never_exceeded(pinner: Pinner) -> None:
    assert pinner.report() == {"pinned_blocks": 0, "budget_blocks": BUDGET}
    assert "over the budget" in pinner.pin("too long", 20, 20)["error"]
    for number in range(5):
        assert "error" not in pinner.pin(f"part-{number}", 3, 21 + number)
    refused = pinner.pin("one too many", 4, 30)
    assert refused["pinned_blocks"] == 15
    assert "3 of 18 are free" in refused["error"]
    shared = tokens(3, 21) + tokens(3, 31)  # three of its six blocks are pinned already
    assert pinner.ask(shared, helium={"pin": "longer"}).report == {"pinned_blocks": 18, "budget_blocks": BUDGET}
    worthier = pinner.ask(tokens(3, 32), helium={"pin": "worthier", "worth": 2})
    assert worthier.report == {"pinned_blocks": 18, "budget_blocks": BUDGET}
    assert pinner.used_blocks() == 18


def test_pins_expire_are_renewed_and_released(pinner: Pinner) -> None:
    assert pinner.pin("short", 2, 40, ttl_s=2)["pinned_blocks"] == 2
    assert pinner.pin("renewed", 3, 41, ttl_s=2)["pinned_blocks"] == 5
    assert "error" not in pinner.directive(renew="renewed", ttl_s=60)
    time.sleep(2.1)
    assert pinner.report()["pinned_blocks"] == 3
    assert pinner.directive(renew="short")["error"] == "no pin is named 'short'"
    assert pinner.directive(unpin="renewed") == {"pinned_blocks": 0, "budget_blocks": BUDGET}
    assert pinner.used_blocks() == 0


def test_a_request_that_pins_would_starve_is_admitted_at_the_price_of_the_least_worth(pinner: Pinner) -> None:
    for name, seed, worth in (("best", 50, 3), ("least", 51, 1), ("middle", 52, 2)):
        assert "error" not in pinner.pin(name, 6, seed, worth=worth)
    evicted = pinner.engine.metric("vllm:helium_pin_evictions_total")
    large = pinner.ask(tokens(47.5, 53), helium={})  # 48 of 63 blocks; 18 are pinned
    assert large.report == {"pinned_blocks": 12, "budget_blocks": BUDGET}
    assert pinner.engine.metric("vllm:helium_pin_evictions_total") == evicted + 1
    assert pinner.ask([*tokens(6, 50), 9]).cached == 6 * BLOCK
    assert pinner.directive(unpin="least")["error"] == "no pin is named 'least'"
    assert "error" not in pinner.directive(unpin="middle")


def test_a_request_that_extends_a_pinned_prefix_keeps_the_pin(pinner: Pinner) -> None:
    """Its own pinned prefix is no obstacle: giving it up would gain nothing."""
    pinner.pin("own", 18, 55)
    extended = pinner.ask(tokens(18, 55) + tokens(29, 56), helium={})
    assert extended.cached == 18 * BLOCK
    assert extended.report == {"pinned_blocks": 18, "budget_blocks": BUDGET}


def test_pins_survive_preemption(pinner: Pinner) -> None:
    pinner.pin("kept", 18, 60)
    before = pinner.engine.metric("vllm:num_preemptions_total")
    # 45 blocks are left; the two, of one request to start together, need 20 each at first and 24 each at the end.
    body = pinner.body([], None, 100) | {"prompt": [tokens(20, 61), tokens(20, 62)]}
    answers = pinner.engine.post("/v1/completions", body)["choices"]
    assert pinner.engine.metric("vllm:num_preemptions_total") > before
    assert len(answers) == 2
    assert all(answer["text"] for answer in answers)
    assert pinner.report()["pinned_blocks"] == 18
    assert pinner.ask([*tokens(18, 60), 9]).cached == 18 * BLOCK
    assert pinner.used_blocks() == 18


def test_reset_prefix_cache_takes_the_pins_with_it(pinner: Pinner) -> None:
    pinner.pin("a", 8, 70)
    assert pinner.reset()
    assert pinner.report() == {"pinned_blocks": 0, "budget_blocks": BUDGET}
    assert pinner.ask(tokens(8.5, 70)).cached == 0
    assert pinner.pin("a", 8, 70)["pinned_blocks"] == 8


def test_reset_prefix_cache_fails_as_ever_under_running_requests_and_keeps_the_pins(pinner: Pinner) -> None:
    pinner.pin("a", 8, 72)
    connection, _ = pinner.start(tokens(4, 73), max_tokens=400)
    assert not pinner.reset()
    assert pinner.report()["pinned_blocks"] == 8
    assert pinner.reset("?reset_running_requests=true")
    assert pinner.report()["pinned_blocks"] == 0
    connection.close()
    wait_until(lambda: pinner.engine.running_count() == 0)


@pytest.mark.parametrize(
    "bad",
    [
        5,
        "pin",
        [],
        {"pin": ""},
        {"pin": 5},
        {"pin": "x" * 999},
        {"pin": "a", "tokens": -1},
        {"pin": "a", "tokens": 5},
        {"pin": "a", "ttl_s": "x"},
        {"renew": "nobody"},
        {"unpin": "nobody"},
        {"pin": "a", "unpin": "a"},
        {"frob": 1},
    ],
    ids=lambda bad: str(bad)[:24],
)
def test_a_bad_directive_is_reported_and_ignored(pinner: Pinner, bad: Any) -> None:
    refused = pinner.engine.metric("vllm:helium_pin_refusals_total")
    answer = pinner.ask(tokens(2, 80), helium=bad, max_tokens=2)
    assert answer.text
    assert answer.report is not None
    assert answer.report["error"]
    assert answer.report["pinned_blocks"] == 0
    assert pinner.engine.metric("vllm:helium_pin_refusals_total") == refused + 1


def test_requests_without_directives_are_answered_as_ever(pinner: Pinner) -> None:
    body = {"model": "demo", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
    for params in ({}, {"kv_transfer_params": None}, {"kv_transfer_params": {"other": {"a": 1}}}):
        assert pinner.engine.post("/v1/chat/completions", {**body, **params})["kv_transfer_params"] is None


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages"])
def test_every_generating_route_carries_directives(pinner: Pinner, path: str) -> None:
    text = " ".join(str(number) for number in range(80))
    body: dict[str, Any] = {"model": "demo", "kv_transfer_params": {"helium": {"pin": "chat"}}}
    if path == "/v1/responses":
        body |= {"input": text, "max_output_tokens": 2}
    else:
        body |= {"messages": [{"role": "user", "content": text}], "max_tokens": 2}
    report = pinner.engine.post(path, body)["kv_transfer_params"]["helium"]
    assert report["pinned_blocks"] > 2
    assert pinner.report() == report


def test_a_streamed_request_is_obeyed_without_a_report(pinner: Pinner) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", pinner.engine.port, timeout=60)
    body = pinner.body(tokens(3, 90), {"pin": "streamed"}, 2, stream=True, stream_options={"include_usage": True})
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    text = connection.getresponse().read()
    connection.close()
    assert b"[DONE]" in text
    assert b"helium" not in text
    assert pinner.report()["pinned_blocks"] == 3


def test_the_engines_own_metrics_show_the_pins(pinner: Pinner) -> None:
    def metric(name: str) -> float:
        return pinner.engine.metric(f"vllm:helium_{name}")

    obeyed, hits = metric("pin_directives_total"), metric("pin_hits_total")
    pinner.pin("a", 4, 95)
    assert (metric("pins"), metric("pinned_blocks"), metric("pin_budget_blocks")) == (1, 4, BUDGET)
    assert metric("pin_directives_total") == obeyed + 1
    pinner.ask([*tokens(4, 95), 9])
    assert metric("pin_hits_total") == hits + 1
    assert pinner.used_blocks() == 4  # vllm:kv_cache_usage_perc counts them as in use
    pinner.directive(unpin="a")
    assert (metric("pins"), metric("pinned_blocks")) == (0, 0)


def test_a_cancelled_request_leaves_no_pin_and_no_block(pinner: Pinner) -> None:
    body = pinner.body(tokens(40, 97), {"pin": "never"}, 1)
    connection = http.client.HTTPConnection("127.0.0.1", pinner.engine.port, timeout=60)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    time.sleep(0.3)
    connection.close()
    wait_until(lambda: pinner.engine.running_count() == 0)
    assert pinner.report()["pinned_blocks"] == 0
    assert pinner.used_blocks() == 0


def test_patience_ends_when_pins_delay_a_request_that_running_ones_block(composed: Pinner) -> None:
    """With 31 pinned, 10 running and 22 free, a request of 30 waits half a second and then gets the pins' room."""
    composed.pin("a", 15, 120)
    composed.pin("b", 16, 121, worth=2)
    connection, _ = composed.start(tokens(9, 122), max_tokens=600)
    waiting = composed.ask(tokens(29.5, 123), helium={})
    assert waiting.report == {"pinned_blocks": 16, "budget_blocks": 31}
    assert composed.engine.metric("vllm:num_requests_running") == 1
    connection.close()
    wait_until(lambda: composed.engine.running_count() == 0)


def test_it_composes_with_another_connector(composed: Pinner, pinning_engines: tuple[VllmEngine, VllmEngine]) -> None:
    assert composed.pin("a", 4, 130) == {"pinned_blocks": 4, "budget_blocks": 31}
    assert composed.engine.metric("vllm:helium_pinned_blocks") == 4
    stored = list((pinning_engines[1].log.parent / "kv").rglob("*.safetensors"))
    assert stored, "the other connector saved nothing"
    assert composed.directive(unpin="a") == {"pinned_blocks": 0, "budget_blocks": 31}
