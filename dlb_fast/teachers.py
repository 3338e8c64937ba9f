"""Who teaches. A teacher gives the kernel a kind and a tensor, and keeps whatever it has to remember.

A new kind of teacher is one class here or anywhere else, and one card in ``docs/methods``: subclass :class:`Teacher`,
write ``teach``, hand an instance to ``TaughtLoss``. No teacher has a kernel of its own: :func:`taught_loss` is the one
road from a :class:`Lesson` to the implementations.
"""

# ruff: noqa: B027  (a teacher's hooks may stay empty; only `teach` has to be written)

from __future__ import annotations

import abc
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import _check
from .functional import Scalar, check_loss_inputs, row_loss

__all__ = ["Lesson", "NoTeacher", "Scene", "Teacher", "VirtualTeacher", "taught_loss"]

NEEDS = frozenset({"ids", "images", "epoch"})


class Scene(NamedTuple):
    """What a teacher may look at: this batch, before the step. Everything beyond the logits may be None."""

    logits: Tensor  # (B, C), with their graph: detach what is kept
    target: Tensor | None  # (B,) labels or (B, C)
    temperature: Scalar
    ids: Tensor | None = None  # (B,) sample ids
    images: Tensor | None = None  # (B, ...) what the model was given
    epoch: int | None = None  # epoch in which the rows were drawn
    ignore_index: int = -100


class Lesson(NamedTuple):
    """What the kernel gets.

    ``kind``: ``"none"`` (plain cross entropy), ``"logits"`` (tempered together with the student), ``"probabilities"``
    (used as they are) or ``"virtual"`` (nothing is read: uniform, or ``correct_share`` on the right class and the rest
    even). The teacher's rows are the first rows of the batch.
    """

    kind: str
    tensor: Tensor | None = None  # (H, C), H <= rows
    correct_share: float | None = None
    mask: Tensor | None = None  # (H,) bool, False takes a row out of the KL
    rows: int | None = None  # only the first rows learn (CS-KD: the others only taught); None: all
    student: Tensor | None = None  # logits the KL looks at instead of the batch's (Zipf: without the right class)
    entropy: Tensor | None = None  # (H,) added to the KL: the value is then the cross entropy with the teacher
    weight: float = 1.0  # > 0, times the KL
    schedule: float = 1.0  # times alpha, wherever alpha stands (PS-KD: grows over the epochs)


class Teacher(abc.ABC):
    """One way to teach. Only ``teach`` has to be written.

    A criterion calls, in this order: ``attach(model)`` once; ``teach(scene)`` and then ``observe(scene)`` for every
    batch in training, ``observe`` to remember it; ``update()`` after every optimiser step. Evaluation touches nothing.
    What a continuation depends on belongs into ``state_dict``: tensors, numbers, text, lists and dicts.

    Attributes:
        needs: what it looks at beyond logits and target: any of ``ids``, ``images``, ``epoch``. A criterion refuses a
            batch without it.

    Example:
        >>> class Shy(Teacher):                       # p(teacher) = the batch's mean distribution
        ...     def teach(self, scene):
        ...         mean = scene.logits.detach().softmax(1).mean(0, keepdim=True)
        ...         return Lesson("probabilities", mean.expand(scene.logits.shape))
    """

    needs: frozenset[str] = frozenset()

    def attach(self, model: nn.Module) -> None:
        """Called once with the model before training; for teachers that look into it."""

    @abc.abstractmethod
    def teach(self, scene: Scene) -> Lesson:
        """The lesson of this batch."""

    def observe(self, scene: Scene) -> None:
        """Remember the batch, after its loss was computed; without gradient."""

    def update(self) -> None:
        """Called after every optimiser step."""

    def reset(self) -> None:
        """Forget everything."""

    def state_dict(self) -> dict[str, Any]:
        """What a continuation depends on; tensors on the CPU."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()``."""

    def cost(self) -> str:
        """One line on what is kept and what a step costs beside plain cross entropy; shown before training."""
        return "no state, no extra forward"


class NoTeacher(Teacher):
    """Plain cross entropy.

    >>> NoTeacher().teach(Scene(torch.zeros(2, 3), None, 1.0)).kind
    'none'
    """

    def teach(self, scene: Scene) -> Lesson:
        return Lesson("none")


class VirtualTeacher(Teacher):
    """The teacher nobody trained: uniform, or ``correct_share`` on the right class and the rest even.

    Computed in registers; no tensor exists. LsrKD, teacher correction, label smoothing and Tf-KD's regularisation are
    settings of it (``docs/methods/lsrkd.md``). Source: Wang et al., arXiv 2009.05226 (abstract; a reconstruction).

    Args:
        correct_share: in [0, 1], or None for the uniform teacher.
        kl_weight: > 0, times the KL but not the CE.

    >>> VirtualTeacher(0.9).teach(Scene(torch.zeros(2, 3), torch.tensor([0, 1]), 1.0))[:3]
    ('virtual', None, 0.9)
    """

    def __init__(self, correct_share: float | None = None, kl_weight: float = 1.0) -> None:
        check_share("VirtualTeacher", correct_share)
        self.correct_share, self.kl_weight = correct_share, kl_weight

    def teach(self, scene: Scene) -> Lesson:
        return Lesson("virtual", correct_share=self.correct_share, weight=self.kl_weight)


def check_share(op: str, correct_share: float | None) -> None:
    """None or a number in [0, 1]."""
    if correct_share is None:
        return
    if isinstance(correct_share, bool) or not isinstance(correct_share, (int, float)) or not 0 <= correct_share <= 1:
        raise ValueError(f"{op}: correct_share must be None (uniform) or a number in [0, 1], got {correct_share!r}")


def taught_loss(
    op: str,
    logits: Tensor,
    target: Tensor | None,
    lesson: Lesson,
    *,
    alpha: Scalar,
    temperature: Scalar,
    ce_weight: float = 1.0,
    ce_alpha: float = 0.0,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``(ce_weight + ce_alpha * a) * CE + a * lesson.weight * tau^2 * mean KL(teacher || z)``: loss and parts.

    ``a`` is ``alpha * lesson.schedule``. Without a teacher (kind ``none``) it is the plain cross entropy, whatever the
    weights. ``parts`` are ``loss, ce, lb, correct``, detached. Raises as ``fused_lb_loss`` does.

    >>> z, y = torch.zeros(2, 4), torch.tensor([0, 1])
    >>> round(taught_loss("demo", z, y, Lesson("virtual"), alpha=0.1, temperature=1.0)[0].item(), 4)
    1.3863
    """
    check_loss_inputs(
        op, logits, target, alpha=alpha, temperature=temperature, label_smoothing=label_smoothing, weight=weight,
        reduction=reduction,
    )  # fmt: skip
    if lesson.rows is not None:
        logits, target = logits[: lesson.rows], None if target is None else target[: lesson.rows]
    if lesson.weight <= 0:
        raise ValueError(f"{op}: a lesson's weight must be > 0, got {lesson.weight}; give Lesson('none') for no lesson")
    if lesson.tensor is not None:
        _check.check_teacher(op, logits, lesson.tensor)
        if lesson.mask is not None:
            _check.check_kd_mask(op, logits, lesson.mask, lesson.tensor.shape[0])
    if lesson.correct_share is not None:
        check_share(op, lesson.correct_share)
        if target is None or target.dim() != 1:
            raise ValueError(f"{op}: correct_share needs labels (B,) to know the right class; got no or dense targets")
    elif target is None and lesson.kind == "none":
        raise ValueError(f"{op}: target is None and there is no teacher; nothing is left to compute")
    shared: dict[str, Any] = {"impl": impl, "ignore_index": ignore_index, "reduction": reduction}
    ce: dict[str, Any] = {"label_smoothing": label_smoothing, "weight": weight}
    if lesson.kind == "none":
        return row_loss(op, logits=logits, target=target, **shared, **ce)
    _check.check_ce_share(op, alpha, ce_weight, ce_alpha)
    alpha = alpha * lesson.schedule
    kd_alpha = alpha * lesson.weight
    kd: dict[str, Any] = {
        "teacher": lesson.tensor, "teacher_kind": lesson.kind, "correct_share": lesson.correct_share,
        "kd_mask": lesson.mask, "temperature": temperature, "alpha": kd_alpha,
    }  # fmt: skip
    if lesson.student is None:
        rate = ce_alpha / lesson.weight  # the kernel scales its CE by ce_weight + ce_alpha * (the KL's weight)
        loss, parts = row_loss(
            op, logits=logits, target=target, ce_weight=ce_weight, ce_alpha=rate, **kd, **shared, **ce
        )
    else:
        first, counts = row_loss(op, logits=logits, target=target, **shared, **ce)
        kd_loss, kd_parts = row_loss(op, logits=lesson.student, target=None, **kd, **shared)
        factor = ce_weight + ce_alpha * alpha
        loss = factor * first + kd_loss
        with torch.no_grad():
            whole = factor * counts[0] + kd_parts[0]
            parts = torch.stack([whole, counts[1], kd_parts[2], counts[3]])
    if lesson.entropy is not None:
        extra = kd_alpha * _reduced(lesson.entropy, lesson, logits.shape[0], reduction)
        loss = loss + extra.to(loss.dtype)
        parts = parts[:4].clone()  # the op keeps its own for the backward
        parts[0] += extra.sum()
    return loss, parts


def _reduced(rows: Tensor, lesson: Lesson, batch: int, reduction: str) -> Tensor:
    """(H,) constants reduced as the kernel reduces its KL rows."""
    if lesson.mask is not None:
        rows = torch.where(lesson.mask, rows, torch.zeros_like(rows))
    if reduction == "sum":
        return rows.sum()
    if reduction == "none":
        return torch.cat([rows, rows.new_zeros(batch - rows.shape[0])])
    count = rows.shape[0] if lesson.mask is None else lesson.mask.sum()
    return rows.sum() / torch.as_tensor(count, device=rows.device).clamp(min=1)
