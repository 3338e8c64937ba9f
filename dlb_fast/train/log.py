"""What a run says: a bar on a terminal, plain lines elsewhere, always metrics.csv and metrics.jsonl, trackers on wish.

Both files only grow, line by line. A checkpoint remembers how long they were; a resumed run cuts them back to that, so
that the steps it repeats are not in there twice.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from .sinks import Trackers
from .state import CheckpointError

__all__ = ["COLUMNS", "RunLog"]

COLUMNS = (
    "step", "epoch", "images_seen", "lr", "loss", "ce", "lb", "train_top1",
    "test_top1", "test_top5", "test_nll", "test_ece", "test_count",
    "seconds", "images_per_second", "data_wait",
)  # fmt: skip

PLAIN_SECONDS = 10.0  # between two lines of progress where there is no bar


class RunLog:
    """Console, metric files and trackers of one run.

    Args:
        folder: where metrics.csv and metrics.jsonl go; None writes no files.
        quiet: no console output.
        stream: the console.
        trackers: names of experiment trackers, see `sinks.py`.
        config: what the trackers show as the run's configuration.

    Raises:
        ValueError: trackers without a folder, or a tracker that is unknown, missing or broken.
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
        self.stream = stream or sys.stderr
        self.quiet = quiet
        self.bar: Any = None
        self.csv = None if folder is None else folder / "metrics.csv"
        self.jsonl = None if folder is None else folder / "metrics.jsonl"
        self.total = 0
        self.told = 0.0  # when the last line of progress was printed
        self.trackers: Trackers | None = None
        if trackers:
            if folder is None:
                raise ValueError(f"RunLog: trackers ({', '.join(trackers)}) need a run folder; give folder=...")
            self.trackers = Trackers(tuple(trackers), folder, config or {}, self.warn)

    def start(self, *, step: int, total: int) -> None:
        """Begin the console's progress and the trackers after a step."""
        self.total, self.told = total, time.monotonic()
        if self.trackers is not None:
            self.trackers.start(step)
        if self.quiet or not self.stream.isatty():
            return
        try:
            from tqdm import tqdm
        except ImportError:
            return
        self.bar = tqdm(total=total, initial=step, unit="step", file=self.stream, dynamic_ncols=True)

    def advance(self) -> None:
        """One more step."""
        if self.bar is not None:
            self.bar.update()

    def say(self, text: str) -> None:
        """A line for people."""
        if self.quiet:
            return
        if self.bar is not None:
            self.bar.write(text, file=self.stream)
        else:
            print(text, file=self.stream, flush=True)

    def warn(self, text: str) -> None:
        """A line that even a quiet run shows: something was lost or is not as it was."""
        if self.quiet:
            print(text, file=self.stream, flush=True)
        else:
            self.say(text)

    def progress(self, row: Mapping[str, Any]) -> None:
        """A row at a log point: metrics.jsonl, trackers, and the bar's tail or now and then a line."""
        self._append(self.jsonl, json.dumps({"kind": "step", **_clean(row)}))
        if self.trackers is not None:
            self.trackers.log(row)
        if self.bar is not None:
            self.bar.set_postfix_str(_tail(row))
        elif time.monotonic() - self.told >= PLAIN_SECONDS:
            self.told = time.monotonic()
            self.say(f"step {row['step']}/{self.total}  {_tail(row)}")

    def result(self, row: Mapping[str, Any]) -> None:
        """A row at an evaluation: both files, trackers and one line on the console.

        Values that are no numbers (the bins of the calibration) go to metrics.jsonl only.
        """
        clean = _clean(row)
        self._append(self.jsonl, json.dumps({"kind": "eval", **clean}))
        if self.trackers is not None:
            self.trackers.log(row)
        if self.csv is not None and not (self.csv.exists() and self.csv.stat().st_size):
            self._append(self.csv, ",".join(COLUMNS))
        self._append(self.csv, ",".join("" if clean.get(c) is None else repr(clean[c]) for c in COLUMNS))
        self.say(_sentence(row))

    def positions(self) -> dict[str, int]:
        """Lengths of the files in bytes, flushed to the disk: what a checkpoint keeps."""
        sizes = {}
        for path in (self.csv, self.jsonl):
            if path is not None and path.exists():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
                sizes[path.name] = path.stat().st_size
        return sizes

    def rewind(self, positions: Mapping[str, int]) -> None:
        """Cut the files back to the lengths of a checkpoint (to nothing for a start from scratch)."""
        for path in (self.csv, self.jsonl):
            if path is None or not path.exists():
                continue
            length, size = positions.get(path.name, 0), path.stat().st_size
            if size < length:
                self.say(f"{path} is shorter ({size} bytes) than at the checkpoint ({length}): some rows are lost")
            os.truncate(path, min(length, size))

    def close(self) -> None:
        """End the bar and the trackers."""
        if self.trackers is not None:
            self.trackers.finish()
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _append(self, path: Path | None, line: str) -> None:
        if path is None:
            return
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise CheckpointError(f"cannot write {path}: {error}; make room, then continue with --resume") from error


def _clean(value: Any) -> Any:
    """Values a strict JSON reader takes: nan and infinities become null."""
    if isinstance(value, Mapping):
        return {k: _clean(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_PHRASES = (
    ("loss", "loss", 1, ".4f"),
    ("lb", "last-batch", 1, ".4f"),
    ("train_top1", "train", 100, ".2f"),
    ("test_top1", "test", 100, ".2f"),
    ("test_nll", "nll", 1, ".4f"),
    ("test_ece", "ece", 1, ".4f"),
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


def _tail(row: Mapping[str, Any]) -> str:
    """What is said between two evaluations."""
    return _phrases({name: row.get(name) for name in ("loss", "lr", "images_per_second", "data_wait")})


def _sentence(row: Mapping[str, Any]) -> str:
    return f"epoch {row['epoch']:g}  step {row['step']}  {_phrases(row)}"
