"""Random directives, cancels and kills for HELIUM_SOAK_SECONDS (120): nothing leaks, no request fails."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pinner import BLOCK, BUDGET, Pinner, pinning_pair, tokens, wait_until

SECONDS = float(os.environ.get("HELIUM_SOAK_SECONDS", "120"))
RESTARTS = max(1, int(SECONDS // 300))
CLIENTS = 4
LONGEST_TTL = 3.0

pytestmark = [pytest.mark.vllm, pytest.mark.soak, pytest.mark.timeout(SECONDS + 120 * RESTARTS + 300, func_only=True)]


def a_directive(rng: random.Random) -> Any:
    name = f"pin-{rng.randrange(12)}"
    ttl = rng.choice([0.2, 1.0, LONGEST_TTL])
    return rng.choice(
        [
            None,
            {},
            {"pin": name, "ttl_s": ttl},
            {"pin": name, "ttl_s": ttl, "tokens": rng.randint(1, 12 * BLOCK)},
            {"pin": name, "ttl_s": ttl, "worth": rng.random() * 3},
            {"renew": name, "ttl_s": ttl},
            {"unpin": name},
            rng.choice([7, {"pin": ""}, {"pin": name, "tokens": -3}, {"nonsense": name}]),
        ]
    )


def a_prompt(rng: random.Random) -> list[int]:
    """Eight families of prefixes that nest, and tails of their own; now and then one that needs the pins' room."""
    if rng.random() < 0.03:
        return tokens(46, rng.randrange(10**6))
    return tokens(12, rng.randrange(8))[: rng.randint(1, 12) * BLOCK] + tokens(rng.random() * 3, rng.randrange(10**6))


def client(pinner: Pinner, seed: int, deadline: float) -> Counter[str]:
    """One client's random requests; every answer is checked. Returns how many of each kind there were."""
    rng = random.Random(seed)
    seen: Counter[str] = Counter()
    while time.monotonic() < deadline:
        prompt, directive = a_prompt(rng), a_directive(rng)
        if rng.random() < 0.2:
            connection, _ = pinner.start(prompt, max_tokens=64, helium=directive)
            time.sleep(rng.random() * 0.2)
            connection.close()
            seen["cancelled"] += 1
            continue
        report = pinner.ask(prompt, directive, rng.randint(1, 12), priority=rng.randint(-2, 2)).report
        assert (report is None) == (directive is None)
        if report is not None:
            assert 0 <= report["pinned_blocks"] <= report["budget_blocks"] == BUDGET
            seen["refused" if "error" in report else "obeyed"] += 1
    return seen


def check_all_free(pinner: Pinner) -> None:
    """After the last request and the longest time to live every block is free again."""
    wait_until(lambda: pinner.engine.running_count() == 0, 60)
    time.sleep(LONGEST_TTL + 0.1)
    assert pinner.report()["pinned_blocks"] == 0
    wait_until(lambda: pinner.used_blocks() == 0)


def kill_under_load_and_restart(pinner: Pinner) -> None:
    streams = [pinner.start(tokens(4, seed), 400, helium={"pin": f"lost-{seed}"}) for seed in range(4)]
    pinner.engine.kill()
    for connection, _ in streams:
        connection.close()
    pinner.engine.start()
    pinner.engine.wait_ready()
    assert pinner.report() == {"pinned_blocks": 0, "budget_blocks": BUDGET}


@pytest.fixture
def pinner(vllm_env: None, tmp_path: Path) -> Iterator[Pinner]:
    engine, _ = pinning_pair(tmp_path)
    with engine:
        yield Pinner(engine)
        assert "Traceback" not in engine.log.read_text()


def test_soak(pinner: Pinner) -> None:
    check_all_free(pinner)
    seen: Counter[str] = Counter()
    for part in range(RESTARTS + 1):
        if part:
            kill_under_load_and_restart(pinner)
        deadline = time.monotonic() + SECONDS / (RESTARTS + 1)
        with ThreadPoolExecutor(CLIENTS) as pool:
            clients = [pool.submit(client, pinner, 100 * part + number, deadline) for number in range(CLIENTS)]
            seen += sum((done.result() for done in clients), Counter())
        check_all_free(pinner)
        for kind in ("expirations", "evictions", "hits"):
            seen[kind] += int(pinner.engine.metric(f"vllm:helium_pin_{kind}_total"))
    print(f"\n{dict(seen)}")
    for kind in ("obeyed", "refused", "cancelled", "expirations", "evictions", "hits"):
        assert seen[kind] > 0, f"the soak tried no {kind}"
