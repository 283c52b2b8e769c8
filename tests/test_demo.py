"""The demo: its agents' calls, what it reads from engines, and the whole of it on engines that take no time."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from serving import Stack, until

from helium_proxy import demo
from helium_proxy.demo.engines import DemoFailed, Engines, Tokens, read_counters
from helium_proxy.demo.proxy import usable_port
from helium_proxy.demo.texts import DEBATERS, EXPERTS, handbook, report
from helium_proxy.demo.workflows import Agent, calls, run_all
from helium_proxy.engine.text import Tokenizer
from helium_proxy.local import free_port

KV = demo.BLOCKS * demo.BLOCK_SIZE


def test_the_handbooks_do_not_fit_into_one_engine_but_every_call_does():
    tokenizer = Tokenizer()
    handbooks = [len(tokenizer.encode(handbook(*role))) for role in {**EXPERTS, **DEBATERS}.items()]
    assert sum(handbooks) > KV
    assert sum(handbooks) < demo.ENGINES * KV  # else there were nothing that placement could do
    assert max(handbooks) * 2 < KV


def test_texts_are_the_same_every_time_and_differ_from_one_another():
    assert handbook("network", "names") == handbook("network", "names")
    assert len({report(number) for number in range(50)}) == 50
    assert len({handbook(*role) for role in {**EXPERTS, **DEBATERS}.items()}) == len(EXPERTS) + len(DEBATERS)


async def test_calls_counts_what_run_all_asks_and_parents_are_asked_first():
    asked: list[tuple[str, str]] = []

    class Recorder(Agent):
        async def ask(self, workflow, run, node, messages, parents=None):
            assert all((run, parent) in asked for parent in parents or [])
            asked.append((run, node))
            return f"{run} {node} says so"

    await run_all(Recorder(client=None, model="m"), 3)  # type: ignore[arg-type]
    assert len(asked) == len(set(asked)) == calls(3) == 63


def test_counters_are_summed_over_label_sets():
    page = (
        'vllm:prompt_tokens_total{engine="0"} 100.0\nvllm:prompt_tokens_total{engine="1"} 50.0\n'
        'vllm:prompt_tokens_cached_total{engine="0"} 30.0\nvllm:generation_tokens_total{engine="0"} 7.0\n'
    )
    tokens = read_counters(page)
    assert tokens == Tokens(150, 30, 7)
    assert (tokens.computed, tokens.hit_rate) == (120, 0.2)


def test_a_page_without_vllms_counters_is_refused():
    with pytest.raises(DemoFailed, match="is it vLLM"):
        read_counters("up 1\n")


async def test_engines_forget_and_name_their_models(stack: Stack):
    engine = await stack.engine()
    async with httpx.AsyncClient() as client:
        engines = Engines([engine.url], client)
        assert await engines.models() == ["demo"]
        assert await engines.forget()
        assert await engines.counters() == Tokens()


def test_a_taken_port_is_replaced():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert usable_port(port) != port
    assert usable_port(port) == port


def run_demo(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "helium_proxy.cli", "demo", "--port", "0", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


async def test_the_whole_demo_on_given_workers(stack: Stack):
    first, second = await stack.engine(), await stack.engine()
    process = run_demo("--once", "--batch", "1", "--worker", first.url, "--worker", f"{second.url}/v1")
    out, _ = await asyncio.to_thread(process.communicate, timeout=60)
    assert process.returncode == 0, out
    assert re.search(r"outputs equal .* 21 of 21", out), out
    rows = dict(re.findall(r"│ (makespan|prompt tokens sent|prompt tokens computed) +│ +([\d.,]+)", out))
    assert set(rows) == {"makespan", "prompt tokens sent", "prompt tokens computed"}


async def test_an_unknown_model_is_named_beside_those_that_are_served(stack: Stack):
    engine = await stack.engine()
    process = run_demo("--once", "--model", "nope", "--worker", engine.url)
    out, _ = await asyncio.to_thread(process.communicate, timeout=60)
    assert process.returncode == 1
    assert "model 'nope' is not served; there are: demo" in out


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc to see child processes")
async def test_interrupted_while_it_measures_it_leaves_no_process_behind():
    process = run_demo("--once")
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    await until(lambda: len(listed.read_text().split()) >= demo.ENGINES, within=30)
    children = [int(child) for child in listed.read_text().split()]
    process.send_signal(signal.SIGINT)
    await asyncio.to_thread(process.communicate, timeout=30)
    assert process.returncode == 130
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)


def test_a_port_is_given_once() -> None:
    ports = [free_port() for _ in range(500)]
    assert len(set(ports)) == 500
