"""Two machines for the tests of torchrun: network namespaces where the tests are root, otherwise twice this one."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from builders import PATIENCE, ROOT, environment, wait_for
from torch.distributed import TCPStore


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
            env = environment(**changes)
            process = subprocess.Popen([*inside, *command], cwd=cwd, env=env, stdout=file, stderr=file)
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


def documented(text: str) -> list[str]:
    """The words of the command in docs/distributed.md that has a text, with one process per machine instead of GPUs."""
    page = (ROOT / "docs/distributed.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", page, re.S)
    (command,) = (line for block in blocks for line in block.replace("\\\n", " ").splitlines() if text in line)
    words = ["1" if word == "gpu" else word for word in shlex.split(command)]
    launcher = [sys.executable, "-m", "torch.distributed.run"]
    return [*(launcher if words[0] == "torchrun" else [sys.executable, "-m", "dlb_fast"]), *words[1:]]


def with_data(words: Sequence[str], data: str, *flags: str) -> list[str]:
    """A documented command with other data and a small network."""
    words = list(words)
    preset = words.index("--preset")
    words[preset : preset + 4] = ["--data", data, "--model", "small_cnn", "--batch-size", "20", *flags]
    return words


def on(node: Node, host: Node, port: int, words: Sequence[str], **changes: str) -> list[str]:
    """A documented torchrun command on `node`, with the rendezvous on `host`; it notices within seconds who is gone."""
    words = [f"{host.address}:{port}" if word == "HOST:29400" else changes.get(word, word) for word in words]
    quick = "last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=3,join_timeout=120"
    ours = [f"--rdzv-conf=is_host={str(node is host).lower()},{quick}", f"--local-addr={node.address}"]
    return [*words[:3], *ours, *words[3:]]


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


def free_port() -> int:
    """A port that was free a moment ago."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False).port
