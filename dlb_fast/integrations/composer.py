"""Composer (MosaicML): the method's two faces, a function and an `Algorithm`.

The function is `dlb_fast.fused_lb_loss`, re-exported here. The algorithm adds the last-batch term to whatever loss the
model computes.
"""

from __future__ import annotations

from typing import Any

import torch

from dlb_fast.functional import fused_lb_loss
from dlb_fast.integrations._need import need
from dlb_fast.integrations.state import forget
from dlb_fast.losses import LastBatchLoss

__all__ = ["LastBatch", "fused_lb_loss"]

_core: Any = need("composer.core", "pip install mosaicml")


class LastBatch(_core.Algorithm):
    """Adds `alpha * tau^2 * KL` towards the logits of the last mini-batch to the loss, at AFTER_LOSS.

    At INIT the criterion becomes the model's submodule `last_batch`, so that checkpoints hold what it remembers. A
    resumed Composer skips the batches it knows by drawing them; at FIT_START the loader is set to the epoch under way.

    Args:
        criterion: `LastBatchLoss`; its options for the cross entropy (class weights, label smoothing) are the model's
            business and must not be set.
        ids_key: of the sample ids in a batch, as for `state.batch_get_item`; None trusts the loader's order.

    Raises:
        ValueError: micro-batches, which tear the repeated half from the new one (pass device_train_microbatch_size, the
            rows of a batch), or a criterion with options for the cross entropy. TypeError: a loader without repeated
            rows, outputs that are not logits.

    >>> trainer = composer.Trainer(..., algorithms=[LastBatch(LastBatchLoss(10), ids_key=2)])    # doctest: +SKIP
    """

    def __init__(self, criterion: LastBatchLoss, ids_key: Any = None) -> None:
        if not isinstance(criterion, LastBatchLoss):
            raise TypeError(f"LastBatch: criterion must be a LastBatchLoss, got {type(criterion).__name__}")
        if criterion.weight is not None or criterion.label_smoothing:
            raise ValueError(
                "LastBatch: the criterion has weight or label_smoothing, but the model computes the cross entropy; set "
                "them there"
            )
        self.criterion = criterion
        self.ids_key = ids_key

    def match(self, event: Any, state: Any) -> bool:
        """INIT, FIT_START and AFTER_LOSS."""
        return event in (_core.Event.INIT, _core.Event.FIT_START, _core.Event.AFTER_LOSS)

    def apply(self, event: Any, state: Any, logger: Any) -> None:
        """Move in, find the epoch, or add the term to `state.loss`."""
        if event == _core.Event.INIT:
            state.model.last_batch = self.criterion
        elif event == _core.Event.FIT_START:
            self._start(state)
        else:
            self._add(state, logger)

    def _start(self, state: Any) -> None:
        loader = state.dataloader
        source: Any = loader if hasattr(loader, "set_epoch") else getattr(loader, "batch_sampler", None)
        if not hasattr(source, "set_epoch") or not hasattr(source, "plan"):
            raise TypeError(
                f"LastBatch: expected a loader of dlb_fast.data, or a DataLoader with batch_sampler="
                f"OverlapBatchSampler(...), got {type(loader).__name__}; without repeated rows there is nothing to add"
            )
        size = state.device_train_microbatch_size
        if not isinstance(size, int) or size < source.batch_size:
            raise ValueError(
                f"LastBatch: device_train_microbatch_size must be at least {source.batch_size}, the rows of a batch, "
                f"got {size!r}; micro-batches tear the repeated half from the new one"
            )
        source.set_epoch(int(state.timestamp.epoch))
        if int(state.timestamp.batch) == 0:
            forget(self.criterion)

    def _add(self, state: Any, logger: Any) -> None:
        logits = state.outputs["logits"] if isinstance(state.outputs, dict) else state.outputs
        if not isinstance(logits, torch.Tensor) or logits.dim() != 2:
            raise TypeError(f"LastBatch: expected logits (B, C) as outputs, got {type(state.outputs).__name__}")
        ids = None if self.ids_key is None else state.batch_get_item(self.ids_key)
        # Without a target the criterion is alpha * tau^2 * KL alone, and remembers the new rows as always.
        term = self.criterion(logits, None, ids)
        loss = state.loss
        if isinstance(loss, dict):
            state.loss = {**loss, "last_batch": term, **({"total": loss["total"] + term} if "total" in loss else {})}
        elif isinstance(loss, (tuple, list)):
            state.loss = (*loss, term)
        else:
            state.loss = loss + term
        logger.log_metrics({"last_batch/term": self.criterion.parts.lb})
