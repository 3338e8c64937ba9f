"""Lightning: `LastBatchCallback` makes a `Trainer` resume the criterion and the loader exactly, at any step.

The criterion is an ordinary part of the LightningModule (`self.criterion = LastBatchLoss(...)`), and any loader of
`dlb_fast.data` can be given to `trainer.fit`. Lightning alone saves the criterion of rank 0 only, and the loader only
in the middle of an epoch; the callback saves the rest.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from dlb_fast.buffer import UNKNOWN_ID
from dlb_fast.integrations._need import need
from dlb_fast.integrations.state import LastBatchState, check_ranks, reset, stream_of
from dlb_fast.losses import DistillationLoss, LastBatchLoss

__all__ = ["LastBatchCallback"]

_KEY = "dlb_fast"
_pl: Any = need("lightning.pytorch", "pip install 'dlb_fast[lightning]'")


class LastBatchCallback(_pl.Callback):
    """Saves and loads a last-batch criterion and the position of its loader, and starts a new fit with an empty memory.

    `fit(ckpt_path=...)` continues where the checkpoint was made: position in the data, remembered rows of every rank. A
    criterion that is not part of the LightningModule is in eval mode (plain cross entropy, memory untouched) during
    validation, test and prediction. With automatic optimisation, all evaluations of one batch (closures of LBFGS) have
    the same teacher, with and without ids; with manual optimisation that needs ids or `criterion.same_batch()`.

    Every step logs `cross_entropy` and `last_batch` (without alpha; `distillation` of another criterion), which
    Lightning reads from the device every `log_every_n_steps`.

    The loader is one of `dlb_fast.data`, or a DataLoader with `batch_sampler=OverlapBatchSampler(...)`. On several
    ranks make it in `train_dataloader()`, where the ranks exist, and pass `Trainer(use_distributed_sampler=False)` with
    a DataLoader: its sampler knows its rank, and Lightning must not replace it.

    Args:
        criterion: None takes the one in the LightningModule.

    Raises:
        ValueError: no criterion or several, a loader made for other ranks, or `Trainer(overfit_batches=...)`.
        TypeError: a loader of another kind.

    Example: ``examples/lightning_images.py``.
    """

    def __init__(self, criterion: nn.Module | None = None) -> None:
        self._given = criterion
        self._delivered = 0  # batches since the current iteration began
        self._begun = False  # an epoch of this fit has begun
        self._to_load: dict[str, Any] | None = None
        self._used: Any = criterion  # in this fit
        self._logged: Any = None  # terms that were logged
        self._mode = True  # of the given criterion, before an evaluation

    def setup(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        """Refuse the option that replaces the stream of batches."""
        if stage == "fit" and trainer.overfit_batches:
            raise ValueError(
                f"LastBatchCallback: overfit_batches={trainer.overfit_batches} trains on the same batches in every "
                "epoch, whose first one would not repeat the last one; give the loader a Subset of the dataset instead"
            )

    def on_fit_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Find the criterion before anything is trained."""
        self._used = self._criterion(pl_module)
        self._used.train()

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Check the loader, then continue or start anew. No batch was used yet."""
        criterion, loader = self._criterion(pl_module), trainer.train_dataloader
        self._begun = False
        check_ranks(loader, trainer.global_rank, trainer.world_size)
        if self._to_load is not None:
            # The iterator exists already: a DataLoader with workers has drawn batches, and one of a loader whose
            # state Lightning has loaded may be the empty rest of an epoch.
            fetcher = trainer.fit_loop._data_fetcher
            fetcher.teardown()
            LastBatchState(criterion, stream_of(loader)).load_state_dict(self._to_load)
            iter(fetcher)
        elif trainer.ckpt_path is None:
            reset(criterion)
        self._to_load = None

    def on_train_epoch_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """An epoch that was cut short (`limit_train_batches`) would be repeated; this starts the next one instead."""
        if self._begun:  # before the first epoch the iterator exists already
            stream = stream_of(trainer.train_dataloader)
            stream.set_epoch(trainer.current_epoch)
            buffer = getattr(self._used, "buffer", None)
            if self._delivered < len(stream) and buffer is not None and (buffer.ids == UNKNOWN_ID).any():
                buffer.reset()  # the next batch does not repeat these rows, and has no ids that would tell
        self._begun = True
        self._delivered = 0

    def on_train_batch_start(self, trainer: Any, pl_module: nn.Module, batch: Any, batch_idx: int) -> None:
        """Count the batch."""
        self._delivered += 1
        self._same_batch(None)

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """What automatic optimisation evaluates after a backward pass is the same batch again: a closure."""
        if pl_module.automatic_optimization:
            self._same_batch(True)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the terms of the batch, without reading them."""
        self._same_batch(None)
        (packed,) = getattr(self._used, "_parts", [None])
        if packed is None or packed is self._logged:
            return  # the step did not use the criterion
        self._logged = packed
        parts, name = self._used.parts, "last_batch" if isinstance(self._used, LastBatchLoss) else "distillation"
        pl_module.log_dict({"cross_entropy": parts.ce, name: parts.lb}, on_step=True, on_epoch=False)

    def on_exception(self, trainer: Any, pl_module: nn.Module, exception: BaseException) -> None:
        """Leave the batch that was not finished."""
        self._same_batch(None)

    def _same_batch(self, same: bool | None) -> None:
        if isinstance(self._used, DistillationLoss):
            self._used._set_same(same)

    def on_validation_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Lightning switches its module only."""
        if self._given is not None:
            self._mode = self._given.training
            self._given.eval()

    def on_validation_end(self, trainer: Any, pl_module: nn.Module) -> None:
        """Back to the mode before."""
        if self._given is not None:
            self._given.train(self._mode)

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def on_save_checkpoint(self, trainer: Any, pl_module: nn.Module, checkpoint: dict[str, Any]) -> None:
        """Put criterion and position of all ranks into the checkpoint (Lightning calls it on every rank)."""
        loader = trainer.train_dataloader
        if loader is None:
            return  # saved before a fit: there is nothing to continue
        stream = stream_of(loader)
        state = LastBatchState(self._criterion(pl_module), stream).state_dict()
        if isinstance(loader, DataLoader):
            state["loader"] = stream.state_dict(delivered=self._delivered)
        position = state["loader"]
        if position["step"] == stream.plan.steps_per_epoch:  # Lightning continues an ended epoch with the next one
            state["loader"] = {**position, "epoch": position["epoch"] + 1, "step": 0}
        checkpoint[_KEY] = state
        if trainer.world_size > 1:  # the module's state has the rows of rank 0, which the other ranks would refuse
            saved = checkpoint["state_dict"]
            for name, module in pl_module.named_modules():
                if isinstance(module, LastBatchLoss) and f"{name}._extra_state" in saved:
                    saved[f"{name}._extra_state"] = torch.empty(0, dtype=torch.uint8)

    def on_load_checkpoint(self, trainer: Any, pl_module: nn.Module, checkpoint: dict[str, Any]) -> None:
        """Keep the state until the loader exists."""
        self._to_load = checkpoint.get(_KEY)

    def _criterion(self, pl_module: nn.Module) -> Any:
        if self._given is not None:
            return self._given
        found = [m for m in pl_module.modules() if isinstance(m, DistillationLoss)]
        if len(found) != 1:
            raise ValueError(
                f"LastBatchCallback: expected one last-batch criterion in {type(pl_module).__name__}, found "
                f"{len(found)}; assign it (self.criterion = LastBatchLoss(...)) or pass LastBatchCallback(criterion)"
            )
        return found[0]
