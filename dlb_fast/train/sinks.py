"""Experiment trackers, each imported only when it is named: TensorBoard, Trackio and Weights & Biases.

A tracker is a guest. One that is missing or cannot start is an error before the first step, when nothing is lost yet;
one that fails later (network, disk) is named once and left out for the rest of the run.

Steps that a resumed run repeats appear once. TensorBoard is told to purge them. Trackio and W&B cannot take back what
they were sent, so `trackers.json` in the run folder remembers how far that was, beside the id they continue under.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

__all__ = ["SINKS", "Sink", "TrackerError", "Trackers"]

STATE = "trackers.json"


class TrackerError(RuntimeError):
    """A tracker could not be started; the message says which, why and what to do."""


class Sink(Protocol):
    """What a tracker must do. Making one imports its library; every method may raise whatever that library raises.

    `takes_back`: whether `start` at a step removes the later steps of an earlier process.
    """

    takes_back: bool

    def start(self, folder: Path, config: Mapping[str, Any], key: str, step: int) -> None:
        """Begin, or continue the run known as `key`, after `step`."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of a step; a step may come twice, with different names."""

    def finish(self) -> None:
        """Send what is left."""


class TensorBoard:
    """Event files in the run folder's `tensorboard`; see them with `tensorboard --logdir runs`."""

    takes_back = True

    def __init__(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._make = SummaryWriter

    def start(self, folder: Path, config: Mapping[str, Any], key: str, step: int) -> None:
        self._writer = self._make(log_dir=str(folder / "tensorboard"), purge_step=step + 1)
        if step == 0:
            self._writer.add_text("config", f"```\n{json.dumps(config, indent=1)}\n```", 0)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # what a killed process had not written would be missing for good: resuming goes on later

    def finish(self) -> None:
        self._writer.close()


class _WandbLike:
    """Weights & Biases, and Trackio, which keeps its face: `init`, `log`, `finish`."""

    takes_back = False
    module: str
    project: str  # environment variable with the project's name

    def __init__(self) -> None:
        import importlib

        self._library = importlib.import_module(self.module)

    def start(self, folder: Path, config: Mapping[str, Any], key: str, step: int) -> None:
        with contextlib.redirect_stdout(sys.stderr):  # Trackio greets on stdout
            self._run = self._library.init(
                project=os.environ.get(self.project, "dlb_fast"),
                config=dict(config),
                resume="allow",
                **self.identity(folder, key),
            )

    def identity(self, folder: Path, key: str) -> dict[str, Any]:
        raise TypeError("a subclass says how a run is found again")

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def finish(self) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self._run.finish()


class Trackio(_WandbLike):
    """A local database, no account; see it with `trackio show`."""

    module, project = "trackio", "TRACKIO_PROJECT"

    def identity(self, folder: Path, key: str) -> dict[str, Any]:
        return {"name": f"{folder.resolve().name}-{key[:6]}"}  # a run is found by its name alone


class Wandb(_WandbLike):
    """Its own environment variables hold: WANDB_PROJECT, WANDB_MODE=offline, WANDB_ENTITY, ..."""

    module, project = "wandb", "WANDB_PROJECT"

    def identity(self, folder: Path, key: str) -> dict[str, Any]:
        return {"name": folder.resolve().name, "id": key, "dir": str(folder)}


SINKS: dict[str, Callable[[], Sink]] = {"tensorboard": TensorBoard, "trackio": Trackio, "wandb": Wandb}


class Trackers:
    """The trackers of one run, held at arm's length.

    Args:
        names: of `SINKS`.
        folder: the run's; holds `trackers.json`.
        config: what the trackers show as the run's configuration.
        say: where a failure is told.

    Raises:
        ValueError: an unknown name, or a library that is missing or broken.
    """

    def __init__(
        self, names: tuple[str, ...], folder: Path, config: Mapping[str, Any], say: Callable[[str], None]
    ) -> None:
        self.folder, self.config, self.say = folder, config, say
        self.sinks: dict[str, Sink] = {}
        for name in names:
            if name not in SINKS:
                raise ValueError(f"tracker: expected one of {', '.join(SINKS)}, got {name!r}")
            try:
                self.sinks[name] = SINKS[name]()
            except Exception as error:
                raise ValueError(
                    f"tracker {name} cannot be used: its import failed ({type(error).__name__}: {error}); "
                    f"pip install {name}, or leave it out of --trackers"
                ) from error
        self._state: dict[str, Any] = {}

    def start(self, step: int) -> None:
        """Begin after `step`.

        Raises:
            TrackerError: one cannot start and there is nothing to lose yet. A run that is continued only warns.
        """
        self._state = self._read()
        for name, sink in list(self.sinks.items()):
            try:
                sink.start(self.folder, self.config, self._state["id"], step)
            except Exception as error:
                if step == 0:
                    raise TrackerError(
                        f"tracker {name} cannot start: {type(error).__name__}: {error}; repair it or leave it out of "
                        f"--trackers (W&B without an account or network: WANDB_MODE=offline)"
                    ) from error
                self._drop(name, error)
        # As it was when the process began: what this process sends itself never goes out twice.
        self._sent = {name: dict(self._state["sent"].get(name, {})) for name in self.sinks}
        self._now: tuple[int, set[str]] = (step, set())
        self._write()

    def log(self, row: Mapping[str, Any]) -> None:
        """The numbers of a row with its `step`; those this step has already told are left out."""
        step = int(row["step"])
        seen = self._now[1] if self._now[0] == step else set()
        values = {
            _tag(name): value
            for name, value in row.items()
            if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        values = {name: value for name, value in values.items() if name not in seen}
        self._now = (step, seen | values.keys())
        for name, sink in list(self.sinks.items()):
            try:
                if sink.takes_back:
                    sink.log(values, step)
                elif fresh := self._unsent(name, values, step):
                    # Noted before it is sent: a process killed in between loses a point instead of doubling it.
                    self._state["sent"][name] = {"step": step, "names": sorted(self._now[1])}
                    self._write()
                    sink.log(fresh, step)
            except Exception as error:
                self._drop(name, error)

    def finish(self) -> None:
        """End all; nothing is raised."""
        for name, sink in list(self.sinks.items()):
            try:
                sink.finish()
            except Exception as error:
                self._drop(name, error)

    def _unsent(self, name: str, values: Mapping[str, float], step: int) -> dict[str, float]:
        sent = self._sent[name]
        if step < sent.get("step", -1):
            return {}
        known = sent["names"] if step == sent.get("step") else ()
        return {tag: value for tag, value in values.items() if tag not in known}

    def _drop(self, name: str, error: Exception) -> None:
        del self.sinks[name]
        self.say(f"tracker {name} failed and is left out from here on: {type(error).__name__}: {error}")

    def _read(self) -> dict[str, Any]:
        try:
            state = json.loads((self.folder / STATE).read_text(encoding="utf-8"))
            return {"id": str(state["id"]), "sent": dict(state["sent"])}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError):
            self.say(f"{self.folder / STATE} cannot be read; the trackers begin a new run")
        return {"id": uuid.uuid4().hex, "sent": {}}

    def _write(self) -> None:
        # Renamed into place but not flushed to the disk: after a power cut at worst a new tracker run begins.
        temporary = self.folder / f".{STATE}.tmp"
        temporary.write_text(json.dumps(self._state), encoding="utf-8")
        os.replace(temporary, self.folder / STATE)


def _tag(name: str) -> str:
    """`test_top1` -> `test/top1`; everything else belongs to the training: `loss` -> `train/loss`."""
    group, _, rest = name.partition("_")
    return f"{group}/{rest}" if group in ("train", "test") and rest else f"train/{name}"
