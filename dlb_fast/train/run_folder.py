"""A run's folder: config.yaml, versions.json, metrics.csv, metrics.jsonl, checkpoints/."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from .config import RunConfig, load_config, to_dict
from .state import write_atomically

try:
    import fcntl
except ImportError:  # not on Windows, where a run folder is not guarded
    fcntl = None  # type: ignore[assignment]

__all__ = ["RunFolder", "newest_run", "versions"]

RUNS = Path("runs")


class RunFolder:
    """The files of one run; nothing is created before `create()`.

    Example:
        >>> RunFolder("runs/a").checkpoints.as_posix()
        'runs/a/checkpoints'
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.checkpoints = self.path / "checkpoints"
        self._held: int | None = None

    def hold(self) -> None:
        """Make the folder, and keep other processes from training in it until `release()` or the end of this one.

        Raises:
            ValueError: another process trains there, or the folder cannot be made.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            if fcntl is None:
                return
            handle = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise ValueError(f"run folder: cannot make {self.path} ({error}); name another one with --out") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise ValueError(
                f"run folder: another process is training in {self.path}, and two would spoil each other's files; wait "
                "for it or end it, or name another folder with --out"
            ) from None
        except OSError:  # a file system without locks
            os.close(handle)
            return
        self._held = handle

    def release(self) -> None:
        """Let others in."""
        if self._held is not None:
            os.close(self._held)
            self._held = None

    @classmethod
    def named(cls, label: str) -> RunFolder:
        """A new folder `runs/<date>-<time>-<label>`, numbered if it is taken."""
        stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{re.sub(r'[^A-Za-z0-9_.-]+', '-', label)}"
        path, number = RUNS / stem, 2
        while path.exists():
            path, number = RUNS / f"{stem}-{number}", number + 1
        return cls(path)

    def exists(self) -> bool:
        """Whether a run was started here."""
        return self.config.exists()

    def create(self, config: RunConfig, impl: str) -> None:
        """Write config.yaml and versions.json; the config last, because it is what marks a folder as a run."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        report = json.dumps({**versions(), "implementation": impl}, indent=1).encode()
        write_atomically(self.path / "versions.json", lambda file: file.write(report))
        text = yaml.safe_dump(to_dict(config), sort_keys=False).encode()
        write_atomically(self.config, lambda file: file.write(text))

    def read_config(self) -> RunConfig:
        """The config the run was started with."""
        if not self.exists():
            raise ValueError(f"there is no run in {self.path}: {self.config} is missing")
        return load_config(self.config)


def newest_run(root: Path | str = RUNS) -> RunFolder:
    """The run under `root` that was worked on last (its newest checkpoint, or its start).

    Raises:
        ValueError: there is no run.
    """
    runs = [RunFolder(p.parent) for p in Path(root).glob("*/config.yaml") if (p.parent / "checkpoints").is_dir()]
    if not runs:
        raise ValueError(f"--resume: there is no run under {root}/; start one first, or name its folder with --out")
    return max(runs, key=lambda run: max(p.stat().st_mtime_ns for p in (run.config, run.checkpoints)))


def versions() -> dict[str, Any]:
    """What a result depends on: interpreter, torch, this package, its commit, machine, threads."""
    import dlb_fast

    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "dlb_fast": getattr(dlb_fast, "__version__", "unknown"),
        "commit": _commit(Path(dlb_fast.__file__).parent),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "ranks": dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _commit(folder: Path) -> str | None:
    """The commit of the package's own work tree, `+dirty` with uncommitted changes; None when installed."""
    if not (folder.parent / ".git").exists():
        return None
    try:
        run = ["git", "-C", str(folder), "describe", "--always", "--dirty=+dirty", "--abbrev=12", "--exclude=*"]
        done = subprocess.run(run, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
