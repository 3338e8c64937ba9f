"""Mixup and CutMix for batches with repeated rows: both views of a sample are mixed alike, with the same partner.

The teacher of the repeated rows is the model's output for the same samples one step ago. If the two steps mixed a
sample with different partners, weights or boxes, the teacher's output would belong to another image. So the random
numbers belong to a *half*, not to a batch: they are a pure function of (seed, epoch of the half, index of the half,
row). A half is mixed within itself, first as new rows and then as repeated rows of the next batch, also across epochs,
after a resume and on any number of ranks.

Sources: mixup, Zhang et al., arXiv 1710.09412; CutMix, Yun et al., arXiv 1905.04899 (box and corrected weight as in its
code); options as in timm's `Mixup`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from dlb_fast._args import as_int
from dlb_fast.data.batch import Batch, to_device
from dlb_fast.data.plan import OverlapPlan
from dlb_fast.data.rng import MIX, Draws, fold_array, key_of
from dlb_fast.data.transforms.erasing import box_mask

__all__ = ["Mix", "check_mix", "partners", "symmetric_beta"]

MODES = ("batch", "elem")
# One column per row of the batch: the partner row, the weight of the own pixels, that of the own label, and the box.
_PARTNER, _SHARE, _LAM, _TOP, _LEFT, _HEIGHT, _WIDTH = range(7)


def partners(rows: int) -> NDArray[np.int64]:
    """(rows,) partner of every row: neighbours are paired; for an odd number the last three form a cycle.

    Every epoch is shuffled, so neighbours are random. Pairs stay together when a half is split over another number of
    ranks, if each rank has an even number of rows.

    Example:
        >>> partners(4).tolist(), partners(5).tolist(), partners(1).tolist()
        ([1, 0, 3, 2], [1, 0, 3, 4, 2], [0])
    """
    order = np.arange(rows) ^ 1
    if rows % 2:
        order[rows - 1] = rows - 1
    if rows % 2 and rows >= 3:
        order[rows - 3 :] = (rows - 2, rows - 1, rows - 3)
    return order


def symmetric_beta(alpha: float, draws: Draws) -> NDArray[np.float64]:
    """(n,) samples of Beta(alpha, alpha) from two uniforms each, without rejection.

    Source: Devroye, "Random variate generation in one line of code", 1996 (from Bailey's t generator, 1994).
    """
    first, second = draws.uniform(), draws.uniform()
    with np.errstate(over="ignore", divide="ignore"):
        spread = np.expm1(-np.log1p(-first) / alpha)
        cosine = np.cos(2 * math.pi * second)
        return 0.5 * (1 + np.sign(cosine) / np.sqrt(1 + 1 / (spread * cosine**2)))


@dataclass(frozen=True)
class Mix:
    """Mixup, CutMix or both, with random numbers per half; for `mix=` of a loader, or called in a training loop.

    Mixup: image i becomes `lam[i] * image[i] + (1 - lam[i]) * image[partner]`. CutMix: a box of image i, clipped at the
    border, is replaced by the partner's; `lam` is the fraction of pixels outside the box. Pass `target_b` and `lam` of
    the batch to the loss: `LastBatchLoss(...)(logits, targets, ids, target_b=batch.target_b, lam=batch.lam)`. The two
    views of a sample are different crops with the same box.

    Args:
        mixup_alpha: alpha of Beta(alpha, alpha), the distribution of `lam`; 0 turns mixup off.
        cutmix_alpha: the same for CutMix.
        prob: probability that rows are mixed.
        switch_prob: probability of CutMix when both are on.
        mode: "batch" draws one `lam` and box per half (for all ranks together), "elem" one per row.

    Raises:
        ValueError: a number out of range, both alphas 0, an unknown mode.

    Example:
        >>> batch = Batch(torch.rand(4, 3, 8, 8), torch.arange(4), torch.arange(4), num_old=0, epoch=0, step=0)
        >>> mixed = Mix(mixup_alpha=0.8)(batch, seed=0, steps_per_epoch=10)
        >>> mixed.target_b.tolist(), mixed.lam.shape
        ([1, 0, 3, 2], torch.Size([4]))
    """

    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    prob: float = 1.0
    switch_prob: float = 0.5
    mode: str = "batch"

    def __post_init__(self) -> None:
        for name in ("mixup_alpha", "cutmix_alpha"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"Mix: {name} must be finite and >= 0, got {value}")
        if not self.mixup_alpha and not self.cutmix_alpha:
            raise ValueError("Mix: mixup_alpha and cutmix_alpha are both 0, so nothing would be mixed; set one of them")
        for name in ("prob", "switch_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"Mix: {name} must be in [0, 1], got {getattr(self, name)}")
        if self.mode not in MODES:
            raise ValueError(f"Mix: mode must be one of {', '.join(MODES)}, got {self.mode!r}")

    def __call__(self, batch: Batch, *, seed: int = 0, steps_per_epoch: int, rank: int = 0) -> Batch:
        """A copy of the batch with mixed images, `target_b` and `lam`.

        Args:
            batch: batch with floating images; `num_old`, `epoch` and `step` identify its halves.
            seed: seed of the run.
            steps_per_epoch: `len(loader)`, to find the half before an epoch's first batch.
            rank: rank of this process.

        Raises:
            ValueError: a batch that is mixed already, or a step beyond the epoch.
            TypeError: uint8 images.
        """
        own = dataclasses.replace(batch, images=batch.images.clone())
        return self.in_place(own, halves_of(batch, steps_per_epoch), seed, rank)

    def of_plan(self, batch: Batch, plan: OverlapPlan, rank: int) -> Batch:
        """`__call__` for a loader with an index plan; modifies the images of `batch`."""
        return self.in_place(batch, halves_of(batch, plan.steps_per_epoch), plan.seed, rank)

    def in_place(self, batch: Batch, halves: Sequence[tuple[int, int, int]], seed: int, rank: int) -> Batch:
        """Mix the images of `batch` where they are; its rows are `halves`: (rows, epoch, number) each."""
        images = batch.images
        if batch.lam is not None:
            raise ValueError("Mix: the batch is mixed already; mix it in the loader or in the loop, not in both")
        if not images.is_floating_point():
            raise TypeError(f"Mix: images must be floating point to be mixed, got {images.dtype}; normalise them first")
        if sum(rows for rows, _, _ in halves) != len(batch):
            raise ValueError(f"Mix: halves {list(halves)} do not add up to the {len(batch)} rows of the batch")
        size, start, columns = (images.shape[2], images.shape[3]), 0, []
        for rows, epoch, index in halves:
            columns.append(self._draw(seed, epoch, index, rows, rank, size))
            columns[-1][_PARTNER] += start
            start += rows
        table = np.concatenate(columns, axis=1)
        numbers = to_device(table, images.device)  # one copy for all columns
        partner, lam = numbers[_PARTNER].long(), numbers[_LAM].float()
        if (table[_LAM] < 1).any():
            _blend(images, images[partner], _pixel_weight(numbers, table, size))
        return dataclasses.replace(batch, target_b=batch.targets[partner], lam=lam)

    def _draw(
        self, seed: int, epoch: int, index: int, rows: int, rank: int, size: tuple[int, int]
    ) -> NDArray[np.float64]:
        """(7, rows) of one half: see `_PARTNER`; a pure function of its arguments."""
        row = rank * rows + np.arange(rows) if self.mode == "elem" else np.zeros(rows, np.int64)
        draws = Draws(fold_array(key_of(seed, MIX, epoch, index), row))
        partner = partners(rows)
        mixed = (draws.uniform() < self.prob) & (partner != np.arange(rows))
        boxed = (draws.uniform() < self.switch_prob) if self.mixup_alpha else np.ones(rows, bool)
        boxed &= mixed & bool(self.cutmix_alpha)
        # Mixup and CutMix use the same two random numbers of a row, because only one of them is used.
        start = draws.counter
        lam = symmetric_beta(self.mixup_alpha or 1.0, draws)
        draws.counter = start
        lam = np.where(boxed, symmetric_beta(self.cutmix_alpha or 1.0, draws), lam)
        table = np.zeros((7, rows))
        table[_PARTNER] = np.where(mixed, partner, np.arange(rows))
        # Rounded to float32 here, so that pixels and labels get exactly the same weight.
        table[_SHARE] = np.where(mixed & ~boxed, lam.astype(np.float32), 1.0)
        side = np.sqrt(1 - lam)
        for corner, extent, length in ((_TOP, _HEIGHT, size[0]), (_LEFT, _WIDTH, size[1])):
            centre, reach = draws.integer(length), (length * side).astype(np.int64) // 2
            table[corner] = np.clip(centre - reach, 0, length)
            table[extent] = np.where(boxed, np.clip(centre + reach, 0, length) - table[corner], 0)
        area = table[_HEIGHT] * table[_WIDTH]
        table[_LAM] = np.where(boxed, (1 - area / (size[0] * size[1])).astype(np.float32), table[_SHARE])
        return table


def halves_of(batch: Batch, steps_per_epoch: int) -> list[tuple[int, int, int]]:
    """(rows, epoch, index) of the halves of a batch: the repeated one, if any, and the new one."""
    steps = as_int(steps_per_epoch, "Mix", "steps_per_epoch", 1)
    if not 0 <= batch.step < steps:
        raise ValueError(f"Mix: steps_per_epoch is {steps}, but the batch is step {batch.step}; pass len(loader)")
    new = (len(batch) - batch.num_old, batch.epoch, batch.step)
    if not batch.has_old:
        return [new]
    before = (batch.epoch, batch.step - 1) if batch.step else (batch.epoch - 1, steps - 1)
    if before[0] < 0:
        raise ValueError("Mix: the first batch of epoch 0 has repeated rows, but there is no half before it")
    return [(batch.num_old, *before), new]


def check_mix(operation: str, mix: Mix | None, dtype: torch.dtype) -> Mix | None:
    """`mix`, checked: TypeError for another type, ValueError for images that stay uint8."""
    if mix is None:
        return None
    if not isinstance(mix, Mix):
        raise TypeError(f"{operation}: mix must be a dlb_fast.data.Mix or None, got {type(mix).__name__}")
    if not dtype.is_floating_point:
        raise ValueError(f"{operation}: mix needs a floating dtype, got {dtype}; mixed pixels are not integers")
    return mix


def _pixel_weight(numbers: torch.Tensor, table: NDArray[np.float64], size: tuple[int, int]) -> torch.Tensor:
    """float32 (n, 1, h, w), or (n, 1, 1, 1) without boxes: weight of the own image at every pixel."""
    weight = numbers[_SHARE].float()[:, None, None]
    if table[_HEIGHT].any():
        weight = torch.where(box_mask(numbers[_TOP:], *size), 0.0, weight)
    return weight[:, None]


def _blend(images: torch.Tensor, others: torch.Tensor, weight: torch.Tensor) -> None:
    """`images = weight * images + (1 - weight) * others`; separate operations, so that all devices round alike."""
    if images.dtype in (torch.float32, torch.float64):
        images.mul_(weight).add_(others.mul_(1 - weight))
    else:
        images.copy_(images.float().mul_(weight).add_(others.float().mul_(1 - weight)))
