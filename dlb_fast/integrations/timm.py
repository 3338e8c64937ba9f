"""timm: `LastBatchTask` is a training task for timm's own train script, or for any loop around `timm.task`.

In `train.py`, in place of `ClassificationTask(...)` and after the loaders were made:

    task = LastBatchTask(model, LastBatchLoss(args.num_classes), device=device, dtype=model_dtype)
    loader_train = task.batches(OverlapLoader(dataset, args.batch_size, transform=..., device=device))

timm saves `get_task_state()` with the model and loads it when it resumes, which it does at whole epochs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from dlb_fast.data import Batch
from dlb_fast.integrations._need import need
from dlb_fast.integrations.state import rank_and_size, reset, stream_of
from dlb_fast.losses import LastBatchLoss

__all__ = ["LastBatchTask"]

_INSTALL = "pip install 'dlb_fast[timm]' (timm 1.0.28 or newer)"
_tasks: Any = need("timm.task", _INSTALL)
if not hasattr(_tasks.TrainingTask, "get_task_state"):
    raise ImportError(f"dlb_fast.integrations: the tasks of this timm have no state of their own; {_INSTALL}")


class LastBatchTask(_tasks.ClassificationTask):
    """Classification with self-distillation from the last mini-batch; compile, DDP and EMA are `ClassificationTask`'s.

    The result has the keys of timm's distillation tasks: `loss`, `output`, `task_loss` (cross entropy) and `kd_loss`
    (the last-batch term, without alpha). While the model is in eval mode the loss is plain cross entropy and the memory
    is not touched. timm's EMA averages the model only.

    Args:
        model: as for `ClassificationTask`.
        criterion: `LastBatchLoss`.
        device: as for `ClassificationTask`.
        dtype: as for `ClassificationTask`.
        verbose: as for `ClassificationTask`.

    Raises:
        TypeError: a criterion of another kind.
        ValueError: a batch that is not the last one that `batches` yielded.

    Example: ``examples/timm_digits.py``.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: LastBatchLoss,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ) -> None:
        if not isinstance(criterion, LastBatchLoss):
            raise TypeError(f"LastBatchTask: criterion must be a LastBatchLoss, got {type(criterion).__name__}")
        super().__init__(model, criterion, device=device, dtype=dtype, verbose=verbose)
        self._batches: TaskBatches | None = None

    def batches(self, loader: Any) -> TaskBatches:
        """The loader as the `(input, target)` pairs that timm iterates over.

        The task keeps the rest of a batch (ids, number of repeated rows, second labels of mixed images) for the loss.
        Mix with the loader's `mix`, not with timm's Mixup: both views of a sample have to be mixed alike.

        Args:
            loader: a loader of `dlb_fast.data`, or a DataLoader of `Batch` with an `OverlapBatchSampler`.
        """
        self._batches = TaskBatches(loader)
        return self._batches

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """Forward pass and loss of one batch."""
        self.criterion.train(self.trainable_module.training)
        output = self.trainable_module(input)
        given = {} if self._batches is None or not self.criterion.training else self._batches.given(target)
        loss = self.criterion(output, target, **given)
        parts = self.criterion.parts
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


class TaskBatches:
    """A loader with the attributes that timm's train script uses."""

    mixup_enabled = False  # timm turns its own mixup off here

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.stream = stream_of(loader)
        self.dataset = None
        self._batch: Batch | None = None

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
        for batch in self.loader:
            if not isinstance(batch, Batch):
                raise TypeError(
                    f"LastBatchTask.batches: expected a loader of Batch, got {type(batch).__name__}; give the "
                    "DataLoader an IndexedDataset and collate_fn=collate_overlap"
                )
            self._batch = batch
            yield batch.images, batch.targets

    def given(self, target: torch.Tensor) -> dict[str, Any]:
        """The further arguments of the criterion for the current batch."""
        batch = self._batch
        if batch is None or len(target) != len(batch):
            rows = None if batch is None else len(batch)
            raise ValueError(
                f"LastBatchTask: got a target of {len(target)} rows, expected {rows}, the rows of the last batch of "
                "task.batches(loader); train on what it yields, one forward per batch"
            )
        device = target.device
        given: dict[str, Any] = {"ids": batch.ids.to(device), "num_old": batch.num_old}
        if batch.target_b is not None and batch.lam is not None:
            given |= {"target_b": batch.target_b.to(device), "lam": batch.lam.to(device)}
        return given
