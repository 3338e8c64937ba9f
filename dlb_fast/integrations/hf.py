"""Hugging Face `Trainer`: `LastBatchTrainer` trains with `LastBatchLoss`, and its checkpoints resume exactly.

The criterion stays outside the model, so a saved model is the model alone. Evaluation is plain cross entropy. Every
rank adds one small file to a checkpoint folder, `dlb_fast_RANK.pt`.
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

from dlb_fast.data import Batch, OverlapBatchSampler, SampleIndex
from dlb_fast.functional import fused_lb_loss
from dlb_fast.integrations._need import need
from dlb_fast.integrations.state import check_ranks, reset, stream_of
from dlb_fast.losses import LastBatchLoss

__all__ = ["LastBatchCallback", "LastBatchTrainer", "as_dataloader"]

_hf: Any = need("transformers", "pip install 'dlb_fast[hf]'")


class LastBatchTrainer(_hf.Trainer):
    """`transformers.Trainer` with self-distillation from the last mini-batch.

    `per_device_train_batch_size` is the rows the model sees, so it must be even; an epoch has twice the usual number of
    steps. With gradient accumulation the cross entropy is that of the whole accumulated batch (by `num_items_in_batch`,
    unless class weights are set), and the last-batch term is the mean over its micro-batches, each learning from the
    micro-batch before it.

    Args:
        *args: as for `Trainer`.
        criterion: `LastBatchLoss`.
        train_loader: a loader of `dlb_fast.data`, or a DataLoader with an `OverlapBatchSampler`; None makes such a
            DataLoader from `train_dataset`, `data_collator` and `args`.
        image_key: the model's argument for images, used with loaders that yield `Batch`.
        **options: as for `Trainer`. The labels are found by `args.label_names`.

    Raises:
        TypeError: a criterion or a loader of another kind.
        ValueError: an odd batch size, a loader made for other ranks, a checkpoint saved with other data or options.

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
        if train_loader is not None:
            stream_of(train_loader)  # raises for a loader of another kind
        self.train_loader = train_loader
        self.image_key = image_key
        # The Trainer looks for the names in the model's forward, which takes no labels here.
        self.label_names: list[str] = list(getattr(self, "label_names", [])) or ["labels"]
        # With this the Trainer counts the items of an accumulated batch and does not divide the loss itself.
        self.model_accepts_loss_kwargs = True
        self.memory = LastBatchCallback(self.criterion)
        self.add_callback(self.memory)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The overlapping batches as a DataLoader. It is not prepared, since the sampler knows its rank."""
        loader = self._overlapping() if self.train_loader is None else self.train_loader
        check_ranks(loader, self.args.process_index, self.args.world_size)
        self.memory.loader = loader
        return as_dataloader(loader, self.image_key)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **options: Any) -> Any:
        """As `Trainer.train`; a resumed run also loads the criterion and the position in the data."""
        folder = resume_from_checkpoint
        if folder is True:
            folder = need("transformers.trainer_utils", "").get_last_checkpoint(self.args.output_dir)
        self.memory.folder = Path(folder) if folder else None
        return super().train(resume_from_checkpoint, *args, **options)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of the criterion in training, plain cross entropy in evaluation."""
        labels = inputs[self.label_names[0]]
        dropped = ("ids", "num_old", *self.label_names)
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
        # share * (CE + alpha' KL) = CE summed over these rows / items + alpha KL / micro_batches
        ranks = self.args.world_size if self.args.average_tokens_across_devices else 1
        share = labels.ne(-100).sum() * ranks / items
        alpha = criterion.alpha
        criterion.alpha = (alpha / (micro_batches * share)).detach()
        try:
            return share * criterion(logits, labels, **given)
        finally:
            criterion.alpha = alpha

    def _overlapping(self) -> DataLoader[Any]:
        args, dataset = self.args, self.train_dataset
        if dataset is None or not hasattr(dataset, "__len__"):
            raise ValueError("LastBatchTrainer: needs a train_dataset with a length, or train_loader=")
        seed = args.seed if args.data_seed is None else args.data_seed
        workers = args.dataloader_num_workers
        return DataLoader(
            _WithIndex(dataset),
            batch_sampler=OverlapBatchSampler(
                len(dataset),
                self._train_batch_size,
                seed=seed,
                rank=args.process_index,
                world_size=args.world_size,
                drop_last=args.dataloader_drop_last,
            ),
            collate_fn=partial(
                _collate, self._get_collator_with_removed_columns(self.data_collator, description="Training")
            ),
            num_workers=workers,
            pin_memory=args.dataloader_pin_memory and torch.cuda.is_available(),
            persistent_workers=args.dataloader_persistent_workers and workers > 0,
            prefetch_factor=args.dataloader_prefetch_factor if workers > 0 else None,
            # The seed of the workers is drawn from here. From torch's global generator, where a resumed run makes one
            # iterator more, it would change the dropout.
            generator=torch.Generator().manual_seed(seed),
        )


class LastBatchCallback(_hf.TrainerCallback):
    """Saves the criterion and the position in the data with every checkpoint, and loads them when training resumes.

    `LastBatchTrainer` has one. With another Trainer, return `as_dataloader(loader)` from `get_train_dataloader` and add
    `LastBatchCallback(criterion, loader, folder)`.

    Args:
        criterion: `LastBatchLoss`.
        loader: a loader of `dlb_fast.data`, or a DataLoader with an `OverlapBatchSampler`.
        folder: the checkpoint that is passed to `train`; None starts anew.

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
        position = self._position(args, state)
        path = None if self.folder is None else self._file(self.folder, args)
        if path is not None and path.is_file():
            saved = torch.load(path, map_location="cpu", weights_only=True)
            stream_of(self.loader).load_state_dict(saved["loader"])
            self.criterion.load_state_dict(saved["criterion"])
            return
        reset(self.criterion)
        stream_of(self.loader).load_state_dict(position)
        if path is not None:
            warnings.warn(
                f"LastBatchCallback: {path} is missing (saved without this callback, or by another number of ranks); "
                f"the data continue at epoch {position['epoch']}, step {position['step']}, and the criterion starts "
                "empty",
                stacklevel=2,
            )

    def on_save(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Write the file of this rank, whole or not at all."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        path = self._file(folder, args)
        unfinished = path.with_suffix(".tmp")
        with open(unfinished, "wb") as file:
            torch.save({"criterion": self.criterion.state_dict(), "loader": self._position(args, state)}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)

    def _position(self, args: Any, state: Any) -> dict[str, Any]:
        """The state of the stream after so many updates. A DataLoader with workers has drawn more than that."""
        updates = -(-len(self.loader) // args.gradient_accumulation_steps)  # per epoch
        epoch, update = divmod(state.global_step, updates)
        step = update * args.gradient_accumulation_steps
        return {**stream_of(self.loader).state_dict(), "epoch": epoch, "step": step}

    @staticmethod
    def _file(folder: Path, args: Any) -> Path:
        return folder / f"dlb_fast_{args.process_index}.pt"


def as_dataloader(loader: Any, image_key: str = "pixel_values") -> DataLoader[Any]:
    """A loader as a torch DataLoader of dicts, which `Trainer` wants.

    A Trainer that resumes asks the batch sampler for the batches it skips. Here the sampler yields step numbers only,
    so `loader`, which was placed by `load_state_dict`, is not asked for them. Every batch that it yields is checked
    against the step the Trainer is at.

    Args:
        loader: a loader of `dlb_fast.data`, or a DataLoader with an `OverlapBatchSampler`. A `Batch` becomes
            `{image_key, "labels", "ids", "num_old"}`; a mapping passes as it is.
        image_key: the model's argument for images.
    """
    batches = _Batches(loader, image_key)
    return DataLoader(batches, batch_sampler=_Steps(batches), collate_fn=_first)


class _Batches(Dataset[Any]):
    """`dataset[step]` is the next batch of the loader."""

    def __init__(self, loader: Any, image_key: str) -> None:
        self.loader = loader
        self.image_key = image_key
        self.batches: Iterator[Any] = iter(())
        self.expected = 0

    def __len__(self) -> int:
        return int(stream_of(self.loader).plan.length)  # samples: the Trainer prints it

    def restart(self) -> None:
        self.expected = stream_of(self.loader).state_dict()["step"]
        self.batches = iter(self.loader)

    def __getitem__(self, step: int) -> dict[str, Any]:
        if step != self.expected:
            raise RuntimeError(
                f"as_dataloader: the Trainer is at step {step} of the epoch and {type(self.loader).__name__} at "
                f"{self.expected}; load the loader's state before training (LastBatchCallback does)"
            )
        batch = next(self.batches)
        self.expected += 1
        if isinstance(batch, Batch):
            return {self.image_key: batch.images, "labels": batch.targets, "ids": batch.ids, "num_old": batch.num_old}
        if isinstance(batch, Mapping):
            return dict(batch)
        raise TypeError(f"as_dataloader: expected batches that are Batch or a mapping, got {type(batch).__name__}")


class _Steps:
    """A batch sampler that yields the step numbers of an epoch."""

    def __init__(self, batches: _Batches) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches.loader)

    def __iter__(self) -> Iterator[list[int]]:
        self.batches.restart()
        for step in range(len(self)):
            yield [step]


class _WithIndex(Dataset[Any]):
    """Items together with the `SampleIndex` that asked for them."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: SampleIndex) -> tuple[SampleIndex, Any]:
        return index, self.dataset[int(index)]


def _collate(collator: Any, rows: list[tuple[SampleIndex, Any]]) -> dict[str, Any]:
    batch = dict(collator([item for _, item in rows]))
    indices = [index for index, _ in rows]
    return {**batch, "ids": torch.tensor([int(i) for i in indices]), "num_old": sum(i.view for i in indices)}


def _first(rows: list[Any]) -> Any:
    return rows[0]


def _logits(outputs: Any) -> torch.Tensor:
    logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs
    logits = logits[0] if isinstance(logits, (tuple, list)) else logits
    if not isinstance(logits, torch.Tensor):
        raise TypeError(f"LastBatchTrainer: the model has to return logits, got {type(outputs).__name__}")
    return logits
