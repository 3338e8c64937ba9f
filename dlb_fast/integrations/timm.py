"""timm: its own train script with the last mini-batch, and `LastBatchTask` for any loop around `timm.task`.

    python -m dlb_fast.integrations.timm train.py DATA --model resnet50 ARGS... [--dlb-alpha 1] [--dlb-temperature 3]

runs timm's `train.py` (of timm's repository; the package does not contain it) as it is. Two of its names are replaced:
`create_loader`, so that the batches of the training set repeat rows, with timm's datasets, workers, augmentation and
prefetcher; and `ClassificationTask`, by `LastBatchTask`. Every option of the script that touches loss, sampling or
mixing is honoured or refused. timm saves `get_task_state()` with the model and loads it when it resumes, which it does
at whole epochs.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from dlb_fast.buffer import rank_and_size
from dlb_fast.data import Batch, IndexedDataset, Mix, OverlapBatchSampler, collate_overlap
from dlb_fast.integrations._need import need
from dlb_fast.integrations.state import check_ranks, reset, stream_of
from dlb_fast.losses import LastBatchLoss

__all__ = ["LastBatchTask", "main"]

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
    ("resplit", False, "it belongs to --aug-splits; alone it would erase new rows only, not their second view"),
    ("multi_label", False, "LastBatchLoss needs one class per image"),
    ("cutmix_minmax", None, "dlb_fast.data.Mix draws the box from cutmix alpha"),
    ("naflex_loader", False, "the batches are those of task.batches(loader)"),
    ("train_img_sizes", None, "the batches are those of task.batches(loader)"),
    ("train_batches_per_epoch", None, "an epoch is that of task.batches(loader)"),
    ("epoch_repeats", 0, "an epoch is that of task.batches(loader)"),
    ("use_multi_epochs_loader", False, "it draws batches of the next epoch before the epoch is set"),
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

    Example: ``examples/timm_images.py``.
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

    def prepare_distributed(self, device_ids: list[Any] | None = None, **options: Any) -> Any:
        """As `ClassificationTask`, also on the CPU, where DistributedDataParallel takes no device ids."""
        return super().prepare_distributed(None if self.device.type == "cpu" else device_ids, **options)

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


def _refuse(args: Any) -> None:
    """Say which options of timm's script cannot be honoured."""
    for name, neutral, why in _REFUSED:
        if (value := getattr(args, name, None)) not in (None, neutral):
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"LastBatchTask: {option} {value} has no effect here, because {why}; leave it out")


def _honour(args: Any, criterion: LastBatchLoss) -> Mix | None:
    """Take over the options of timm's script, or say which cannot be honoured; returns how to mix."""
    _refuse(args)
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
            "teacher saw another image; leave out --no-prefetcher, or leave --mixup and --cutmix at 0"
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
            if isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[1], Batch):
                batch = dataclasses.replace(batch[1], images=batch[0])  # `_WithIds`, perhaps through timm's prefetcher
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


class _WithIds:
    """A collate function of `(image, target)` for `IndexedDataset`: `(images, Batch without images)`.

    timm's prefetcher moves both to the device, normalises and erases the images, and is one batch ahead of the loop.
    """

    def __init__(self, collate: Any) -> None:
        self.collate = collate

    def __call__(self, items: list[tuple[Any, Any, int]]) -> tuple[torch.Tensor, Batch]:
        images, _ = self.collate([(image, target) for image, target, _ in items])
        return images, collate_overlap([(torch.empty(0), target, index) for _, target, index in items])


class _Script:
    """timm's train script with `LastBatchTask` and overlapping batches.

    Args:
        path: the script.
    """

    needed = ("main", "parser", "create_loader", "ClassificationTask")

    def __init__(self, path: str) -> None:
        where = "timm's train.py is in its repository (github.com/huggingface/pytorch-image-models, at the tag of the "
        where += "installed timm), not in its package"
        if not Path(path).is_file():
            raise FileNotFoundError(f"dlb_fast.integrations.timm: {path} is not a file; {where}")
        spec = importlib.util.spec_from_file_location("timm_train", path)
        if spec is None or spec.loader is None:
            raise ValueError(f"dlb_fast.integrations.timm: {path} is not a Python file; {where}")
        self.script: Any = importlib.util.module_from_spec(spec)
        sys.path.insert(0, str(Path(path).resolve().parent))
        spec.loader.exec_module(self.script)
        if missing := [name for name in self.needed if not hasattr(self.script, name)]:
            raise ValueError(
                f"dlb_fast.integrations.timm: {path} has no {', '.join(missing)}, which this takes over; {where}. In a "
                "loop of your own use LastBatchTask"
            )
        self.path = path
        self.args: Any = None
        self.criterion: Any = None
        self.batches: Any = None
        self._create_loader = self.script.create_loader

    def run(self, arguments: Sequence[str]) -> None:
        """`main()` of the script."""
        script = self.script
        group = script.parser.add_argument_group("Self-distillation from the last mini-batch (dlb_fast)")
        group.add_argument("--dlb-alpha", type=float, default=1.0, help="weight of the last-batch term (default: 1)")
        group.add_argument("--dlb-temperature", type=float, default=3.0, help="its temperature (default: 3)")
        parse = script.parser.parse_args

        def parse_args(*given: Any, **options: Any) -> Any:
            self.args = parse(*given, **options)
            _refuse(self.args)
            return self.args

        script.parser.parse_args = parse_args
        script.create_loader, script.ClassificationTask = self.create_loader, self.create_task
        sys.argv = [self.path, *arguments]
        script.main()

    def create_loader(self, dataset: Any, *given: Any, **options: Any) -> Any:
        """timm's loader; that of the training set has an `OverlapBatchSampler`, and mixes as the task does."""
        if not options.get("is_training", False):
            return self._create_loader(dataset, *given, **options)
        name, args = "dlb_fast.integrations.timm", self.args
        if isinstance(dataset, IterableDataset):
            raise TypeError(
                f"{name}: --dataset {getattr(args, 'dataset', '')} ({type(dataset).__name__}) is read in its own "
                "order, so no row can be repeated; use a folder, a tar file or another dataset with items by index"
            )
        collate = options.pop("collate_fn", None)
        if collate is not None and not hasattr(collate, "mixup_enabled"):
            raise TypeError(f"{name}: cannot use collate_fn {collate!r} of the script; leave it out")
        # Without ranks: the sampler below knows them.
        loader = self._create_loader(dataset, *given, **{**options, "distributed": False})
        inner = getattr(loader, "loader", loader)  # of the prefetcher
        sampler = OverlapBatchSampler(inner.dataset, args.batch_size, seed=args.seed)
        overlapping: DataLoader[Any] = DataLoader(
            IndexedDataset(inner.dataset),
            batch_sampler=sampler,
            collate_fn=_WithIds(inner.collate_fn),
            num_workers=inner.num_workers,
            pin_memory=inner.pin_memory,
            worker_init_fn=inner.worker_init_fn,
            persistent_workers=inner.persistent_workers,
        )
        if inner is loader:
            loader = overlapping
        else:
            loader.loader = overlapping
        self.criterion = LastBatchLoss(args.num_classes, alpha=args.dlb_alpha, temperature=args.dlb_temperature)
        first = rank_and_size()[0] == 0
        self.batches = TaskBatches(loader, _honour(args, self.criterion), args, first)
        if first:
            _logger.info(
                f"dlb_fast: {len(dataset)} training images; of the {args.batch_size} rows of a batch half repeat the "
                f"batch before, so an epoch has {len(sampler)} batches and shows every image twice. {self.criterion}"
            )
        return self.batches

    def create_task(
        self, model: nn.Module, criterion: Any = None, criterion_kwargs: Any = None, **options: Any
    ) -> LastBatchTask:
        """`LastBatchTask` in place of `ClassificationTask`; its loss replaces cross entropy only."""
        if criterion is None:
            criterion = need("timm.loss", _INSTALL).create_classification_loss(**(criterion_kwargs or {}))
        if type(criterion).__name__ not in _CROSS_ENTROPIES or getattr(criterion, "weight", None) is not None:
            raise ValueError(
                f"dlb_fast.integrations.timm: the loss that the options ask for is {criterion}, and LastBatchLoss "
                "replaces the unweighted cross entropy only; leave out what chooses it"
            )
        task = LastBatchTask(model, self.criterion, args=self.args, **options)
        task._batches = self.batches
        return task


_CROSS_ENTROPIES = ("CrossEntropyLoss", "LabelSmoothingCrossEntropy", "SoftTargetCrossEntropy")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run timm's train script: `python -m dlb_fast.integrations.timm TRAIN.PY ARGS...`, also under torchrun.

    Args:
        arguments: path of the script and its arguments; None takes those of the command line.

    Raises:
        FileNotFoundError: no such script.
        ValueError: a script without the names that are replaced, or an option that cannot be honoured.
        TypeError: a dataset that is read in its own order.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0].startswith("-"):
        raise SystemExit(
            "usage: python -m dlb_fast.integrations.timm TRAIN.PY ARGS... (timm's train.py and its arguments; "
            "TRAIN.PY --help lists them)"
        )
    try:
        _Script(given[0]).run(given[1:])
    except (FileNotFoundError, ValueError, TypeError) as error:
        if str(error).startswith(("dlb_fast.", "LastBatch", "OverlapBatchSampler: ", "OverlapPlan: ", "Mix: ")):
            raise SystemExit(f"error: {error}") from error
        raise


if __name__ == "__main__":
    from dlb_fast.integrations.timm import main as run  # not this copy of the module, whose classes nobody imports

    run()
