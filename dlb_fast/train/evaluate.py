"""Evaluation: accuracy, likelihood and calibration, with every image counted once."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .distributed import Ranks, is_sharded

__all__ = ["ECE_BINS", "evaluate", "memorised", "predictions"]

ECE_BINS = 15  # Guo et al., ICML 2017


@torch.no_grad()
def predictions(
    model: nn.Module,
    batches: Iterable[Any],
    autocast: AbstractContextManager[Any] | None = None,
    ranks: Ranks | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits `(N, C)` in float32 (float64 stays) and targets `(N,)` in eval mode; restores the model's mode.

    Args:
        model: the network.
        batches: pairs `(images, targets)`, or anything with `.images` and `.targets`; on several ranks this rank's
            share, with a length. Every rank then gets the rows of all ranks, in rank order.
        autocast: context manager for the forwards.
        ranks: the processes that evaluate together.

    Raises:
        ValueError: no image, or fewer images than ranks.

    A row of a negative target, an image that could not be read, is left out.
    """
    extra, ranks = 0, ranks or Ranks()
    if ranks.world_size > 1:
        rounds = len(batches)  # type: ignore[arg-type]
        most, least = ranks.max([rounds, -rounds])
        if not least:
            raise ValueError(f"evaluate: expected an image for each of {ranks.world_size} ranks; use fewer ranks")
        extra = int(most) - rounds if is_sharded(model) else 0
    was_training = model.training
    model.eval()
    logits, targets = [], []
    try:
        for batch in batches:
            images, labels = batch if isinstance(batch, (tuple, list)) else (batch.images, batch.targets)
            with autocast or nullcontext():
                out = model(images)
            logits.append(out if out.dtype == torch.float64 else out.float())
            targets.append(labels)
        for _ in range(extra):  # with FSDP2 every rank must take part in the forwards of the others
            model(images[:1])
    finally:
        model.train(was_training)
    if not logits:
        raise ValueError("evaluate: there is no image to evaluate on; is the test set empty?")
    found, labels = ranks.cat(torch.cat(logits)), ranks.cat(torch.cat(targets))
    if not (readable := labels >= 0).any():
        raise ValueError(f"evaluate: none of {len(labels)} images could be read; see the log for the reasons")
    return found[readable], labels[readable]


def evaluate(
    model: nn.Module,
    batches: Iterable[Any],
    autocast: AbstractContextManager[Any] | None = None,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Metrics of a model over a dataset, equal on all ranks. The arguments are those of `predictions`.

    Returns:
        top1: accuracy in [0, 1].
        top5: accuracy of the five largest logits; 1 with fewer than five classes.
        nll: mean cross entropy in nats.
        ece: expected calibration error over 15 equal bins of confidence.
        count: number of images.
        calibration: those bins as lists: `share` of the images, `accuracy`, mean `confidence` (0 in an empty bin).
        confusion: `[target, predicted, images]` of every pair of classes that occurs, right answers included.

    Example:
        >>> evaluate(nn.Identity(), [(torch.eye(3), torch.arange(3))])["top1"]
        1.0
    """
    logits, targets = predictions(model, batches, autocast, ranks)
    count, classes = logits.shape
    if int(targets.max()) >= classes:
        raise ValueError(
            f"evaluate: labels reach {int(targets.max())} but the model has {classes} logits; "
            f"was it made with another num_classes?"
        )
    predicted = logits.topk(min(5, classes), dim=1).indices
    top = predicted == targets[:, None]
    pairs, images = torch.unique(targets * classes + predicted[:, 0], return_counts=True)  # at most one per image
    bins = reliability(logits, targets)[1:]
    return {
        "top1": top[:, 0].sum().item() / count,
        "top5": top.any(dim=1).sum().item() / count,
        "nll": F.cross_entropy(logits.double(), targets).item(),
        "ece": calibration_error(logits, targets),
        "count": count,
        "calibration": dict(zip(("share", "accuracy", "confidence"), (b.tolist() for b in bins), strict=True)),
        "confusion": torch.stack((pairs // classes, pairs % classes, images), dim=1).tolist(),
    }


def memorised(
    model: nn.Module, batches: Iterable[Any], classes: int, *, ranks: Ranks | None = None
) -> dict[str, float]:
    """How a model fits training images of which some have a wrong label, in shares of these images.

    Args:
        model: the network.
        batches: as in `predictions`; a target is `label * classes + true class`.
        classes: number of classes.
        ranks: as in `predictions`.

    Returns:
        train_right_top1: of the images with the right label, those classified so.
        train_wrong_top1: of the images with a wrong label, those classified as this label: memorised.
        train_wrong_true: of the images with a wrong label, those classified as their true class.

    Example:
        >>> targets = torch.tensor([3 * 0 + 0, 3 * 1 + 1, 3 * 1 + 0])  # the third image is of class 0, labelled 1
        >>> memorised(nn.Identity(), [(torch.eye(3)[[0, 1, 1]], targets)], 3)
        {'train_right_top1': 1.0, 'train_wrong_top1': 1.0, 'train_wrong_true': 0.0}
    """
    logits, coded = predictions(model, batches, ranks=ranks)
    labels, true, found = coded // classes, coded % classes, logits.argmax(dim=1)
    right = labels == true

    def share(hit: Tensor, of: Tensor) -> float:
        return (hit & of).sum().item() / max(1, int(of.sum()))

    return {
        "train_right_top1": share(found == labels, right),
        "train_wrong_top1": share(found == labels, ~right),
        "train_wrong_true": share(found == true, ~right),
    }


def calibration_error(logits: Tensor, targets: Tensor, bins: int = ECE_BINS) -> float:
    """`sum over bins of share * |accuracy - mean confidence|`; bins of equal width, closed on the right."""
    _, share, accuracy, confidence = reliability(logits, targets, bins)
    return float((share * (accuracy - confidence).abs()).sum())


def reliability(logits: Tensor, targets: Tensor, bins: int = ECE_BINS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per bin of confidence: its index, share of images, accuracy and mean confidence (empty bins are 0)."""
    confidence, predicted = logits.double().softmax(dim=1).max(dim=1)
    correct = (predicted == targets).double()
    index = (confidence * bins).ceil().long().sub(1).clamp(0, bins - 1)
    count = torch.bincount(index, minlength=bins).double()
    present = count.clamp(min=1)
    return (
        torch.arange(bins),
        count / len(targets),
        torch.bincount(index, correct, minlength=bins) / present,
        torch.bincount(index, confidence, minlength=bins) / present,
    )
