"""PS-KD: the teacher of a sample is what the model predicted when it saw the sample last.

    L = CE(z, (1 - a) y + a p),    a = alpha * (epoch + 1) / epochs

``p`` is the stored prediction (of another augmentation, not softened); a sample that was not seen yet has its label as
teacher, and so has one whose last logits were not finite. The loss is computed as
``(1 - a) CE + a [KL(p || softmax(z)) + H(p)]``, which is the same value and gradient.

Source: **official** code lgcnsai/PS-KD-Pytorch, `loss/pskd_loss.py` and `main.py` (Kim et al., ICCV 2021).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._args import as_int, check_device, check_dtype, check_ignore_index, check_logits, check_rows, check_target
from ..functional import LossParts, Teacher, distill
from ..losses import Inputs
from ..reference import Scalar, compute_dtype
from ._common import labels
from .bank import BankLoss, SampleBank
from .registry import Method, register

__all__ = ["LogitBank", "PsKDLoss", "ps_kd_loss", "reference"]

ALPHA = 0.8  # official code: alpha_T, linear in the epoch
MEMORY_DTYPE = torch.float16  # ours; the official code keeps float32 probabilities on the host


def _past_predictions(past: Tensor) -> Teacher:
    return Teacher("probabilities", past.detach().to(compute_dtype(past.dtype)), add_entropy=True)


def ps_kd_loss(
    logits: Tensor,
    target: Tensor,
    past: Tensor,
    *,
    alpha: Scalar = ALPHA,
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
    """PS-KD: ``CE(z, (1 - alpha) y + alpha p)``, ``p`` the model's own prediction when it saw the sample last.

    Args:
        logits: ``(B, C)``.
        target: ``(B,)`` labels or ``(B, C)`` probabilities; a row with an ignored label has no loss.
        past: ``(B, C)`` **probabilities** (not logits), detached here; a row that is not finite teaches nothing.
        alpha: in ``[0, 1]``; the official code has ``0.8 (epoch + 1) / epochs``.

    The other options, the result and the errors are those of :func:`~dlb_fast.distillation_loss`.
    Source: **official** code lgcnsai/PS-KD-Pytorch.

    >>> z, y = torch.zeros(1, 4), torch.tensor([1])
    >>> round(ps_kd_loss(z, y, torch.tensor([[0.1, 0.7, 0.1, 0.1]])).item(), 4) == round(1.386294, 4)
    True
    """
    op = "ps_kd_loss"
    check_logits(op, logits, target)
    teacher = _past_predictions(check_rows(op, "past", past, logits))
    ignore_index = check_ignore_index(op, ignore_index)
    for name, given in (("target", target), ("target_b", target_b)):
        if given is not None and (checked := check_target(op, logits, given, name)).dim() == 1:
            known = checked != ignore_index
            teacher = teacher._replace(mask=known if teacher.mask is None else teacher.mask & known)
    loss, parts = distill(
        op, logits, target, teacher, alpha=alpha, temperature=1.0, ce_alpha=-1.0,
        label_smoothing=label_smoothing, weight=weight, ignore_index=ignore_index, kd_mask=kd_mask, target_b=target_b,
        lam=lam, reduction=reduction, impl=impl,
    )  # fmt: skip
    return (loss, LossParts.unpack(parts)) if return_parts else loss


class LogitBank(SampleBank):
    """The last prediction for every sample of a set: ``(num_samples, C)`` log-probabilities by sample id.

    Log-probabilities rather than logits, because the classes that matter lie near 0, where float16 is finest (relative
    error of a probability ``p``: ``5e-4 |log p|``). float16 takes ``2 * num_samples * C`` bytes.

    Args:
        num_samples: samples of the whole set; ids are in ``[0, num_samples)``.
        num_classes: ``C``.
        dtype: storage dtype.
        device: where to keep it; None: beside the logits when it takes at most a quarter of that device's free memory,
            else on the host (rows then travel every step).

    Raises:
        ValueError: sizes below 1, an unknown device. An id outside the bank is an IndexError on a CPU (a ValueError of
            :class:`PsKDLoss`) and an error of the device on a GPU.

    Source of the idea: ``all_predictions`` of the official code.

    >>> bank = LogitBank(num_samples=4, num_classes=2)
    >>> bank.store(torch.tensor([2]), torch.tensor([[0.0, 0.0]]))
    >>> rows, seen = bank.rows(torch.tensor([2, 0]), "cpu")
    >>> rows[0].exp().tolist(), seen.tolist()
    ([0.5, 0.5], [True, False])
    """

    def __init__(
        self,
        num_samples: int,
        num_classes: int,
        dtype: torch.dtype = MEMORY_DTYPE,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(num_samples, num_classes, dtype, device)

    @torch.no_grad()
    def store(self, ids: Tensor, logits: Tensor, keep: Tensor | None = None) -> None:
        """Replace the rows of these samples by ``log_softmax(logits)``; of repeated ids the last one counts.

        A row that is not finite (NaN, infinite, or -inf for every class) leaves the bank as it is.

        Args:
            ids: ``(n,)`` integer sample ids.
            logits: ``(n, C)``.
            keep: ``(n,)`` bool, False leaves the bank as it is; decided on the device, without a synchronisation.
        """
        logits = logits.detach().to(compute_dtype(logits.dtype))
        super().store(ids, torch.log_softmax(logits, 1), keep)


class PsKDLoss(BankLoss):
    """PS-KD as a criterion: the loss of :func:`ps_kd_loss`, with a :class:`LogitBank` of past predictions.

    Every training batch needs ``ids``, and ``epoch`` unless ``epochs`` is None. ``cost()`` tells the size of the bank.
    A batch with the ids of the one before it is that batch once more (:class:`~dlb_fast.DistillationLoss`): a loop
    whose batches all have the same ids passes ``epoch`` or calls ``step()`` after every optimiser step.

    Args:
        num_samples: samples of the training set.
        num_classes: ``C``.
        alpha: weight of the past prediction at the end of the run, in [0, 1].
        epochs: of the whole run, over which the weight grows; None keeps it at alpha.
        memory_dtype: how the predictions are stored.
        memory_device: where the predictions are stored; None: beside the model, on the host when they would not fit.
        cross_rank: store the predictions of all ranks on every rank, because a sample comes back on another one; their
            batches must have equal sizes.

    The other options are those of :class:`~dlb_fast.DistillationLoss`.

    >>> criterion = PsKDLoss(num_samples=10, num_classes=4)
    >>> criterion(torch.zeros(2, 4), torch.tensor([0, 1]), torch.tensor([7, 3])).shape
    torch.Size([])
    """

    def __init__(
        self,
        num_samples: int,
        num_classes: int,
        *,
        alpha: Scalar = ALPHA,
        epochs: int | None = None,
        memory_dtype: torch.dtype = MEMORY_DTYPE,
        memory_device: torch.device | str | None = None,
        cross_rank: bool = True,
        label_smoothing: float = 0.0,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        impl: str = "auto",
    ) -> None:
        op = "PsKDLoss"
        num_samples, num_classes = as_int(num_samples, op, "num_samples", 1), as_int(num_classes, op, "num_classes", 1)
        memory_device = check_device(op, "memory_device", memory_device)
        check_dtype(op, "memory_dtype", memory_dtype)
        if epochs is not None:
            epochs = as_int(epochs, op, "epochs", 1)
        super().__init__(
            LogitBank(num_samples, num_classes, memory_dtype, memory_device), cross_rank,
            alpha=alpha, temperature=1.0, ce_alpha=-1.0, label_smoothing=label_smoothing, weight=weight,
            ignore_index=ignore_index, reduction=reduction, impl=impl,
        )  # fmt: skip
        self.epochs = epochs
        self.needs = frozenset({"ids"} if epochs is None else {"ids", "epoch"})

    def teacher(self, inputs: Inputs) -> Teacher:
        target = labels("PsKDLoss", inputs.target, inputs.target_b, "a mixed image belongs to no single sample")
        rows, seen = self.meet(inputs)
        past = torch.softmax(rows.to(compute_dtype(rows.dtype)), 1)  # float16 rows sum to 1 only nearly
        label = torch.zeros_like(past).scatter(1, target.long().clamp(0, past.shape[1] - 1)[:, None], 1.0)
        scale = 1.0
        if self.epochs is not None:
            assert inputs.epoch is not None
            scale = min((inputs.epoch + 1) / self.epochs, 1.0)
        teacher = _past_predictions(torch.where(seen[:, None], past, label))
        return teacher._replace(mask=target != inputs.ignore_index, alpha_scale=scale)

    def record(self, inputs: Inputs) -> None:
        self.leave(inputs, inputs.logits)


def reference(logits: Tensor, target: Tensor, past: Tensor, *, alpha: float = ALPHA) -> Tensor:
    """The definition, in the order of the official code."""
    soft = (1.0 - alpha) * F.one_hot(target, logits.shape[1]).to(logits.dtype) + alpha * past
    return (-soft * torch.log_softmax(logits, 1)).mean(0).sum()


register(
    Method("ps_kd", PsKDLoss, "PS-KD: the sample's own last prediction", card="pskd", variants={"ps_kd": ("PS-KD", {})})
)
