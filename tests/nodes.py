"""Two machines for the tests of torchrun: network namespaces where the tests are root, otherwise two names for this one."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from builders import PATIENCE, environment, wait_for


def descendants(pid: int) -> list[int]:
    """The processes below one, their children before them."""
    found = []
    for child in children(pid):
        found += [*descendants(child), child]
    return found


def children(pid: int) -> list[int]:
    def parent(path: Path) -> int:
        try:
            return int(path.joinpath("stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return -1

    return [int(path.name) for path in Path("/proc").glob("[0-9]*") if parent(path) == pid]


class Node:
    """A machine: a namespace with its own network, or this machine itself.

    Args:
        namespace: name of its network namespace, or "" for this machine.
        address: its address.
    """

    def __init__(self, namespace: str, address: str) -> None:
        self.namespace, self.address = namespace, address
        self.processes: list[subprocess.Popen[Any]] = []

    def start(self, command: Sequence[str], cwd: Path, log: Path, **changes: str) -> subprocess.Popen[Any]:
        """Start a command on this machine, with both its outputs in `log`."""
        inside = ["ip", "netns", "exec", self.namespace] if self.namespace else []
        if self.namespace:
            changes["GLOO_SOCKET_IFNAME"] = "eth0"
        file: IO[bytes]
        with open(log, "wb") as file:
            process = subprocess.Popen([*inside, *command], cwd=cwd, env=environment(**changes), stdout=file, stderr=file)
        self.processes.append(process)
        return process

    def kill(self) -> None:
        """End everything on this machine without warning: the launcher and then what it started."""
        for process in self.processes:
            below = descendants(process.pid)
            process.kill()
            for pid in reversed(below):
                _kill(pid)
            process.wait(PATIENCE)
        self.processes.clear()


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def two_nodes() -> Iterator[list[Node]]:
    """Two machines that reach each other, the first one's address first; they are gone afterwards."""
    names = [f"dlb{os.getpid()}{letter}" for letter in "ab"]
    apart = _connect(names)
    nodes = [Node(name if apart else "", f"10.213.7.{k}" if apart else "127.0.0.1") for k, name in enumerate(names, 1)]
    try:
        yield nodes
    finally:
        for node in nodes:
            node.kill()
        if apart:
            for name in names:
                _ip("netns", "del", name)


def _ip(*arguments: str) -> bool:
    return subprocess.run(["ip", *arguments], capture_output=True).returncode == 0


def _connect(names: Sequence[str]) -> bool:
    """Whether two namespaces with one cable between them could be made."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    first, second = names
    made = all(_ip("netns", "add", name) for name in names) and _ip(
        *("link", "add", "eth0", "netns", first, "type", "veth", "peer", "name", "eth0", "netns", second)
    )
    for k, name in enumerate(names, 1):
        made = made and _ip("-n", name, "addr", "add", f"10.213.7.{k}/30", "dev", "eth0")
        made = made and all(_ip("-n", name, "link", "set", device, "up") for device in ("lo", "eth0"))
    if not made:
        for name in names:
            _ip("netns", "del", name)
    return made


def torchrun(node: Node, host: Node, port: int, *options: str) -> list[str]:
    """`torchrun` on `node` with the rendezvous on `host`, which notices within seconds that a machine is gone."""
    quick = "last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=3,join_timeout=120"
    serves = "true" if node is host else "false"
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-id=job", *options),
        f"--rdzv-endpoint={host.address}:{port}",
        f"--rdzv-conf=is_host={serves},{quick}",
        f"--local-addr={node.address}",
    ]


def wait_for_text(log: Path, text: str, process: subprocess.Popen[Any], count: int = 1) -> str:
    """Wait until a log has a text `count` times; returns the log."""

    def found() -> str | None:
        said = log.read_text(errors="replace")
        return said if said.count(text) >= count else None

    try:
        return wait_for(found, f"{text!r} in {log.name}", process)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{log.read_text(errors='replace')[-6000:]}") from None


def ended(process: subprocess.Popen[Any], log: Path) -> int:
    """Wait for the end of a process; returns its exit status."""
    try:
        return process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"{log.name} does not end:\n{log.read_text(errors='replace')[-6000:]}") from None
