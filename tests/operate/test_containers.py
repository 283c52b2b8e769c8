"""The compose file, the image and the scripts pass their validators, pin what they use, and say what can be set."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from .build_checkov import build
from .compose import COMPOSE, DOCKER, DOCKERFILE, ROOT, load, variables

BIN = Path(sys.executable).parent
SCRIPTS = sorted(DOCKER.glob("*.sh"))


def tool(name: str) -> str:
    """The path of a tool of ours or the system's; skips the test, naming it, when it is not there."""
    found = shutil.which(name, path=f"{BIN}:/usr/bin:/usr/local/bin")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def check(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_compose_file_fits_the_compose_specification() -> None:
    check(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", COMPOSE)


def test_compose_file_as_docker_reads_it() -> None:
    """With docker's own parser, where the command line tool and its compose plug-in are there; no daemon is asked."""
    docker = tool("docker")
    if subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode:
        pytest.skip("docker has no compose plug-in here")
    profiles = ["--profile", "gpu", "--profile", "cpu", "--profile", "observability"]
    read = json.loads(check(docker, "compose", "-f", COMPOSE, *profiles, "config", "--format", "json"))
    assert set(read["services"]) == set(load()["services"])


def test_image_passes_hadolint() -> None:
    check(tool("hadolint"), DOCKERFILE)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_pass_shellcheck(script: Path) -> None:
    check(tool("shellcheck"), script)


@pytest.mark.timeout(900)
def test_image_passes_checkov() -> None:
    try:
        checkov = build()
    except (subprocess.SubprocessError, OSError) as error:
        pytest.skip(f"checkov cannot be installed: {error}")
    report = json.loads(
        check(
            checkov,
            "--file",
            DOCKERFILE,
            "--framework",
            "dockerfile",
            "--skip-download",
            "--output",
            "json",
            "--soft-fail",
        )
    )
    failed = report["results"]["failed_checks"]
    assert not failed, [one["check_id"] for one in failed]
    assert report["summary"]["passed"] > 50


def test_every_image_is_pinned_to_a_version() -> None:
    images = [service["image"] for service in load()["services"].values()]
    images += re.findall(r"^ARG PYTHON=(\S+)", DOCKERFILE.read_text(), re.M)
    for image in images:
        assert re.search(r"\d+\.\d+\.\d+", image), image
    assert not re.search(r":latest\b", COMPOSE.read_text() + DOCKERFILE.read_text())


def test_locked_packages_are_what_the_project_asks_for() -> None:
    locked = dict(re.findall(r"^([\w.-]+)==(\S+)", (DOCKER / "requirements.txt").read_text(), re.M))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for line in [*project["dependencies"], *extras["otel"], *extras["redis"]]:
        wanted = Requirement(line)
        assert wanted.specifier.contains(locked[wanted.name.lower()]), line
    text = (DOCKER / "requirements.txt").read_text()
    assert text.count("--hash=sha256:") >= len(locked)


def test_every_variable_is_shown_with_its_default() -> None:
    used = variables(COMPOSE.read_text())
    shown = dict(re.findall(r"^(\w+)=(.*)$", (DOCKER / ".env.example").read_text(), re.M))
    internal = {"HELIUM_VERSION"}
    assert set(shown) == set(used) - internal
    assert shown == {name: used[name] for name in shown}


def test_profiles_share_no_published_port() -> None:
    services = load()["services"]
    for profile in ("gpu", "cpu"):
        up = [s for s in services.values() if set(s["profiles"]) & {profile, "observability"}]
        ports = [port for service in up for port in service.get("ports", [])]
        assert len(ports) == len(set(ports)) == 3
        assert all(port.startswith("127.0.0.1:") for port in ports), "published to this machine alone by default"


def test_our_services_are_hardened() -> None:
    for name, service in load()["services"].items():
        assert "no-new-privileges:true" in service["security_opt"], name
        if name != "worker":  # vLLM's image writes caches all over its own
            assert service["read_only"], name
            assert service["cap_drop"] == ["ALL"], name


def fake(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("address", "gpus", "devices"),
    [("10.0.0.11", 1, "0"), ("10.0.0.13", 1, "2"), ("10.0.0.11", 2, "0,1"), ("10.0.0.13", 4, "8,9,10,11")],
)
def test_each_worker_takes_gpus_of_its_own(tmp_path: Path, address: str, gpus: int, devices: str) -> None:
    fake(tmp_path, "hostname", f'echo "{address} fe80::1 "')  # as on Debian: a space at the end
    fake(tmp_path, "getent", 'case "$2" in *-[123]) echo "10.0.0.1${2##*-} $2";; *) exit 2;; esac')
    fake(tmp_path, "vllm", 'echo "$CUDA_VISIBLE_DEVICES"; echo "$PYTHONPATH"; for a in "$@"; do echo "$a"; done')
    environ = {"PATH": f"{tmp_path}:/usr/bin:/bin", "WORKERS": "4", "WORKER_HOST": "helium-worker", "MODEL": "m/m",
               "GPUS_PER_WORKER": str(gpus)}  # fmt: skip
    done = subprocess.run(
        ["sh", DOCKER / "worker.sh", "--max-model-len", "8192"],
        env=environ,
        capture_output=True,
        text=True,
        check=True,
    )
    visible, path, *arguments = done.stdout.splitlines()
    assert (visible, path) == (devices, "/opt/helium")
    assert arguments[:2] == ["serve", "m/m"]
    assert arguments[-2:] == ["--max-model-len", "8192"]
    given = dict(itertools.pairwise(arguments))
    assert given["--tensor-parallel-size"] == str(gpus)
    assert json.loads(given["--kv-transfer-config"])["kv_connector_module_path"] == "helium_proxy.vllm_plugin"
    assert json.loads(given["--kv-events-config"])["publisher"] == "zmq"


def test_flags_given_to_vllm_exist() -> None:
    """Read from the sources of the vLLM that the real-engine tests have installed."""
    found = sorted(ROOT.glob(".cache/vllm-venv-*/lib/python*/site-packages/vllm/engine/arg_utils.py"))
    if not found:
        pytest.skip("no vLLM is installed below .cache (tests/vllm/build_env.py)")
    packages = found[-1].parents[1]
    source = "".join(path.read_text() for path in [found[-1], *packages.glob("entrypoints/**/cli_args.py")])
    flags = set(re.findall(r"--([a-z-]+)", (DOCKER / "worker.sh").read_text())) - {"host", "port"}
    assert flags >= {"kv-transfer-config", "scheduling-policy"}
    for flag in flags:
        assert f"--{flag}" in source or re.search(rf"\b{flag.replace('-', '_')}:", source), flag
