"""The training loop. `Trainer.fit()` reads from top to bottom: batch, forward, backward, step, log, evaluate, save."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from dlb_fast.data import Batch

from . import checkpoint
from .config import TrainConfig
from .distributed import (
    Ranks,
    broadcast_buffers,
    broadcast_weights,
    distributed_mode,
    full_state,
    gradient_sync,
    reshard,
    wrap,
)
from .log import RunLog
from .optim import Ema

__all__ = [
    "FORWARDS",
    "MetricAverager",
    "Trainer",
    "TrainingDiverged",
    "accepted_inputs",
    "total_steps",
    "training_loss",
]


class TrainingDiverged(RuntimeError):
    """The loss is not finite; the last checkpoint, saved before, is kept."""


class Trainer:
    """Trains a model with a criterion that may remember the last mini-batch.

    Args:
        model: maps images to logits `(n, C)`, on the device of the training. On several ranks pass the bare network;
            the trainer wraps or shards it (`config.distributed`) and updates the optimiser's parameters.
        criterion: called as `criterion(logits, targets)`, with those of `ids`, `num_old`, `images`, `epoch`, `target_b`
            and `lam` that its `forward` accepts. If it has them, `setup(model)` is called once and `step()` after every
            optimiser step.
        optimizer: optimiser of the model's parameters.
        loader: any iterable of `Batch`; one pass is an epoch. With `state_dict` and `load_state_dict` it resumes
            exactly; without, a resume skips the batches of the epoch so far, which is exact for a fixed sequence.
        scheduler: stepped once per optimiser step; None keeps the learning rates.
        evaluate: `model -> {"top1": ..., ...}`, called every `eval_every` steps; its values are logged as `test_*`,
            those named `train_*` as they are.
        folder: run folder for metrics and checkpoints; None writes nothing.
        config: length, precision and output of the training.
        log: console, metric files and trackers of rank 0; by default made from `folder` and `config`.
        ranks: this process and its group; by default those of the torch.distributed group, if there is one.
        metadata: written into exported weights.
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
        self.distributed = distributed_mode(config, ranks, criterion, self.device)
        if config.sync_bn:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.model, self.criterion, self.optimizer, self.scheduler = model, criterion, optimizer, scheduler
        self.loader, self.evaluate = loader, evaluate
        if config.patience is not None and evaluate is None:
            raise ValueError("Trainer: patience needs an evaluation; give evaluate")
        self.folder = None if folder is None else Path(folder)
        if not ranks.is_main:
            log = RunLog(quiet=True)
        self.log = log or RunLog(self.folder, trackers=config.trackers, config=dataclasses.asdict(config))
        self.metadata = dict(metadata or {})
        self.total_steps = total_steps(loader, config)
        self.eval_every = config.eval_every or max(1, _length(loader) // config.accumulate)
        self.checkpoint_every = config.checkpoint_every or self.eval_every
        broadcast_weights(model, ranks)
        self.ema = None if config.ema is None else Ema(model, config.ema)
        self.wrapped = wrap(model, optimizer, None if self.ema is None else self.ema.model, self.distributed)
        self.network = self.wrapped
        if config.compile:  # static shapes, because there are two batch sizes only: the first batch is half as large
            self.network = torch.compile(self.wrapped, dynamic=False)  # type: ignore[assignment]
        self.autocast: Any = None
        if config.amp != "none":
            dtype = torch.bfloat16 if config.amp == "bf16" else torch.float16
            self.autocast = torch.autocast(self.device.type, dtype=dtype)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "fp16")
        self.inputs = accepted_inputs(criterion)
        if hasattr(criterion, "setup"):
            criterion.setup(model)  # type: ignore[operator]
        self.criterion_step: Callable[[], None] | None = getattr(criterion, "step", None)

        self.step = 0  # optimiser steps done
        self.epoch = 0  # passes of the loader finished
        self.in_epoch = 0  # batches delivered of the current pass
        self.images_seen = 0  # rows through the network on all ranks, including repeated ones
        self.seconds = 0.0  # training time up to the last evaluation, without evaluations and checkpoints
        self.best: dict[str, float] = {}  # {"step", "top1"} of the best evaluation
        self.stale = 0  # evaluations since then
        self.last: dict[str, Any] = {}  # the last row of metrics
        self.stop = StopSignals(ranks)
        self.stopped_by: str | None = None
        self.metrics = MetricAverager(self.device)  # since the last evaluation

    def fit(self) -> dict[str, Any]:
        """Train to the end, or until patience ends or SIGTERM, SIGINT or SIGUSR1 comes; then save a checkpoint.

        Returns:
            The last row of metrics, with `best_top1`, `best_step`, `stopped_by` (None, "patience" or the name of the
            signal) and `finished` (whether all steps are done, or patience has ended).

        Raises:
            TrainingDiverged: the loss of any rank is not finite at a log point, or a weight at a checkpoint.
            CheckpointError: the disk is full or not writable; the last good checkpoint is kept.
            RankError: another rank ended; its own message says why.
        """
        config, log, stop = self.config, self.log, self.stop
        if self.folder is not None and self.ranks.is_main:
            (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        log.start(step=self.step, total=self.total_steps, per_epoch=_length(self.loader) / config.accumulate)
        self.model.train()
        self.criterion.train()
        self.optimizer.zero_grad(set_to_none=True)
        syncs_gradients = self.distributed != "none"
        batches = self._batches()
        with stop.caught(), contextlib.closing(log), self.ranks.explain_lost_connection():
            while True:
                last = self.step >= self.total_steps
                if stop.signal or self.ranks.world_size > 1:
                    self.stopped_by = stop.agreed(now=last)
                if self.out_of_patience and not (last or self.stopped_by):
                    self.stopped_by = "patience"  # on all ranks, which have the same scores
                if last or self.stopped_by:
                    break

                started = time.perf_counter()
                for micro_step in range(1, config.accumulate + 1):
                    batch = next(batches)
                    if syncs_gradients:  # reduce the gradients in the last backward of the step only
                        with gradient_sync(self.wrapped, micro_step == config.accumulate):
                            self.forward_backward(batch)
                    else:
                        self.forward_backward(batch)
                self.optimizer_step()
                self.step += 1

                last = self.step == self.total_steps
                log_due = last or self.step % config.log_every == 0
                eval_due = last or self.step % self.eval_every == 0
                save_due = last or self.step % self.checkpoint_every == 0
                if log_due or eval_due:
                    self.check_finite()
                self.metrics.seconds += time.perf_counter() - started
                if log_due:
                    log.progress(self._row())
                if log_due or log.bar is not None:
                    log.tick(self.step)
                if eval_due:
                    self._evaluate()
                if save_due:
                    self.check_finite()
                    self.save()

            if self.stopped_by and self.step % self.checkpoint_every and self.step < self.total_steps:
                self.check_finite()
                self.save()
        return {
            **(self.last or self._row()),
            "best_top1": self.best.get("top1"),
            "best_step": self.best.get("step"),
            "stopped_by": self.stopped_by,
            "finished": self.step >= self.total_steps or self.out_of_patience,
        }

    @property
    def out_of_patience(self) -> bool:
        """Whether the last `patience` evaluations brought no better top-1."""
        return self.config.patience is not None and self.stale >= self.config.patience

    def forward_backward(self, batch: Batch) -> None:
        """Forward and backward of one batch; adds its loss to the metrics."""
        if batch.images.device != self.device:
            batch = batch.to(self.device, non_blocking=True)
        if self.config.channels_last:
            batch.images = batch.images.contiguous(memory_format=torch.channels_last)
        loss = training_loss(
            self.network,
            self.criterion,
            batch,
            forward=self.config.forward,
            autocast=self.autocast,
            inputs=self.inputs,
        )
        self.scaler.scale(loss / self.config.accumulate if self.config.accumulate > 1 else loss).backward()
        rows = len(batch.targets)
        self.images_seen += rows * self.ranks.world_size
        # `parts.correct` counts half of the rows with CS-KD
        self.metrics.add(loss, getattr(self.criterion, "parts", None), getattr(self.criterion, "counted", None) or rows)

    def optimizer_step(self) -> None:
        """Clip the gradient; step the optimiser, the scheduler, the EMA and the criterion."""
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
        if self.criterion_step is not None:
            self.criterion_step()

    def check_finite(self) -> None:
        """Raise TrainingDiverged if a loss since the last evaluation is not finite on any rank; synchronises.

        Called before every checkpoint too, so that no checkpoint has NaN weights.
        """
        if not self.config.nan_check or self.metrics.reduced(self.ranks).is_finite():
            return
        self._diverged("the loss became NaN or infinite")

    def _diverged(self, what: str) -> NoReturn:
        kept = "there is no checkpoint yet"
        if self.folder is not None and (found := checkpoint.list_checkpoints(self.folder / "checkpoints")):
            kept = f"the last good checkpoint is {found[0]}"
        raise TrainingDiverged(
            f"{what} by step {self.step} (epoch {self.epoch}); {kept}. "
            f"Lower the learning rate, clip the gradient (--clip-grad) or look for broken inputs; "
            f"--no-nan-check turns this check off"
        )

    def _check_weights(self, state: dict[str, Any]) -> None:
        """Raise TrainingDiverged if a weight is not finite: the gradient may be NaN where the loss is finite."""
        if self.config.nan_check and (name := checkpoint.not_finite(state)) is not None:
            self._diverged(f"{name} became NaN or infinite")

    def save(self) -> Path | None:
        """Write a checkpoint of all ranks and the weights; returns the path of the checkpoint."""
        if self.folder is None:
            return None
        folder, state = self.folder / "checkpoints", self.state_dict()
        self.ranks.run_on_main(lambda: self._check_weights(state))
        path = self.ranks.run_on_main(lambda: checkpoint.save_checkpoint(folder, state, keep=self.config.keep))
        self._export("last")
        return path

    def state_dict(self) -> dict[str, Any]:
        """The state of the training, as tensors and plain values; complete on rank 0 only."""
        return checkpoint.trainer_state(self)

    def load_state_dict(self, state: dict[str, Any], origin: str = "the checkpoint") -> None:
        """Continue from `state_dict()`. Every rank passes the state of rank 0.

        Raises:
            CheckpointError: the state belongs to another model, or only one of the state and this run has an EMA.
        """
        checkpoint.load_trainer_state(self, state, origin)

    def resume(self) -> Path | None:
        """Continue from the newest valid checkpoint of the folder; without one return None and clear the logs.

        Writes the exported weights of that state, because the process may have ended between checkpoint and export.
        """
        if self.folder is None:
            raise ValueError("Trainer.resume: needs a run folder")

        def warn(text: str) -> None:
            if self.ranks.is_main:
                self.log.warn(text)

        found = checkpoint.load_newest(self.folder / "checkpoints", self.load_state_dict, warn, self.ranks)
        if found is None:
            self.log.rewind({})
        else:
            self._export_again(warn)
        return found

    def _export_again(self, warn: Callable[[str], None]) -> None:
        """Write `last`, and `best` if this state is the best; forget a best whose weights are not in the folder."""
        assert self.folder is not None
        self._export("last")
        if not self.best:
            return
        if self.best["step"] == self.step:
            self._export("best")
            return
        path = self.folder / "checkpoints" / "best.safetensors"
        step = self.ranks.run_on_main(lambda: checkpoint.step_of_weights(path))
        if step != self.best["step"]:
            why = "is missing or damaged" if step is None else f"has the weights of step {step}"
            warn(
                f"{path} {why}, not those of step {self.best['step']}, the best at step {self.step}; the next "
                f"evaluation writes it"
            )
            self.best, self.stale = {}, 0

    def _batches(self) -> Iterator[Batch]:
        """Yields batches epoch after epoch, without end, and measures the waiting time."""
        length = _length(self.loader)
        empty = 0
        while empty < 2:  # a pass resumed at its end is empty; two empty passes mean that the loader is exhausted
            batches = iter(self.loader)
            if self.in_epoch and not hasattr(self.loader, "load_state_dict"):
                batches = islice(batches, self.in_epoch, None)
            empty += 1
            while True:
                started = time.perf_counter()
                batch = next(batches, None)
                self.metrics.waited += time.perf_counter() - started
                if batch is None:
                    break
                empty = 0
                self.in_epoch += 1
                if self.in_epoch == length:  # counted at the last batch, so that a checkpoint there has epoch + 1
                    self.epoch, self.in_epoch = self.epoch + 1, 0
                yield batch
            if self.in_epoch:
                self.epoch, self.in_epoch = self.epoch + 1, 0
        raise ValueError(
            f"Trainer: the loader has no more batches at step {self.step} of {self.total_steps}; "
            f"is it an exhausted generator, or is the dataset smaller than a batch?"
        )

    def _evaluate(self) -> None:
        """Evaluate, log a row of metrics, and write the weights if they are the best so far."""
        row = self._row()
        if self.evaluate is not None:
            weights = self.model if self.ema is None else self.ema.model
            broadcast_buffers(weights, self.ranks)
            scores = self.ranks.broadcast(dict(self.evaluate(weights)))
            reshard(weights)
            if (confusion := scores.pop("confusion", None)) is not None and self.ranks.is_main:
                self.log.confusion({"step": self.step, "classes": self.metadata.get("classes"), "pairs": confusion})
            row |= {name if name.startswith("train_") else f"test_{name}": v for name, v in scores.items()}
            self.model.train()
            self.stale += 1
            if scores.get("top1", -1.0) > self.best.get("top1", -1.0):
                self.best, self.stale = {"top1": scores["top1"], "step": self.step}, 0
                self._export("best")
        self.last = row
        self.log.result(row)
        self.seconds += self.metrics.seconds
        self.metrics = MetricAverager(self.device)

    def _row(self) -> dict[str, Any]:
        epoch = self.epoch + self.in_epoch / max(1, _length(self.loader))
        lr = self.optimizer.param_groups[0]["lr"]
        seen = {"step": self.step, "epoch": round(epoch, 4), "images_seen": self.images_seen, "lr": lr}
        metrics = self.metrics.reduced(self.ranks)
        return {**seen, **metrics.means(), "seconds": round(self.seconds + metrics.seconds, 3)}

    def _export(self, name: str) -> None:
        """Write the evaluated weights (the EMA's, if there is one) as safetensors."""
        if self.folder is None:
            return
        path = self.folder / "checkpoints" / f"{name}.safetensors"
        weights = self.model if self.ema is None else self.ema.model
        tensors, metadata = full_state(weights.state_dict()), {**self.metadata, "step": str(self.step)}
        self.ranks.run_on_main(lambda: self._check_weights({"model": tensors}))
        self.ranks.run_on_main(lambda: checkpoint.save_weights(path, tensors, metadata))


def joint(model: nn.Module, batch: Batch) -> Tensor:
    """Logits `(n, C)` of one forward over all rows (the paper): both halves share their BatchNorm statistics."""
    return model(batch.images)


def two_pass(model: nn.Module, batch: Batch) -> Tensor:
    """Logits `(n, C)` in the order `[repeated | new]` from two forwards, first of the new rows.

    As in the official code (Meta-knowledge-Lab/DLB@8949a46 `dlb.py`): BatchNorm normalises each half with its own
    statistics and updates the running statistics twice. Without BatchNorm and dropout it equals `joint`.
    """
    new_logits = model(batch.new)
    if not batch.has_old:
        return new_logits
    old_logits = model(batch.old)
    return torch.cat((old_logits, new_logits))


def partners(model: nn.Module, batch: Batch) -> Tensor:
    """Logits `(n, C)` of rows `[anchors | partners]` from two forwards: the partners without gradient, in train mode.

    As in the official code of CS-KD (alinlab/cs-kd `train.py`), BatchNorm sees the anchors first, then the partners.
    """
    half = len(batch) // 2
    anchors = model(batch.images[:half])
    with torch.no_grad():
        others = model(batch.images[half:])
    return torch.cat((anchors, others))


FORWARDS: dict[str, Callable[[nn.Module, Batch], Tensor]] = {
    "joint": joint,
    "two_pass": two_pass,
    "partners": partners,
}


def accepted_inputs(criterion: nn.Module) -> frozenset[str]:
    """The fields of a batch that the criterion's `forward` accepts; `nn.CrossEntropyLoss` accepts none."""
    fields = {"ids", "num_old", "images", "epoch", "target_b", "lam"}
    return frozenset(inspect.signature(criterion.forward).parameters) & fields


def training_loss(
    model: nn.Module,
    criterion: nn.Module,
    batch: Batch,
    *,
    forward: str = "joint",
    autocast: AbstractContextManager[Any] | None = None,
    inputs: frozenset[str] | None = None,
) -> Tensor:
    """The loss of one batch `[repeated rows | new rows]`; the criterion may store the new rows.

    With DLB `loss = CE over all rows + alpha * tau^2 * KL(logits one step ago || logits)` over the repeated rows.

    Args:
        model: maps images `(n, ch, h, w)` to logits `(n, C)`.
        criterion: called as `criterion(logits, targets)`, with those of `ids`, `num_old`, `images`, `epoch`, `target_b`
            and `lam` that its `forward` accepts. Without `lam` it gets dense targets `(n, C)` for mixed images.
        batch: rows `[repeated | new]`.
        forward: a name in `FORWARDS`.
        autocast: context manager for the network's forward; the loss runs outside it and computes in float32.
        inputs: `accepted_inputs(criterion)`; None computes it.

    Returns:
        The 0-d loss.

    Raises:
        ValueError: unknown forward.
    """
    if forward not in FORWARDS:
        raise ValueError(f"training_loss: forward must be one of {', '.join(FORWARDS)}, got {forward!r}")
    if autocast is None:
        logits = FORWARDS[forward](model, batch)
    else:
        with autocast:
            logits = FORWARDS[forward](model, batch)
    if inputs is None:
        inputs = accepted_inputs(criterion)
    target, options = batch.targets, dict[str, Any]()
    if batch.lam is not None:
        target, options = mixed_targets(batch, "lam" in inputs, logits)
    for name in inputs - {"target_b", "lam"}:
        options[name] = getattr(batch, name)
    return criterion(logits, target, **options)


def mixed_targets(batch: Batch, pairs: bool, logits: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Targets of mixed images: `(target, {"target_b": ..., "lam": ...})` with `pairs`, else `(dense (n, C), {})`.

    The class with the larger weight becomes `target`, because `parts.correct` (train_top1) counts that one.
    """
    own, other, share = batch.targets, batch.target_b, batch.lam
    assert other is not None and share is not None
    if pairs:
        swapped = share < 0.5
        first, second = torch.where(swapped, other, own), torch.where(swapped, own, other)
        return first, {"target_b": second, "lam": torch.where(swapped, 1 - share, share)}
    dense = torch.zeros_like(logits, dtype=torch.promote_types(logits.dtype, torch.float32))
    share = share.to(dense.dtype)
    dense.scatter_add_(1, own[:, None], share[:, None])
    return dense.scatter_add_(1, other[:, None], 1 - share[:, None]), {}


class MetricAverager:
    """Means over the batches since the last evaluation. The sums stay on the device, so `add` does not synchronise.

    Attributes:
        sums: (4,) float64 sums of loss, ce, lb and correct.
        batches: number of batches.
        rows: number of rows that `correct` counts.
        with_parts: number of batches whose criterion has `parts`.
        waited: seconds spent waiting for batches.
        seconds: seconds of training.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)
        self.batches = self.rows = self.with_parts = 0
        self.waited = self.seconds = 0.0

    def add(self, loss: Tensor, parts: Any, rows: int) -> None:
        """Add one batch: `parts` with loss, ce, lb and correct, or only the loss if `parts` is None."""
        if parts is None:
            self.sums[0] += loss.detach()
        else:
            values = (parts.loss.double(), parts.ce.double(), parts.lb.double(), parts.correct.double())
            self.sums += torch.stack(values)
            self.with_parts += 1
        self.batches += 1
        self.rows += rows

    def reduced(self, ranks: Ranks) -> MetricAverager:
        """The sums over all ranks, with their mean times; a collective that synchronises."""
        if ranks.world_size == 1:
            return self
        counts = [self.batches, self.rows, self.with_parts, self.waited, self.seconds]
        *sums, batches, rows, with_parts, waited, seconds = ranks.sum([*self.sums.tolist(), *counts])
        reduced = MetricAverager(torch.device("cpu"))
        reduced.sums = torch.tensor(sums, dtype=torch.float64)
        reduced.batches, reduced.rows, reduced.with_parts = int(batches), int(rows), int(with_parts)
        reduced.waited, reduced.seconds = waited / ranks.world_size, seconds / ranks.world_size
        return reduced

    def is_finite(self) -> bool:
        """Whether every sum is finite; synchronises."""
        return bool(self.sums.isfinite().all())

    def means(self) -> dict[str, Any]:
        """A row of metrics; None for unknown ones."""
        if not self.batches:
            return dict.fromkeys(("loss", "ce", "lb", "train_top1", "images_per_second", "data_wait"))
        loss, ce, lb, correct = self.sums.tolist()
        known = bool(self.with_parts)
        return {
            "loss": loss / self.batches,
            "ce": ce / self.batches if known else None,
            "lb": lb / self.batches if known else None,
            "train_top1": correct / self.rows if known else None,
            "images_per_second": self.rows / self.seconds if self.seconds else None,
            "data_wait": self.waited / self.seconds if self.seconds else None,
        }

    def state_dict(self) -> dict[str, Any]:
        """The sums and counts, for a checkpoint between two evaluations."""
        return {**vars(self), "sums": self.sums.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        vars(self).update(state)
        self.sums = state["sums"].to(self.sums.device)


# SLURM sends SIGUSR1 (`--signal=USR1@120`), which Windows does not have.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]
VOTE_SECONDS = 0.5  # aimed time between two votes on stopping
VOTE_STEPS = 256  # most steps between two votes


class StopSignals:
    """SIGTERM, SIGINT and SIGUSR1 end the run after the current step; a second SIGINT ends it at once.

    A second SIGTERM or SIGUSR1 changes nothing, because a scheduler sends one to every process and the launcher sends
    it to the ranks again. Forked workers of a loader inherit this and work on: the step that is to end needs them.

    A single process checks `signal`. Several ranks vote about twice a second: they reduce the signal numbers and the
    seconds per step, so that all stop at the same step and agree on the step of the next vote.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.signal = 0  # number of the signal that this process got
        self._interval = self._left = 1  # steps
        self._voted = time.perf_counter()

    def agreed(self, *, now: bool = False) -> str | None:
        """The name of the signal that ends the run, or None. All ranks call this before every step.

        `now`, the same on all ranks, votes at once.
        """
        number = self.signal
        if self.ranks.world_size > 1:
            self._left -= 1
            if self._left > 0 and not now:
                return None
            clock = time.perf_counter()
            agreed, pace = self.ranks.max([number, (clock - self._voted) / self._interval])
            number, self._voted = int(agreed), clock
            steps = min(int(VOTE_SECONDS / max(pace, 1e-6)), 2 * self._interval, VOTE_STEPS)
            self._interval = self._left = max(1, steps)
        return signal.Signals(number).name if number else None

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """Record the first signal within this block; the previous handlers are restored."""
        if threading.current_thread() is not threading.main_thread():
            yield  # Python delivers signals to the main thread only
            return
        before: dict[int, Any] = {}

        def record(number: int, frame: Any) -> None:
            self.signal = number
            if number == signal.SIGINT:
                signal.signal(number, before[number])

        for wanted in STOP_SIGNALS:
            before[wanted] = signal.signal(wanted, record)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def total_steps(loader: Any, config: TrainConfig) -> int:
    """Optimiser steps of a run: `max_steps`, or the epochs' batches over the accumulation."""
    if config.max_steps is not None:
        return config.max_steps
    length = _length(loader)
    if not length:
        raise ValueError("Trainer: the loader has no length; give max_steps")
    return max(1, config.epochs * length // config.accumulate)


def _length(loader: Any) -> int:
    """Batches per epoch, or 0 if the loader has no length."""
    try:
        return len(loader)
    except TypeError:
        return 0
