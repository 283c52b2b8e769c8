"""Run the services of compose.yaml without Docker, as nearly as Linux allows: each in network, mount and process
namespaces of its own, on a bridge with a name server, with a read-only root, no capabilities and the image's user.

Needs root, iproute2 and util-linux; `missing` says what is not there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .compose import DOCKER, PROMETHEUS, ROOT, Image, argv, load, own_image

SETUP = r"""
set -eu
mount --make-rprivate /
mount -t tmpfs tmpfs "$SCRATCH"
mkdir "$SCRATCH/upper" "$SCRATCH/work" "$SCRATCH/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$SCRATCH/upper,workdir=$SCRATCH/work" "$SCRATCH/root"
root="$SCRATCH/root"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
chmod 711 "$root/root"  # in the overlay only: a Python that lives below it must be reached by the containers' user
echo "nameserver $DNS" > "$SCRATCH/resolv.conf"
rm -f "$root/etc/resolv.conf"; cp "$SCRATCH/resolv.conf" "$root/etc/resolv.conf"
echo "127.0.0.1 localhost" > "$root/etc/hosts"
mkdir -p "$root/opt/helium"
mount --bind "$VENV" "$root/opt/helium"
while read -r kind source target options; do
  if [ "$kind" = file ]; then mkdir -p "$(dirname "$root$target")"; [ -e "$root$target" ] || touch "$root$target"
  else mkdir -p "$root$target"; fi
  if [ "$kind" = tmpfs ]; then mount -t tmpfs -o "$options" tmpfs "$root$target"
  else mount --bind "$source" "$root$target"; [ "$options" != ro ] || mount -o remount,bind,ro "$root$target"; fi
done < "$MOUNTS"
mkdir -p "$root$CODE"  # the environment's scripts name it, and a checkout below /tmp has just been hidden
mount --bind "$CODE" "$root$CODE"
mount -o remount,bind,ro "$root$CODE"
mount -o remount,ro "$root"
unset SCRATCH DNS VENV CODE MOUNTS
exec chroot "$root" setpriv --reuid "$RUN_AS" --regid "$RUN_AS" --clear-groups --no-new-privs --bounding-set -all \
  env -u RUN_AS -u RUN_PATH PATH="$RUN_PATH" "$@"
"""


def missing() -> str | None:
    """Why containers cannot be imitated here; None: they can."""
    if os.geteuid() != 0:
        return "namespaces need root"
    for tool in ("ip", "unshare", "nsenter", "setpriv", "chroot"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    probe = subprocess.run(
        ["unshare", "-n", "-m", "-p", "-f", "sh", "-c", "mount --make-rprivate / && mount -t tmpfs t /mnt"],
        capture_output=True,
        check=False,
    )
    return None if probe.returncode == 0 else f"namespaces are not allowed here: {probe.stderr.decode().strip()}"


def _sh(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


class Names(threading.Thread):
    """A name server with A records only: what Docker's own does for containers."""

    def __init__(self, address: str) -> None:
        super().__init__(daemon=True)
        self.records: dict[str, str] = {}
        self._open = True
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.settimeout(0.2)
        try:
            self._socket.bind((address, 53))
        except OSError:
            self._socket.close()
            raise

    def run(self) -> None:
        with self._socket:
            while self._open:
                with contextlib.suppress(TimeoutError):
                    query, client = self._socket.recvfrom(512)
                    self._socket.sendto(self.answer(query), client)

    def answer(self, query: bytes) -> bytes:
        labels, at = [], 12
        while query[at]:
            labels.append(query[at + 1 : at + 1 + query[at]].decode())
            at += 1 + query[at]
        question = query[12 : at + 5]
        address = self.records.get(".".join(labels).lower())
        wanted = struct.unpack("!H", query[at + 1 : at + 3])[0]
        records = b""
        if address and wanted == 1:
            records = b"\xc0\x0c" + struct.pack("!HHIH", 1, 1, 1, 4) + socket.inet_aton(address)
        code = 0 if address else 3  # NXDOMAIN
        head = query[:2] + struct.pack("!HHHHH", 0x8580 | code, 1, bool(records), 0, 0)
        return head + question + records

    def close(self) -> None:
        self._open = False
        self.join()


@dataclass
class Container:
    """One running replica."""

    service: str
    name: str
    address: str
    namespace: str
    image: Image
    spec: dict[str, Any]
    log: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Of the service's own process, which is process 1 of its namespace."""
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0])

    def healthy(self) -> bool:
        """Run the health check that compose or the image declares, inside the container."""
        test = self.spec.get("healthcheck", {}).get("test", ["CMD", *self.image.health])
        try:
            enter = ["nsenter", "--target", str(self.pid), "--net", "--mount", "--root", "--wd"]
        except (OSError, IndexError):
            return False
        path = {"PATH": "/opt/helium/bin:/usr/bin:/bin"}
        return subprocess.run([*enter, *test[1:]], env=path, capture_output=True, check=False).returncode == 0

    def stop(self, timeout: float = 20) -> int:
        """SIGTERM, as `docker stop` sends it; the exit status."""
        assert self.process is not None
        with contextlib.suppress(OSError, IndexError):
            os.kill(self.pid, signal.SIGTERM)
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait(10)


@dataclass
class Stack:
    """The services of `profiles`, of those whose program is on this machine; a context manager."""

    profiles: set[str]
    environ: dict[str, str] = field(default_factory=dict)
    replace: dict[str, str] = field(default_factory=dict)
    """Bind mounts whose source is another one here: path below docker/ → path."""
    containers: list[Container] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def __enter__(self) -> Stack:
        self._stop = contextlib.ExitStack()
        try:
            self._start()
        except BaseException:
            self._stop.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for container in self.containers:  # all at once, then each is waited for
            with contextlib.suppress(OSError, IndexError):
                os.kill(container.pid, signal.SIGTERM)
        self._stop.close()

    def __getitem__(self, name: str) -> Container:
        return next(one for one in self.containers if one.name == name)

    def _start(self) -> None:
        self.folder = Path(self._stop.enter_context(tempfile.TemporaryDirectory(prefix="helium-stack-")))
        number = os.getpid() % 250
        self._net = f"10.87.{number}"
        self._bridge = f"hx{os.getpid()}"
        _sh("ip", "link", "add", self._bridge, "type", "bridge")
        self._stop.callback(_sh, "ip", "link", "del", self._bridge)
        _sh("ip", "addr", "add", f"{self._net}.1/24", "dev", self._bridge)
        _sh("ip", "link", "set", self._bridge, "up")
        self.names = Names(f"{self._net}.1")
        self.names.start()
        self._stop.callback(self.names.close)
        spec = load(self.environ)
        images = {"helium-proxy": own_image(), "prom/prometheus": PROMETHEUS}
        for service, wanted in spec["services"].items():
            if not self.profiles & set(wanted["profiles"]):
                continue
            image = images.get(wanted["image"].rsplit(":", 1)[0])
            if image is None or shutil.which(image.entrypoint[0], path=f"{ROOT}/.venv/bin:/usr/bin") is None:
                self.skipped.append(service)
                continue
            for replica in range(1, int(wanted.get("deploy", {}).get("replicas", 1)) + 1):
                self._launch(spec["name"], service, replica, wanted, image)

    def _launch(self, project: str, service: str, replica: int, spec: dict[str, Any], image: Image) -> None:
        index = len(self.containers) + 2
        namespace, address = f"{self._bridge}-{index}", f"{self._net}.{index}"
        inside, outside = f"{self._bridge}i{index}"[:15], f"{self._bridge}o{index}"[:15]
        _sh("ip", "netns", "add", namespace)
        self._stop.callback(_sh, "ip", "netns", "del", namespace)
        _sh("ip", "link", "add", outside, "type", "veth", "peer", "name", inside, "netns", namespace)
        _sh("ip", "link", "set", outside, "master", self._bridge, "up")
        _sh("ip", "-n", namespace, "addr", "add", f"{address}/24", "dev", inside)
        for device in (inside, "lo"):
            _sh("ip", "-n", namespace, "link", "set", device, "up")
        name = f"{project}-{service}-{replica}"
        aliases = spec.get("networks", {}).get("default", {}).get("aliases", [])
        for known in (name, service, *aliases):
            self.names.records[known] = address
        container = Container(service, name, address, namespace, image, spec, self.folder / f"{name}.log")
        scratch = self.folder / f"{name}.root"
        scratch.mkdir()
        mounts = self.folder / f"{name}.mounts"
        mounts.write_text("".join(self._mounts(spec, image.user)))
        system = "/usr/local/bin:/usr/bin:/bin"
        environment = {**image.environment, **{key: str(value) for key, value in spec.get("environment", {}).items()}}
        settings = {
            "SCRATCH": str(scratch),
            "DNS": f"{self._net}.1",
            "VENV": f"{ROOT}/.venv",
            "CODE": str(ROOT),
            "MOUNTS": str(mounts),
            "RUN_AS": str(image.user),
            "RUN_PATH": environment.get("PATH", "$PATH").replace("$PATH", system),
            "PATH": f"/usr/sbin:/sbin:{system}",
        }
        command = ["ip", "netns", "exec", namespace, "unshare", "--mount", "--pid", "--fork", "--kill-child"]
        with container.log.open("wb") as log:
            container.process = subprocess.Popen(
                [*command, "sh", "-c", SETUP, "sh", *argv(spec, image)],
                env={**environment, **settings},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._stop.callback(container.stop)
        self.containers.append(container)

    def _mounts(self, spec: dict[str, Any], user: int) -> list[str]:
        """Lines `kind source target options` for the set-up script."""
        assert spec["read_only"], "every service here has a read-only root"
        lines = []
        for entry in spec.get("tmpfs", []):
            target, _, options = entry.partition(":")
            lines.append(f"tmpfs - {target} {options}\n")
        for entry in spec.get("volumes", []):
            source, target, *options = entry.split(":")
            if source.startswith("."):
                path = Path(self.replace.get(source.removeprefix("./"), DOCKER / source)).resolve()
                lines.append(
                    f"{'file' if path.is_file() else 'dir'} {path} {target} {options[0] if options else 'rw'}\n"
                )
            else:
                lines.append(f"tmpfs - {target} mode=0700,uid={user},gid={user}\n")
        return lines

    def wait(self, timeout: float = 60) -> None:
        """Until every container is healthy. Raises AssertionError with the log of one that is not."""
        end = time.monotonic() + timeout
        for container in self.containers:
            while not container.healthy():
                assert container.process is not None
                over = time.monotonic() > end or container.process.poll() is not None
                assert not over, f"{container.name} is not healthy:\n{container.log.read_text()[-3000:]}"
                time.sleep(0.2)
