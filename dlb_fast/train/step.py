"""One training step of DLB: which rows go through the network together, and what the criterion sees.

A batch is `[old | new]`: rows `[0, num_old)` repeat the new rows of the step before. The criterion
(`LastBatchLoss`) remembers the logits of the new rows and teaches the old rows of the next step with them.

- `joint` (the paper): one forward over all rows, so both halves share their BatchNorm statistics.
- `two_pass` (the official code, Meta-knowledge-Lab/DLB@8949a46 `dlb.py`): first the new rows, then the old rows, in
  two forwards. Each half is normalised with its own statistics, and the running statistics are updated twice, in that
  order. Without BatchNorm (and dropout) both give the same loss and gradient.

Mixed images (`dlb_fast.data.Mix`) come with the class mixed in and the share of their own. A criterion that takes
`target_b` and `lam` gets them, any other one the same as dense targets.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dlb_fast.data import Batch

__all__ = ["FORWARDS", "accepted_inputs", "training_loss"]


def joint(model: nn.Module, batch: Batch) -> Tensor:
    """Logits `(n, C)` of one forward over the rows `[old | new]`."""
    return model(batch.images)


def two_pass(model: nn.Module, batch: Batch) -> Tensor:
    """Logits `(n, C)` in the order `[old | new]` from two forwards, the new rows first as in the official code."""
    new_logits = model(batch.new)
    if not batch.has_old:
        return new_logits
    old_logits = model(batch.old)
    return torch.cat((old_logits, new_logits))


def partners(model: nn.Module, batch: Batch) -> Tensor:
    """Logits `(n, C)` of rows `[anchors | partners]`: the anchors, then the partners without gradient but in train mode
    (BatchNorm sees both, one after the other), as in the official code of CS-KD (alinlab/cs-kd `train.py`)."""
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
    """Which fields of a batch the criterion takes: LastBatchLoss `ids` and `num_old`, `nn.CrossEntropyLoss` none."""
    fields = {"ids", "num_old", "images", "epoch", "target_b", "lam"}
    return frozenset(inspect.signature(criterion.forward).parameters) & fields


def labels_of(batch: Batch, pair: bool, logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """(target, further arguments) of a batch: labels `(n,)`; of mixed images the pair form, or dense targets `(n, C)`.

    Of a pair, the class with the larger share comes first: it is the one that `parts.correct` (train_top1) counts.
    """
    own, other, share = batch.targets, batch.target_b, batch.lam
    if other is None or share is None:
        return own, {}
    if pair:
        swapped = share < 0.5
        first, second = torch.where(swapped, other, own), torch.where(swapped, own, other)
        return first, {"target_b": second, "lam": torch.where(swapped, 1 - share, share)}
    dense = torch.zeros_like(logits, dtype=torch.promote_types(logits.dtype, torch.float32))
    share = share.to(dense.dtype)
    dense.scatter_add_(1, own[:, None], share[:, None])
    return dense.scatter_add_(1, other[:, None], 1 - share[:, None]), {}


def training_loss(
    model: nn.Module,
    criterion: nn.Module,
    batch: Batch,
    *,
    forward: str = "joint",
    autocast: Any = None,
    accepts: frozenset[str] | None = None,
) -> Tensor:
    """The loss of one batch, ready for `backward()`; the criterion's memory then holds this batch's new rows.

    `L = CE over all rows + alpha * tau^2 * KL(logits the new half gave one step ago || logits of the old rows)`

    Args:
        model: maps images `(n, ch, h, w)` to logits `(n, C)`.
        criterion: called as `criterion(logits, targets)`, plus `ids`, `num_old`, `images`, `epoch`, `target_b` and
            `lam` where its `forward` has them.
        batch: rows `[old | new]`.
        forward: a name in `FORWARDS`.
        autocast: context manager for the network's forward; the loss itself runs outside it, in float32 inside.
        accepts: `accepted_inputs(criterion)`, if the caller already has it.
    Returns:
        The 0-d loss.
    Raises:
        ValueError: `forward` is none of them.
    """
    if forward not in FORWARDS:
        raise ValueError(f"training_loss: forward must be one of {', '.join(FORWARDS)}, got {forward!r}")
    if autocast is None:
        logits = FORWARDS[forward](model, batch)
    else:
        with autocast:
            logits = FORWARDS[forward](model, batch)
    if accepts is None:
        accepts = accepted_inputs(criterion)
    target, pair = labels_of(batch, "lam" in accepts, logits)
    others = {name: getattr(batch, name) for name in accepts - {"target_b", "lam"}}
    return criterion(logits, target, **others, **pair)
