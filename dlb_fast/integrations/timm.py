"""timm: `LastBatchTask` is a training task for timm's own train script, or for any loop around `timm.task`.

In `train.py`, in place of `ClassificationTask(...)` and after the loaders were made:

    task = LastBatchTask(model, LastBatchLoss(args.num_classes), device=device, dtype=model_dtype)
    loader_train = task.batches(OverlapLoader(dataset, args.batch_size, transform=..., device=device))

timm saves `get_task_state()` with the model and gives it back when it resumes, which it does at whole epochs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from dlb_fast.data import Batch
from dlb_fast.integrations._need import need
from dlb_fast.integrations.state import forget, rank_and_size, stateful
from dlb_fast.losses import LastBatchLoss

__all__ = ["LastBatchTask"]

_INSTALL = "pip install 'dlb_fast[timm]' (timm 1.0.28 or newer has the tasks this is one of)"
_tasks: Any = need("timm.task", _INSTALL)
if not hasattr(_tasks.TrainingTask, "get_task_state"):
    raise ImportError(f"dlb_fast.integrations: this timm's tasks have no state of their own; {_INSTALL}")


class LastBatchTask(_tasks.ClassificationTask):
    """Classification with self-distillation from the last mini-batch; compile, DDP and EMA are `ClassificationTask`'s.

    The result has the keys of timm's distillation tasks: `loss`, `output`, `task_loss` (cross entropy) and `kd_loss`
    (the last-batch term, without alpha). While the model is in eval mode the loss is plain cross entropy and the memory
    is not touched; timm's EMA averages the model only.

    Args:
        model: as for `ClassificationTask`. criterion: `LastBatchLoss`. device, dtype, verbose: as for timm's tasks.

    Raises:
        TypeError: a criterion of another kind. ValueError: a batch that is not the one `batches` handed out last.

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
        """`loader` (one of ours, or `TrackedLoader`) as the `(input, target)` pairs that timm iterates over.

        What else is known of a batch (ids, repeated rows, the partners of a mixed image) reaches the task by itself.
        Mix with our loader's `mix`, not with timm's Mixup: both visits of a sample have to be mixed alike.
        """
        self._batches = TaskBatches(stateful(loader))
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
        """Remembered rows and position in the data; nothing for the EMA."""
        if ema:
            return {}
        state: dict[str, Any] = {"criterion": self.criterion.state_dict()}
        return state if self._batches is None else {**state, "loader": self._batches.loader.state_dict()}

    def load_task_state(
        self, state: dict[str, Any] | None, strict: bool = True, module: nn.Module | None = None, ema: bool = False
    ) -> None:
        """Take the state over; ranks other than 0, whose rows timm does not save, start with an empty criterion."""
        if ema:
            return
        if not state or rank_and_size()[0] > 0:
            forget(self.criterion)
        else:
            self.criterion.load_state_dict(state["criterion"])
        if state and self._batches is not None and "loader" in state:
            self._batches.loader.load_state_dict(state["loader"])


class TaskBatches:
    """A loader with the face timm's train script expects of one."""

    mixup_enabled = False  # timm turns its own mixup off here

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.dataset = None
        self._batch: Batch | None = None

    @property
    def batch_sampler(self) -> TaskBatches:
        """Itself: timm announces the epoch by `loader.batch_sampler.set_epoch`."""
        return self

    @property
    def sampler(self) -> TaskBatches:
        """Itself, as older scripts announce it."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Start `epoch`; nothing happens when it is the current one."""
        self.loader.set_epoch(epoch)

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
        """What the criterion has to know of the batch under way."""
        batch = self._batch
        if batch is None or len(target) != len(batch):
            rows = None if batch is None else len(batch)
            raise ValueError(
                f"LastBatchTask: a target of {len(target)} rows, but the batch handed out last has {rows}; train on "
                "what task.batches(loader) yields, one forward per batch"
            )
        device = target.device
        given: dict[str, Any] = {"ids": batch.ids.to(device), "num_old": batch.num_old}
        if batch.target_b is not None and batch.lam is not None:
            given |= {"target_b": batch.target_b.to(device), "lam": batch.lam.to(device)}
        return given
