"""The lessons of the family: what BAKE, MrKD, PS-KD, Zipf and the others put before the kernel.

Tensors in, a teacher's tensor out, everything detached. Shared by the functions (``family.py``) and the teachers with
memory (``family_teachers.py``).
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ._check import check_scalar, check_tensor
from .functional import Scalar
from .reference import compute_dtype
from .teachers import Lesson, check_share

__all__ = [
    "average_copies", "check_features", "check_omega", "ensemble_batch", "gathered", "mirrored", "ps_lesson", "ranked",
    "tf_kd_share",
]  # fmt: skip


def tf_kd_share(num_classes: int, temperature: float = 20.0, share: float = 0.99) -> float:
    """What the right class gets in Tf-KD's regularisation, whose code softmaxes the virtual probabilities once more.

    >>> round(tf_kd_share(100, 20.0), 4)                      # next to uniform
    0.0105
    """
    op = "tf_kd_reg"
    check_share(op, share)
    check_scalar(op, "temperature", temperature, positive=True)
    # as a softmax does it: relative to the larger of the two, so that no temperature overflows
    gap = (share - (1.0 - share) / max(num_classes - 1, 1)) / temperature
    right, other = math.exp(min(gap, 0.0)), math.exp(-max(gap, 0.0))
    return right / (right + (num_classes - 1) * other)


@torch.no_grad()
def average_copies(
    copies_logits: Tensor,
    target: Tensor | None,
    temperature: Scalar,
    correct_share: float | None = None,
    swap: bool = False,
) -> Tensor:
    """The averaged distribution (B, C) of copies' logits (K, B, C); see :func:`mr_kd_loss`."""
    z = copies_logits.to(compute_dtype(copies_logits.dtype))
    if (swap or correct_share is not None) and (target is None or target.dim() != 1):
        raise ValueError("mr_kd_loss: swap and correct_share need labels (B,) to know the right class")
    classes = z.shape[-1]
    if target is not None and target.dim() == 1:
        known = ((target >= 0) & (target < classes))[:, None]
        at = target.long().clamp(0, classes - 1)[:, None]
    if swap:
        index = at.expand(z.shape[0], *at.shape)
        largest, where = z.max(-1, keepdim=True)
        swapped = z.scatter(-1, where, z.gather(-1, index)).scatter(-1, index, largest)
        z = torch.where(known, swapped, z)
    mean = torch.softmax(z / temperature, -1).mean(0)
    if correct_share is not None:
        rest = mean.scatter(1, at, 0.0)
        total = rest.sum(1, keepdim=True)
        even = torch.full_like(rest, 1.0 / max(classes - 1, 1)).scatter(1, at, 0.0)
        rest = torch.where(total > 0, rest / total, even)  # a copy that is certain leaves nothing to scale
        corrected = ((1.0 - correct_share) * rest).scatter(1, at, correct_share)
        mean = torch.where(known, corrected, mean)
    return mean


@torch.no_grad()
def gathered(value: Tensor) -> tuple[Tensor, int]:
    """(world * B, D) of all ranks in their order, and the row at which this rank's begin; no gradient.

    Every rank must bring the same shape. Without a process group it is the tensor itself.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return value, 0
    parts = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, value.contiguous())
    return torch.cat(parts), dist.get_rank() * value.shape[0]


@torch.no_grad()
def ensemble_batch(
    features: Tensor, logits: Tensor, temperature: Scalar, omega: float = 0.5, cross_rank: bool = False
) -> Tensor:
    """BAKE's targets ``Q = (1 - w) (I - w A)^-1 P`` (B, C), by a linear solve in float32 whatever autocast says."""
    with torch.autocast(logits.device.type, enabled=False):
        dtype = compute_dtype(logits.dtype)
        rows = logits.shape[0]
        features = F.normalize(features.detach().to(dtype).flatten(1), p=2, dim=1)
        tempered = torch.softmax(logits.detach().to(dtype) / temperature, dim=1)
        start = 0
        if cross_rank:  # one collective for both
            joined, start = gathered(torch.cat([features, tempered], 1))
            features, tempered = joined.split([features.shape[1], tempered.shape[1]], dim=1)
        affinity = torch.softmax((features @ features.T).fill_diagonal_(-1e9), dim=1)
        system = torch.eye(len(tempered), dtype=dtype, device=logits.device) - omega * affinity
        # Diagonally dominant for w < 1, so the unchecked solve cannot fail (and does not wait for a GPU).
        solved, _ = torch.linalg.solve_ex(system, tempered)
        return (1.0 - omega) * solved[start : start + rows]


def check_omega(op: str, omega: float) -> None:
    """A number in [0, 1): at 1 the system is singular."""
    if isinstance(omega, bool) or not isinstance(omega, (int, float)) or not 0 <= omega < 1:
        raise ValueError(f"{op}: omega must be a number in [0, 1), got {omega!r}")


def check_features(op: str, features: Tensor, logits: Tensor) -> None:
    """A row of features per row of logits, on the same device."""
    check_tensor(op, "features", features)
    if features.dim() < 2 or features.shape[0] != logits.shape[0] or features.device != logits.device:
        raise ValueError(
            f"{op}: features must have shape ({logits.shape[0]}, D) on {logits.device}, one row per row of the logits, "
            f"got {tuple(features.shape)} on {features.device}"
        )


def mirrored(op: str, logits: Tensor) -> Lesson:
    """Each half of the rows teaches the other; the weight 2 makes the mean over all rows two means over halves."""
    if logits.shape[0] % 2:
        raise ValueError(f"{op}: the rows must be [first views | second views], an even number, got {logits.shape[0]}")
    half = logits.shape[0] // 2
    return Lesson("logits", logits.detach().roll(half, 0), weight=2.0)


def ps_lesson(past: Tensor, schedule: float = 1.0) -> Lesson:
    """Past probabilities as teacher, with their entropy, so that the value is the soft-target cross entropy."""
    past = past.detach().to(compute_dtype(past.dtype))
    return Lesson("probabilities", past, entropy=-torch.xlogy(past, past).sum(1), schedule=schedule)


def ranked(logits: Tensor, target: Tensor, power: float = 1.0, ignore_index: int = -100) -> Lesson:
    """Zipf's teacher: ``rank^-power`` on the wrong classes; the student is the logits without the right class."""
    check_scalar("zipf_loss", "power", power, positive=False)
    if target.dim() != 1 or logits.shape[1] < 2:
        raise ValueError(
            f"zipf_loss: needs labels (B,) and at least 2 classes, got {target.dim()}-d target, C = {logits.shape[1]}"
        )
    classes = logits.shape[1]
    at = target.long().clamp(0, classes - 1)[:, None]
    with torch.no_grad():
        z = logits.detach().to(compute_dtype(logits.dtype)).contiguous()
        larger = classes - torch.searchsorted(z.sort(1).values, z, right=True)  # ties share the smallest rank
        # By logarithms: a large power leaves nothing of rank 2 and more, and rank 1 may be the right class.
        share = -power * (1.0 + larger).to(z.dtype).log()
        teacher = share.scatter(1, at, -math.inf).softmax(1)
    right = torch.zeros_like(logits, dtype=torch.bool).scatter(1, at, True)
    return Lesson("probabilities", teacher, mask=target != ignore_index, student=logits.masked_fill(right, -math.inf))
