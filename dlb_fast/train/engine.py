"""The loop. `Trainer.fit()` reads from top to bottom: batch, loss, step, log point, evaluation, checkpoint."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dlb_fast.data import Batch

from . import snapshot
from . import state as files
from .config import TrainConfig
from .distributed import Ranks
from .graphed import GraphedStep, check_graph
from .log import RunLog
from .optim import Ema
from .parallel import Parallel, check_parallel, same_start, whole_states
from .step import FORWARDS, accepted_inputs, training_loss
from .stop import StopSignals
from .window import Window, length_of, total_steps

__all__ = ["Trainer", "TrainingDiverged"]


class TrainingDiverged(RuntimeError):
    """The loss is no longer finite; the last checkpoint, from before, is kept."""


class Trainer:
    """Trains a model with a criterion that may remember the last mini-batch.

    Args:
        model: maps images to logits `(n, C)`; on the device to train on. On several ranks it is the bare network: the
            trainer wraps or shares it as `config.distributed` says, and gives the optimiser the shares.
        criterion: `LastBatchLoss`, a `TaughtLoss` or any `criterion(logits, targets)`. Where it has them,
            `attach(model)` is called once and `update()` after every optimiser step.
        optimizer: over the model's parameters.
        loader: any iterable of `Batch`; one pass is an epoch. With `state_dict`/`load_state_dict` it resumes exactly
            by itself; without, the batches of the epoch so far are skipped, which is exact for a fixed sequence.
        scheduler: stepped once per optimiser step; None keeps the rates.
        evaluate: `model -> {"top1": ..., ...}`, called every `eval_every` steps; its values are logged as `test_*`.
        folder: the run folder for metrics and checkpoints; None writes nothing.
        config: how long, how precisely, what is written when.
        log: console, metric files and trackers; made from `folder` and `config` by default. Only rank 0's is used.
        ranks: this process among others; by default its place in the torch.distributed group, if there is one.
        metadata: what exported weights say about themselves.
        **settings: single fields of `TrainConfig`, overriding `config`.

    Example:
        >>> from dlb_fast.train.models import create_model
        >>> model = create_model("small_cnn", 10, 1)
        >>> batch = Batch(torch.rand(4, 1, 8, 8), torch.arange(4), torch.arange(4), num_old=0, epoch=0, step=0)
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> trainer = Trainer(model, nn.CrossEntropyLoss(), sgd, [batch], max_steps=2, log=RunLog(quiet=True))
        >>> trainer.fit()["step"]
        2
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module,
        optimizer: torch.optim.Optimizer,
        loader: Iterable[Batch],
        *,
        scheduler: Any = None,
        evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
        folder: Path | str | None = None,
        config: TrainConfig | None = None,
        log: RunLog | None = None,
        metadata: Mapping[str, str] | None = None,
        ranks: Ranks | None = None,
        **settings: Any,
    ) -> None:
        self.config = config = dataclasses.replace(config or TrainConfig(), **settings)
        if config.forward not in FORWARDS:
            raise ValueError(f"Trainer: forward must be one of {', '.join(FORWARDS)}, got {config.forward!r}")
        self.ranks = ranks = ranks or Ranks.current()
        self.device = next(model.parameters()).device
        kind = check_parallel(config, ranks, criterion, self.device)
        check_graph(config, criterion, self.device, kind)
        if config.sync_bn:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.model, self.criterion, self.optimizer, self.scheduler = model, criterion, optimizer, scheduler
        self.loader, self.evaluate = loader, evaluate
        self.folder = None if folder is None else Path(folder)
        if not ranks.is_main:
            log = RunLog(quiet=True)
        self.log = log or RunLog(self.folder, trackers=config.trackers, config=dataclasses.asdict(config))
        self.metadata = dict(metadata or {})
        self.total_steps = total_steps(loader, config)
        self.eval_every = config.eval_every or max(1, length_of(loader) // config.accumulate)
        same_start(model, ranks)
        self.ema = None if config.ema is None else Ema(model, config.ema)
        average = None if self.ema is None else self.ema.model
        self.parallel = Parallel(model, optimizer, average, kind=kind, compiled=config.compile, ranks=ranks)
        self.graphed = GraphedStep(self._backward, model.parameters()) if config.graph else None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "fp16")
        self.accepts = accepted_inputs(criterion)
        # Teachers may look into the model and remember its steps.
        attach: Callable[[nn.Module], None] = getattr(criterion, "attach", lambda model: None)
        attach(model)
        self._teacher_update: Callable[[], None] = getattr(criterion, "update", lambda: None)

        self.step = 0  # optimiser steps done
        self.epoch = 0  # passes of the loader finished
        self.in_epoch = 0  # batches delivered of the running pass
        self.images_seen = 0  # rows through the network on all ranks, repeated ones included
        self.seconds = 0.0  # training time up to the last evaluation, evaluations and checkpoints not included
        self.best: dict[str, float] = {}  # {"step", "top1"} of the best evaluation
        self.last: dict[str, Any] = {}  # the last row of metrics
        self.stop = StopSignals(ranks)
        self.stopped_by: str | None = None
        self.window = Window(self.device)  # since the last evaluation

    def fit(self) -> dict[str, Any]:
        """Train to the end, or to SIGTERM/SIGINT, which save a checkpoint and return.

        Returns:
            The last row of metrics, with `best_top1`, `best_step` and `stopped_by` (None, "SIGTERM" or "SIGINT").
        Raises:
            TrainingDiverged: the loss of any rank is not finite at a log point.
            CheckpointError: the disk is full or not writable; the last good checkpoint is kept.
            RankError: another rank ended; its own message says why.
        """
        config = self.config
        if self.folder is not None and self.ranks.is_main:
            (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        self.log.start(step=self.step, total=self.total_steps)
        self.model.train()
        self.criterion.train()
        self.optimizer.zero_grad(set_to_none=True)
        with self.stop.marked(), _closing(self.log), self.ranks.naming_the_lost():
            stream = self._stream()
            while True:
                over = self.step >= self.total_steps
                self.stopped_by = self.stop.wanted(now=over)
                if over or self.stopped_by is not None:
                    break
                started = time.perf_counter()
                for number, batch in enumerate(islice(stream, config.accumulate), 1):
                    with self.parallel.accumulating(last=number == config.accumulate):
                        self._accumulate(batch)
                self._optimizer_step()
                self.step += 1
                due = self._due(self.eval_every)
                if due or self._due(config.log_every):
                    self._check_finite()
                self.window.seconds += time.perf_counter() - started
                self.log.advance()
                if self._due(config.log_every):
                    self.log.progress(self._row())
                if due:
                    self._evaluate()
                if self._due(config.checkpoint_every or self.eval_every):
                    self._check_finite()
                    self.save()
            if self.stopped_by is not None and not self._due(config.checkpoint_every or self.eval_every):
                self._check_finite()
                self.save()
        return {
            **(self.last or self._row()),
            "best_top1": self.best.get("top1"),
            "best_step": self.best.get("step"),
            "stopped_by": self.stopped_by,
        }

    def _accumulate(self, batch: Batch) -> None:
        """Forward and backward of one batch."""
        if batch.images.device != self.device:
            batch = batch.to(self.device, non_blocking=True)
        if self.config.channels_last:
            batch.images = batch.images.contiguous(memory_format=torch.channels_last)
        loss = self._backward(batch) if self.graphed is None else self.graphed(batch)
        counted = getattr(self.criterion, "counted", len(batch))  # CS-KD judges half of the rows
        self.window.add(loss, getattr(self.criterion, "parts", None), counted)
        self.images_seen += len(batch) * self.ranks.world_size

    def _backward(self, batch: Batch) -> torch.Tensor:
        """The loss of a batch, its gradient added to the parameters'."""
        loss = training_loss(
            self.parallel.network,
            self.criterion,
            batch,
            forward=self.config.forward,
            autocast=self._autocast(),
            accepts=self.accepts,
        )
        self.scaler.scale(loss / self.config.accumulate if self.config.accumulate > 1 else loss).backward()
        return loss

    def _optimizer_step(self) -> None:
        if self.config.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.scheduler is not None:
            self.scheduler.step()
        if self.ema is not None:
            self.ema.update(self.model)
        self._teacher_update()

    def _stream(self) -> Iterator[Batch]:
        """Batches without end, epoch after epoch; measures how long each one is waited for."""
        length = length_of(self.loader)
        empty = 0
        while empty < 2:  # a pass that is resumed at its very end is empty; two in a row mean that nothing will come
            batches = iter(self.loader)
            if self.in_epoch and not hasattr(self.loader, "load_state_dict"):
                batches = islice(batches, self.in_epoch, None)
            empty += 1
            while True:
                started = time.perf_counter()
                batch = next(batches, None)
                self.window.waited += time.perf_counter() - started
                if batch is None:
                    break
                empty = 0
                self.in_epoch += 1
                if self.in_epoch == length:  # counted at the last batch, so that a checkpoint there says epoch + 1
                    self.epoch, self.in_epoch = self.epoch + 1, 0
                yield batch
            if self.in_epoch:
                self.epoch, self.in_epoch = self.epoch + 1, 0
        raise ValueError(
            f"Trainer: the loader has no more batches at step {self.step} of {self.total_steps}; "
            f"is it a generator that is used up, or is the data smaller than a batch?"
        )

    def _due(self, every: int | None) -> bool:
        return every is not None and (self.step % every == 0 or self.step == self.total_steps)

    def _autocast(self) -> AbstractContextManager[Any] | None:
        if self.config.amp == "none":
            return None
        dtype = torch.bfloat16 if self.config.amp == "bf16" else torch.float16
        return torch.autocast(self.device.type, dtype=dtype)

    def _check_finite(self) -> None:
        """Stop when the summed loss of the window is not finite on any rank. Reading it waits for the device."""
        if self.config.nan_check and not self.window.summed(self.ranks).is_finite():
            kept = "there is no checkpoint yet"
            if self.folder is not None and (found := sorted((self.folder / "checkpoints").glob("step-*.pt"))):
                kept = f"the last good checkpoint is {found[-1]}"
            raise TrainingDiverged(
                f"the loss became NaN or infinite by step {self.step} (epoch {self.epoch}); {kept}. "
                f"Lower the learning rate, clip the gradient (--clip-grad) or look for broken inputs; "
                f"--no-nan-check turns this check off"
            )

    def _evaluate(self) -> None:
        """A row of metrics; the best weights so far are exported."""
        row = self._row()
        if self.evaluate is not None:
            weights = self.model if self.ema is None else self.ema.model
            with self.parallel.evaluating(weights):
                scores = self.ranks.from_main(dict(self.evaluate(weights)))
            row |= {f"test_{name}": value for name, value in scores.items()}
            self.model.train()
            if scores.get("top1", -1.0) > self.best.get("top1", -1.0):
                self.best = {"top1": scores["top1"], "step": self.step}
                self._export("best")
        self.last = row
        self.log.result(row)
        self.seconds += self.window.seconds
        self.window = Window(self.device)

    def _row(self) -> dict[str, Any]:
        epoch = self.epoch + self.in_epoch / max(1, length_of(self.loader))
        lr = self.optimizer.param_groups[0]["lr"]
        seen = {"step": self.step, "epoch": round(epoch, 4), "images_seen": self.images_seen, "lr": lr}
        window = self.window.summed(self.ranks)
        return {**seen, **window.means(), "seconds": round(self.seconds + window.seconds, 3)}

    def _export(self, name: str) -> None:
        """Write the weights alone, as they are evaluated."""
        if self.folder is None:
            return
        path = self.folder / "checkpoints" / f"{name}.safetensors"
        weights = self.model if self.ema is None else self.ema.model
        tensors, labels = whole_states(weights.state_dict()), {**self.metadata, "step": str(self.step)}
        self.ranks.on_main(lambda: files.save_weights(path, tensors, labels))

    def save(self) -> Path | None:
        """Write a checkpoint of all ranks and the exported weights; returns the checkpoint's path."""
        if self.folder is None:
            return None
        folder, state = self.folder / "checkpoints", self.state_dict()
        path = self.ranks.on_main(lambda: files.save_checkpoint(folder, state, keep=self.config.keep))
        self._export("last")
        return path

    def state_dict(self) -> dict[str, Any]:
        """Everything a continuation depends on, as tensors and plain values; complete on rank 0."""
        return snapshot.take(self)

    def load_state_dict(self, state: dict[str, Any], origin: str = "the checkpoint") -> None:
        """Continue where `state_dict()` was taken. On several ranks each is given rank 0's state.

        Raises:
            CheckpointError: the state belongs to another model, or was made with EMA and this run has none (or the
                reverse).
        """
        snapshot.put(self, state, origin)

    def resume(self) -> Path | None:
        """Continue from the folder's newest valid checkpoint; None (and clean logs) when there is none."""
        if self.folder is None:
            raise ValueError("Trainer.resume: needs a run folder")
        found = files.load_newest(self.folder / "checkpoints", self.load_state_dict, self._warn, self.ranks)
        if found is None:
            self.log.rewind({})
        return found

    def _warn(self, text: str) -> None:
        if self.ranks.is_main:
            self.log.warn(text)


@contextmanager
def _closing(log: RunLog) -> Iterator[None]:
    try:
        yield
    finally:
        log.close()


