"""timm: `LastBatchTask` is a training task for timm's own train script, or for any loop around `timm.task`.

In `train.py`, in place of `ClassificationTask(...)` and after the loaders were made:

    task = LastBatchTask(model, LastBatchLoss(args.num_classes), device=device, dtype=model_dtype, args=args)
    loader_train = task.batches(OverlapLoader(dataset, args.batch_size, transform=..., device=device))

With `args` every option of the script that touches loss, sampling or mixing is honoured or refused. timm saves
`get_task_state()` with the model and loads it when it resumes, which it does at whole epochs.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dlb_fast.buffer import rank_and_size
from dlb_fast.data import Batch, Mix
from dlb_fast.integrations._need import need
from dlb_fast.integrations.state import check_ranks, reset, stream_of
from dlb_fast.losses import LastBatchLoss

__all__ = ["LastBatchTask"]

_INSTALL = "pip install 'dlb_fast[timm]' (timm 1.0.28 or newer)"
_tasks: Any = need("timm.task", _INSTALL)
if not hasattr(_tasks.TrainingTask, "get_task_state"):
    raise ImportError(f"dlb_fast.integrations: the tasks of this timm have no state of their own; {_INSTALL}")


_logger = logging.getLogger(__name__)

# Options of timm's script that the criterion or its batches cannot follow: name, value without effect, why.
_REFUSED: tuple[tuple[str, Any, str], ...] = (
    ("jsd_loss", False, "the loss is LastBatchLoss"),
    ("bce_loss", False, "the loss is LastBatchLoss, whose classes exclude each other"),
    ("kd_model_name", None, "the teacher is the last mini-batch"),
    ("aug_splits", 0, "a batch has two views of every sample already, in two steps"),
    ("aug_repeats", 0, "a batch has two views of every sample already, in two steps"),
    ("cutmix_minmax", None, "dlb_fast.data.Mix draws the box from cutmix alpha"),
    ("naflex_loader", False, "the batches are those of task.batches(loader)"),
    ("train_img_sizes", None, "the batches are those of task.batches(loader)"),
    ("train_batches_per_epoch", None, "an epoch is that of task.batches(loader)"),
    ("epoch_repeats", 0, "an epoch is that of task.batches(loader)"),
)


class LastBatchTask(_tasks.ClassificationTask):
    """Classification with self-distillation from the last mini-batch; compile, DDP and EMA are `ClassificationTask`'s.

    The result has the keys of timm's distillation tasks: `loss`, `output`, `task_loss` (cross entropy) and `kd_loss`
    (the last-batch term, without alpha). While the model is in eval mode the loss is plain cross entropy and the memory
    is not touched. timm's EMA averages the model only. The means of both terms are logged after every epoch and, with
    `args`, where timm's script logs its loss.

    Args:
        model: as for `ClassificationTask`.
        criterion: `LastBatchLoss`.
        device: as for `ClassificationTask`.
        dtype: as for `ClassificationTask`.
        verbose: as for `ClassificationTask`.
        args: the options of timm's script. `--smoothing` becomes the criterion's `label_smoothing`, and the task mixes
            by `--mixup`, `--cutmix`, `--mixup-prob`, `--mixup-switch-prob`, `--mixup-mode` (batch or elem) and
            `--mixup-off-epoch`: both views of a sample alike, so that the teacher saw the same mixture.

    Raises:
        TypeError: a criterion of another kind.
        ValueError: a batch that is not the last one that `batches` yielded, or was mixed after it; options that cannot
            be honoured; a loader made for other ranks or with another batch size.

    Example: ``examples/timm_digits.py``.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: LastBatchLoss,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
        args: Any = None,
    ) -> None:
        if not isinstance(criterion, LastBatchLoss):
            raise TypeError(f"LastBatchTask: criterion must be a LastBatchLoss, got {type(criterion).__name__}")
        self._mix = None if args is None else _honour(args, criterion)
        super().__init__(model, criterion, device=device, dtype=dtype, verbose=verbose)
        self._args = args
        self._batches: TaskBatches | None = None

    def batches(self, loader: Any) -> TaskBatches:
        """The loader as the `(input, target)` pairs that timm iterates over.

        The task keeps the rest of a batch (ids, number of repeated rows, second labels of mixed images) for the loss.
        Mix by `args` or with the loader's `mix`, not with timm's Mixup: both views of a sample have to be mixed alike.

        Args:
            loader: a loader of `dlb_fast.data`, or a DataLoader of `Batch` with an `OverlapBatchSampler`.
        """
        check_ranks(loader, *rank_and_size())
        rows, args = 2 * stream_of(loader).plan.rows, self._args
        if args is not None and rows != args.batch_size:
            raise ValueError(
                f"LastBatchTask.batches: the batches of {type(loader).__name__} have {rows} rows and --batch-size is "
                f"{args.batch_size}, from which timm computes the learning rate; make the loader with args.batch_size"
            )
        self._batches = TaskBatches(loader, self._mix, args, self.verbose)
        return self._batches

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """Forward pass and loss of one batch."""
        self.criterion.train(self.trainable_module.training)
        output = self.trainable_module(input)
        given = {} if self._batches is None or not self.criterion.training else self._batches.given(target)
        if self._args is not None and self._batches is None and self.criterion.training:
            raise ValueError("LastBatchTask: train on loader_train = task.batches(loader), whose batches repeat rows")
        loss = self.criterion(output, target, **given)
        parts = self.criterion.parts
        if given and self._batches is not None:
            self._batches.record(parts)
        return {"loss": loss, "output": output, "task_loss": parts.ce, "kd_loss": parts.lb}

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """The memory of the criterion and the position in the data; nothing for the EMA."""
        if ema:
            return {}
        state: dict[str, Any] = {"criterion": self.criterion.state_dict()}
        return state if self._batches is None else {**state, "loader": self._batches.stream.state_dict()}

    def load_task_state(
        self, state: dict[str, Any] | None, strict: bool = True, module: nn.Module | None = None, ema: bool = False
    ) -> None:
        """Load a state. timm saves that of rank 0, so other ranks start with an empty criterion."""
        if ema:
            return
        if not state or rank_and_size()[0] > 0:
            reset(self.criterion)
        else:
            self.criterion.load_state_dict(state["criterion"])
        if state and self._batches is not None and "loader" in state:
            self._batches.stream.load_state_dict(state["loader"])


def _honour(args: Any, criterion: LastBatchLoss) -> Mix | None:
    """Take over the options of timm's script, or say which cannot be honoured; returns how to mix."""
    for name, neutral, why in _REFUSED:
        if (value := getattr(args, name, None)) not in (None, neutral):
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"LastBatchTask: {option} {value} has no effect here, because {why}; leave it out")
    classes = getattr(args, "num_classes", None)
    if classes not in (None, criterion.num_classes):
        raise ValueError(f"LastBatchTask: --num-classes is {classes}, the criterion has {criterion.num_classes}")
    smoothing = getattr(args, "smoothing", 0.0)
    if criterion.label_smoothing not in (0, smoothing):
        raise ValueError(
            f"LastBatchTask: --smoothing is {smoothing} and criterion.label_smoothing {criterion.label_smoothing}; "
            "set one of them, or both alike"
        )
    criterion.label_smoothing = smoothing
    if not args.mixup and not args.cutmix:
        return None
    if not getattr(args, "prefetcher", True):
        raise ValueError(
            "LastBatchTask: without the prefetcher timm mixes every batch once more, with other partners, so that the "
            "teacher saw another image; leave out --no-prefetcher (the loader's batches are on the device already), or "
            "leave --mixup and --cutmix at 0 and pass mix= to the loader"
        )
    return Mix(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
    )


class TaskBatches:
    """A loader with the attributes that timm's train script uses."""

    mixup_enabled = False  # timm turns its own mixup off here

    def __init__(self, loader: Any, mix: Mix | None = None, args: Any = None, verbose: bool = False) -> None:
        self.loader = loader
        self.stream = stream_of(loader)
        self.dataset = None
        self._mix = mix
        self._mix_until = getattr(args, "mixup_off_epoch", 0) or None  # first epoch without
        self._accumulated = getattr(args, "grad_accum_steps", 1)
        self._log_interval = getattr(args, "log_interval", 0)
        self._verbose = verbose
        self._batch: Batch | None = None
        self._terms: torch.Tensor | None = None  # sums of the terms of the current epoch, and of its batches

    @property
    def batch_sampler(self) -> TaskBatches:
        """Itself: timm calls `loader.batch_sampler.set_epoch`."""
        return self

    @property
    def sampler(self) -> TaskBatches:
        """Itself: older scripts call `loader.sampler.set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Start `epoch`; nothing happens when it is the current one."""
        self.stream.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        self._terms = None
        last = len(self) - 1
        for number, batch in enumerate(self.loader):
            if not isinstance(batch, Batch):
                raise TypeError(
                    f"LastBatchTask.batches: expected a loader of Batch, got {type(batch).__name__}; give the "
                    "DataLoader an IndexedDataset and collate_fn=collate_overlap"
                )
            self._batch = batch = self._mixed(batch)
            yield batch.images, batch.targets
            update, rest = divmod(number + 1, self._accumulated)
            if number == last or (self._log_interval and not rest and (update - 1) % self._log_interval == 0):
                self._log(batch.epoch, number, last + 1)

    def record(self, parts: Any) -> None:
        """Add the terms of a batch, on the device."""
        terms = torch.stack([parts.ce, parts.lb, torch.ones_like(parts.ce)])
        self._terms = terms if self._terms is None else self._terms + terms

    def _log(self, epoch: int, number: int, batches: int) -> None:
        """Log the means since the epoch began, over all ranks."""
        if self._terms is None:
            return
        terms = self._terms.clone()
        if rank_and_size()[1] > 1:
            dist.all_reduce(terms)
        ce, lb, count = terms.tolist()
        if self._verbose:
            _logger.info(
                f"Train: {epoch} [{number + 1:>4d}/{batches}]  Cross entropy: {ce / count:#.3g}  "
                f"Last batch: {lb / count:#.3g}"
            )

    def _mixed(self, batch: Batch) -> Batch:
        """The batch mixed by timm's options; from `--mixup-off-epoch` on only rows whose teacher saw a mixture are."""
        mix, until = self._mix, self._mix_until
        if mix is None or (until is not None and (batch.epoch, batch.step) > (until, 0)):
            return batch
        plan, rank = self.stream.plan, self.stream.rank
        mixed = mix(batch, seed=plan.seed, steps_per_epoch=plan.steps_per_epoch, rank=rank)
        if until is None or batch.epoch < until or mixed.target_b is None or mixed.lam is None:
            return mixed
        old = batch.num_old
        return dataclasses.replace(
            mixed,
            images=torch.cat([mixed.images[:old], batch.images[old:]]),
            target_b=torch.cat([mixed.target_b[:old], batch.targets[old:]]),
            lam=torch.cat([mixed.lam[:old], torch.ones_like(mixed.lam[old:])]),
        )

    def given(self, target: torch.Tensor) -> dict[str, Any]:
        """The further arguments of the criterion for the current batch."""
        batch = self._batch
        if batch is None or len(target) != len(batch):
            rows = None if batch is None else len(batch)
            raise ValueError(
                f"LastBatchTask: got a target of {len(target)} rows, expected {rows}, the rows of the last batch of "
                "task.batches(loader); train on what it yields, one forward per batch"
            )
        if target.shape != batch.targets.shape or target.dtype != batch.targets.dtype:
            raise ValueError(
                f"LastBatchTask: got a target {tuple(target.shape)} of {target.dtype}, expected the "
                f"{tuple(batch.targets.shape)} labels of the last batch; it was mixed after task.batches(loader) "
                "yielded it, so the teacher of a row saw another image. Leave timm's Mixup out: pass args= to the "
                "task, or mix= to the loader"
            )
        device = target.device
        given: dict[str, Any] = {"ids": batch.ids.to(device), "num_old": batch.num_old}
        if batch.target_b is not None and batch.lam is not None:
            given |= {"target_b": batch.target_b.to(device), "lam": batch.lam.to(device)}
        return given
