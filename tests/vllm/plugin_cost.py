"""What the pinning connector costs a real engine that never sees a directive.

    python tests/vllm/plugin_cost.py [--rounds 20]

Two engines on the same core, one with the connector; bursts of the same requests go to one and then the other, in
turns that swap order. Prints the ratio of times (with / without): median over the rounds and its quartiles.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

from engines import PIN_CONNECTOR, VllmEngine, start_engines

from helium_proxy.local import free_port

REQUESTS, PROMPT, OUTPUT = 16, 64, 48  # per burst; tokens


def burst(engine: VllmEngine, seed: int) -> float:
    """Seconds that the engine takes for one burst of concurrent requests with new prompts."""
    rng = random.Random(seed)
    bodies = [
        {
            "model": "demo",
            "prompt": [rng.randrange(300, 8000) for _ in range(PROMPT)],
            "max_tokens": OUTPUT,
            "temperature": 0,
            "ignore_eos": True,
        }
        for _ in range(REQUESTS)
    ]
    started = time.perf_counter()
    with ThreadPoolExecutor(REQUESTS) as pool:
        list(pool.map(lambda body: engine.post("/v1/completions", body), bodies))
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    engines = [VllmEngine(free_port(), connector=connector) for connector in (None, PIN_CONNECTOR)]
    start_engines(engines)
    try:
        for engine in engines:
            burst(engine, -1)
        ratios, plain = [], []
        for turn in range(rounds):
            seconds = {}
            for index in (0, 1) if turn % 2 else (1, 0):
                seconds[index] = burst(engines[index], turn)
            ratios.append(seconds[1] / seconds[0])
            plain.append(seconds[0])
    finally:
        for engine in engines:
            engine.stop()
    low, middle, high = statistics.quantiles(ratios, n=4)
    steps = statistics.median(plain) / OUTPUT
    print(f"with / without the connector: median {middle:.3f}, quartiles {low:.3f} to {high:.3f}")
    print(f"{rounds} rounds of {REQUESTS} requests, {steps * 1e3:.1f} ms a step without it")


if __name__ == "__main__":
    main()
