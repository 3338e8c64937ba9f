"""Proof at first use: a GPU implementation is trusted where it has been seen to be right, on that card.

A child process runs the kernels on small seeded cases and holds them against float64; nothing that a broken kernel does
can reach the process that asks. The verdict is kept in the user's cache under a key of everything that could change it.
The CUDA kernels are checked by ``csrc/cuda/prove.cpp``, which needs no torch; Triton's by ``doctor.prove_triton``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

SETTINGS = ("auto", "trust", "never", "again")
PATIENCE = {"cuda": 60.0, "triton": 180.0}  # seconds for a child; where there is only PTX, CUDA compiles too
LOCK_PATIENCE = 90.0  # seconds for another process that is checking; then this one checks for itself
LIMIT = 10.0  # seconds for a child that has been killed; one that hangs in the driver may never end
FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # not what a broken kernel leads to
NOT_FOR_CHILDREN = ("LD_PRELOAD", "CUDA_INJECTION", "NVTX_INJECTION", "CUDA_LAUNCH_BLOCKING", "DLB_FAST_")
CUDA_CODE = "import ctypes, os, sys; ctypes.CDLL(sys.argv[1]).dlb_fast_prove(sys.argv[2].encode(), 1); os._exit(0)"
TRITON_CODE = "import sys; sys.path[:] = {path!r}; from dlb_fast import doctor; doctor.prove_triton({uuid!r})"


class Verdict(NamedTuple):
    """What a check has shown: ``passed`` is None where it could not decide, and ``said`` tells why in any case."""

    passed: bool | None
    said: str
    seconds: float = 0.0
    time: float = 0.0

    def __str__(self) -> str:
        when = time.strftime("%Y-%m-%d", time.localtime(self.time))
        return f"checked {when} in {self.seconds:.1f} s: {self.said}" if self.passed is not None else self.said


def setting() -> str:
    """DLB_FAST_PROOF: auto, trust (take the fastest unchecked), never (plain torch) or again (check anew)."""
    value = os.environ.get("DLB_FAST_PROOF", "auto") or "auto"
    if value not in SETTINGS:
        raise ValueError(f"DLB_FAST_PROOF must be one of {', '.join(SETTINGS)}, got {value!r}")
    return value


def key_of(name: str, *parts: object) -> str:
    """The name of a verdict: of everything that could change it."""
    return f"{name}-{hashlib.sha256(repr((name, *parts)).encode()).hexdigest()[:32]}"


# Verdicts of this process by key, and when it first asked for each.
_KNOWN: dict[str, Verdict] = {}
_ASKED: dict[str, float] = {}


def known(key: str) -> Verdict | None:
    """A verdict that this process or an earlier one has come to."""
    if key in _KNOWN:
        return _KNOWN[key]
    for folder in filter(_ours, _folders()):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            kept = json.loads((folder / f"{key}.json").read_text())
            numbers = float(kept["seconds"]), float(kept["time"])
            if kept["key"] == key and isinstance(kept["passed"], bool) and isinstance(kept["said"], str):
                return Verdict(kept["passed"], kept["said"], *numbers)
    return None


def verdict(name: str, key: str, command: list[str], uuid: str = "", again: bool = False) -> Verdict:
    """The verdict known, or that of a child process: one at a time on a machine.

    ``again`` takes none from before this process first asked.
    """
    asked = _ASKED.setdefault(key, time.time())

    def usable() -> Verdict | None:
        found = known(key)
        return found if found is not None and (not again or found.time >= asked) else None

    found = usable()
    if found is None:
        folder = _writable_folder()
        with _only_one(folder):
            found = usable()  # of whoever had the lock
            if found is None:
                found = _check(name, command, uuid)
                if found.passed is not None:
                    _write(folder, key, found)
        _KNOWN[key] = found  # also where it is undecided: a process asks once
    return found


def _folders() -> list[Path]:
    """Where verdicts are: the user's cache, then a folder of the user's own among the temporary files."""
    home = os.environ.get("DLB_FAST_CACHE")
    if not home:
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        home = os.path.join(cache, "dlb_fast")
    return [Path(home) / "proof", Path(tempfile.gettempdir()) / f"dlb_fast-{os.getuid()}"]


def _ours(folder: Path) -> bool:
    """Whether nobody but this user and root can have written there."""
    try:
        found = folder.stat()
    except OSError:
        return False
    return found.st_uid in (0, os.getuid()) and not found.st_mode & 0o022


def _writable_folder() -> Path | None:
    """The first of the folders that takes a file, made where it is not there; None: verdicts stay in this process."""
    for folder in _folders():
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if _ours(folder):
                with tempfile.TemporaryFile(dir=folder):
                    return folder
    return None


def _write(folder: Path | None, key: str, found: Verdict) -> None:
    """Aside and moved into place: nobody reads half a verdict."""
    if folder is None:
        return
    with contextlib.suppress(OSError):
        handle, aside = tempfile.mkstemp(dir=folder, prefix=f".{key}")
        with os.fdopen(handle, "w") as file:
            json.dump({"key": key, **found._asdict()}, file)
        os.replace(aside, folder / f"{key}.json")


@contextlib.contextmanager
def _only_one(folder: Path | None) -> Iterator[None]:
    """Hold the lock; without it after a while, and where the file system has none."""
    import fcntl

    with contextlib.ExitStack() as stack:
        if folder is not None:
            with contextlib.suppress(OSError):
                file = stack.enter_context((folder / "lock").open("w"))
                end = time.monotonic() + LOCK_PATIENCE
                while time.monotonic() < end:
                    try:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        break
                    except BlockingIOError:
                        time.sleep(0.05)
        yield


def _check(name: str, command: list[str], uuid: str) -> Verdict:
    """Run the child on the GPU with this UUID, as CUDA's tools know it or, where they do not (MIG), as this process."""
    start, patience = time.monotonic(), PATIENCE[name]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(NOT_FOR_CHILDREN)}
    told: tuple[bool | None, str] = (None, "")
    for narrow in ({"CUDA_VISIBLE_DEVICES": f"GPU-{uuid}"}, {}) if uuid and name == "cuda" else ({},):
        told = _child(command, environment | narrow, patience)
        if told[0] is not None or "no such GPU is visible" not in told[1]:
            break
    return Verdict(*told, time.monotonic() - start, time.time())


def _child(command: list[str], environment: dict[str, str], patience: float) -> tuple[bool | None, str]:
    """Whether a child's check passed, and what to tell about it."""
    if not command[0]:
        return None, "no Python to start a check with"
    try:
        child = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        return None, f"no process could be started: {error}"
    try:
        out, err = child.communicate(timeout=patience)
        late = False
    except subprocess.TimeoutExpired:
        child.kill()
        late = True
        try:
            out, err = child.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired as hanging:
            out, err = hanging.stdout or b"", b""
    except BaseException:  # Ctrl-C: the child is in a session of its own
        child.kill()
        raise
    lines = out.decode(errors="replace").splitlines()
    marks = [line for line in lines if line.startswith(("launch ", "back"))]
    place = marks[-1].removeprefix("launch ") if marks and marks[-1] != "back" else ""
    if late:
        if place:
            return False, f"{place} did not return within {patience:g} s"
        return None, f"no answer within {patience:g} s: the machine or the GPU is busy"
    if child.returncode < 0:
        name = signal.Signals(-child.returncode).name
        if -child.returncode in FROM_OUTSIDE:
            return None, f"the check was ended by {name}"
        return False, f"the check crashed with {name}" + (f" in {place}" if place else "")
    return _judged(lines, child.returncode, err.decode(errors="replace").strip())


def _judged(lines: list[str], code: int, error: str) -> tuple[bool | None, str]:
    """What a child's last line says. Its numbers decide, not what it calls them."""
    try:
        report: dict[str, Any] = json.loads(lines[-1])
        for word, passed in (("undecided", None), ("failed", False)):
            if word in report:
                return passed, str(report[word])
        cases, worst = int(report["cases"]), float(report["worst"])
        if cases < 1 or cases != int(report["of"]):
            return None, f"the check ended after {cases} of {report['of']} cases"
        if not 0 <= worst <= 1:
            return False, f"off by {worst:g} times what is allowed"
        return True, f"{cases} cases, float32 off by {float(report.get('float32', worst)):.2f} of what is allowed"
    except (IndexError, KeyError, TypeError, ValueError):
        return None, f"the check ended with exit code {code} and no verdict: {(error or str(lines[-1:]))[-200:]}"
