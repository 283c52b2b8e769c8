"""The command line: its help, its errors, and what it shows of a running proxy."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from serving import Proxy, Stack, until
from structlog.testing import capture_logs

from helium_proxy import __version__, terminal
from helium_proxy.cli import main

COMMANDS = {"serve", "demo", "engine", "explain", "runs", "workers", "version"}


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(
        main, list(arguments), env={"COLUMNS": "200", "HELIUM_URL": None, "HELIUM_API_KEY": None}
    )


async def at(proxy: Proxy, *arguments: str) -> Result:
    """The command, run in a thread while the proxy serves in this one."""
    return await asyncio.to_thread(invoke, *arguments, "--url", proxy.url)


# -- help and errors


def test_help_lists_every_command_with_a_sentence():
    out = invoke("--help").output
    listed = dict(re.findall(r"^  (\w+) +(\S.*)$", out.split("Commands:")[1], re.M))
    assert set(listed) == COMMANDS
    assert all(len(text) > 10 for text in listed.values())


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_option_has_help(command: str):
    for parameter in main.commands[command].params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name


def test_version():
    assert invoke("version").output.startswith(f"helium-proxy {__version__} (Python ")
    assert invoke("--version").output.strip() == f"helium-proxy, version {__version__}"


def test_a_typo_in_the_configuration_names_the_nearest_key(tmp_path):
    file = tmp_path / "helium.yaml"
    file.write_text("serverr: {port: 1}\n")
    result = invoke("serve", "--config", str(file))
    assert result.exit_code == 1
    assert "serverr is no setting; did you mean server?" in result.output


def test_a_worker_that_is_no_url_is_refused():
    result = invoke("serve", "--worker", "gpu-1:8000")
    assert result.exit_code == 1
    assert "must start with http:// or https://" in result.output


@pytest.mark.parametrize("command", [["runs"], ["runs", "some-run"], ["workers"]])
def test_no_proxy_there(command: list[str]):
    result = invoke(*command, "--url", "http://127.0.0.1:1")
    assert result.exit_code == 1
    assert result.output == "Error: no proxy answers at http://127.0.0.1:1; start one, or name it with --url\n"


# -- a running proxy


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """The proxy in this process logs to the standard output that a command's runner reads."""
    with capture_logs():
        yield


async def review(proxy: Proxy, run: str = "review-1") -> None:
    """Two experts, one asked twice, and a verdict."""

    async def ask(node: str, text: str, parents: list[str]) -> None:
        body = {
            "model": "demo",
            "temperature": 0,
            "max_tokens": 8,
            "messages": [{"role": "user", "content": text}],
            "helium": {"workflow": "review", "run": run, "node": node, "parents": parents},
        }
        (await proxy.client.post("/v1/chat/completions", json=body)).raise_for_status()

    await ask("safety", "Is it safe?", [])
    await ask("speed", "Is it fast?", [])
    await ask("speed_again", "Is it fast?", [])
    await ask("verdict", "So?", ["safety", "speed", "speed_again"])


async def test_workers_and_runs_of_a_running_proxy(stack: Stack):
    engine = await stack.engine()
    proxy = await stack.proxy(engine)
    await review(proxy)

    workers = (await at(proxy, "workers")).output.splitlines()
    assert workers[0].split()[:3] == ["worker", "state", "models"]
    assert workers[1].split()[:3] == [engine.url.removeprefix("http://"), "up", "demo"]

    runs = (await at(proxy, "runs")).output.splitlines()
    assert len(runs) == 2
    assert runs[1].split()[:4] == ["review-1", "review", "live", "4"]
    assert "3 computed, 1 hit" in runs[1]
    assert (await at(proxy, "runs", "--workflow", "other")).output == "No run matches.\n"
    empty = await stack.proxy(engine)
    assert (await at(empty, "runs")).output == "No runs yet.\n"
    plain = await stack.proxy(engine, mode="passthrough")
    await review(plain)
    assert (await at(plain, "runs")).output == "No run is seen in passthrough mode.\n"


async def test_a_run_is_drawn_in_layers(stack: Stack):
    proxy = await stack.proxy(await stack.engine())
    await review(proxy)
    out = (await at(proxy, "runs", "review-1")).output
    assert out.startswith("review  review-1  live  4 calls, ")
    rows = [line.split() for line in out.splitlines()]
    drawn = [(row[0], row[1]) for row in rows if row and row[0] in "╭├╰─"]
    assert drawn == [("╭", "safety"), ("├", "speed"), ("╰", "speed_again"), ("─", "verdict")]
    assert "all 3 above" in out
    assert re.search(r"speed_again +hit", out)


async def test_an_unknown_run_and_an_unknown_key(stack: Stack):
    proxy = await stack.proxy(await stack.engine(), auth={"keys": [{"key": "sk-right"}]})
    refused = await at(proxy, "runs")
    assert refused.exit_code == 1
    assert "wants an API key that it knows: --api-key, or HELIUM_API_KEY" in refused.output
    assert "sk-wrong" not in (await at(proxy, "runs", "--api-key", "sk-wrong")).output
    missing = await at(proxy, "runs", "nowhere", "--api-key", "sk-right")
    assert missing.output == "Error: no run 'nowhere'\n"


async def test_no_worker(stack: Stack):
    proxy = await stack.proxy(engine={"count": 0})
    assert (await at(proxy, "workers")).output.startswith("No workers.")


async def test_a_worker_that_is_down_says_why(stack: Stack):
    proxy = await stack.proxy("http://127.0.0.1:1", wait=False)
    await until(lambda: any(w.last_error for w in proxy.services.pool))
    out = (await at(proxy, "workers")).output
    assert re.search(r"127\.0\.0\.1:1: \S+", out)


@pytest.mark.parametrize("suffix", ["yaml", "json"])
async def test_explain_a_plan(stack: Stack, tmp_path, suffix: str):
    proxy = await stack.proxy(await stack.engine())
    plan = {
        "workflow": "pair",
        "model": "demo",
        "params": {"temperature": 0, "max_tokens": 4},
        "nodes": [
            {"id": "first", "messages": [{"role": "user", "content": "{{inputs.question}}"}]},
            {"id": "second", "messages": [{"role": "user", "content": "Again: {{nodes.first}}"}]},
        ],
        "inputs": [{"question": "Why?"}, {"question": "How?"}],
    }
    file = tmp_path / f"plan.{suffix}"
    file.write_text(json.dumps(plan))
    planned = await at(proxy, "explain", str(file))
    assert planned.output.startswith("Workflow pair: 4 operators over 2 inputs, 4 to compute"), planned.output
    assert "Actual" not in planned.output
    analyzed = await at(proxy, "explain", str(file), "--analyze")
    assert "Actual: " in analyzed.output
    del plan["nodes"]
    file.write_text(json.dumps(plan))
    wrong = await at(proxy, "explain", str(file))
    assert wrong.exit_code == 1
    assert "nodes" in wrong.output


async def test_explain_says_what_cannot_run_and_ends_so(stack: Stack, tmp_path):
    proxy = await stack.proxy(await stack.engine())
    file = tmp_path / "plan.yaml"
    file.write_text("model: gpt-5\nnodes: [{id: a, prompt: x}, {id: b, prompt: '{{nodes.a}}'}]\n")
    planned = await at(proxy, "explain", str(file))
    assert planned.exit_code == 0
    assert "Warning: no worker that is up serves model 'gpt-5', which 2 operators will ask for\n" in planned.output
    analyzed = await at(proxy, "explain", str(file), "--analyze")
    assert analyzed.exit_code == 1
    assert "\nFailed\n  a[0]: The model `gpt-5` does not exist.\n" in analyzed.output
    assert "None" not in analyzed.output


async def test_explain_takes_an_unquoted_date_as_text(stack: Stack, tmp_path):
    proxy = await stack.proxy(await stack.engine())
    file = tmp_path / "plan.yaml"
    file.write_text("model: demo\nnodes: [{id: a, prompt: 'On {{inputs.d}}.'}]\ninputs: [{d: 2024-01-01}]\n")
    planned = await at(proxy, "explain", str(file))
    assert planned.exit_code == 0
    assert planned.output.startswith("Workflow workflow: 1 operator over 1 input, 1 to compute")
    assert "On 2024-01-01." in planned.output


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "Error: plan.yaml: there is no plan in it\n"),
        ("# nothing yet\n", "Error: plan.yaml: there is no plan in it\n"),
        ("nodes: !!set {a}\n", "Error: plan.yaml: Object of type set is not JSON serializable\n"),
        ("nodes: .nan\n", "Error: plan.yaml: Out of range float values are not JSON compliant"),
    ],
)
def test_explain_of_a_file_that_is_no_plan(tmp_path, text: str, error: str):
    file = tmp_path / "plan.yaml"
    file.write_text(text)
    result = invoke("explain", str(file), "--url", "http://127.0.0.1:1")
    assert result.exit_code == 1
    assert result.output.startswith(error)


async def test_one_call_is_no_calls(stack: Stack):
    proxy = await stack.proxy(await stack.engine())
    body = {"model": "demo", "prompt": "Hello.", "max_tokens": 1, "helium": {"run": "short"}}
    (await proxy.client.post("/v1/completions", json=body)).raise_for_status()
    out = (await at(proxy, "runs", "short")).output
    assert "  1 call, " in out
    assert " 1 output token\n" in out


# -- the embedded engine


def test_the_engine_has_the_short_help_too():
    result = invoke("engine", "-h")
    assert result.exit_code == 0
    assert "Serve an embedded engine with vLLM's HTTP interface." in result.output


@pytest.mark.parametrize("option", ["--kv-events", "--kv-events-replay"])
def test_an_endpoint_that_cannot_be_bound_is_named(option: str):
    result = invoke("engine", "--kv-events", "tcp://127.0.0.1:0", option, "foo")
    assert result.exit_code == 2
    assert f"Error: {option[2:].replace('-', '_')}: 'foo' cannot be bound: Invalid argument" in result.output


# -- a run's shape, without a proxy


def call(name: str, queued: float, **fields: Any) -> dict[str, Any]:
    blank = dict.fromkeys(("started_at", "first_token_at", "finished_at", "fate", "worker"))
    return {"call": name, "node": name, "queued_at": queued, "iteration": 1, **blank, **fields}


def test_layers_follow_the_longest_path():
    calls = [call("d", 4), call("a", 1), call("c", 3), call("b", 2)]
    edges = [{"from": f, "to": t} for f, t in (("a", "b"), ("b", "c"), ("a", "c"), ("gone", "d"))]
    layers = terminal.layers_of(calls, terminal.parents_of(calls, edges))
    assert [[c["call"] for c in layer] for layer in layers] == [["a", "d"], ["b"], ["c"]]


def test_a_circle_of_edges_is_drawn_all_the_same():
    calls = [call("a", 1), call("b", 2)]
    edges = [{"from": "a", "to": "b"}, {"from": "b", "to": "a"}]
    assert len(terminal.layers_of(calls, terminal.parents_of(calls, edges))) == 1


@pytest.mark.parametrize(
    ("fields", "bar"),
    [
        ({"started_at": 12.0, "first_token_at": 14.0, "finished_at": 18.0}, "··░░████"),
        ({"started_at": 12.0}, "··"),
        ({}, "█"),
        ({"fate": "hit", "finished_at": 10.0}, "━"),
        ({"fate": "coalesced", "finished_at": 14.0}, "━━━━"),
    ],
)
def test_timeline(fields: dict[str, Any], bar: str):
    assert terminal.timeline(call("a", 10.0, **fields), 10.0, 18.0, 8).plain == bar
