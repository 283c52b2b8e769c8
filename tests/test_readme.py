"""What the README and its neighbours say is tried here: commands, code, links, names of settings and files."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from io import StringIO
from pathlib import Path

import click
import pytest
from frameworks.build_env import failure_of, python_of
from rich.console import Console
from serving import Stack

from helium_proxy.cli import main
from helium_proxy.config import known_keys, load
from helium_proxy.demo import Comparison, Measured, show
from helium_proxy.demo.engines import Tokens

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
OWN = [ROOT / "README.md", *(ROOT / "docs" / name for name in ("README.md", "architecture.md", "development.md"))]
URL = "http://127.0.0.1:8080"

BLOCKS = re.findall(r"^```(\w+) ?(\w*)\n(.*?)^```", README, re.M | re.S)
PYTHON = [(framework, code) for language, framework, code in BLOCKS if language == "python"]
SHELL = "".join(code for language, _, code in BLOCKS if language == "sh").replace("\\\n", " ").splitlines()


def commands(name: str) -> list[list[str]]:
    return [shlex.split(line, comments=True) for line in SHELL if line.split()[:1] == [name]]


# -- code


@pytest.mark.parametrize(("framework", "code"), PYTHON, ids=[f or f"python-{i}" for i, (f, _) in enumerate(PYTHON)])
async def test_the_code_runs(stack: Stack, framework: str, code: str):
    if framework and (reason := failure_of(framework)) is not None:
        pytest.skip(reason)
    proxy = await stack.proxy(await stack.engine())
    python = str(python_of(framework)) if framework else sys.executable
    environ = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}
    done = await asyncio.to_thread(
        subprocess.run,
        [python, "-c", code.replace(URL, proxy.url)],
        env=environ,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    if "helium" in code:
        run = (await proxy.client.get("/helium/runs/review-42")).json()
        assert [call["node"] for call in run["nodes"]] == ["security", "speed", "verdict"]
        assert len(run["edges"]) == 2


async def test_a_client_that_reads_the_environment(stack: Stack):
    proxy = await stack.proxy(await stack.engine())
    [exported] = commands("export")
    environ = dict(pair.split("=", 1) for pair in exported[1:])
    environ["OPENAI_BASE_URL"] = environ["OPENAI_BASE_URL"].replace(URL, proxy.url)
    header = re.search(r"`OPENAI_CUSTOM_HEADERS='([^']+)'`", README)
    assert header is not None
    environ |= {"OPENAI_CUSTOM_HEADERS": header[1], "PATH": os.environ["PATH"]}
    code = "from openai import OpenAI; OpenAI().chat.completions.create(model='demo', messages=[])"
    code = code.replace("[]", "[{'role': 'user', 'content': 'Hello.'}]")
    await asyncio.to_thread(subprocess.run, [sys.executable, "-c", code], env=environ, check=True, timeout=60)
    [run] = (await proxy.client.get("/helium/runs")).json()["runs"]
    assert run["workflow"] == "review"


# -- commands


@pytest.mark.parametrize("words", commands("helium-proxy"), ids=" ".join)
def test_our_commands_have_these_options(words: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    command = main.commands[words[1]]
    with click.Context(main) as parent:
        command.make_context(words[1], words[2:], parent=parent)  # raises on what it does not know


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
async def test_the_curl_commands(stack: Stack, tmp_path: Path):
    proxy = await stack.proxy(await stack.engine())
    tried = [[word.replace(URL, proxy.url) for word in words] for words in commands("curl")]
    assert len(tried) == 3
    for words in tried:
        done = await asyncio.to_thread(
            subprocess.run, [*words, "-sSf"], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        json.loads(done.stdout)


def test_make_targets_exist():
    mentioned = set(
        re.findall(r"\bmake ([a-z][a-z-]+)", "".join(re.findall(r"`+[^`]+`+", README)) + "\n".join(SHELL))
    )
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert {"demo", "test"} <= mentioned <= targets


def test_vllms_flags_are_those_our_containers_use():
    [words] = commands("vllm")
    worker = (ROOT / "docker/worker.sh").read_text()
    flags = [word for word in words if word.startswith("--")]
    assert flags
    assert all(f"  {flag}" in worker for flag in flags)
    connector = json.loads(words[words.index("--kv-transfer-config") + 1])
    assert json.dumps(connector, separators=(",", ":")) in worker


# -- names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text):
        if not re.match(r"https?://|#", target):
            assert (page.parent / target.split("#")[0]).exists(), target


def test_every_page_is_listed():
    listed = set(re.findall(r"\]\((\w+\.md)\)", (ROOT / "docs/README.md").read_text()))
    assert listed == {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}


@pytest.mark.parametrize("page", OWN, ids=lambda page: page.name)
def test_settings_and_files_that_are_named_exist(page: Path):
    sections = {key.split(".")[0] for key in known_keys() if "." in key}
    for name in re.findall(r"`([a-z_]+(?:[./][\w.-]+)+)`", page.read_text()):
        if "/" in name:
            assert any((base / name).exists() for base in (ROOT, ROOT / "helium_proxy", ROOT / "docs")), name
        elif name.split(".")[0] in sections and not name.endswith((".py", ".md", ".yaml")):
            assert name in known_keys(), name


def test_no_page_names_a_path_of_some_machine():
    for page in PAGES:
        assert not re.search(r"(?<![\w.])/(?:home|root|work|Users|tmp)/", page.read_text()), page.name


# -- configuration files


@pytest.mark.parametrize("name", ["configs/proxy.yaml", "docker/helium.yaml"])
def test_configuration_files_are_valid(name: str):
    load(ROOT / name, environ={})


def test_what_the_example_configuration_comments_out_is_valid_too(tmp_path: Path):
    text = (ROOT / "configs/proxy.yaml").read_text()
    uncommented = re.sub(r"^( *)# ( *(?:- \{|(?:- )?\w+:(?= |$)).*)$", r"\1\2", text, flags=re.M)
    (tmp_path / "all.yaml").write_text(uncommented)
    settings = load(tmp_path / "all.yaml", environ={})
    assert len(settings.workers) == 3
    assert [key.tenant for key in settings.auth.keys] == ["research", "operations"]


# -- the demo's table


def test_the_readme_shows_the_table_that_the_demo_prints():
    measured = Measured(1.0, Tokens(2.0, 1.0, 1.0), {("run", "node"): "answer"})
    console = Console(file=StringIO(), width=100, highlight=False)
    show.comparison(console, Comparison(measured, measured), embedded=True)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    names = re.findall(r"^│ (\w[\w ]*?) +│", printed, re.M)
    assert len(names) == 5
    assert re.findall(r"^│ (\w[\w ]*?) +│", README, re.M) == names
