"""The family as modules: one criterion around any teacher, and a named face for every published method."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import _check
from .buffer import pack_state, unpack_state
from .family_teachers import BankTeacher, BatchTeacher, CopiesTeacher, MirrorTeacher, PartnerTeacher, RankTeacher
from .functional import LossParts, Scalar, check_impl, check_loss_inputs, row_loss
from .lessons import tf_kd_share
from .memories import LogitBank
from .teachers import Scene, Teacher, VirtualTeacher, taught_loss

__all__ = [
    "BakeLoss", "CsKDLoss", "DdgsdLoss", "LsrKDLoss", "MrKDLoss", "PsKDLoss", "TaughtLoss", "TfKDRegLoss", "ZipfLoss",
]  # fmt: skip


class TaughtLoss(nn.Module):
    """A criterion around any teacher: ``loss = criterion(logits, target, ids, images=..., epoch=...)``.

    ``L = (ce_weight + ce_alpha * alpha) CE + alpha tau^2 mean KL(teacher || softmax(z / tau))``

    ``ce_alpha=-1`` gives the ``(1 - alpha) CE`` of the label-smoothing methods. In ``eval()`` it is plain cross entropy
    and the teacher is not touched. The teacher's memory is part of ``state_dict()`` through ``get_extra_state``.

    Args:
        teacher: who teaches; what it needs beyond logits and target must be passed to the call.
        alpha, temperature: numbers or 0-d tensors; may be reassigned at any time.
        label_smoothing, weight, ignore_index, reduction, impl: as in ``fused_lb_loss``.

    A loop calls ``attach(model)`` once and ``update()`` after every optimiser step; both do nothing for teachers
    without memory of the model.

    Attributes:
        parts: ``LossParts`` of the last call. teacher. counted: rows of the last batch that ``parts.correct`` is about.

    >>> criterion = TaughtLoss(VirtualTeacher(), alpha=0.1, ce_alpha=-1.0)
    >>> criterion(torch.zeros(2, 4), torch.tensor([0, 1])).shape
    torch.Size([])
    """

    weight: Tensor | None

    def __init__(
        self,
        teacher: Teacher,
        *,
        alpha: Scalar = 1.0,
        temperature: Scalar = 1.0,
        ce_weight: float = 1.0,
        ce_alpha: float = 0.0,
        label_smoothing: float = 0.0,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        impl: str = "auto",
    ) -> None:
        super().__init__()
        op = type(self).__name__
        _check.check_scalar(op, "alpha", alpha, positive=False)
        _check.check_scalar(op, "temperature", temperature, positive=True)
        _check.check_ce_share(op, alpha, ce_weight, ce_alpha)
        _check.check_options(op, label_smoothing, reduction)
        _check.check_ignore_index(op, ignore_index)
        check_impl(op, impl)
        if not isinstance(teacher, Teacher):
            raise TypeError(f"{op}: teacher must be a dlb_fast.Teacher, got {type(teacher).__name__}")
        self.teacher = teacher
        self.alpha, self.temperature = alpha, temperature
        self.ce_weight, self.ce_alpha = ce_weight, ce_alpha
        self.label_smoothing, self.ignore_index = label_smoothing, ignore_index
        self.reduction, self.impl = reduction, impl
        self.counted = 0
        self.register_buffer("weight", weight, persistent=False)
        self._parts: Tensor | None = None

    def extra_repr(self) -> str:
        return (
            f"teacher={type(self.teacher).__name__}, alpha={self.alpha}, temperature={self.temperature}, "
            f"reduction={self.reduction!r}, impl={self.impl!r}"
        )

    @property
    def parts(self) -> LossParts:
        """The terms of the last call, detached 0-d tensors on the device."""
        if self._parts is None:
            raise RuntimeError(f"{type(self).__name__}.parts: there are none before the first call of the criterion")
        return LossParts.unpack(self._parts)

    def attach(self, model: nn.Module) -> None:
        """Show the model to the teacher, once before training."""
        self.teacher.attach(model)

    def update(self) -> None:
        """Tell the teacher that an optimiser step was made."""
        self.teacher.update()

    setup, step = attach, update  # the names that the trainer calls

    def reset(self) -> None:
        """Make the teacher forget everything."""
        self.teacher.reset()

    def cost(self) -> str:
        """One line: what the teacher keeps and what it costs per step."""
        return self.teacher.cost()

    def forward(
        self,
        logits: Tensor,
        target: Tensor | None,
        ids: Tensor | None = None,
        *,
        images: Tensor | None = None,
        epoch: int | None = None,
    ) -> Tensor:
        """The loss of one batch.

        Args:
            logits: ``(B, C)``. target: as in ``fused_lb_loss``. ids: ``(B,)`` sample ids. images: what the model was
                given. epoch: the rows' epoch. The last three only matter to teachers that need them.
        """
        op = type(self).__name__
        options: dict[str, Any] = {
            "label_smoothing": self.label_smoothing, "weight": self.weight, "ignore_index": self.ignore_index,
            "reduction": self.reduction, "impl": self.impl,
        }  # fmt: skip
        if not self.training:
            if target is None:
                raise ValueError(f"{op}: target is None in eval(), where nobody teaches; nothing is left to compute")
            check_loss_inputs(
                op, logits, target, alpha=self.alpha, temperature=self.temperature, weight=self.weight,
                label_smoothing=self.label_smoothing, reduction=self.reduction,
            )  # fmt: skip
            self.counted = logits.shape[0]
            loss, self._parts = row_loss(op, logits=logits, target=target, **options)
            return loss
        if ids is not None:
            _check.check_ids(op, logits, ids)
        given = {"ids": ids, "images": images, "epoch": epoch}
        missing = sorted(name for name in self.teacher.needs if given[name] is None)
        if missing:
            wanted = " and ".join(f"{name}=" for name in missing)
            raise ValueError(f"{op}: {type(self.teacher).__name__} needs {wanted} with every batch; pass it to forward")
        scene = Scene(logits, target, self.temperature, ids, images, epoch, self.ignore_index)
        lesson = self.teacher.teach(scene)
        loss, self._parts = taught_loss(
            op, logits, target, lesson, alpha=self.alpha, temperature=self.temperature, ce_weight=self.ce_weight,
            ce_alpha=self.ce_alpha, **options,
        )  # fmt: skip
        self.counted = logits.shape[0] if lesson.rows is None else lesson.rows
        self.teacher.observe(scene)
        return loss

    def get_extra_state(self) -> Any:
        """The teacher's memory, for ``state_dict()``: a dict, which nothing copies. A teacher without memory gives an
        empty tensor, which savers that know tensors only (safetensors) can write."""
        return self.teacher.state_dict() or pack_state({})

    def set_extra_state(self, state: Any) -> None:
        """Give the teacher its memory back."""
        self.teacher.load_state_dict(unpack_state(state))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        *rest: Any,
    ) -> None:  # fmt: skip
        """As torch does, but a teacher without memory misses none in weights saved without it."""
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *rest)
        key = prefix + "_extra_state"
        if key in missing_keys and type(self.teacher).state_dict is Teacher.state_dict:
            missing_keys.remove(key)


class LsrKDLoss(TaughtLoss):
    """LsrKD, and teacher correction with ``correct_share``: see ``lsr_kd_loss`` (a **reconstruction**).

    >>> LsrKDLoss(alpha=0.1, temperature=2.0)(torch.zeros(2, 4), torch.tensor([0, 1])).shape
    torch.Size([])
    """

    def __init__(
        self, *, alpha: Scalar = 0.1, temperature: Scalar = 1.0, correct_share: float | None = None, **options: Any
    ) -> None:
        super().__init__(
            VirtualTeacher(correct_share), alpha=alpha, temperature=temperature, ce_alpha=-1.0, **options
        )


class TfKDRegLoss(TaughtLoss):
    """Tf-KD's regularisation: see ``tf_kd_reg_loss`` (**official** formula).

    >>> TfKDRegLoss(num_classes=4)(torch.zeros(2, 4), torch.tensor([0, 1])).shape
    torch.Size([])
    """

    def __init__(
        self,
        num_classes: int,
        *,
        alpha: Scalar = 0.1,
        temperature: float = 20.0,
        multiplier: float = 100.0,
        share: float = 0.99,
        **options: Any,
    ) -> None:
        teacher = VirtualTeacher(tf_kd_share(num_classes, temperature, share), multiplier / num_classes)
        super().__init__(teacher, alpha=alpha, temperature=1.0, ce_alpha=-1.0, **options)


class MrKDLoss(TaughtLoss):
    """MrKD: copies of the model teach it: see ``mr_kd_loss`` and ``CopiesTeacher`` (a **reconstruction**).

    The loop calls ``attach(model)`` once, passes ``images=`` with every batch and calls ``update()`` after every
    optimiser step. Further arguments: those of ``CopiesTeacher`` (``copies, interval, dtype, device, correct_share,
    swap, ensemble``); the others go to ``TaughtLoss``.

    >>> model = nn.Linear(3, 4)
    >>> criterion = MrKDLoss(copies=1, interval=1)
    >>> criterion.attach(model)
    >>> criterion.update()                                                       # after a step: the first copy
    >>> x = torch.randn(2, 3)
    >>> bool(criterion(model(x), torch.tensor([0, 1]), images=x) > 0)
    True
    """

    def __init__(
        self,
        *,
        alpha: Scalar = 0.5,
        temperature: Scalar = 3.0,
        copies: int = 2,
        interval: int = 100,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        correct_share: float | None = None,
        swap: bool = False,
        ensemble: float | None = None,
        **options: Any,
    ) -> None:
        teacher = CopiesTeacher(
            copies, interval, dtype=dtype, device=device, correct_share=correct_share, swap=swap, ensemble=ensemble
        )
        super().__init__(teacher, alpha=alpha, temperature=temperature, ce_alpha=-1.0, **options)


class BakeLoss(TaughtLoss):
    """BAKE: the batch ensembles itself: see ``bake_loss`` (**official** formula).

    ``attach(model)`` hooks the input of the last ``nn.Linear`` (or of ``layer``); without a model pass ``features=``.

    >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4))
    >>> criterion = BakeLoss()
    >>> criterion.attach(model)
    >>> criterion(model(torch.randn(6, 3)), torch.arange(6) % 4).shape
    torch.Size([])
    """

    teacher: BatchTeacher

    def __init__(
        self,
        *,
        alpha: Scalar = 1.0,
        temperature: Scalar = 4.0,
        omega: float = 0.5,
        cross_rank: bool = False,
        layer: nn.Module | str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(BatchTeacher(omega, cross_rank, layer), alpha=alpha, temperature=temperature, **options)

    def forward(
        self,
        logits: Tensor,
        target: Tensor | None,
        ids: Tensor | None = None,
        *,
        features: Tensor | None = None,
        images: Tensor | None = None,
        epoch: int | None = None,
    ) -> Tensor:
        """As ``TaughtLoss``, with ``features`` (B, D) in place of the hook's."""
        self.teacher.features = features if self.training else None
        return super().forward(logits, target, ids, images=images, epoch=epoch)


class CsKDLoss(TaughtLoss):
    """CS-KD over rows ``[anchors | partners of the same classes]``: see ``cs_kd_loss`` (**official** formula).

    The partners' rows come from a forward without gradient; cross entropy counts the anchors only.

    >>> CsKDLoss()(torch.zeros(4, 4), torch.tensor([0, 1, 0, 1])).shape
    torch.Size([])
    """

    def __init__(self, *, alpha: Scalar = 1.0, temperature: Scalar = 4.0, **options: Any) -> None:
        super().__init__(PartnerTeacher(), alpha=alpha, temperature=temperature, **options)


class DdgsdLoss(TaughtLoss):
    """DDGSD over rows ``[first views | second views]``: see ``ddgsd_loss`` (third-party formula).

    >>> DdgsdLoss()(torch.zeros(4, 4), torch.tensor([0, 1, 0, 1])).shape
    torch.Size([])
    """

    def __init__(
        self, *, alpha: Scalar = 1.0, temperature: Scalar = 4.0, ce_weight: float = 1.0, **options: Any
    ) -> None:
        super().__init__(MirrorTeacher(), alpha=alpha, temperature=temperature, ce_weight=ce_weight, **options)


class PsKDLoss(TaughtLoss):
    """PS-KD: every sample is taught by its own last prediction: see ``ps_kd_loss`` (**official** formula).

    Args:
        num_samples, num_classes: of the training set; they size the ``LogitBank``, which ``cost()`` tells.
        alpha: the weight at the end (``a_T``). epochs: of the run, for its growth; None keeps it constant.
        dtype, device: of the bank. cross_rank: as in ``BankTeacher``.

    Every call needs ``ids``, and ``epoch`` unless ``epochs`` is None.

    >>> criterion = PsKDLoss(num_samples=10, num_classes=4)
    >>> criterion(torch.zeros(2, 4), torch.tensor([0, 1]), torch.tensor([7, 3])).shape
    torch.Size([])
    """

    def __init__(
        self,
        num_samples: int,
        num_classes: int,
        *,
        alpha: Scalar = 0.8,
        epochs: int | None = None,
        dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
        cross_rank: bool = False,
        **options: Any,
    ) -> None:
        teacher = BankTeacher(LogitBank(num_samples, num_classes, dtype, device), epochs, cross_rank)
        super().__init__(teacher, alpha=alpha, temperature=1.0, ce_alpha=-1.0, **options)


class ZipfLoss(TaughtLoss):
    """Zipf's label smoothing from the logits' ranks: see ``zipf_loss`` (**official** formula, logits only).

    >>> ZipfLoss()(torch.zeros(2, 4), torch.tensor([0, 1])).shape
    torch.Size([])
    """

    def __init__(self, *, alpha: Scalar = 0.1, power: float = 1.0, **options: Any) -> None:
        super().__init__(RankTeacher(power), alpha=alpha, temperature=1.0, **options)
