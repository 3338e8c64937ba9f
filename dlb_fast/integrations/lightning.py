"""Lightning: `LastBatchCallback` makes a `Trainer` resume our criterion and our loader exactly, at any step.

The criterion is an ordinary part of the LightningModule (`self.criterion = LastBatchLoss(...)`), and any loader of
`dlb_fast.data` can be given to `trainer.fit`. Lightning by itself keeps the criterion of rank 0, and the loader only
when it resumes in the middle of an epoch; the callback adds the rest, and checks the ranks.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from dlb_fast.data import OverlapBatchSampler
from dlb_fast.integrations._need import need
from dlb_fast.integrations.state import LastBatchState, check_ranks, forget
from dlb_fast.losses import DistillationLoss, LastBatchLoss

__all__ = ["LastBatchCallback"]

_KEY = "dlb_fast"
_pl: Any = need("lightning.pytorch", "pip install 'dlb_fast[lightning]'")


class LastBatchCallback(_pl.Callback):
    """Keeps a last-batch criterion and its loader through fit, validation and checkpoints.

    A new fit starts with an empty criterion; `fit(ckpt_path=...)` continues where the checkpoint was made: position in
    the data, remembered rows of every rank. A criterion that is not part of the LightningModule is switched to eval
    (plain cross entropy, memory untouched) during validation.

    The loader is one of ours (with any number of ranks), or a torch DataLoader with `batch_sampler=OverlapBatchSampler`
    (on several ranks with `Trainer(use_distributed_sampler=False)`: the sampler knows its rank, Lightning must not
    replace it). With several ranks make it in `train_dataloader()`, where the ranks exist.

    Args:
        criterion: None finds the one in the LightningModule.

    Raises:
        ValueError: no criterion, or several; a loader made for other ranks. TypeError: a loader of another kind.

    Example: ``examples/lightning_digits.py``.
    """

    def __init__(self, criterion: nn.Module | None = None) -> None:
        self._given = criterion
        self._delivered = 0  # batches since the iteration of a DataLoader began
        self._to_load: dict[str, Any] | None = None

    def on_fit_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Find the criterion before anything is trained."""
        self._criterion(pl_module).train()

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """The loader exists and no batch was taken: check it, then continue or start anew."""
        criterion, loader = self._criterion(pl_module), trainer.train_dataloader
        self._delivered = 0
        place = self._place(loader)
        check_ranks(place, trainer.global_rank, trainer.world_size)
        if self._to_load is not None:
            if place is loader:
                LastBatchState(criterion, place).load_state_dict(self._to_load)
            else:
                # The DataLoader's iterator exists already, and with workers has drawn batches.
                fetcher = trainer.fit_loop._data_fetcher
                fetcher.teardown()
                LastBatchState(criterion, place).load_state_dict(self._to_load)
                iter(fetcher)
        elif trainer.ckpt_path is None:
            forget(criterion)
        self._to_load = None

    def on_train_epoch_start(self, trainer: Any, pl_module: nn.Module) -> None:
        self._delivered = 0

    def on_train_batch_start(self, trainer: Any, pl_module: nn.Module, batch: Any, batch_idx: int) -> None:
        self._delivered += 1

    def on_validation_start(self, trainer: Any, pl_module: nn.Module) -> None:
        if self._given is not None:
            self._given.eval()

    def on_validation_end(self, trainer: Any, pl_module: nn.Module) -> None:
        if self._given is not None:
            self._given.train()

    def on_save_checkpoint(self, trainer: Any, pl_module: nn.Module, checkpoint: dict[str, Any]) -> None:
        """Put criterion and position of all ranks into the checkpoint (Lightning calls it on every rank)."""
        loader = trainer.train_dataloader
        if loader is None:
            return  # saved before a fit: there is nothing to continue
        place = self._place(loader)
        state = LastBatchState(self._criterion(pl_module), place).state_dict()
        if place is not loader:
            state["loader"] = place.state_dict(delivered=self._delivered)
        checkpoint[_KEY] = state

    def on_load_checkpoint(self, trainer: Any, pl_module: nn.Module, checkpoint: dict[str, Any]) -> None:
        """Keep the state until the loader exists."""
        self._to_load = checkpoint.get(_KEY)

    def _criterion(self, pl_module: nn.Module) -> nn.Module:
        if self._given is not None:
            return self._given
        found = [m for m in pl_module.modules() if isinstance(m, (LastBatchLoss, DistillationLoss))]
        if len(found) != 1:
            raise ValueError(
                f"LastBatchCallback: expected one last-batch criterion in {type(pl_module).__name__}, found "
                f"{len(found)}; assign it (self.criterion = LastBatchLoss(...)) or pass LastBatchCallback(criterion)"
            )
        return found[0]

    @staticmethod
    def _place(loader: Any) -> Any:
        """Whatever knows the position: one of our loaders, or a DataLoader's batch sampler."""
        sampler = getattr(loader, "batch_sampler", None)
        if isinstance(loader, DataLoader) and isinstance(sampler, OverlapBatchSampler):
            return sampler
        if isinstance(loader, DataLoader) or not hasattr(loader, "plan") or not hasattr(loader, "state_dict"):
            raise TypeError(
                f"LastBatchCallback: expected one loader of dlb_fast.data, or a DataLoader with "
                f"batch_sampler=OverlapBatchSampler(...), got {type(loader).__name__}"
                + (f" with batch_sampler {type(sampler).__name__}" if sampler is not None else "")
                + "; without repeated rows there is no last-batch term (under DDP pass use_distributed_sampler=False)"
            )
        return loader
