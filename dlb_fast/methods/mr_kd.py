"""MrKD: copies of the model along its own training are the teacher.

    L = (1 - alpha) CE + alpha * tau^2 * mean KL(1/K sum_k softmax(c_k / tau) || softmax(z / tau))

``c_k`` are the logits of K past copies. The gradient is that of averaging the K losses. ``correct_share`` (teacher
correction): the right class of the averaged teacher gets this probability and the others are scaled to the rest.
``swap`` (knowledge adjustment): in every copy the logits of its largest and of the right class change places.
``ensemble_lr``: a fully connected layer over the copies' logits in place of their average; it starts as the average
and takes one SGD step of cross entropy per batch. A copy whose logits of a row are not finite does not teach the row.

Source: Wang et al., arXiv 2009.05226; Sensors 2021, 21(8), 2792. A **reconstruction** from the abstracts in every
part; the numbers are ours. Copies are evaluated in eval mode (their own BatchNorm statistics, no dropout): our choice.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._args import (
    as_int,
    as_number,
    check_correct_share,
    check_device,
    check_dtype,
    check_ignore_index,
    check_logits,
    check_same_device,
    check_target,
    check_temperature,
    check_tensor,
)
from ..buffer import from_bytes, split_bytes, to_bytes
from ..functional import LossParts, Teacher, distill
from ..losses import DistillationLoss, Inputs
from ..reference import Scalar, compute_dtype, finite_rows, teacher_kl
from ._common import autocast, chosen, format_bytes, labels
from .registry import Method, register

__all__ = ["MrKDLoss", "WeightSnapshots", "mr_kd_loss", "reference"]

ALPHA, TEMPERATURE, COPIES, COPY_EVERY = 0.5, 3.0, 2, 100  # ours: the papers' numbers were not available
STEPLESS = 100  # batches without a step() after which a loop is warned; more than gradient accumulation takes


@torch.no_grad()
def average(
    copies_logits: Tensor,
    target: Tensor | None,
    temperature: Scalar,
    correct_share: float | None = None,
    swap: bool = False,
    ignore_index: int = -100,
) -> Tensor:
    """The averaged distribution (B, C) of copies' logits (K, B, C); rows with an ignored label are not adjusted.

    The average is over the copies whose logits of the row are finite; NaN where there is none.
    """
    z = copies_logits.to(compute_dtype(copies_logits.dtype))
    finite = z.amax(-1, keepdim=True).isfinite()

    def mean_of(z: Tensor) -> Tensor:
        shares = torch.softmax(z / temperature, -1).masked_fill(~finite, 0.0)
        return shares.sum(0) / finite.sum(0)

    if not swap and correct_share is None:
        return mean_of(z)
    assert target is not None
    classes = z.shape[-1]
    known = ((target >= 0) & (target < classes) & (target != ignore_index))[:, None]
    label = target.long().clamp(0, classes - 1)[:, None]
    if swap:
        index = label.expand(z.shape[0], *label.shape)
        largest, where = z.max(-1, keepdim=True)
        swapped = z.scatter(-1, where, z.gather(-1, index)).scatter(-1, index, largest)
        z = torch.where(known, swapped, z)
    mean = mean_of(z)
    if correct_share is not None:
        rest = mean.scatter(1, label, 0.0)
        total = rest.sum(1, keepdim=True)
        equal = torch.full_like(rest, 1.0 / max(classes - 1, 1)).scatter(1, label, 0.0)
        rest = torch.where(total > 0, rest / total, equal)  # a copy that is certain leaves nothing to scale
        corrected = ((1.0 - correct_share) * rest).scatter(1, label, correct_share)
        mean = torch.where(known & finite.any(0), corrected, mean)
    return mean


def mr_kd_loss(
    logits: Tensor,
    target: Tensor,
    copies_logits: Tensor,
    *,
    alpha: Scalar = ALPHA,
    temperature: Scalar = TEMPERATURE,
    correct_share: float | None = None,
    swap: bool = False,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    kd_mask: Tensor | None = None,
    target_b: Tensor | None = None,
    lam: Scalar | None = None,
    reduction: str = "mean",
    impl: str = "auto",
    return_parts: bool = False,
) -> Any:
    """MrKD: ``(1 - alpha) CE + alpha tau^2 KL(mean_k softmax(c_k / tau) || softmax(z / tau))``, K copies of the model.

    Args:
        logits: ``(B, C)``.
        target: ``(B,)`` labels; without ``swap`` and ``correct_share`` also ``(B, C)`` probabilities.
        copies_logits: ``(K, B, C)``, K >= 1, detached here.
        alpha: weight of the KL in ``[0, 1]``.
        temperature: tau > 0 of both distributions; a gradient of tau is that of the student's part.
        correct_share: teacher correction, the probability of the right class in ``[0, 1]``; None: none.
        swap: knowledge adjustment.

    The other options, the result and the errors are those of :func:`~dlb_fast.distillation_loss`.
    Source: arXiv 2009.05226 and Sensors 2021, 21(8), 2792: a **reconstruction** (see the module).

    >>> z, y = torch.zeros(2, 4), torch.tensor([0, 1])
    >>> round(mr_kd_loss(z, y, z[None]).item(), 4) == round(0.5 * 1.386294, 4)
    True
    """
    op = "mr_kd_loss"
    check_logits(op, logits, target)
    check_tensor(op, "copies_logits", copies_logits)
    correct_share, temperature = check_correct_share(op, correct_share), check_temperature(op, temperature)
    ignore_index = check_ignore_index(op, ignore_index)
    check_same_device(op, "copies_logits", copies_logits, logits)
    if not copies_logits.is_floating_point():
        raise TypeError(f"{op}: copies_logits must be floating point, got {copies_logits.dtype}")
    if copies_logits.dim() != 3 or copies_logits.shape[0] < 1 or copies_logits.shape[1:] != logits.shape:
        raise ValueError(
            f"{op}: copies_logits must have shape (K, {', '.join(map(str, logits.shape))}) with K >= 1, "
            f"got {tuple(copies_logits.shape)}"
        )
    if target is not None:
        target = check_target(op, logits, target)
    if swap or correct_share is not None:
        labels(op, target, target_b, "swap and correct_share know the right class")
    averaged = average(copies_logits, target, temperature, correct_share, swap, ignore_index)
    loss, parts = distill(
        op, logits, target, Teacher("probabilities", averaged), alpha=alpha, temperature=temperature, ce_alpha=-1.0,
        label_smoothing=label_smoothing, weight=weight, ignore_index=ignore_index, kd_mask=kd_mask, target_b=target_b,
        lam=lam, reduction=reduction, impl=impl,
    )  # fmt: skip
    return (loss, LossParts.unpack(parts)) if return_parts else loss


def ensembled(copies: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Logits (B, C) of the ensemble ``weight`` (C, K * C), ``bias`` (C,) over the copies' logits (K, B, C)."""
    with autocast(copies, enabled=False):
        return copies.transpose(0, 1).flatten(1) @ weight.T + bias


class WeightSnapshots:
    """The last ``copies`` snapshots of a model's weights and buffers, evaluated without gradient.

    ``step()`` counts optimiser steps and takes a snapshot every ``copy_every`` of them, over the oldest one once there
    are ``copies``. A snapshot is evaluated by ``torch.func.functional_call``, so the model itself is never touched.

    Args:
        copies: how many are kept.
        copy_every: optimiser steps between two.
        dtype: storage dtype of floating weights (torch.bfloat16 halves them); None: that of the model.
        device: where to keep them ("cpu" saves device memory and pays a transfer per step); None: beside the model.

    Raises:
        ValueError: counts below 1, an unknown device. RuntimeError: used before ``setup(model)``.
    """

    def __init__(
        self,
        copies: int = COPIES,
        copy_every: int = COPY_EVERY,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.copies = as_int(copies, "WeightSnapshots", "copies", 1)
        self.copy_every = as_int(copy_every, "WeightSnapshots", "copy_every", 1)
        self.dtype, self.device = dtype, check_device("WeightSnapshots", "device", device)
        self.steps = 0
        self.kept: list[dict[str, Tensor]] = []  # a ring: snapshot number n is at n % copies
        self._model: nn.Module | None = None

    def __len__(self) -> int:
        return len(self.kept)

    def setup(self, model: nn.Module) -> None:
        """The model whose weights are kept (the one inside a DistributedDataParallel wrapper)."""
        inner = getattr(model, "module", model)
        self._model = inner if isinstance(inner, nn.Module) else model

    @property
    def model(self) -> nn.Module:
        """The model."""
        if self._model is None:
            raise RuntimeError("WeightSnapshots: no model yet; call criterion.setup(model) once before training")
        return self._model

    @property
    def ready(self) -> bool:
        """Whether ``setup(model)`` was called."""
        return self._model is not None

    @property
    def nbytes(self) -> int:
        """Bytes of all ``copies``."""
        return self.copies * sum(t.numel() * self._dtype_of(t).itemsize for t in self._tensors().values())

    def _tensors(self) -> dict[str, Tensor]:
        return {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}

    def blank(self) -> dict[str, Tensor]:
        """A snapshot of zeros, on the CPU."""
        return {
            name: torch.zeros(tensor.shape, dtype=self._dtype_of(tensor), device="cpu")
            for name, tensor in self._tensors().items()
        }

    def _dtype_of(self, tensor: Tensor) -> torch.dtype:
        return self.dtype if self.dtype is not None and tensor.is_floating_point() else tensor.dtype

    @torch.no_grad()
    def step(self) -> None:
        """Count an optimiser step; take a snapshot when one is due."""
        self.steps += 1
        if self.steps % self.copy_every:
            return
        taken = {
            name: tensor.detach().to(self.device or tensor.device, self._dtype_of(tensor), copy=True)
            for name, tensor in self._tensors().items()
        }
        position = (self.steps // self.copy_every - 1) % self.copies
        self.kept[position : position + 1] = [taken]

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Logits (K, B, C) of the K >= 1 snapshots there are."""
        model, now = self.model, self._tensors()
        with _eval_mode(model):
            return torch.stack(
                [
                    torch.func.functional_call(
                        model, {n: t.to(now[n].device, now[n].dtype) for n, t in weights.items()}, (images,)
                    )
                    for weights in self.kept
                ]
            )

    def reset(self) -> None:
        """Forget all snapshots and start counting anew."""
        self.kept, self.steps = [], 0

    def state_dict(self) -> dict[str, Any]:
        """The snapshots, on the CPU, and the count of steps, from which their order follows."""
        kept = [{name: tensor.cpu().clone() for name, tensor in weights.items()} for weights in self.kept]
        return {"steps": self.steps, "kept": kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()``; ValueError when it was saved with other ``copies`` or ``copy_every``."""
        steps, kept = state["steps"], state["kept"]
        if len(kept) != min(steps // self.copy_every, self.copies):
            raise ValueError(
                f"WeightSnapshots: {len(kept)} snapshots after {steps} steps do not fit copies={self.copies}, "
                f"copy_every={self.copy_every}; use the numbers they were saved with"
            )
        place = self.device or next(iter(self._tensors().values())).device
        self.steps = steps
        self.kept = [{name: tensor.to(place) for name, tensor in weights.items()} for weights in kept]


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode, and back to the mode of every single module (a frozen BatchNorm stays frozen)."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


class MrKDLoss(DistillationLoss):
    """MrKD as a criterion: the loss of :func:`mr_kd_loss`, with :class:`WeightSnapshots` of the model.

    The loop calls ``setup(model)`` once, passes ``images=`` with every batch and calls ``step()`` after every optimiser
    step. Until the first snapshot is due the loss is plain cross entropy; the ensemble waits until all are there. The
    copies have no gradient, and the ensemble learns by its own step only.

    Args:
        alpha: weight of the KL in [0, 1].
        temperature: of both distributions.
        copies: copies of the model.
        copy_every: optimiser steps between two copies.
        memory_dtype: how floating weights are stored; None: as in the model.
        memory_device: where the copies are stored; None: beside the model.
        correct_share: probability of the right class in the teacher (teacher correction); None: none.
        swap: exchange the copies' logits of the largest and of the right class (knowledge adjustment).
        ensemble_lr: learn a fully connected ensemble of the copies at this rate; None: their average.

    The other options are those of :class:`~dlb_fast.DistillationLoss`.

    >>> model = nn.Linear(3, 4)
    >>> criterion = MrKDLoss(copies=1, copy_every=1)
    >>> criterion.setup(model)
    >>> criterion.step()                                                       # after an optimiser step: the first copy
    >>> x = torch.randn(2, 3)
    >>> bool(criterion(model(x), torch.tensor([0, 1]), images=x) > 0)
    True
    """

    needs = frozenset({"images"})
    mixes = True
    copies_model = True
    _kept_as: ClassVar[Mapping[str, str]] = {
        "copies": "snapshots.copies",
        "copy_every": "snapshots.copy_every",
        "memory_dtype": "snapshots.dtype",
        "memory_device": "snapshots.device",
    }

    def __init__(
        self,
        *,
        alpha: Scalar = ALPHA,
        temperature: Scalar = TEMPERATURE,
        copies: int = COPIES,
        copy_every: int = COPY_EVERY,
        memory_dtype: torch.dtype | None = None,
        memory_device: torch.device | str | None = None,
        correct_share: float | None = None,
        swap: bool = False,
        ensemble_lr: float | None = None,
        label_smoothing: float = 0.0,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        impl: str = "auto",
    ) -> None:
        op = "MrKDLoss"
        correct_share = check_correct_share(op, correct_share)
        copies, copy_every = as_int(copies, op, "copies", 1), as_int(copy_every, op, "copy_every", 1)
        memory_device = check_device(op, "memory_device", memory_device)
        if memory_dtype is not None:
            check_dtype(op, "memory_dtype", memory_dtype)
        if ensemble_lr is not None:
            ensemble_lr = as_number(op, "ensemble_lr", ensemble_lr, "a learning rate > 0 or None")
            if not 0 < ensemble_lr < math.inf:
                raise ValueError(f"{op}: ensemble_lr must be a learning rate > 0 or None, got {ensemble_lr!r}")
        super().__init__(
            alpha=alpha, temperature=temperature, ce_alpha=-1.0, label_smoothing=label_smoothing, weight=weight,
            ignore_index=ignore_index, reduction=reduction, impl=impl,
        )  # fmt: skip
        self.snapshots = WeightSnapshots(copies, copy_every, memory_dtype, memory_device)
        self.correct_share, self.swap, self.ensemble_lr = correct_share, swap, ensemble_lr
        # The ensemble's weight (C, K * C) and bias (C,), and what they were before the batch recorded last.
        self._ensemble: tuple[Tensor, Tensor] | None = None
        self._ensemble_before: tuple[Tensor, Tensor] | None = None
        # Of this batch, for the ensemble's step: the copies' logits, and the ensemble that it met.
        self._met: tuple[Tensor, tuple[Tensor, Tensor]] | None = None
        self._classes = 0  # of the ensemble; 0 before the first batch and without an ensemble
        self._without_step = 0  # batches recorded before any step()

    def setup(self, model: nn.Module) -> None:
        self.snapshots.setup(model)

    def teacher(self, inputs: Inputs) -> Teacher:
        target = inputs.target
        if self.swap or self.correct_share is not None or self.ensemble_lr is not None:
            target = labels(
                "MrKDLoss", target, inputs.target_b, "swap, correct_share and ensemble_lr know the right class"
            )
        _ = self.snapshots.model  # refused without setup(), also while no copy is due
        self._met = None
        if not len(self.snapshots):
            return Teacher("none")
        assert inputs.images is not None
        logits = inputs.logits
        half = logits.dtype in (torch.bfloat16, torch.float16)
        with autocast(logits, dtype=logits.dtype if half else None, enabled=half):
            copies = self.snapshots.logits(inputs.images)
        if self.ensemble_lr is not None and len(self.snapshots) == self.snapshots.copies:
            copies = copies.to(compute_dtype(copies.dtype))
            ensemble = self._ensemble_for(copies, inputs.again)
            if torch.is_grad_enabled():
                self._met = copies, ensemble
            copies = ensembled(copies, *ensemble)[None]
        averaged = average(copies, target, inputs.temperature, self.correct_share, self.swap, inputs.ignore_index)
        return Teacher("probabilities", averaged)

    def _ensemble_for(self, copies: Tensor, again: bool | Tensor) -> tuple[Tensor, Tensor]:
        """The ensemble that teaches this batch; a new one is the average of the copies."""
        now, before = self._ensemble, self._ensemble_before
        if now is None:
            count, _, classes = copies.shape
            eye = torch.eye(classes, dtype=copies.dtype, device=copies.device)
            return eye.repeat(1, count) / count, torch.zeros_like(eye[0])
        weight, bias = now if before is None else (chosen(again, *pair) for pair in zip(before, now, strict=True))
        return weight.to(copies), bias.to(copies)

    def record(self, inputs: Inputs) -> None:
        """One SGD step of the ensemble by cross entropy; ignored labels and logits not finite do not count."""
        self._warn_without_step()
        if self.ensemble_lr is not None:
            self._classes = inputs.logits.shape[1]
        met, self._met, self._ensemble_before = self._met, None, None
        if met is None or self.ensemble_lr is None or inputs.target is None:
            return
        copies, (weight, bias) = met
        target, classes = inputs.target, bias.shape[0]
        own = ensembled(copies, weight, bias)
        known = (target >= 0) & (target < classes) & (target != inputs.ignore_index) & finite_rows(own)
        label = target.long().clamp(0, classes - 1)[:, None]
        error = torch.softmax(own, 1).scatter_add(1, label, -torch.ones_like(label, dtype=bias.dtype))
        error = error.masked_fill(~known[:, None], 0.0) / known.sum().clamp(min=1)  # gradient of the mean cross entropy
        rows = copies.masked_fill(~known[:, None], 0.0).transpose(0, 1).flatten(1)
        with autocast(rows, enabled=False):
            step = error.T @ rows
        self._ensemble_before = weight, bias
        self._ensemble = weight - self.ensemble_lr * step, bias - self.ensemble_lr * error.sum(0)

    def _warn_without_step(self) -> None:
        """A loop that never calls step() would train on plain cross entropy unnoticed."""
        if self._without_step < 0 or self.snapshots.steps:
            return
        self._without_step += 1
        if self._without_step == STEPLESS:
            self._without_step = -1
            warnings.warn(
                f"MrKDLoss: {STEPLESS} batches and no criterion.step(), so there is no copy of the model and the loss "
                "is plain cross entropy; call criterion.step() after every optimiser step",
                stacklevel=2,
            )

    def step(self) -> None:
        super().step()
        self.snapshots.step()

    def reset(self) -> None:
        super().reset()
        self.snapshots.reset()
        self._ensemble = self._ensemble_before = self._met = None
        self._classes = 0

    def cost(self) -> str:
        kept = self.snapshots
        where = f" on {kept.device}" if kept.device is not None else ""
        return (
            f"{kept.copies} copies of the model, {format_bytes(kept.nbytes)}{where}, one every {kept.copy_every} "
            f"steps; {kept.copies} forwards without gradient per step more"
        )

    def get_extra_state(self) -> Tensor:
        """Copies and ensemble for ``state_dict()``, as one uint8 tensor; empty before ``setup(model)``.

        Its size follows from the model and ``copies``, with ``ensemble_lr`` also from the classes of the first batch.
        """
        snapshots, classes = self.snapshots, self._classes
        if not snapshots.ready:
            return torch.empty(0, dtype=torch.uint8, device="cpu")
        kept = snapshots.state_dict()["kept"]
        kept += [snapshots.blank()] * (snapshots.copies - len(kept))
        tensors = [tensor for weights in kept for tensor in weights.values()]
        if classes:
            blank = torch.zeros(snapshots.copies, 1, classes, dtype=torch.float64, device="cpu")
            tensors += [tensor.to(torch.float64) for tensor in self._ensemble or self._ensemble_for(blank, False)]
        return to_bytes([snapshots.steps, snapshots.copies, snapshots.copy_every, classes], tensors)

    def set_extra_state(self, state: Tensor) -> None:
        """Take over saved copies and their ensemble."""
        if not isinstance(state, Tensor):
            raise ValueError(f"MrKDLoss: expected saved copies, a uint8 tensor, got {type(state).__name__}")
        if state.numel() == 0:  # saved before setup(model)
            self.reset()
            return
        (steps, copies, copy_every, classes), packed = from_bytes(state, 4)
        snapshots, ensemble_shapes = self.snapshots, [(classes, copies * classes), (classes,)] if classes else []
        blank = snapshots.blank()
        forms = [(tuple(like.shape), like.dtype) for like in blank.values()] * copies
        *tensors, rest = split_bytes(packed, [*forms, *((shape, torch.float64) for shape in ensemble_shapes)])
        if len(rest):
            raise ValueError(f"MrKDLoss: the saved copies have {len(rest)} bytes more than copies of this model")
        each = len(blank)
        kept = [dict(zip(blank, tensors[i * each : (i + 1) * each], strict=True)) for i in range(copies)]
        snapshots.load_state_dict({"steps": steps, "kept": kept[: min(steps // copy_every, copies)]})
        super().reset()
        self._classes, self._ensemble_before, self._met = classes, None, None
        self._ensemble = (tensors[-2], tensors[-1]) if classes else None


def reference_teacher(
    copies_logits: Tensor,
    target: Tensor,
    *,
    temperature: float,
    correct_share: float | None = None,
    swap: bool = False,
) -> Tensor:
    """The teacher's definition (B, C), copy by copy and row by row."""
    rows = []
    for logits in copies_logits:
        if swap:
            logits = logits.clone()
            for i, y in enumerate(target.tolist()):
                top = int(logits[i].argmax())
                logits[i, y], logits[i, top] = logits[i, top].clone(), logits[i, y].clone()
        rows.append(torch.softmax(logits / temperature, 1))
    mean = torch.stack(rows).mean(0)
    if correct_share is not None:
        hot = F.one_hot(target, mean.shape[1]).to(mean.dtype)
        rest = mean * (1.0 - hot)
        mean = correct_share * hot + (1.0 - correct_share) * rest / rest.sum(1, keepdim=True)
    return mean


def reference(
    logits: Tensor,
    target: Tensor,
    copies_logits: Tensor,
    *,
    alpha: float = ALPHA,
    temperature: float = TEMPERATURE,
    correct_share: float | None = None,
    swap: bool = False,
) -> Tensor:
    """The definition."""
    teacher = reference_teacher(copies_logits, target, temperature=temperature, correct_share=correct_share, swap=swap)
    return (1.0 - alpha) * F.cross_entropy(logits, target) + alpha * teacher_kl(teacher, logits, temperature)


register(
    Method(
        "mr_kd",
        MrKDLoss,
        "MrKD: copies of the model along its training",
        card="mrkd",
        one_class=("correct_share", "swap", "ensemble_lr"),
        variants={"mr_kd": ("MrKD", {})},
    )
)
