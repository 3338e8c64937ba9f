"""Log the metrics of a run to the console, metrics.csv, metrics.jsonl and experiment trackers.

The files are append-only. A checkpoint stores their lengths, and a resume truncates them to these lengths, so that
repeated steps are not logged twice.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from .checkpoint import CheckpointError, write_atomically

__all__ = ["COLUMNS", "TRACKERS", "RunLog"]

COLUMNS = (
    "step",
    "epoch",
    "images_seen",
    "lr",
    "loss",
    "ce",
    "lb",
    "train_top1",
    "test_top1",
    "test_top5",
    "test_nll",
    "test_ece",
    "test_count",
    "seconds",
    "images_per_second",
    "data_wait",
)

PLAIN_SECONDS = 10.0  # between two progress lines without a bar


class TensorBoard:
    """Event files in the run folder's `tensorboard`. A resumed run purges the steps that it repeats."""

    def __init__(self) -> None:
        self.writer_class = importlib.import_module("torch.utils.tensorboard").SummaryWriter

    def start(self, folder: Path, config: Mapping[str, Any], step: int) -> None:
        self.writer = self.writer_class(log_dir=str(folder / "tensorboard"), purge_step=step + 1)
        if step == 0:
            self.writer.add_text("config", f"```\n{json.dumps(config, indent=1)}\n```", 0)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()  # otherwise a killed process would lose the last values

    def finish(self) -> None:
        self.writer.close()


class Wandb:
    """Weights & Biases. It drops the steps that a resumed run repeats. WANDB_PROJECT, WANDB_MODE=offline, ... apply."""

    module = "wandb"

    def __init__(self) -> None:
        self.library = importlib.import_module(self.module)

    def start(self, folder: Path, config: Mapping[str, Any], step: int) -> None:
        project = os.environ.get(f"{self.module.upper()}_PROJECT", "dlb_fast")
        with contextlib.redirect_stdout(sys.stderr):  # Trackio prints a greeting
            self.run = self.library.init(
                project=project, config=dict(config), resume="allow", **self.identity(folder, _run_id(folder))
            )

    def identity(self, folder: Path, run_id: str) -> dict[str, str]:
        return {"name": folder.resolve().name, "id": run_id, "dir": str(folder)}

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def finish(self) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self.run.finish()


class Trackio(Wandb):
    """A local database, no account; see it with `trackio show`. Steps that a resumed run repeats are in it twice."""

    module = "trackio"

    def identity(self, folder: Path, run_id: str) -> dict[str, str]:
        return {"name": f"{folder.resolve().name}-{run_id[:6]}"}  # Trackio finds a run by its name


TRACKERS: dict[str, Callable[[], Any]] = {"tensorboard": TensorBoard, "trackio": Trackio, "wandb": Wandb}


def _run_id(folder: Path) -> str:
    """The tracker's id of the run in this folder, created once, so that a resumed run continues it."""
    path = folder / "tracker_id"
    if not path.exists():
        write_atomically(path, lambda file: file.write(uuid.uuid4().hex.encode()))
    return path.read_text(encoding="ascii").strip()


class RunLog:
    """Console, metric files and trackers of one run.

    Args:
        folder: folder of metrics.csv and metrics.jsonl; None writes no files.
        quiet: no console output.
        stream: the console; None means stderr.
        trackers: names in `TRACKERS`; they need a folder. A tracker that fails during the run is reported once and then
            dropped; it does not end the run.
        config: configuration of the run, for the trackers.

    Raises:
        ValueError: trackers without a folder, or a tracker that is unknown or cannot be imported.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        quiet: bool = False,
        stream: TextIO | None = None,
        trackers: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder, self.config = folder, config or {}
        self.stream = stream or sys.stderr
        self.quiet = quiet
        self.bar: Any = None
        self.csv = None if folder is None else folder / "metrics.csv"
        self.jsonl = None if folder is None else folder / "metrics.jsonl"
        self.total = 0
        self.per_epoch = 0.0  # steps
        self.printed = 0.0  # when the last line of progress was printed
        self.began: tuple[float, int] | None = None  # when the first step was done, and its number
        self.latest = ""  # the values of the last log point
        self.trackers: dict[str, Any] = {}
        self.sent: set[tuple[int, str]] = set()  # (step, name) of the values that the trackers got for the last step
        if trackers and folder is None:
            raise ValueError(f"RunLog: trackers ({', '.join(trackers)}) need a run folder; give folder=...")
        for name in trackers:
            if name not in TRACKERS:
                raise ValueError(f"RunLog: tracker must be one of {', '.join(TRACKERS)}, got {name!r}")
            try:
                self.trackers[name] = TRACKERS[name]()
            except Exception as error:
                raise ValueError(
                    f"tracker {name} cannot be used: its import failed ({type(error).__name__}: {error}); "
                    f"pip install {name}, or leave it out of --trackers"
                ) from error

    def start(self, *, step: int, total: int, per_epoch: float = 0.0) -> None:
        """Start the progress bar and the trackers after `step`; an epoch has `per_epoch` steps, 0: unknown."""
        self.total, self.per_epoch, self.printed, self.began = total, per_epoch, time.monotonic(), None
        self._call_trackers("start", self.folder, self.config, step)
        if self.quiet or not self.stream.isatty():
            return
        try:
            from tqdm import tqdm
        except ImportError:
            return
        self.bar = tqdm(total=total, initial=step, unit="step", file=self.stream, dynamic_ncols=True)

    def say(self, text: str) -> None:
        """Print a line."""
        if self.quiet:
            return
        if self.bar is not None:
            self.bar.write(text, file=self.stream)
        else:
            print(text, file=self.stream, flush=True)

    def warn(self, text: str) -> None:
        """Print a warning, in a quiet run too."""
        if self.quiet:
            print(text, file=self.stream, flush=True)
        else:
            self.say(text)

    def progress(self, row: Mapping[str, Any]) -> None:
        """A row at a log point: to metrics.jsonl, the trackers, and the next line of progress."""
        self._append(self.jsonl, json.dumps({"kind": "step", **_finite(row)}))
        self._track(row)
        self.latest = _short(row)
        if self.bar is not None:
            self.bar.set_postfix_str("  ".join(filter(None, (self._left(row["step"])[0], self.latest))))

    def tick(self, step: int) -> None:
        """Step `step` is done: move the bar, or print a line unless the last one is younger than ten seconds.

        Called for every step with a bar, otherwise at log points. The time left is that of the steps left at the mean
        pace since the first call, evaluations included; the first step, which compiles and fills the loader, does not
        count. Reads the host's clock only.
        """
        now = time.monotonic()
        self.began = self.began or (now, step)
        if self.bar is not None:
            self.bar.update()
        elif now - self.printed >= PLAIN_SECONDS:
            self.printed = now
            self.say("  ".join(filter(None, (f"step {step}/{self.total}", *self._left(step), self.latest))))

    def _left(self, step: int) -> tuple[str, str]:
        """The epoch with its time left, and the time left of the run; empty where unknown."""
        since, first = self.began or (0.0, step)
        pace = (time.monotonic() - since) / (step - first) if step > first else None
        epoch = run = ""
        if self.per_epoch:
            number = max(1, math.ceil(step / self.per_epoch))
            end = min(self.total, number * self.per_epoch)
            epoch = f"epoch {number}/{max(number, math.ceil(self.total / self.per_epoch))}"
            epoch += "" if pace is None else f" ({_clock(pace * (end - step))} left)"
        if pace is not None:
            run = f"run {_clock(pace * (self.total - step))} left"
        return epoch, run

    def result(self, row: Mapping[str, Any]) -> None:
        """Log a row of an evaluation to both files, the trackers and the console.

        Values that are not numbers (the calibration bins) are written to metrics.jsonl only.
        """
        finite = _finite(row)
        self._append(self.jsonl, json.dumps({"kind": "eval", **finite}))
        self._track(row)
        if self.csv is not None and not (self.csv.exists() and self.csv.stat().st_size):
            self._append(self.csv, ",".join(COLUMNS))
        self._append(self.csv, ",".join("" if finite.get(c) is None else repr(finite[c]) for c in COLUMNS))
        self.say(f"epoch {row['epoch']:g}  step {row['step']}  {_phrases(row)}")

    def confusion(self, counts: Mapping[str, Any]) -> None:
        """Replace confusion.json, which has a file of its own: only the last one is of use, and it may be long."""
        if self.folder is not None:
            text = json.dumps(counts, separators=(",", ":"))
            write_atomically(self.folder / "confusion.json", lambda file: file.write(text.encode()))

    def positions(self) -> dict[str, int]:
        """Lengths of the files in bytes, flushed to the disk, for a checkpoint."""
        sizes = {}
        for path in (self.csv, self.jsonl):
            if path is not None and path.exists():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
                sizes[path.name] = path.stat().st_size
        return sizes

    def rewind(self, positions: Mapping[str, int]) -> None:
        """Truncate the files to the lengths of a checkpoint, or to 0 without one."""
        for path in (self.csv, self.jsonl):
            if path is None or not path.exists():
                continue
            length, size = positions.get(path.name, 0), path.stat().st_size
            if size < length:
                self.say(f"{path} is shorter ({size} bytes) than at the checkpoint ({length}): some rows are lost")
            os.truncate(path, min(length, size))

    def close(self) -> None:
        """Close the bar and the trackers."""
        self._call_trackers("finish")
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _track(self, row: Mapping[str, Any]) -> None:
        """Send the numbers of a row to the trackers, except values that this step has sent before."""
        step = row["step"]
        values = {_tag(k): v for k, v in row.items() if isinstance(v, (int, float)) and k != "step"}
        values = {name: value for name, value in values.items() if (step, name) not in self.sent}
        self.sent = {key for key in self.sent if key[0] == step} | {(step, name) for name in values}
        self._call_trackers("log", values, step)

    def _call_trackers(self, method: str, *arguments: Any) -> None:
        for name, tracker in list(self.trackers.items()):
            try:
                getattr(tracker, method)(*arguments)
            except Exception as error:
                del self.trackers[name]
                self.warn(f"tracker {name} failed and is dropped: {type(error).__name__}: {error}")

    def _append(self, path: Path | None, line: str) -> None:
        if path is None:
            return
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise CheckpointError(f"cannot write {path}: {error}; free space, then continue with --resume") from error


def _clock(seconds: float) -> str:
    """`0:42`, `12:10`, `3:04:05`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def _finite(value: Any) -> Any:
    """`value` with None for NaN and infinities, which strict JSON lacks."""
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _tag(name: str) -> str:
    """Tracker name of a column: `test_top1` -> `test/top1`, `loss` -> `train/loss`."""
    group, _, rest = name.partition("_")
    return f"{group}/{rest}" if group in ("train", "test") and rest else f"train/{name}"


_PHRASES = (
    ("loss", "loss", 1, ".4f"),
    ("lb", "last-batch", 1, ".4f"),
    ("train_top1", "train", 100, ".2f"),
    ("test_top1", "test", 100, ".2f"),
    ("test_nll", "nll", 1, ".4f"),
    ("test_ece", "ece", 1, ".4f"),
    ("train_wrong_top1", "wrong labels learned", 100, ".1f"),
    ("lr", "lr", 1, ".3g"),
    ("images_per_second", "images/s", 1, ".0f"),
    ("data_wait", "waiting for data", 100, ".0f"),
)


def _phrases(row: Mapping[str, Any]) -> str:
    return "  ".join(
        f"{label} {row[name] * scale:{form}}{' %' if scale == 100 else ''}"
        for name, label, scale, form in _PHRASES
        if row.get(name) is not None
    )


def _short(row: Mapping[str, Any]) -> str:
    """The values of a row that are printed between two evaluations."""
    return _phrases({name: row.get(name) for name in ("loss", "lr", "images_per_second", "data_wait")})
