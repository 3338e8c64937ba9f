"""Hugging Face `Trainer`: `LastBatchTrainer` trains with our loss and loader, and its checkpoints resume exactly.

The criterion stays outside the model, so saved models are the model alone. Evaluation is plain cross entropy. What a
checkpoint folder gets from us is one small file per rank, `dlb_fast_RANK.pt`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from dlb_fast.data import Batch, OverlapBatchSampler, SampleIndex, TrackedLoader
from dlb_fast.functional import fused_lb_loss
from dlb_fast.integrations._need import need
from dlb_fast.integrations.state import check_ranks, forget, stateful
from dlb_fast.losses import LastBatchLoss

__all__ = ["LastBatchCallback", "LastBatchTrainer", "as_dataloader"]

_hf: Any = need("transformers", "pip install 'dlb_fast[hf]'")
_EXTRA = ("ids", "num_old")


class LastBatchTrainer(_hf.Trainer):
    """`transformers.Trainer` with self-distillation from the last mini-batch.

    `per_device_train_batch_size` is the rows the model sees, so it must be even; an epoch has twice the usual number of
    steps. Gradient accumulation keeps the cross entropy of the whole accumulated batch
    (by `num_items_in_batch`, unless class weights are set) and averages the last-batch terms of its micro-batches, each
    taught by the micro-batch before.

    Args:
        criterion: `LastBatchLoss`.
        train_loader: one of our loaders, made for `args.device` or moved there by the Trainer; None builds a DataLoader
            with an `OverlapBatchSampler` from `train_dataset`, `data_collator` and `args`.
        image_key: the model's argument for images, used with loaders that yield `Batch`.
        everything else: as for `Trainer`. `labels` are what the model would get under `args.label_names`.

    Raises:
        TypeError: a criterion or a loader of another kind. ValueError: an odd batch size, a loader made for other
            ranks, a checkpoint saved with other data or options.

    Example: ``examples/hf_digits.py``.
    """

    def __init__(
        self,
        *args: Any,
        criterion: LastBatchLoss,
        train_loader: Any = None,
        image_key: str = "pixel_values",
        **options: Any,
    ) -> None:
        if not isinstance(criterion, LastBatchLoss):
            raise TypeError(f"LastBatchTrainer: criterion must be a LastBatchLoss, got {type(criterion).__name__}")
        super().__init__(*args, **options)
        self.criterion = criterion.to(self.args.device)
        self.train_loader = None if train_loader is None else stateful(train_loader)
        self.image_key = image_key
        # The Trainer finds their names in the model's forward, which needs no labels here.
        self.label_names: list[str] = list(getattr(self, "label_names", [])) or ["labels"]
        # The Trainer then counts the items of an accumulated batch and leaves the scale of the loss to us.
        self.model_accepts_loss_kwargs = True
        self.memory = LastBatchCallback(self.criterion)
        self.add_callback(self.memory)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Our batches behind the face of a DataLoader; not prepared, since the sampler knows its rank."""
        loader = self._overlapping() if self.train_loader is None else self.train_loader
        check_ranks(loader, self.args.process_index, self.args.world_size)
        self.memory.loader = loader
        return as_dataloader(loader, self.image_key)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **options: Any) -> Any:
        """As `Trainer.train`; a resumed run gets criterion and position back."""
        folder = resume_from_checkpoint
        if folder is True:
            folder = need("transformers.trainer_utils", "").get_last_checkpoint(self.args.output_dir)
        self.memory.folder = Path(folder) if folder else None
        return super().train(resume_from_checkpoint, *args, **options)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The criterion's loss in training, plain cross entropy in evaluation."""
        labels = inputs[self.label_names[0]]
        dropped = (*_EXTRA, *self.label_names)
        outputs = model(**{name: value for name, value in inputs.items() if name not in dropped})
        logits = _logits(outputs)
        if model.training:
            loss = self._training_loss(logits, labels, inputs, num_items_in_batch)
        else:
            plain = self.criterion
            loss = fused_lb_loss(logits, labels, weight=plain.weight, ignore_index=plain.ignore_index, impl=plain.impl)
        return (loss, outputs if isinstance(outputs, Mapping) else {"logits": logits}) if return_outputs else loss

    def _training_loss(self, logits: torch.Tensor, labels: torch.Tensor, inputs: dict[str, Any], items: Any) -> Any:
        criterion, micro_batches = self.criterion, self.current_gradient_accumulation_steps
        given = {"ids": inputs.get("ids"), "num_old": inputs.get("num_old")}
        if micro_batches == 1 or items is None:  # without a count the Trainer divides by the micro-batches itself
            return criterion(logits, labels, **given)
        if criterion.weight is not None:
            return criterion(logits, labels, **given) / micro_batches
        # share * (CE + alpha' KL) = CE of these rows / items + alpha KL / micro_batches
        ranks = self.args.world_size if self.args.average_tokens_across_devices else 1
        share = labels.ne(-100).sum() * ranks / items
        alpha = criterion.alpha
        criterion.alpha = (alpha / (micro_batches * share)).detach()
        try:
            return share * criterion(logits, labels, **given)
        finally:
            criterion.alpha = alpha

    def _overlapping(self) -> TrackedLoader:
        args, dataset = self.args, self.train_dataset
        if dataset is None or not hasattr(dataset, "__len__"):
            raise ValueError("LastBatchTrainer: needs a train_dataset with a length, or train_loader=")
        collator = self._get_collator_with_removed_columns(self.data_collator, description="Training")
        sampler = OverlapBatchSampler(
            len(dataset), self._train_batch_size, seed=args.seed if args.data_seed is None else args.data_seed,
            rank=args.process_index, world_size=args.world_size, drop_last=args.dataloader_drop_last,
        )  # fmt: skip
        workers = args.dataloader_num_workers
        loader: DataLoader[Any] = DataLoader(
            _WithIndex(dataset), batch_sampler=sampler, collate_fn=partial(_collate, collator), num_workers=workers,
            pin_memory=args.dataloader_pin_memory and torch.cuda.is_available(),
            persistent_workers=args.dataloader_persistent_workers and workers > 0,
            prefetch_factor=args.dataloader_prefetch_factor if workers > 0 else None,
        )  # fmt: skip
        return TrackedLoader(loader)


class LastBatchCallback(_hf.TrainerCallback):
    """Writes criterion and position into every checkpoint, and gives them back at the start of a resumed run.

    `LastBatchTrainer` has one. For another Trainer: `LastBatchCallback(criterion, loader, folder)`, `folder` being the
    checkpoint that is passed to `train`, with `as_dataloader(loader)` returned by `get_train_dataloader`.

    Raises:
        ValueError: a checkpoint saved with other data or options.
    """

    def __init__(self, criterion: nn.Module, loader: Any = None, folder: str | os.PathLike[str] | None = None) -> None:
        self.criterion = criterion
        self.loader = loader
        self.folder = None if folder is None else Path(folder)

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Continue where the checkpoint was made, or start anew."""
        self.criterion.train()
        if self.folder is None:
            forget(self.criterion)
            self._place(0, 0)
            return
        path = self._file(self.folder, args)
        if path.is_file():
            saved = torch.load(path, map_location="cpu", weights_only=True)
            self.loader.load_state_dict(saved["loader"])
            self.criterion.load_state_dict(saved["criterion"])
            return
        forget(self.criterion)
        steps = len(self.loader)
        updates = -(-steps // args.gradient_accumulation_steps)
        epoch, update = divmod(state.global_step, updates)
        step = update * args.gradient_accumulation_steps
        self._place(epoch, step)
        warnings.warn(
            f"LastBatchCallback: {path} is missing (saved without this callback, or by another number of ranks); the "
            f"data continue at epoch {epoch}, step {step}, and the criterion starts empty",
            stacklevel=2,
        )

    def on_save(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Every rank writes its own file, complete or not at all."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        path = self._file(folder, args)
        unfinished = path.with_suffix(".tmp")
        with open(unfinished, "wb") as file:
            torch.save({"criterion": self.criterion.state_dict(), "loader": self.loader.state_dict()}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)

    def _place(self, epoch: int, step: int) -> None:
        self.loader.load_state_dict({**self.loader.state_dict(), "epoch": epoch, "step": step})

    @staticmethod
    def _file(folder: Path, args: Any) -> Path:
        return folder / f"dlb_fast_{args.process_index}.pt"


def as_dataloader(loader: Any, image_key: str = "pixel_values") -> DataLoader[Any]:
    """One of our loaders behind the face of a torch DataLoader of dicts, as `Trainer` wants it.

    A resumed Trainer skips the batches it knows; here these are numbers only, so the loader, which has its position
    from `load_state_dict`, is not asked for them, and every batch that it gives is checked against the step the Trainer
    is at. `Batch` becomes `{image_key, "labels", "ids", "num_old"}`, mappings pass as they are.
    """
    pull = _Pull(loader, image_key)
    return DataLoader(pull, batch_sampler=_Steps(pull), collate_fn=_only)


class _Pull(Dataset[Any]):
    """`dataset[step]` is the loader's next batch."""

    def __init__(self, loader: Any, image_key: str) -> None:
        self.loader = loader
        self.image_key = image_key
        self.batches: Iterator[Any] = iter(())
        self.expected = 0

    def __len__(self) -> int:
        return int(self.loader.plan.length)  # samples: what the Trainer logs

    def restart(self) -> None:
        state = self.loader.state_dict()
        self.expected = state["step"]
        self.batches = iter(self.loader)

    def __getitem__(self, step: int) -> dict[str, Any]:
        if step != self.expected:
            raise RuntimeError(
                f"as_dataloader: the Trainer is at step {step} of the epoch and {type(self.loader).__name__} at "
                f"{self.expected}; give the loader its state back before training (LastBatchCallback does)"
            )
        batch = next(self.batches)
        self.expected += 1
        if isinstance(batch, Batch):
            return {self.image_key: batch.images, "labels": batch.targets, "ids": batch.ids, "num_old": batch.num_old}
        if isinstance(batch, Mapping):
            return dict(batch)
        raise TypeError(f"as_dataloader: expected batches that are Batch or a mapping, got {type(batch).__name__}")


class _Steps:
    """The steps of an epoch, one per batch."""

    def __init__(self, pull: _Pull) -> None:
        self.pull = pull

    def __len__(self) -> int:
        return len(self.pull.loader)

    def __iter__(self) -> Iterator[list[int]]:
        self.pull.restart()
        for step in range(len(self)):
            yield [step]


class _WithIndex(Dataset[Any]):
    """Items together with the `SampleIndex` they were asked for by."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: SampleIndex) -> tuple[SampleIndex, Any]:
        return index, self.dataset[int(index)]


def _collate(collator: Any, rows: list[tuple[SampleIndex, Any]]) -> dict[str, Any]:
    batch = dict(collator([item for _, item in rows]))
    indices = [index for index, _ in rows]
    return {**batch, "ids": torch.tensor([int(i) for i in indices]), "num_old": sum(i.use for i in indices)}


def _only(rows: list[Any]) -> Any:
    return rows[0]


def _logits(outputs: Any) -> torch.Tensor:
    logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs
    logits = logits[0] if isinstance(logits, (tuple, list)) else logits
    if not isinstance(logits, torch.Tensor):
        raise TypeError(f"LastBatchTrainer: the model has to return logits, got {type(outputs).__name__}")
    return logits
