"""From a config to a finished run, and from a run folder to its scores."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dlb_fast import _backends

from .config import RunConfig, override, to_dict
from .distributed import ALONE, Ranks
from .engine import Trainer
from .evaluate import evaluate
from .export import describe
from .log import RunLog
from .memory import peak_mebibytes, reset_peak
from .methods import find, make_criterion, make_sampler, resolve
from .models import create_model
from .optim import make_optimizer
from .run_folder import RunFolder, versions
from .schedule import make_scheduler
from .sets import Sets, open_sets
from .state import CheckpointError, load_weights, write_atomically
from .window import total_steps

__all__ = ["build_trainer", "evaluate_run", "resolve_device", "train_run"]


def resolve_device(name: str, ranks: Ranks = ALONE) -> torch.device:
    """`auto` is the GPU where there is one, and each rank's own; raises ValueError for a device torch cannot use."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if ranks.several and name.startswith("cuda"):
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
    sets: Sets | None = None,
    folder: Path | None = None,
    log: RunLog | None = None,
    ranks: Ranks | None = None,
) -> Trainer:
    """The trainer of a config; the same config gives the same initial weights and the same batches.

    `batch_size` counts the rows of a step over all ranks: a rank trains on `batch_size / world_size` of them, so the
    same config means the same training on any number of ranks.

    Args:
        config: the run.
        sets: already opened data; None opens `config.data`.
        folder: run folder; None writes nothing.
        log: console and metric files.
        ranks: this process among others; by default its place in the torch.distributed group, if there is one.
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
    sets = sets or open_sets(config.data)
    seed_everything(config.train.seed)
    model = create_model(config.model.model, sets.num_classes, sets.channels).to(device)
    if config.train.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if ranks.rank:  # the weights are alike by now; what the network draws from here on (dropout) must not be
        seed_everything(config.train.seed + ranks.rank)
    method, seed = find(config.loss.method), config.train.seed
    rows = config.data.batch_size // ranks.world_size
    sampler = make_sampler(config.loss, sets.train.targets, rows, seed)
    loader = sets.train_loader(
        overlap=method.batches == "overlap", seed=seed, device=device, channels_last=config.train.channels_last,
        sampler=sampler, augment=config.augment, ranks=ranks,
    )  # fmt: skip
    steps = total_steps(loader, config.train)
    passes = max(1, math.ceil(steps * config.train.accumulate / len(loader)))
    optimizer = make_optimizer(model, config.optim)
    scheduler = make_scheduler(
        optimizer,
        config.schedule,
        total_steps=steps,
        steps_per_epoch=len(loader) / config.train.accumulate,
    )
    return Trainer(
        model,
        make_criterion(
            config.loss, num_classes=sets.num_classes, num_samples=len(sets.train), rows=rows, epochs=passes
        ).to(device),
        optimizer,
        loader,
        scheduler=scheduler,
        evaluate=lambda network: evaluate(network, sets.test_batches(device, ranks), ranks=ranks),
        folder=folder,
        config=config.train,
        log=log,
        metadata=describe(config, sets),
        ranks=ranks,
    )


def train_run(
    config: RunConfig,
    folder: RunFolder,
    *,
    resume: bool = False,
    quiet: bool = False,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Train in a run folder, from the start or from its newest valid checkpoint; returns the trainer's result.

    Everything that can be wrong with the config, the data or the model is found before the folder is made. A finished
    run leaves result.json. On several ranks all call this; rank 0 alone says and writes anything.
    """
    config, ranks = resolve(config), ranks or Ranks.current()
    log = RunLog(quiet=True)
    if ranks.is_main:
        log = RunLog(folder.path, quiet=quiet, trackers=config.train.trackers, config=to_dict(config))
    reset_peak(resolve_device(config.train.device, ranks))
    trainer = build_trainer(config, folder=folder.path, log=log, ranks=ranks)
    loader: Any = trainer.loader
    impl = _backends.pick(config.loss.impl, trainer.device.type)
    started = ranks.on_main(folder.exists)
    ranks.on_main(folder.hold)
    try:
        if resume and started and ranks.is_main:
            _compare_versions(folder, log)
        if not (resume and started):
            ranks.on_main(lambda: folder.create(config, impl))
        log.say(
            f"{config.loss.method} with {config.model.model} ({_count(trainer.model):,} parameters) on "
            f"{config.data.source}: {trainer.total_steps} steps of {_rows(config, trainer)}, "
            f"loss implementation {impl!r}\n"
            f"run folder {folder.path}"
        )
        cost: Any = getattr(trainer.criterion, "cost", None)
        if cost is not None:
            log.say(f"{config.loss.method}: {cost()}")
        if resume and started:
            found = trainer.resume()
            # Not before: a continuation that is refused leaves the run's config as it was.
            ranks.on_main(lambda: folder.create(config, impl))
            log.say(f"continuing from {found}" if found else "the run had no checkpoint yet: starting from scratch")
            if trainer.step >= trainer.total_steps:
                log.say(f"the run is already complete ({trainer.step} steps)")
        try:
            result = trainer.fit()
        finally:
            loader.close()
    finally:
        folder.release()
    if result["stopped_by"] is not None and trainer.step < trainer.total_steps:
        log.say(
            f"stopped by {result['stopped_by']} at step {trainer.step} of {trainer.total_steps}, everything is saved; "
            f"continue with: dlb-fast train --resume --out {folder.path}"
        )
        return result
    result["peak_mib"] = peak_mebibytes(trainer.device)
    data = json.dumps(result, indent=1).encode()
    ranks.on_main(lambda: write_atomically(folder.path / "result.json", lambda file: file.write(data)))
    if result["best_top1"] is not None:
        log.say(
            f"done: test top-1 {100 * result['test_top1']:.2f} % at the end, best {100 * result['best_top1']:.2f} % "
            f"at step {result['best_step']}"
        )
    return result


def _rows(config: RunConfig, trainer: Trainer) -> str:
    """What one optimiser step sees, and at which peak rate: `128 rows (2 ranks x 64, ddp) on cpu, lr 0.05`."""
    ranks, batches = trainer.ranks, config.train.accumulate
    parts = [f"{ranks.world_size} ranks"] * ranks.several + [f"{batches} batches"] * (batches > 1)
    made = f"{' x '.join([*parts, str(config.data.batch_size // ranks.world_size)])}"
    note = f" ({made}{f', {trainer.parallel.kind}' if ranks.several else ''})" if parts else ""
    device = trainer.device.type if ranks.several else trainer.device
    return f"{config.data.batch_size * batches} rows{note} on {device}, lr {config.optim.lr:g}"


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _compare_versions(folder: RunFolder, log: RunLog) -> None:
    """Say what changed since the start: a continuation is bit-identical only with the same software and threads."""
    try:
        before = json.loads((folder.path / "versions.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        log.say(f"{folder.path / 'versions.json'} cannot be read; it is written anew")
        return
    now = versions()
    changed = [f"{name} {before.get(name)} -> {value}" for name, value in now.items() if before.get(name) != value]
    if changed:
        log.say(f"changed since the start, so the continuation may differ in the last bits: {', '.join(changed)}")


def evaluate_run(
    path: Path | str, *, weights: str = "best", source: str | None = None, device: str = "auto"
) -> dict[str, Any]:
    """Scores of a run's exported weights (`best` or `last`) on its own test set or on another one of the same classes.

    Raises:
        ValueError: no run there, or a set with another number of classes.
        CheckpointError: the weights are missing or damaged.
    """
    folder = RunFolder(path)
    config = folder.read_config()
    if source is not None:
        # normalisation is part of the model: another set is evaluated with the statistics of the training
        trained = open_sets(config.data)
        other = open_sets(override(config, source=source, per_class=None, label_noise=0.0).data)
        if other.num_classes != trained.num_classes:
            raise ValueError(
                f"eval: {source} has {other.num_classes} classes, the run in {path} has {trained.num_classes}"
            )
        sets = Sets(other.train, other.test, config.data, trained.mean, trained.std)
    else:
        sets = open_sets(config.data)
    where = resolve_device(device)
    model = create_model(config.model.model, sets.num_classes, sets.channels)
    file = folder.checkpoints / f"{weights}.safetensors"
    if not file.exists():
        raise CheckpointError(f"eval: {file} is missing; has the run finished an evaluation?")
    load_weights(file, model)
    return evaluate(model.to(where), sets.test_batches(where))
