"""Train a run in its folder, from a config; load or evaluate a run from its folder.

A run folder holds config.yaml, versions.json, metrics.csv, metrics.jsonl, checkpoints/ and, once finished, result.json;
with label noise also labels.csv, the labels that it trains on.
"""

from __future__ import annotations

import contextlib
import csv
import ctypes
import io
import json
import math
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn

from dlb_fast import _backends
from dlb_fast.buffer import rank_and_size
from dlb_fast.data.datasets.folder import IMAGE_EXTENSIONS, is_hidden, is_image
from dlb_fast.data.datasets.labels import LabelFile, label_rows
from dlb_fast.data.datasets.open import class_names, find_splits
from dlb_fast.data.datasets.tar import shard_files

from .checkpoint import (
    CheckpointError,
    list_checkpoints,
    load_matching,
    read_weights,
    remove_leftovers,
    write_atomically,
)
from .config import RunConfig, check_effects, load_config, override, to_dict, without_effect
from .data import RunData, eval_loader, evaluation_config, identity, open_data, open_test
from .distributed import Ranks
from .evaluate import evaluate, memorised
from .log import RunLog
from .loop import Trainer, total_steps
from .methods import find, make_criterion, make_sampler, resolve
from .models import architecture, create_model
from .optim import make_optimizer, make_scheduler
from .weights import load_initial_weights

try:
    import fcntl
except ImportError:  # on Windows, where a run folder is not locked
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "RunFolder",
    "build_trainer",
    "evaluate_run",
    "load_model",
    "lock_folder",
    "newest_run",
    "open_own_data",
    "rehearse",
    "resolve_device",
    "shortened",
    "train_run",
    "versions",
]

RUNS = Path("runs")
INIT_IMAGES = 512  # most training images that a network with `init_from_images` sees before the first step
FILES = re.compile(
    r"config\.yaml|(versions|result|confusion)\.json|labels\.csv|tracker_id|report\.(html|md)|curves\.png|"
    r"(best|last)\.safetensors"
)


class RunFolder:
    """The files of one run. Nothing is written before `named()`, `lock()` or `create()`.

    Example:
        >>> RunFolder("runs/a").checkpoints.as_posix()
        'runs/a/checkpoints'
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.labels = self.path / "labels.csv"
        self.checkpoints = self.path / "checkpoints"
        self._lock: int | None = None
        self._reserved = False

    def lock(self) -> None:
        """Make the folder and lock it against other processes until `unlock()` or the end of this process.

        Raises:
            ValueError: another process trains in the folder, or it cannot be made.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock = lock_folder(
                self.path,
                f"run folder: another process is training in {self.path}, and two would overwrite each other's files; "
                "wait for it or end it, or name another folder with --out",
            )
        except OSError as error:
            why = error.strerror or error
            raise ValueError(f"run folder: cannot make {self.path} ({why}); name another one with --out") from error
        if self._lock is None:
            return
        for folder in (self.path, self.checkpoints):
            remove_leftovers(folder, FILES)

    def unlock(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @classmethod
    def named(cls, label: str) -> RunFolder:
        """Make a new folder `runs/<date>-<time>-<label>`, with a number if it exists; no other process gets the same.

        Raises:
            ValueError: the folder cannot be made.
        """
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{re.sub(r'[^A-Za-z0-9_.-]+', '-', label)}"
        path, number = RUNS / name, 2
        while True:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.mkdir()  # fails if another process was faster
            except FileExistsError:
                if RUNS.is_dir():
                    path, number = RUNS / f"{name}-{number}", number + 1
                    continue
                raise ValueError(f"run folder: {RUNS} is not a folder; name another one with --out") from None
            except OSError as error:
                raise ValueError(f"run folder: cannot make {path} ({error.strerror}); name one with --out") from error
            folder = cls(path)
            folder._reserved = True
            return folder

    def release(self) -> None:
        """Remove the folder if `named()` made it and it is still empty."""
        if self._reserved:
            with contextlib.suppress(OSError):
                self.path.rmdir()

    def exists(self) -> bool:
        """Whether the folder has a run."""
        return self.config.exists()

    def has_work(self) -> bool:
        """Whether the run has got as far as a checkpoint; before that, a new run may take its folder."""
        kept = (self.checkpoints / "last.safetensors", self.path / "result.json")
        return self.exists() and (bool(list_checkpoints(self.checkpoints)) or any(file.exists() for file in kept))

    def clear(self) -> None:
        """Delete what a run without a checkpoint has left, so that none of it is taken for that of a new run."""
        left = (
            "metrics.csv", "metrics.jsonl", "confusion.json", "labels.csv", "tracker_id", "checkpoints/best.safetensors"
        )  # fmt: skip
        for name in (*left, "config.yaml"):  # the config, which marks a run, last: cut short, this is done again
            (self.path / name).unlink(missing_ok=True)

    def create(self, config: RunConfig, impl: str, initial: str = "", data: RunData | None = None) -> None:
        """Write labels.csv where `data` have label noise, versions.json, then config.yaml, which marks a run.

        `initial`: the first weights.
        """
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        (self.path / "report.html").unlink(missing_ok=True)  # it shows an earlier state
        known = {**versions(), "implementation": impl, **({"initial_weights": initial} if initial else {})}
        if data is not None and (wrong := data.wrong_labels) is not None:
            known["wrong_labels"] = wrong / len(data.train)
            rows = label_rows(data.train)
            write_atomically(self.labels, lambda file: file.write(rows))
        report = json.dumps(known, indent=1).encode()
        write_atomically(self.path / "versions.json", lambda file: file.write(report))
        text = yaml.safe_dump(to_dict(config), sort_keys=False).encode()
        write_atomically(self.config, lambda file: file.write(text))

    def read_config(self) -> RunConfig:
        """The config of the run."""
        if not self.exists():
            raise ValueError(f"there is no run in {self.path}: {self.config} is missing")
        return load_config(self.config)


def lock_folder(path: Path, busy: str) -> int | None:
    """Lock a folder until the handle is closed or this process ends; None where the system has no locks.

    Raises:
        ValueError: another process has the lock; its message is `busy`.
    """
    if fcntl is None:
        return None
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ValueError(busy) from None
    except OSError:  # a file system without locks
        os.close(handle)
        return None
    return handle


def newest_run(root: Path | str = RUNS) -> RunFolder:
    """The run under `root` with the newest checkpoint or start.

    Raises:
        ValueError: there is no run.
    """
    runs = [RunFolder(p.parent) for p in Path(root).glob("*/config.yaml") if (p.parent / "checkpoints").is_dir()]
    if not runs:
        raise ValueError(f"--resume: there is no run under {root}/; start one first, or name its folder with --out")
    return max(runs, key=lambda run: max(p.stat().st_mtime_ns for p in (run.config, run.checkpoints)))


def versions() -> dict[str, Any]:
    """Versions of Python, torch and this package, and the platform, threads, ranks and GPU."""
    import dlb_fast

    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "dlb_fast": getattr(dlb_fast, "__version__", "unknown"),
        "commit": _commit(Path(dlb_fast.__file__).parent),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "ranks": rank_and_size()[1],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _commit(folder: Path) -> str | None:
    """The commit of the package's work tree, `+dirty` with uncommitted changes; None when installed."""
    if not (folder.parent / ".git").exists():
        return None
    try:
        run = ["git", "-C", str(folder), "describe", "--always", "--dirty=+dirty", "--abbrev=12", "--exclude=*"]
        done = subprocess.run(run, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def resolve_device(name: str, ranks: Ranks | None = None) -> torch.device:
    """The device of a name. `auto` is the GPU if there is one; on several ranks each rank gets its own GPU.

    Raises:
        ValueError: torch cannot use the device, or the machine has fewer GPUs than ranks.
    """
    ranks = ranks or Ranks()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if ranks.world_size > 1 and name.startswith("cuda"):
        if ":" in name:
            raise ValueError(f"config: device expects cuda, auto or cpu on {ranks.world_size} ranks, got {name!r}")
        count = torch.cuda.device_count()
        if ranks.local_size > count:
            raise ValueError(
                f"config: device {name!r}: {ranks.local_size} ranks on this machine expect as many GPUs, it has "
                f"{count}; start fewer (torchrun --nproc-per-node {max(1, count)}) or use --device cpu"
            )
        name = f"cuda:{ranks.local_rank}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"config: device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def seed_everything(seed: int) -> None:
    """Seed torch's, numpy's and Python's global generators."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def build_trainer(
    config: RunConfig,
    *,
    data: RunData | None = None,
    folder: Path | None = None,
    log: RunLog | None = None,
    ranks: Ranks | None = None,
    initial: bool = True,
) -> Trainer:
    """The trainer of a config; the same config gives the same initial weights and the same batches.

    `batch_size` is the number of rows per step over all ranks. A rank trains on `batch_size / world_size` of them, so
    the number of ranks does not change the training.

    Args:
        config: the run.
        data: opened data; None opens `config.data`.
        folder: run folder; None writes nothing.
        log: console and metric files.
        ranks: this process and its group; by default those of the torch.distributed group, if there is one.
        initial: load the initial weights that the config names; False where a checkpoint follows.
    """
    config, ranks = resolve(config), ranks or Ranks.current()
    device = resolve_device(config.train.device, ranks)
    if config.data.batch_size % (2 * ranks.world_size):
        unit = 2 * ranks.world_size
        below = config.data.batch_size // unit * unit
        raise ValueError(
            f"config: batch_size counts the rows of all ranks; {ranks.world_size} ranks expect a multiple of {unit}, "
            f"got {config.data.batch_size}; use {f'{below} or ' if below else ''}{below + unit}"
        )
    data = data or open_data(config.data)
    seed_everything(config.train.seed)
    name = config.model.model if initial and not config.model.pretrained else architecture(config.model.model)
    model = create_model(name, data.num_classes, data.channels)
    loaded = ""
    if initial and (config.model.pretrained or config.model.init_from is not None):  # before all copies of the model
        loaded = ranks.run_on_main(lambda: load_initial_weights(model, config.model, data))
        if log is not None:
            log.say(f"initial weights: {loaded}")
    model = model.to(device)
    if config.train.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if ranks.rank:  # the weights are equal on all ranks, but dropout must differ
        seed_everything(config.train.seed + ranks.rank)
    _check_fit(model, config, data, device)
    if initial and not loaded and hasattr(model, "init_from_images"):  # the trainer copies rank 0's weights to all
        ranks.run_on_main(lambda: model.init_from_images(data.sample_images(INIT_IMAGES)))  # type: ignore[operator]
    rows = config.data.batch_size // ranks.world_size
    loader = data.train_loader(
        overlap=find(config.loss.method).batches == "overlap",
        seed=config.train.seed,
        device=device,
        channels_last=config.train.channels_last,
        sampler=make_sampler(config.loss, data.train.targets, rows, config.train.seed),
        augment=config.augment,
        ranks=ranks,
    )
    steps = total_steps(loader, config.train)
    passes = max(1, math.ceil(steps * config.train.accumulate / len(loader)))
    criterion = make_criterion(
        config.loss, num_classes=data.num_classes, num_samples=len(data.train), rows=rows, epochs=passes
    )
    optimizer = make_optimizer(model, config.optim)
    scheduler = make_scheduler(
        optimizer,
        config.schedule,
        total_steps=steps,
        steps_per_epoch=len(loader) / config.train.accumulate,
    )
    tested = data.test_batches(device, ranks)  # one loader, which names an unreadable image once
    fitted = data.fitted_batches(device, ranks)

    def scores(network: nn.Module) -> dict[str, Any]:
        known = {} if fitted is None else memorised(network, fitted, data.num_classes, ranks=ranks)
        return {**evaluate(network, tested, ranks=ranks), **known}

    return Trainer(
        model,
        criterion.to(device),
        optimizer,
        loader,
        scheduler=scheduler,
        evaluate=scores,
        folder=folder,
        config=config.train,
        log=log,
        metadata={**weights_metadata(config, data), "initial_weights": json.dumps(loaded or "random")},
        ranks=ranks,
    )


def _check_fit(model: nn.Module, config: RunConfig, data: RunData, device: torch.device) -> None:
    """Refuse a network that does not take the images: small ones may vanish in its poolings, others need one size."""
    side, eval_side = config.data.image_size, config.data.eval_size or config.data.image_size
    sizes = {tuple(data.train.images.shape[2:])} if data.in_memory else {(side, side), (eval_side, eval_side)}
    training = model.training
    for height, width in sorted(sizes):
        try:
            with torch.no_grad():
                model.eval()(torch.zeros(1, data.channels, height, width, device=device))
        except Exception as error:  # torch raises RuntimeError and ValueError, timm AssertionError
            raise ValueError(
                f"config: model {config.model.model} does not take images of {height} x {width} with {data.channels} "
                f"channels ({' '.join(str(error).split())}); choose another model"
                + ("" if data.in_memory else " or another image_size")
            ) from error
        finally:
            model.train(training)


def weights_metadata(config: RunConfig, data: RunData) -> dict[str, str]:
    """Metadata of exported weights, as text: what is needed to build the model and normalise its input."""
    side = config.data.eval_size or config.data.image_size
    size = list(data.train.images.shape[2:]) if data.in_memory else [side, side]
    return {
        "model": architecture(config.model.model),
        "num_classes": str(data.num_classes),
        "channels": str(data.channels),
        "size": json.dumps(size),
        "mean": json.dumps(list(data.mean)),
        "std": json.dumps(list(data.std)),
        **identity(data),
    }


def train_run(
    config: RunConfig,
    folder: RunFolder,
    *,
    resume: bool = False,
    quiet: bool = False,
    ranks: Ranks | None = None,
    note: str = "",
    data: RunData | None = None,
) -> dict[str, Any]:
    """Train in a run folder, from the start or from its newest valid checkpoint; returns the result of `Trainer.fit`.

    The first line printed is `RunData.about`, what was done to the data; `note` is printed after it. `data`: opened
    data; None opens `config.data`.

    Errors in the config, the data or the model leave no folder behind. A finished run writes result.json.
    All ranks call this; only rank 0 prints and writes.
    """
    ranks = ranks or Ranks.current()
    try:
        config = resolve(config)
        log = RunLog(quiet=True)
        if ranks.is_main:
            log = RunLog(folder.path, quiet=quiet, trackers=config.train.trackers, config=to_dict(config))
        device = resolve_device(config.train.device, ranks)
        _keep_freed_memory(device)
        _reset_peak_memory(device)
        data = data or (open_own_data(folder, config) if resume else open_data(config.data))
        log.say(data.about + (f"\n{note}" if note else ""))
        begun = resume and ranks.run_on_main(lambda: _same_start(folder, config))
        trainer = build_trainer(config, data=data, folder=folder.path, log=log, ranks=ranks, initial=not begun)
    except BaseException:
        if ranks.is_main:
            folder.release()
        raise
    loader: Any = trainer.loader
    impl = _backends.pick(config.loss.impl, trainer.device, op="train")
    checkpoints = folder.checkpoints
    ranks.run_on_main(folder.lock)
    try:
        # after lock(), because another process may have started and ended a run here in the meantime
        started = ranks.run_on_main(folder.exists)
        if started and not resume:
            if ranks.run_on_main(folder.has_work):
                raise ValueError(f"run folder: {folder.path} already holds a run; resume it, or choose another folder")
            log.say(f"the run in {folder.path} had no checkpoint yet: a new one takes its place")
            ranks.run_on_main(folder.clear)
        resume = resume and started
        if resume and ranks.run_on_main(lambda: folder.has_work() and not list_checkpoints(checkpoints)):
            raise CheckpointError(
                f"{checkpoints} has no checkpoint, but the run has been trained; a resume would start it over. "
                "Put a checkpoint back, or start a new run with another --out"
            )
        if resume and ranks.is_main:
            _compare_versions(folder, log)
        initial = json.loads(trainer.metadata["initial_weights"])
        if not resume:
            ranks.run_on_main(lambda: folder.create(config, impl, initial, data))
        parameters = sum(p.numel() for p in trainer.model.parameters())
        log.say(
            f"{config.loss.method} with {config.model.model} ({parameters:,} parameters) on "
            f"{config.data.source}: {trainer.total_steps} steps of {_rows(config, trainer)}, "
            f"loss implementation {impl!r}\n"
            f"run folder {folder.path}"
        )
        cost: Any = getattr(trainer.criterion, "cost", None)
        if cost is not None:
            log.say(f"{config.loss.method}: {cost()}")
        ranks.check_shared(folder.config)
        if resume:
            found = trainer.resume()
            if found:
                ranks.run_on_main(lambda: _check_labels(folder, data))
            # after resume(), so that a refused resume does not change the config of the run
            initial = json.loads(trainer.metadata["initial_weights"])
            complete = trainer.step >= trainer.total_steps
            kept = ""
            if not (complete or trainer.out_of_patience):
                ranks.run_on_main(lambda: folder.create(config, impl, initial, data))
            elif to_dict(config) != to_dict(folder.read_config()):
                kept = "; nothing is left to train, so its config stays as it was"
            log.say(f"continuing from {found}" if found else "the run had no checkpoint yet: starting from scratch")
            if complete:
                log.say(f"the run is already complete ({trainer.step} steps){kept}")
            elif trainer.out_of_patience:
                log.say(
                    f"the run has ended early at step {trainer.step}; a larger --patience, or None, continues it{kept}"
                )
            else:
                ranks.run_on_main(lambda: (folder.path / "result.json").unlink(missing_ok=True))
        try:
            result = trainer.fit()
        finally:
            loader.close()
    finally:
        folder.unlock()
    if not result["finished"]:
        log.say(
            f"stopped by {result['stopped_by']} at step {trainer.step} of {trainer.total_steps}, everything is saved; "
            f"continue with: dlb-fast train --resume --out {folder.path}"
        )
        return result
    result["peak_mib"] = _peak_memory_mib(trainer.device)
    encoded = json.dumps(result, indent=1).encode()
    ranks.run_on_main(lambda: write_atomically(folder.path / "result.json", lambda file: file.write(encoded)))
    if result["stopped_by"] == "patience":
        log.say(
            f"stopped early at step {trainer.step} of {trainer.total_steps}: {trainer.stale} evaluations without a "
            f"better test top-1 (patience {config.train.patience})"
        )
    if result["best_top1"] is not None:
        log.say(
            f"done: test top-1 {100 * result['test_top1']:.2f} % at the end, best {100 * result['best_top1']:.2f} % "
            f"at step {result['best_step']}; `dlb-fast eval` takes the best weights, with --weights last those of the "
            "end"
        )
    return result


def open_own_data(folder: RunFolder, config: RunConfig) -> RunData:
    """`open_data` for a run that has begun: the labels of a file that is gone are those that the run folder keeps."""
    file = config.data.label_file
    if file is not None and folder.labels.exists() and not Path(LabelFile.of(file).path).exists():
        config = override(config, noise_kind=f"file:{folder.labels}")
    return open_data(config.data)


def _check_labels(folder: RunFolder, data: RunData) -> None:
    """ValueError if the run folder keeps other labels than those that the run continues with."""
    if data.wrong_labels is None or not folder.labels.exists():
        return
    before, now = folder.labels.read_bytes(), label_rows(data.train)
    if before != now and _column(before, "label") != _column(now, "label"):
        raise ValueError(
            f"--resume: {folder.labels} has other labels than those that the run was trained on; bring the file back, "
            "or delete it, and it is written again"
        )


def _column(content: bytes, name: str) -> list[str | None]:
    text = io.StringIO(content.decode("utf-8", "surrogateescape"), newline="")
    return [row.get(name) for row in csv.DictReader(text)]


def _same_start(folder: RunFolder, config: RunConfig) -> bool:
    """Whether the run has a checkpoint, whose weights it continues with.

    Raises:
        ValueError: the config names other initial weights than those that the run has started from.
    """
    if not (folder.exists() and list_checkpoints(folder.checkpoints)):
        return False
    before, now = folder.read_config().model, config.model
    if (before.pretrained, before.init_from) != (now.pretrained, now.init_from):
        raise ValueError(
            f"--resume: the run in {folder.path} has begun and continues with its own weights; leave --pretrained and "
            "--init-from as they were, or start a new run with another --out"
        )
    return True


def _rows(config: RunConfig, trainer: Trainer) -> str:
    """Rows per optimiser step and peak learning rate, such as `128 rows (2 ranks x 64, ddp) on cpu, lr 0.05`."""
    size, batches = trainer.ranks.world_size, config.train.accumulate
    factors = [f"{size} ranks"] * (size > 1) + [f"{batches} batches"] * (batches > 1)
    product = " x ".join([*factors, str(config.data.batch_size // size)])
    mode = f", {trainer.distributed}" if size > 1 else ""
    note = f" ({product}{mode})" if factors else ""
    device = trainer.device.type if size > 1 else trainer.device
    return f"{config.data.batch_size * batches} rows{note} on {device}, lr {config.optim.lr:g}"


def _compare_versions(folder: RunFolder, log: RunLog) -> None:
    """Log what changed since the start: a resume is bit-identical only with the same software and threads."""
    try:
        before = json.loads((folder.path / "versions.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        log.say(f"{folder.path / 'versions.json'} cannot be read and is replaced")
        return
    now = versions()
    changed = [f"{name} {before.get(name)} -> {value}" for name, value in now.items() if before.get(name) != value]
    if changed:
        log.say(f"changed since the start, so the continuation may differ in the last bits: {', '.join(changed)}")


def _keep_freed_memory(device: torch.device) -> None:
    """Let glibc keep what a step frees on the CPU; it would give it back, and every step fault its pages in anew."""
    if device.type == "cpu":
        with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
            library = ctypes.CDLL(None)
            # M_MMAP_THRESHOLD, of which an older glibc takes 32 MiB at most; without it the next line would only stop
            # glibc from raising the threshold by itself.
            if library.mallopt(-3, 2**30) or library.mallopt(-3, 2**25):
                library.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD


def _reset_peak_memory(device: torch.device) -> None:
    """Reset the peak of the device memory (GPU) or of the resident memory of this process (Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # not Linux, or not allowed: the peak is then that of the whole process
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM


def _peak_memory_mib(device: torch.device) -> float | None:
    """Peak memory in MiB since `_reset_peak_memory`; None if the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), None)


def load_model(run: Path | str, *, weights: str = "best") -> tuple[nn.Module, dict[str, Any]]:
    """Load the network of a run, in eval mode on the CPU, and the metadata of its weights; does not need the data.

    Args:
        run: run folder.
        weights: `best` or `last`.

    Returns:
        The network; its input is `(pixel / 255 - mean) / std`, float32 of shape (B, channels, *size).
        A dict with `model`, `num_classes`, `channels`, `size`, `mean`, `std`, `classes`, `files` (fingerprints of the
        training and test images), `initial_weights` (what it started from) and `step`.

    Raises:
        ValueError: there is no run.
        CheckpointError: the weights are missing or damaged.

    Example: `model, about = load_model("runs/first")`
    """
    folder = RunFolder(run)
    folder.read_config()  # raises where there is no run
    file = folder.checkpoints / f"{weights}.safetensors"
    if not file.exists():
        raise CheckpointError(f"load_model: {file} is missing; has the run finished an evaluation?")
    tensors, about = read_weights(file)
    if "num_classes" not in about:
        raise CheckpointError(f"load_model: {file} says nothing about its network; expected weights of a dlb_fast run")
    model = create_model(about["model"], about["num_classes"], about["channels"])
    load_matching(model, tensors, str(file))
    return model.eval(), about


def evaluate_run(
    path: Path | str, *, weights: str = "best", source: str | None = None, device: str = "auto", **changed: Any
) -> dict[str, Any]:
    """Scores of a run's weights (`best` or `last`) on its own test set or on another dataset of its classes.

    `changed`: fields of `DataConfig` in place of the run's, such as `on_error`.

    Raises:
        ValueError: there is no run, the dataset has other classes or images of another shape, or the images that the
            run held out are not the same any more.
        CheckpointError: the weights are missing or damaged.
    """
    model, about = load_model(path, weights=weights)
    config = override(RunFolder(path).read_config(), **changed).data
    test = open_test(config, about, source)
    where = resolve_device(device)
    # normalisation is part of the network, so any data use the statistics of the training set
    batches = eval_loader(test, evaluation_config(config, about), about["mean"], about["std"], where)
    return evaluate(model.to(where), batches)


SMOKE_STEPS, SMOKE_ROWS, SMOKE_CLASSES, SMOKE_PIXELS = 4, 16, 10, 64
SMOKE_IMAGES = 64  # of the test set; of the training set of an image folder at least as many


def shortened(config: RunConfig, *, real_data: bool = False) -> RunConfig:
    """The config with four steps of at most 16 rows, an evaluation and a checkpoint every second step, and no trackers.

    Unless `real_data`, the images are synthetic, of ten classes and of the config's size, at most 64 pixels.

    Example:
        >>> from dlb_fast.presets import load_preset
        >>> shortened(load_preset("cifar100-resnet32-dlb")).data.source
        'synthetic:160,10,32'
    """
    check_effects(config)
    if not real_data:
        kind = config.data.source.split(":")[0]
        size = 8 if kind in ("digits", "synthetic") else min(SMOKE_PIXELS, config.data.image_size)
        source = f"synthetic:{SMOKE_ROWS * SMOKE_CLASSES},{SMOKE_CLASSES},{size}"
        # some kinds of noise are defined for the classes of the config's own data, and a file is of its images
        config = override(config, source=source, per_class=None, noise_kind="symmetric")
        config = override(config, **without_effect(config))  # such as the size of image files
    rows = min(SMOKE_ROWS, config.data.batch_size)
    every: dict[str, Any] = {"eval_every": SMOKE_STEPS // 2, "checkpoint_every": SMOKE_STEPS // 2, "log_every": 1}
    return override(config, batch_size=rows, max_steps=SMOKE_STEPS, trackers=(), patience=None, **every)


def few_images(source: str, folder: Path) -> str:
    """A source with a few images of every class of another: a large one takes minutes to list.

    Of an image folder with its splits and classes, links to the first images found are made in `folder`; of several tar
    shards it is the first one. Any other source is returned as it is.

    Raises:
        ValueError: as `open_dataset` for the folders.
    """
    kind, _, path = source.partition(":")
    if kind == "tar":
        return f"tar:{shard_files(path)[0]}"
    if kind != "imagefolder":
        return source
    root = Path(path).resolve()
    train, validation, _ = find_splits(root)
    for split, name in ((train or root, "train" if train else ""), (validation, "val")):
        classes = [] if split is None else class_names(split)
        count = max(4, math.ceil(SMOKE_IMAGES / max(1, len(classes))))
        for label in classes:
            (folder / name / label).mkdir(parents=True)
            for number, image in enumerate(islice(_images_below(split / label), count)):  # type: ignore[operator]
                (folder / name / label / f"{number}{image.suffix}").symlink_to(image)
    return f"imagefolder:{folder}"


def _images_below(folder: Path) -> Iterator[Path]:
    """The images of a folder and its subfolders as the file system lists them, without reading all of a folder.

    As `ImageFolder` it leaves out hidden folders and reads every folder once, however many links lead to it.
    """
    waiting, entered = [folder], set()
    while waiting:
        current = waiting.pop()
        identity = (found := os.stat(current)).st_dev, found.st_ino
        if identity in entered:
            continue
        entered.add(identity)
        with os.scandir(current) as entries:
            for entry in entries:
                if os.path.isdir(entry.path):  # unlike `entry.is_dir()` also where a link leads to itself
                    waiting += [] if is_hidden(entry.name) else [Path(entry.path)]
                elif is_image(entry.name, IMAGE_EXTENSIONS):
                    yield Path(entry.path)


def rehearse(config: RunConfig, *, real_data: bool = False, quiet: bool = False, ranks: Ranks) -> dict[str, Any]:
    """Train two steps, evaluate, save; resume, train to the end, evaluate the exported weights. Keeps nothing.

    Args:
        config: config of the run.
        real_data: use a few images of the config's own data.
        quiet: no console output.
        ranks: this process and its group.

    Returns:
        The scores of the last weights, with `seconds` and `about`, what was done in words.

    Raises:
        RuntimeError: the written weights have another top-1 than the run. Other errors as in `train_run`.
    """
    started = time.perf_counter()
    if config.data.kind == "digits" and config.model.init_from is not None:
        real_data = True  # synthetic images have three channels, for which no weights of digits are
    path = Path(ranks.run_on_main(lambda: tempfile.mkdtemp(prefix="dlb-fast-smoke-")))
    try:
        short = shortened(config, real_data=real_data)
        if real_data:
            source = ranks.run_on_main(lambda: few_images(config.data.source, path / "data"))
            fewer = source != config.data.source
            short = override(short, source=source, per_class=None if fewer else config.data.per_class)
            if fewer and config.data.label_file is not None:  # whose labels are for all images
                short = override(short, noise_kind="symmetric")
        try:
            data = open_data(short.data)
        except ValueError as error:  # name the user's folder in place of the links
            raise ValueError(str(error).replace(str(path / "data"), str(config.data.path))) from None
        data.about = data.about.replace(short.data.source, config.data.source)
        chosen = np.linspace(0, len(data.test) - 1, min(SMOKE_IMAGES, len(data.test))).astype(int)
        data.test = data.test.select(np.unique(chosen))
        run = RunFolder(path / "run")
        first = override(short, max_steps=SMOKE_STEPS // 2)
        train_run(first, run, data=data, quiet=quiet, ranks=ranks)
        result = train_run(short, run, data=data, resume=True, quiet=quiet, ranks=ranks)
        scores = ranks.run_on_main(lambda: _scores_of_export(run.path, data, config.train.device))
        if not ranks.world_size > 1 and abs(scores["top1"] - result["test_top1"]) > 1e-9:
            raise RuntimeError(
                f"smoke: top-1 of the written weights is {scores['top1']}, of the run {result['test_top1']}"
            )
    finally:
        if ranks.is_main:
            shutil.rmtree(path, ignore_errors=True)
    of = config.data.source if real_data else f"synthetic images in place of {config.data.source}"
    about = (
        f"{SMOKE_STEPS} steps of {short.data.batch_size} rows with {len(data.train)} training and {len(data.test)} "
        f"test images of {of}"
    )
    return {**scores, "seconds": round(time.perf_counter() - started, 1), "about": about}


def _scores_of_export(path: Path, data: RunData, device: str) -> dict[str, Any]:
    where = resolve_device(device)
    model, _ = load_model(path, weights="last")
    return evaluate(model.to(where), data.test_batches(where))
