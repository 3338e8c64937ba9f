"""The losses as functions of tensors, and the one way from their arguments to an op."""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _args, _backends, ops, reference
from ._options import NUMBERS, REDUCTION, TEACHER_KIND, TENSORS
from .buffer import LogitBuffer
from .reference import Scalar


class LossParts(NamedTuple):
    """The loss and its terms, detached 0-d tensors on the device of the logits.

    ``loss`` as returned (summed for ``reduction="none"``), ``ce`` and ``lb`` the two terms without their weights,
    ``correct`` the number of rows whose label has the largest logit (a tie counts; 0 without a target).
    """

    loss: Tensor
    ce: Tensor
    lb: Tensor
    correct: Tensor

    @classmethod
    def unpack(cls, parts: Tensor) -> LossParts:
        """Views of the op's ``parts`` tensor."""
        loss, ce, lb, correct = parts[:4].unbind()
        return cls(loss, ce, lb, correct)


class TopK(NamedTuple):
    """The ``k`` largest logits of teacher rows, and how much all logits sum to: a teacher of ``k + 1`` probabilities.

    ``p_j = exp(values_j / tau - logsumexp)`` for the k classes, ``p_rest = 1 - sum_j p_j`` for all others together.
    The loss compares the student's ``q_j`` of the k classes and its ``q_rest = 1 - sum_j q_j`` with them:

    ``KL = sum_j p_j (log p_j - log q_j) + p_rest (log p_rest - log q_rest)``

    which is exact for these distributions, never negative and at most the KL to all ``C`` probabilities. The gradient
    by ``z / tau`` is ``q_c - p_c`` for the k classes and ``q_c (1 - p_rest / q_rest)`` for the others.

    ``values`` are relative to the row's largest logit, which changes no probability and keeps the digits of
    ``logsumexp``; those of a user may have any offset, if ``logsumexp`` has it too. ``logsumexp`` belongs to one
    temperature: at another tau of the loss the rest is wrong.

    Raises:
        ValueError: by ``of``, for k outside ``1 <= k <= C`` and for more than 2^24 classes.

    >>> import torch
    >>> from dlb_fast import TopK, distillation_loss
    >>> z = torch.tensor([[2.0, 0.0, 1.0, -1.0]])
    >>> top = TopK.of(z, 2, temperature=1.0)
    >>> top.indices.tolist(), top.values.tolist()
    ([[0, 2]], [[0.0, -1.0]])
    >>> abs(distillation_loss(z, None, top, kind="top_k").item()) < 1e-6
    True
    """

    values: Tensor  # (H, k) floating
    indices: Tensor  # (H, k) int64 classes, all different
    logsumexp: Tensor  # (H,) log sum_c exp(t_c / tau) over all classes

    @classmethod
    def of(cls, logits: Tensor, k: int, temperature: Scalar) -> TopK:
        """The top k of ``logits`` (H, C), detached, in float32 (float64 for float64 logits)."""
        op = "TopK.of"
        _args.check_logits(op, logits)
        k = _args.check_kept(op, k, logits.shape[1])
        temperature = _args.check_temperature(op, temperature, logits.dtype)
        options = prepare(op, reduction="none")
        logits, rows = logits.detach(), len(logits)
        if logits.is_cpu and not torch.compiler.is_compiling():
            rows = max(_PIECE // logits.shape[1], 1)  # what stays in the cache
        found = []
        with torch.no_grad():
            for piece in logits.split(max(rows, 1)):
                values, indices = _largest(piece, k)
                values = values.to(reference.compute_dtype(logits.dtype))
                tempered = piece - values[:, :1]
                tempered = tempered / temperature if isinstance(temperature, Tensor) else tempered.div_(temperature)
                # Cross entropy with the largest class for a label: log sum_c exp((t_c - max) / tau).
                log_sum, _ = row_loss(options, tempered, indices[:, 0])
                found.append((values - values[:, :1], indices, log_sum))
        return cls(*found[0]) if len(found) == 1 else cls(*map(torch.cat, zip(*found, strict=True)))

    def packed(self) -> Tensor:
        """(H, 2 k + 1) float32, or float64 with float64 values: values, indices, logsumexp, as the ops take them.

        A row whose logsumexp is not finite has NaN there, and teaches nothing.
        """
        dtype = reference.compute_dtype(self.values.dtype)
        log_sum = self.logsumexp.to(dtype)
        log_sum = torch.where(log_sum.isfinite(), log_sum, float("nan"))
        return torch.cat([self.values.to(dtype), self.indices.to(dtype), log_sum[:, None]], 1)


_PIECE = 1 << 19  # logits of TopK.of at a time


def _largest(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``rows.topk(k, 1)``. On a CPU, which sorts, of long rows only the k of 32 columns each that have the largest
    maxima: the k largest are among them."""
    width = rows.shape[1] // 32
    if width < 4 * k or not rows.is_cpu or torch.compiler.is_compiling():
        return rows.topk(k, 1)
    blocks = rows[:, : 32 * width].unflatten(1, (32, width)).amax(1).topk(k, 1, sorted=False).indices
    columns = torch.arange(rows.shape[1], device=rows.device)
    last = columns[32 * width :].expand(len(rows), -1)
    columns = torch.cat([(blocks[:, None] + width * columns[:32, None]).flatten(1), last], 1)
    values, at = rows.gather(1, columns).topk(k, 1)
    return values, columns.gather(1, at)


class Options(NamedTuple):
    """The options of a loss, checked by :func:`prepare`."""

    op: str  # the name that errors begin with
    impl: str
    alpha: Scalar
    temperature: Scalar
    ce_weight: float
    ce_alpha: float
    label_smoothing: float
    correct_share: float | None
    weight: Tensor | None
    ignore_index: int
    reduction: str
    float64_only: bool  # the temperature is too large for float32
    numbers: tuple[Any, ...]  # the floats and integers of options.h, in its order


def prepare(
    op: str,
    *,
    impl: str = "auto",
    alpha: Scalar = 1.0,
    temperature: Scalar = 3.0,
    ce_weight: float = 1.0,
    ce_alpha: float = 0.0,
    label_smoothing: float = 0.0,
    correct_share: float | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Options:
    """Check what does not depend on a batch. A module does this once and keeps the result until an option changes."""
    _args.check_impl(op, impl)
    alpha = _args.check_scalar(op, "alpha", alpha, positive=False)
    temperature = _args.check_temperature(op, temperature)
    label_smoothing = _args.check_share(op, "label_smoothing", label_smoothing)
    _args.check_reduction(op, reduction)
    ignore_index = _args.check_ignore_index(op, ignore_index)
    values = {
        "alpha": 0.0 if isinstance(alpha, Tensor) else float(alpha),
        "temperature": 0.0 if isinstance(temperature, Tensor) else float(temperature),
        "ce_weight": ce_weight,
        "ce_alpha": ce_alpha,
        "label_smoothing": label_smoothing,
        "correct_share": -1.0 if correct_share is None else correct_share,
        "ignore_index": ignore_index,
        "reduction": REDUCTION[reduction],
    }
    return Options(
        op, impl, alpha, temperature, ce_weight, ce_alpha, label_smoothing, correct_share, weight, ignore_index,
        reduction, values["temperature"] > _args.TEMPERATURES[1], tuple(map(values.get, NUMBERS)),
    )  # fmt: skip


def _rows_contiguous(value: Tensor) -> Tensor:
    """Kernels walk a row with unit stride and take any row stride."""
    return value if value.stride(1) == 1 or value.shape[1] == 1 else value.contiguous()


def _integers(value: Tensor) -> Tensor:
    """int64 where ``value`` holds integers; anything else as it is, for the op to refuse."""
    return value.long() if value.dtype in _args.INTEGERS else value


def row_loss(
    options: Options,
    logits: Tensor,
    target: Tensor | None,
    *,
    teacher: Tensor | None = None,
    teacher_kind: str = "logits",
    buffer: LogitBuffer | None = None,
    ids: Tensor | None = None,
    num_old: int | None = None,
    again: int = 0,
    kd_mask: Tensor | None = None,
    target_b: Tensor | None = None,
    lam: Scalar | None = None,
    upstream: Scalar | None = None,
) -> tuple[Tensor, Tensor]:
    """The one way to an implementation: every loss of the package ends here.

    ``(ce_weight + ce_alpha * alpha) * CE + alpha * tau^2 * KL(teacher || z)``. The teacher is a tensor, the stored rows
    of ``buffer`` (which then takes the new rows of the batch; the caller asks ``buffer.recognise`` for ``again`` and
    sets ``buffer.count`` and ``buffer.batch``), or virtual. ``logits`` are a tensor of two dimensions; ``kd_mask``,
    ``target_b`` and ``lam`` have passed their checks.

    The compiled ops check their tensors before they write anything, so they are called first; the arguments are
    examined only where the call fails, to say which one is wrong and what to do. Triton's ops and plain PyTorch check
    nothing, and neither does tracing: there the arguments are examined first.

    Returns:
        ``(loss, parts)``, or with ``upstream`` ``(loss, grad)``: the gradient times ``upstream``, without autograd.
    """
    examined = False
    try:
        if buffer is not None and torch._C._are_functorch_transforms_active():
            ops.refuse_memory(options.op)
        beyond_cuda = logits.is_cuda and _beyond_cuda(logits, teacher if buffer is None else buffer.rows)
        impl = _backends.pick(options.impl, logits.device, beyond_cuda, options.op)
        if options.float64_only and logits.dtype is not torch.float64:
            _args.check_temperature(options.op, options.temperature, logits.dtype)
        if impl != "torch" and (
            refusal := ops.unsupported(
                logits, target=target, weight=options.weight, lam=lam, alpha=options.alpha,
                temperature=options.temperature,
            )
        ):  # fmt: skip
            if options.impl != "auto":
                raise RuntimeError(f"{options.op}: impl={impl!r} {refusal} use impl='torch', plain autograd")
            impl = "torch"
        if teacher is not None and teacher_kind == "top_k":
            teacher = teacher.to(reference.compute_dtype(logits.dtype))
            impl = top_k_impl(options, impl)
        if impl not in ("cpu", "cuda") or type(logits) is not Tensor or torch.compiler.is_compiling():
            _examine(options, logits, target, target_b, teacher, teacher_kind, buffer, ids)
            examined = True
        if buffer is not None:
            teacher_kind = "logits"
        elif teacher is None and teacher_kind != "virtual":
            teacher_kind = "none"
        if impl == "torch":
            return _plain_torch(
                options, logits, target, teacher, teacher_kind, buffer, ids, num_old, again, kd_mask, target_b, lam
            )
        if teacher is not None and impl != "cpu":  # the CPU's op finds rows that are not finite by itself
            finite = reference.finite_rows(teacher)
            kd_mask = finite if kd_mask is None else kd_mask & finite

        tensors = _op_tensors(options, logits, target, kd_mask, target_b, lam)
        first: tuple[Any, ...]
        if buffer is None:
            name = "last_batch"
            first = (None if teacher is None else _rows_contiguous(teacher.detach()), TEACHER_KIND[teacher_kind])
        else:
            name = "last_batch_update"
            if ids is not None and not (ids.dtype is torch.int64 and ids.is_contiguous()):
                ids = _integers(ids).contiguous()
            first = (buffer.rows, buffer.slots, ids, -1 if num_old is None else num_old, again)
        args = (*first, *map(tensors.get, TENSORS), *options.numbers)
        if not logits.is_contiguous():
            logits = _rows_contiguous(logits)
        if upstream is None:
            result = ops.run(impl, name, logits, args)
        else:
            result = ops.run_with_grad(impl, name, logits, args, upstream)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:  # not checkpoint's early stop
        if not examined:
            try:
                _examine(options, logits, target, target_b, teacher, teacher_kind, buffer, ids)
            except (TypeError, ValueError) as reason:
                raise reason from None
        # A limit of one implementation; torch's check puts function and file before it.
        said = re.match(r"(?:.*, )?last_batch[^:,]*: (.*)", str(error))
        if said:
            raise RuntimeError(f"{options.op}: impl={impl!r}: {said[1]}") from None
        raise
    return result


def _beyond_cuda(logits: Tensor, stored: Tensor | None) -> bool:
    """Whether the CUDA kernels refuse such a call, for which "auto" takes the next; ``stored``: the teacher's rows."""
    if logits.dtype is torch.float64 or (isinstance(stored, Tensor) and stored.dtype is torch.float64):
        return True
    return bool(logits.shape[0] > _args.CUDA_LARGEST or logits.shape[1] > _args.CUDA_LARGEST)


def _op_tensors(
    options: Options,
    logits: Tensor,
    target: Tensor | None,
    kd_mask: Tensor | None,
    target_b: Tensor | None,
    lam: Scalar | None,
) -> dict[str, Tensor | None]:
    """The tensors of options.h that are given, in the dtype and layout that the op reads."""
    tensors: dict[str, Tensor | None] = {"target": target}
    if target is not None and target.dtype is not torch.int64:
        if target.dim() == 2 and target.is_floating_point():
            tensors["target"] = _rows_contiguous(target.to(reference.compute_dtype(logits.dtype)))
        else:
            tensors["target"] = _integers(target)
    if kd_mask is not None:
        tensors["kd_mask"] = kd_mask.contiguous()
    if target_b is not None:
        dtype = reference.compute_dtype(logits.dtype)
        tensors["target_b"] = _integers(target_b)
        assert lam is not None
        tensors["lam"] = _args.on_device(lam, dtype, logits.device).contiguous()
    if options.weight is not None:
        _args.check_weight(options.op, logits, options.weight)
        tensors["weight"] = options.weight.to(reference.compute_dtype(logits.dtype)).contiguous()
    if isinstance(options.alpha, Tensor):
        _args.check_scalar(options.op, "alpha", options.alpha, positive=False)  # its value may have changed
        tensors["alpha_t"] = options.alpha.detach().to(logits.device, reference.compute_dtype(logits.dtype))
    if isinstance(options.temperature, Tensor):
        _args.check_temperature(options.op, options.temperature, logits.dtype)
        tensors["temperature_t"] = options.temperature.detach().to(logits.device, reference.compute_dtype(logits.dtype))
    return tensors


def _examine(
    options: Options,
    logits: Tensor,
    target: Tensor | None,
    target_b: Tensor | None,
    teacher: Tensor | None,
    teacher_kind: str,
    buffer: LogitBuffer | None,
    ids: Tensor | None,
) -> None:
    """Raise the error of the first tensor that does not fit the others."""
    op = options.op
    _args.check_logits(op, logits, target)
    if target is not None:
        _args.check_target(op, logits, target)
    if options.weight is not None:
        _args.check_weight(op, logits, options.weight)
    if teacher is not None and teacher_kind == "top_k":
        _args.check_packed(op, logits, teacher)
    elif teacher is not None:
        _args.check_teacher(op, logits, teacher)
    if buffer is not None:
        _check_buffer(op, logits, buffer)
    if ids is not None:
        _args.check_ids(op, logits, ids)
    _args.check_label_ranges(op, target, target_b, logits.shape[1], options.ignore_index)


def _check_buffer(op: str, logits: Tensor, buffer: LogitBuffer) -> None:
    if not isinstance(buffer, LogitBuffer):
        raise TypeError(f"{op}: buffer must be a dlb_fast.LogitBuffer, got {type(buffer).__name__}")
    if buffer.num_classes != logits.shape[1] or buffer.device != logits.device:
        raise ValueError(
            f"{op}: buffer must have C = {logits.shape[1]} classes on {logits.device}, got {buffer.num_classes} on "
            f"{buffer.device}; make it with num_classes={logits.shape[1]} and device={str(logits.device)!r}"
        )
    if buffer.of_classes:
        raise ValueError(f"{op}: buffer must hold logits, got one that holds their top k; LastBatchLoss uses that one")


def _plain_torch(
    options: Options,
    logits: Tensor,
    target: Tensor | None,
    teacher: Tensor | None,
    teacher_kind: str,
    buffer: LogitBuffer | None,
    ids: Tensor | None,
    num_old: int | None,
    again: int,
    kd_mask: Tensor | None,
    target_b: Tensor | None,
    lam: Scalar | None,
) -> tuple[Tensor, Tensor]:
    """The definition, differentiated by autograd. As in the kernels, a scalar does not decide the dtype."""
    dtype = reference.compute_dtype(logits.dtype)
    alpha, temperature = options.alpha, options.temperature
    if isinstance(alpha, Tensor):
        _args.check_scalar(options.op, "alpha", alpha, positive=False)
        alpha = alpha.to(dtype)
    if isinstance(temperature, Tensor):
        _args.check_temperature(options.op, temperature, logits.dtype)
        temperature = temperature.to(dtype)
    mask = kd_mask
    if buffer is not None:
        match = buffer.match(logits.shape[0], ids, num_old, again)
        teacher, valid = buffer.teacher(match), match.repeats
        mask = valid if kd_mask is None else valid & kd_mask[: valid.shape[0]]
    if target is not None:
        target = target if target.dim() == 2 else target.long()
    loss, parts = reference.last_batch_loss(
        logits, target, teacher, alpha=alpha, temperature=temperature, label_smoothing=options.label_smoothing,
        weight=options.weight, ignore_index=options.ignore_index,
        kd_mask=mask, reduction=options.reduction, target_b=None if target_b is None else target_b.long(),
        lam=lam,
        ce_weight=options.ce_weight + options.ce_alpha * alpha if options.ce_alpha else options.ce_weight,
        teacher_kind=teacher_kind, correct_share=options.correct_share,
    )  # fmt: skip
    if buffer is not None:
        buffer.update(logits, ids, num_old, again, kd_mask)
    return loss, parts


def fused_lb_loss(
    logits: Tensor,
    target: Tensor | None,
    last_logits: Tensor | None = None,
    *,
    alpha: Scalar = 1.0,
    temperature: Scalar = 3.0,
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
    """Cross entropy plus consistency with the logits of the last mini-batch (DLB), loss and gradient in one pass.

    ``L = CE(z, y) + alpha * tau^2 * mean_{i < H} KL(softmax(t_i / tau) || softmax(z_i / tau))``

    The CE is torch's, over all ``B`` rows. The KL runs over the first ``H`` rows, those that repeat samples of the
    previous iteration; its mean divides by the number of valid rows ("batchmean"), and tau^2 keeps the size of its
    gradient independent of the temperature. There is no ``(1 - alpha)`` on the CE. ``alpha=1`` and ``temperature=3``
    are what the community uses with this method, not values read from the paper.

    Args:
        logits: ``(B, C)`` float32, bfloat16, float16 or float64; any strides; never written to.
        target: ``(B,)`` integer labels, ``(B, C)`` class probabilities, or None for the KL term alone.
        last_logits: ``(H, C)`` with ``H <= B``: the previous logits of rows ``[0, H)``; None gives plain CE. Detached.
        alpha: weight of the KL term, a number in ``[0, 1e30]`` or a 0-d tensor (a schedule that never recompiles).
        temperature: tau of both distributions, a number or a 0-d tensor, in ``[1e-18, 100]``, with float64 logits up
            to 1e6: beyond that the rounding error of the KL times tau^2 is no longer small beside the loss. The value
            of a tensor on a GPU is not read.
        label_smoothing: in ``[0, 1]``, as in torch; applies to the CE only.
        weight: ``(C,)`` class weights of the CE, as in torch.
        ignore_index: rows with this label leave the CE; they leave the KL only through ``kd_mask``.
        kd_mask: ``(H,)`` bool, False takes a row out of the KL.
        target_b: ``(B,)`` labels of the other images of mixed pairs (mixup, CutMix). With ``lam`` it gives the same as
            the dense target ``lam * onehot(target) + (1 - lam) * onehot(target_b)``, which is never formed.
        lam: share of ``target`` in mixed images, a number, ``()`` or ``(B,)``.
        reduction: ``"mean"`` (as above), ``"sum"``, or ``"none"`` for per-row losses ``(B,)``. A term without any valid
            row is 0 with zero gradient (torch's CE would give NaN).
        impl: ``"auto" | "cuda" | "triton" | "cpu" | "torch"``; a named one runs or raises, it never falls back.
        return_parts: also return :class:`LossParts`.

    Returns:
        The loss in float32 (float64 for float64 logits), 0-d or ``(B,)``; with ``return_parts`` a pair. The gradient
        has the dtype of the logits. The compiled implementations differentiate the logits, once; ``impl="torch"`` is
        plain autograd in every argument but the teacher.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or options that do not fit, a label outside ``[0, C)`` on the CPU
            (on a GPU such a row becomes NaN). RuntimeError: a named implementation that is not available, or has not
            the gradient or the derivative that is asked for.

    Source: Shen et al., CVPR 2022; official code ``dlb.py`` of Meta-knowledge-Lab/DLB.

    >>> import torch
    >>> z, y = torch.tensor([[2.0, 0.0], [0.0, 1.0]], requires_grad=True), torch.tensor([0, 1])
    >>> loss = fused_lb_loss(z, y, last_logits=torch.tensor([[1.0, 0.0]]))
    >>> loss.backward()
    >>> round(loss.item(), 4), z.grad.shape
    (0.339, torch.Size([2, 2]))
    """
    op = "fused_lb_loss"
    _args.check_logits(op, logits, target)
    if target_b is not None or lam is not None:
        lam = _args.check_pair(op, logits, target, target_b, lam)
    if kd_mask is not None:
        if last_logits is None:
            raise ValueError(f"{op}: kd_mask was given without last_logits; there is no KL term to mask")
        _args.check_teacher(op, logits, last_logits)
        _args.check_kd_mask(op, logits, kd_mask, last_logits.shape[0])
    if target is None and last_logits is None:
        raise ValueError(f"{op}: target and last_logits are both None; nothing is left to compute")
    options = prepare(
        op, impl=impl, alpha=alpha, temperature=temperature, label_smoothing=label_smoothing, weight=weight,
        ignore_index=ignore_index, reduction=reduction,
    )  # fmt: skip
    loss, parts = row_loss(options, logits, target, teacher=last_logits, kd_mask=kd_mask, target_b=target_b, lam=lam)
    return (loss, LossParts.unpack(parts)) if return_parts else loss


def dlb_step(
    logits: Tensor,
    target: Tensor | None,
    buffer: LogitBuffer,
    *,
    ids: Tensor | None = None,
    num_old: int | None = None,
    again: bool | None = None,
    alpha: Scalar = 1.0,
    temperature: Scalar = 3.0,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    upstream: Scalar = 1.0,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Loss and gradient of one batch without autograd, the fast loop; the buffer takes the new rows.

    Continue with ``logits.backward(grad)``. On a GPU this is one launch, where a criterion and ``loss.backward()`` are
    three: torch fills a 1 as the gradient of the loss, and a kernel reads it. The loss is that of
    :class:`LastBatchLoss` with ``reduction="mean"``.

    Args:
        logits: ``(B, C)``; its graph is not entered.
        target: ``(B,)`` labels, ``(B, C)`` probabilities, or None, as in :func:`fused_lb_loss`.
        buffer: :class:`LogitBuffer` with ``C`` classes on the device of the logits.
        ids: ``(B,)`` sample ids, as in :class:`LastBatchLoss`.
        num_old: how many of the first rows repeat the stored ones, as in :class:`LastBatchLoss`.
        again: whether this is the batch of the last call once more (the second pass of SAM, a closure): it then meets
            the same teacher, and its rows replace those of the last call. None compares the ids, where there are any.
        alpha: weight of the KL, a number or a 0-d tensor.
        temperature: tau, as in :func:`fused_lb_loss`.
        label_smoothing: of the CE, as in torch.
        weight: ``(C,)`` class weights of the CE, as in torch.
        ignore_index: rows with this label leave the CE.
        upstream: factor of the gradient (a loss scale, 1 / n to accumulate n batches), a number or a 0-d tensor; the
            loss is not multiplied. Any but the number 1, and float16 logits, take a second launch, and a number a
            third that fills it in.
        impl: as in :func:`fused_lb_loss`.

    Returns:
        ``(loss, grad)``: 0-d float32 (float64 for float64 logits), and ``(B, C)`` in the dtype of the logits.

    Raises:
        ValueError, TypeError: as :func:`fused_lb_loss`, and for a buffer of other classes or another device.

    >>> import torch
    >>> from dlb_fast import LogitBuffer
    >>> model, buffer = torch.nn.Linear(3, 5), LogitBuffer(num_classes=5, capacity=2)
    >>> logits = model(torch.randn(2, 3))
    >>> loss, grad = dlb_step(logits, torch.tensor([1, 4]), buffer)
    >>> logits.backward(grad)
    >>> grad.shape, buffer.count
    (torch.Size([2, 5]), 2)
    """
    op = "dlb_step"
    _args.check_logits(op, logits, target)
    upstream = _args.check_scalar(op, "upstream", upstream, positive=False)
    num_old = _args.check_num_old(op, num_old)
    if again is not None and not isinstance(again, bool):
        raise TypeError(f"{op}: again must be True, False or None, got {again!r}")
    options = prepare(
        op, impl=impl, alpha=alpha, temperature=temperature, label_smoothing=label_smoothing, weight=weight,
        ignore_index=ignore_index,
    )  # fmt: skip
    if refusal := ops.unsupported(
        logits, target=target, weight=weight, alpha=alpha, temperature=temperature, upstream=upstream
    ):
        raise RuntimeError(f"{op}: it {refusal} use LastBatchLoss with impl='torch', plain autograd")
    _check_buffer(op, logits, buffer)
    if ids is not None:
        _args.check_ids(op, logits, ids)
    where: dict[str, Any] = {}
    if logits.shape[0] > 0:  # an empty batch has no row to teach or to store
        same = buffer.recognise(logits.shape[0], ids, num_old, -1 if again is None else int(again), op)
        stored = buffer.stored_rows(logits.shape[0], num_old, same, op)
        where = {"buffer": buffer, "ids": ids, "num_old": num_old, "again": same}
    beyond_cuda = logits.is_cuda and _beyond_cuda(logits, buffer.rows if where else None)
    if _backends.pick(impl, logits.device, beyond_cuda, op) != "torch":
        loss, grad = row_loss(options, logits, target, upstream=upstream, **where)
    else:
        with torch.inference_mode(False), torch.enable_grad():  # whatever mode the caller is in
            inference = not torch.compiler.is_compiling() and logits.is_inference()
            leaf = (logits.clone() if inference else logits).detach().requires_grad_()
            loss, _ = row_loss(options, leaf, target, **where)
            (grad,) = torch.autograd.grad(loss * upstream, leaf)
        loss = loss.detach()
    if where:
        buffer.count, buffer.batch = stored, logits.shape[0]
    return loss, grad


def top_k_impl(options: Options, impl: str) -> str:
    """What computes a teacher of kind ``"top_k"`` where ``impl`` was picked."""
    if impl not in ("cuda", "triton"):
        return impl
    if options.impl != "auto":
        raise RuntimeError(
            f"{options.op}: impl={impl!r} has no teacher of kind 'top_k'; use impl='auto', which computes it in plain "
            "PyTorch on this device"
        )
    return "torch"


def pack_top_k(op: str, teacher: object) -> Tensor:
    """The packed form of a :class:`TopK` that a user gave; errors name ``op``."""
    if not isinstance(teacher, TopK):
        raise TypeError(
            f"{op}: a teacher of kind 'top_k' must be a dlb_fast.TopK, got {type(teacher).__name__}; "
            "TopK.of(logits, k, temperature) makes one"
        )
    _args.check_top_k(op, *teacher)
    return teacher.packed()


class Teacher(NamedTuple):
    """The teacher of one batch, as the kernel takes it.

    ``kind``: ``"logits"`` (softened with the temperature of the student), ``"probabilities"`` (used as they are),
    ``"top_k"`` (the tensor is a :class:`TopK` ``.packed()``), ``"uniform"`` (no tensor: the same probability for every
    class, or ``correct_share`` for the right class and the rest divided equally), or ``"none"`` (plain cross entropy).
    """

    kind: str
    tensor: Tensor | None = None  # (H, C) or packed (H, 2 k + 1): teacher of the first H <= B rows
    correct_share: float | None = None  # with kind "uniform": probability of the right class
    mask: Tensor | None = None  # (H,) bool: False takes a row out of the KL
    rows: int | None = None  # only the first rows have a loss at all; None: all
    student: Tensor | None = None  # (B, C) logits for the KL in place of the batch's
    add_entropy: bool = False  # add the teacher's entropy: the KL becomes the cross entropy with the teacher
    kl_weight: float = 1.0  # > 0, multiplies the KL
    alpha_scale: float = 1.0  # multiplies alpha wherever alpha stands: a schedule


_KINDS = {"logits": True, "probabilities": True, "top_k": True, "uniform": False, "none": False}
"""Kind of a teacher -> whether it has a tensor."""


def _check_teacher_fields(op: str, teacher: Teacher, logits: Tensor) -> None:
    """A Teacher whose fields belong to its kind and to the batch; a method of a user may return anything."""
    if not isinstance(teacher, Teacher):
        raise TypeError(f"{op}: teacher(inputs) must return a dlb_fast.Teacher, got {type(teacher).__name__}")
    kind, rows, batch = teacher.kind, teacher.rows, logits.shape[0]
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(f"{op}: the teacher's kind must be one of {', '.join(_KINDS)}, got {kind!r}")
    if _KINDS[kind] != (teacher.tensor is not None):
        raise ValueError(f"{op}: a teacher of kind {kind!r} {'needs a' if _KINDS[kind] else 'takes no'} tensor")
    if teacher.correct_share is not None and kind != "uniform":
        raise ValueError(f"{op}: correct_share belongs to a teacher of kind 'uniform', got kind {kind!r}")
    if teacher.add_entropy and kind != "probabilities":
        raise ValueError(f"{op}: add_entropy belongs to a teacher of kind 'probabilities', got kind {kind!r}")
    if kind == "none" and (teacher.mask is not None or teacher.student is not None):
        raise ValueError(f"{op}: a teacher of kind 'none' has no KL, so it takes no mask and no student")
    if rows is not None and _args.as_int(rows, op, "the teacher's rows", 0) > batch:
        raise ValueError(f"{op}: the teacher's rows must be at most the {batch} rows of the batch, got {rows}")
    if isinstance(teacher.kl_weight, bool) or not isinstance(teacher.kl_weight, (int, float)):
        raise TypeError(f"{op}: the teacher's kl_weight must be a number, got {type(teacher.kl_weight).__name__}")
    if not 0 < teacher.kl_weight < math.inf:
        raise ValueError(
            f"{op}: the teacher's kl_weight must be finite and > 0, got {teacher.kl_weight}; use Teacher('none') for a "
            "batch without a teacher"
        )
    _args.check_scalar(op, "the teacher's alpha_scale", teacher.alpha_scale, positive=False)
    student = teacher.student
    if student is None:
        return
    _args.check_rows(op, "the teacher's student", student, logits)
    if torch.is_grad_enabled() and logits.requires_grad and not student.requires_grad:
        raise ValueError(
            f"{op}: the teacher's student must be made of the logits with their graph, got a tensor that requires no "
            "gradient; the KL would not train, so do not detach the student"
        )


def distill(
    op: str,
    logits: Tensor,
    target: Tensor | None,
    teacher: Teacher,
    *,
    alpha: Scalar,
    temperature: Scalar,
    ce_weight: float = 1.0,
    ce_alpha: float = 0.0,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    kd_mask: Tensor | None = None,
    target_b: Tensor | None = None,
    lam: Scalar | None = None,
    reduction: str = "mean",
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Loss and parts of :func:`distillation_loss` for a :class:`Teacher`; errors name ``op``."""
    _args.check_logits(op, logits, target)
    if target is not None:
        _args.check_target(op, logits, target)
    alpha = _args.check_scalar(op, "alpha", alpha, positive=False)
    ce_weight, ce_alpha = _args.check_ce_weight(op, alpha, ce_weight, ce_alpha)
    if target_b is not None or lam is not None:
        lam = _args.check_pair(op, logits, target, target_b, lam)
    if kd_mask is not None:
        _args.check_kd_mask(op, logits, kd_mask, logits.shape[0])
    _check_teacher_fields(op, teacher, logits)
    if (rows := teacher.rows) is not None:
        logits = logits[:rows]
        teacher = teacher._replace(student=None if teacher.student is None else teacher.student[:rows])
        target, target_b, kd_mask = (None if t is None else t[:rows] for t in (target, target_b, kd_mask))
        lam = lam[:rows] if isinstance(lam, Tensor) and lam.dim() == 1 else lam
    if teacher.tensor is not None and teacher.kind == "top_k":
        _args.check_packed(op, logits, teacher.tensor)
    elif teacher.tensor is not None:
        _args.check_teacher(op, logits, teacher.tensor, "teacher")
    if teacher.mask is not None:
        rows = len(logits if teacher.tensor is None else teacher.tensor)
        _args.check_kd_mask(op, logits, teacher.mask, rows, "the teacher's mask")
    if (correct_share := _args.check_correct_share(op, teacher.correct_share)) is not None:
        if target is None or target.dim() != 1 or target_b is not None:
            raise ValueError(
                f"{op}: correct_share needs one class per row, target (B,), got none, probabilities (B, C) or the "
                "mixup pair form; use correct_share=None with mixed images"
            )
    elif target is None and teacher.kind == "none":
        raise ValueError(f"{op}: target is None and there is no teacher; nothing is left to compute")
    mask = teacher.mask if kd_mask is None else kd_mask
    if kd_mask is not None and teacher.tensor is not None:
        mask = kd_mask[: teacher.tensor.shape[0]]
        mask = mask if teacher.mask is None else mask & teacher.mask
    shared: dict[str, Any] = {"impl": impl, "ignore_index": ignore_index, "reduction": reduction}
    ce_options: dict[str, Any] = {"label_smoothing": label_smoothing, "weight": weight, **shared}
    ce: dict[str, Any] = {"target": target, "target_b": target_b, "lam": lam}
    if teacher.kind == "none":
        return row_loss(prepare(op, alpha=alpha, temperature=temperature, **ce_options), logits, **ce)
    alpha = alpha * teacher.alpha_scale
    kd_alpha = alpha * teacher.kl_weight
    kind = "virtual" if teacher.kind == "uniform" else teacher.kind
    kd: dict[str, Any] = {"teacher": teacher.tensor, "teacher_kind": kind, "kd_mask": mask}
    kd_options: dict[str, Any] = {"correct_share": correct_share, "temperature": temperature, "alpha": kd_alpha}
    if teacher.student is None:
        rate = ce_alpha / teacher.kl_weight  # the kernel weighs its CE by ce_weight + rate * (its weight of the KL)
        options = prepare(op, ce_weight=ce_weight, ce_alpha=rate, **ce_options, **kd_options)
        loss, parts = row_loss(options, logits, **ce, **kd)
    else:
        ce_loss, ce_parts = row_loss(prepare(op, **ce_options), logits, **ce)
        kd_loss, kd_parts = row_loss(prepare(op, **kd_options, **shared), teacher.student, None, **kd)
        factor = ce_weight + ce_alpha * alpha
        loss = factor * ce_loss + kd_loss
        with torch.no_grad():
            total = factor * ce_parts[0] + kd_parts[0]
            parts = torch.stack([total, ce_parts[1], kd_parts[2], ce_parts[3]])
    if teacher.add_entropy:
        assert teacher.tensor is not None
        probabilities = teacher.tensor.detach()
        finite = reference.finite_rows(probabilities)
        mask = finite if mask is None else mask & finite
        entropy = -torch.xlogy(probabilities, probabilities).sum(1)
        extra = kd_alpha * _reduce_constants(entropy, mask, logits.shape[0], reduction)
        loss = loss + extra.to(loss.dtype)
        parts = parts[:4].clone()  # the op keeps its own for the backward
        parts[0] += extra.sum()
    return loss, parts


def _reduce_constants(rows: Tensor, mask: Tensor | None, batch: int, reduction: str) -> Tensor:
    """Constants ``rows`` (H,) reduced as the kernel reduces its KL rows."""
    if mask is not None:
        rows = torch.where(mask, rows, torch.zeros_like(rows))
    if reduction == "sum":
        return rows.sum()
    if reduction == "none":
        return torch.cat([rows, rows.new_zeros(batch - rows.shape[0])])
    return rows.sum() / (max(rows.shape[0], 1) if mask is None else mask.sum().clamp(min=1))


def distillation_loss(
    logits: Tensor,
    target: Tensor | None,
    teacher: Tensor | TopK | None = None,
    *,
    kind: str = "logits",
    alpha: Scalar = 1.0,
    temperature: Scalar = 1.0,
    ce_weight: float = 1.0,
    ce_alpha: float = 0.0,
    correct_share: float | None = None,
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
    """Cross entropy plus the KL divergence from a teacher: the general form of every method of this package.

    ``L = (ce_weight + ce_alpha * alpha) CE(z, y) + alpha * tau^2 * mean_{i < H} KL(teacher_i || softmax(z_i / tau))``

    Loss and gradient come from one pass of the kernel of :func:`fused_lb_loss`. ``ce_alpha=-1`` gives the
    ``(1 - alpha) CE`` of the methods that derive from label smoothing.

    Args:
        logits: ``(B, C)`` as in :func:`fused_lb_loss`.
        target: ``(B,)`` labels, ``(B, C)`` probabilities, or None for the KL alone.
        teacher: ``(H, C)`` or a :class:`TopK` of ``H`` rows, ``H <= B``, for the first ``H`` rows; None with
            ``kind="uniform"``, otherwise None means plain cross entropy. Detached.
        kind: ``"logits"`` (softened with ``temperature``), ``"probabilities"`` (used as they are), ``"top_k"`` (the k
            largest logits and one bucket for the rest) or ``"uniform"``.
        alpha: weight of the KL, a number >= 0 or a 0-d tensor.
        temperature: tau of the student and of teacher logits, as in :func:`fused_lb_loss`.
        ce_weight: weight of the cross entropy.
        ce_alpha: what alpha adds to the weight of the cross entropy; the sum must not be negative.
        correct_share: with ``kind="uniform"``, the teacher's probability of the right class in ``[0, 1]``; the others
            divide the rest equally. None: every class ``1 / C``. Needs labels ``(B,)``.
        label_smoothing: of the cross entropy, as in torch.
        weight: ``(C,)`` class weights of the cross entropy, as in torch.
        ignore_index: rows with this label leave the CE; they leave the KL only through ``kd_mask`` (or, with
            ``correct_share``, because they have no right class).
        kd_mask: ``(B,)`` bool, False takes a row out of the KL.
        target_b: ``(B,)`` second labels of mixed images, see :func:`fused_lb_loss`.
        lam: share of ``target`` in mixed images, a number, ``()`` or ``(B,)``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (per row, ``(B,)``).
        impl: ``"auto" | "cuda" | "triton" | "cpu" | "torch"``.
        return_parts: also return :class:`LossParts`.

    Returns:
        The loss, or ``(loss, LossParts)``, as :func:`fused_lb_loss`.

    Raises:
        ValueError, TypeError: arguments that do not fit together, as :func:`fused_lb_loss`; an unknown ``kind``.

    >>> z, y = torch.zeros(2, 4), torch.tensor([0, 1])
    >>> round(distillation_loss(z, y, kind="uniform", alpha=0.1, ce_alpha=-1.0).item(), 4)    # 0.9 log 4
    1.2477
    """
    op = "distillation_loss"
    if kind not in ("logits", "probabilities", "top_k", "uniform"):
        raise ValueError(f"{op}: kind must be 'logits', 'probabilities', 'top_k' or 'uniform', got {kind!r}")
    if kind == "uniform" and teacher is not None:
        raise ValueError(f"{op}: teacher must be None with kind='uniform', which needs no tensor")
    if kind != "uniform" and correct_share is not None:
        raise ValueError(f"{op}: correct_share belongs to kind='uniform', got kind={kind!r}")
    if kd_mask is not None and teacher is None and kind != "uniform":
        raise ValueError(f"{op}: kd_mask was given without a teacher; there is no KL term to mask")
    _args.check_logits(op, logits, target)
    if kind == "top_k" and teacher is not None:
        teacher = pack_top_k(op, teacher)
    elif isinstance(teacher, TopK):
        raise TypeError(f"{op}: a TopK belongs to kind='top_k', got kind={kind!r}")
    given = Teacher("none" if teacher is None and kind != "uniform" else kind, teacher, correct_share)
    loss, parts = distill(
        op, logits, target, given, alpha=alpha, temperature=temperature, ce_weight=ce_weight, ce_alpha=ce_alpha,
        label_smoothing=label_smoothing, weight=weight, ignore_index=ignore_index, kd_mask=kd_mask, target_b=target_b,
        lam=lam, reduction=reduction, impl=impl,
    )  # fmt: skip
    return (loss, LossParts.unpack(parts)) if return_parts else loss
