"""The losses as modules, for any training loop."""

from __future__ import annotations

import operator
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import _args
from .buffer import UNKNOWN_ID, LogitBuffer, check_buffer_dtype, pack_state, unpack_state
from .functional import LossParts, Options, Teacher, distill, prepare, row_loss
from .reference import Scalar


def _starts_with(ids: Tensor, stored: Tensor) -> bool:
    return bool(((stored == ids[: len(stored)]) | (stored == UNKNOWN_ID)).all())


class Inputs(NamedTuple):
    """The inputs of a method: one batch, before its optimiser step."""

    logits: Tensor  # (B, C), with their graph; a method must detach what it stores
    target: Tensor | None  # (B,) labels or (B, C) probabilities
    temperature: Scalar
    ids: Tensor | None = None  # (B,) sample ids
    images: Tensor | None = None  # (B, ...) input of the model
    epoch: int | None = None  # epoch in which the new rows were sampled
    ignore_index: int = -100
    target_b: Tensor | None = None  # (B,) second labels, where the images are mixed


class DistillationLoss(nn.Module):
    """Base of every method: a criterion with a teacher. ``loss = criterion(logits, target, ids, images=...)``.

    ``L = (ce_weight + ce_alpha * alpha) CE + alpha * tau^2 * mean KL(teacher || softmax(z / tau))``

    A method overrides :meth:`teacher`. A method with a state also overrides :meth:`record` (called after the loss of
    every training batch), :meth:`step` (after every optimiser step), :meth:`setup` (once, with the model),
    :meth:`reset`, :meth:`cost`, and torch's ``get_extra_state`` and ``set_extra_state``. The training loop calls
    ``setup(model)`` once and ``step()`` after every optimiser step. In ``eval()`` every method is torch's cross entropy
    with the same options and does not change its state.

    Args:
        alpha: weight of the KL, a number >= 0 or a 0-d tensor; may be reassigned at any time.
        temperature: tau > 0, a number or a 0-d tensor; may be reassigned at any time.
        ce_weight: weight of the cross entropy.
        ce_alpha: what alpha adds to that weight; -1 gives ``(1 - alpha) CE``.
        label_smoothing: of the cross entropy, as in torch.
        weight: ``(C,)`` class weights of the cross entropy, as in torch; goes where the module goes.
        ignore_index: rows with this label leave the cross entropy.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        impl: ``"auto" | "cuda" | "triton" | "cpu" | "torch"``, as in :func:`fused_lb_loss`.

    Attributes:
        needs: which of ``ids``, ``images`` and ``epoch`` every training batch must come with.
        mixes: whether the teacher still fits when images are mixed (mixup, CutMix); otherwise ``target_b`` is refused.
        copies_model: whether the method keeps copies of all weights (then FSDP is refused).
        counted: how many rows ``parts.correct`` counts; None: all of the last batch.
        parts: :class:`LossParts` of the last call.

    >>> class MeanTeacher(DistillationLoss):
    ...     def teacher(self, inputs):                # every row learns the batch's mean prediction
    ...         mean = inputs.logits.detach().softmax(1).mean(0, keepdim=True)
    ...         return Teacher("probabilities", mean.expand(inputs.logits.shape))
    >>> MeanTeacher(alpha=0.5)(torch.zeros(2, 4), torch.tensor([0, 1])).shape
    torch.Size([])
    """

    needs: frozenset[str] = frozenset()
    mixes = False
    copies_model = False
    weight: Tensor | None

    def __init__(
        self,
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
        prepare(
            op, impl=impl, alpha=alpha, temperature=temperature, label_smoothing=label_smoothing,
            ignore_index=ignore_index, reduction=reduction,
        )  # fmt: skip
        _args.check_ce_weight(op, alpha, ce_weight, ce_alpha)
        self.alpha, self.temperature = alpha, temperature
        self.ce_weight, self.ce_alpha = ce_weight, ce_alpha
        self.label_smoothing, self.ignore_index = label_smoothing, ignore_index
        self.reduction, self.impl = reduction, impl
        self.register_buffer("weight", weight, persistent=False)
        self.counted: int | None = None
        self._parts: Tensor | None = None
        # The attributes that the options were last prepared from, and those options.
        self._prepared: tuple[tuple[Any, ...], Options] | None = None

    def teacher(self, inputs: Inputs) -> Teacher:
        """The teacher of this batch; every method writes it."""
        raise NotImplementedError(f"{type(self).__name__}: a method must define teacher(inputs) -> Teacher")

    def record(self, inputs: Inputs) -> None:
        """Remember the batch; called without gradient after its loss was computed."""

    def step(self) -> None:
        """Count an optimiser step; the loop calls it after every one."""

    def setup(self, model: nn.Module) -> None:
        """See the model; the loop calls it once before training."""

    def reset(self) -> None:
        """Forget everything: the method is then as it was made."""

    def cost(self) -> str:
        """One line on memory and extra work per step beside plain cross entropy."""
        return "no state, no extra forward"

    @property
    def parts(self) -> LossParts:
        """The terms of the last call, detached 0-d tensors on the device."""
        if self._parts is None:
            raise RuntimeError(f"{type(self).__name__}.parts: there are none before the first call of the criterion")
        return LossParts.unpack(self._parts)

    def _options(self) -> Options:
        """The checked options; prepared again when one of the attributes was set since."""
        given = (
            self.alpha, self.temperature, self.ce_weight, self.ce_alpha, self.label_smoothing, self.weight,
            self.ignore_index, self.reduction, self.impl,
        )  # fmt: skip
        kept = None if torch.compiler.is_compiling() else self._prepared
        if kept is not None and all(map(operator.is_, given, kept[0])):
            return kept[1]
        options = prepare(
            type(self).__name__, impl=self.impl, alpha=self.alpha, temperature=self.temperature,
            ce_weight=self.ce_weight, ce_alpha=self.ce_alpha, label_smoothing=self.label_smoothing, weight=self.weight,
            ignore_index=self.ignore_index, reduction=self.reduction,
        )  # fmt: skip
        _args.check_ce_weight(type(self).__name__, self.alpha, self.ce_weight, self.ce_alpha)
        if not torch.compiler.is_compiling():
            self._prepared = given, options
        return options

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, temperature={self.temperature}, reduction={self.reduction!r}, impl={self.impl!r}"

    def forward(
        self,
        logits: Tensor,
        target: Tensor | None,
        ids: Tensor | None = None,
        *,
        images: Tensor | None = None,
        epoch: int | None = None,
        target_b: Tensor | None = None,
        lam: Scalar | None = None,
        kd_mask: Tensor | None = None,
    ) -> Tensor:
        """The loss of one batch.

        Args:
            logits: ``(B, C)``.
            target: ``(B,)`` labels, ``(B, C)`` probabilities, or None for the KL alone.
            ids: ``(B,)`` integer sample ids, for methods that remember samples.
            images: ``(B, ...)`` what the model was given, for methods that evaluate other weights on it.
            epoch: epoch of the batch, for methods with a schedule.
            target_b: ``(B,)`` second labels of mixed images.
            lam: share of ``target`` in mixed images, a number, ``()`` or ``(B,)``.
            kd_mask: ``(B,)`` bool, False takes a row out of the KL.
        """
        op = type(self).__name__
        teacher, inputs = Teacher("none"), None
        options = self._options()
        if self.training:
            _args.check_logits(op, logits, target)
            if target is not None:
                target = _args.check_target(op, logits, target)
            if ids is not None:
                _args.check_ids(op, logits, ids)
            if epoch is not None:
                epoch = _args.as_int(epoch, op, "epoch", 0)
            given = {"ids": ids, "images": images, "epoch": epoch}
            if missing := sorted(name for name in self.needs if given[name] is None):
                wanted = " and ".join(f"{name}=" for name in missing)
                raise ValueError(f"{op}: needs {wanted} with every batch in train(); pass it to the call")
            if target_b is not None and not self.mixes:
                raise ValueError(
                    f"{op}: needs one class per row, got target_b of mixed images, which its teacher does not fit; "
                    "turn mixup and CutMix off"
                )
            inputs = Inputs(
                logits, target, options.temperature, ids, images, epoch, options.ignore_index, target_b
            )  # fmt: skip
            teacher = self.teacher(inputs)
        elif target is None:
            raise ValueError(f"{op}: target is None in eval(), where there is no teacher; nothing is left to compute")
        loss, self._parts = distill(
            op, logits, target, teacher, alpha=self.alpha, temperature=self.temperature, ce_weight=self.ce_weight,
            ce_alpha=self.ce_alpha, label_smoothing=self.label_smoothing, weight=self.weight,
            ignore_index=self.ignore_index, kd_mask=kd_mask, target_b=target_b, lam=lam, reduction=self.reduction,
            impl=self.impl,
        )  # fmt: skip
        self.counted = teacher.rows
        if inputs is not None:
            with torch.no_grad():
                self.record(inputs)
        return loss


class LastBatchLoss(DistillationLoss):
    """Self-distillation from the last mini-batch as a criterion: ``loss = criterion(logits, target, ids)``.

    ``L = CE + alpha * tau^2 * mean KL(softmax(t / tau) || softmax(z / tau))`` over the rows that repeat samples of the
    previous batch; ``t`` are the logits the model gave them then. A batch is ``[repeated rows | new rows]``, as
    ``OverlapBatchSampler`` makes it: the stored rows teach the first rows, then the other rows replace them, in the
    same launch. The first batch holds new rows only and is plain CE.

    In ``eval()`` the criterion is torch's cross entropy with the same options and does not touch the buffer. The buffer
    is not a registered buffer, because DistributedDataParallel would overwrite every rank's teacher with rank 0's. It
    is part of ``state_dict()`` through ``get_extra_state``. A saved buffer that does not fit, or a checkpoint without
    one, restarts it with a warning. With gradient accumulation every call is a batch: a micro-batch learns from the
    previous micro-batch.

    Args:
        num_classes: ``C``.
        capacity: rows stored, half the batch the model sees; None takes it from the first batches.
        dtype: dtype of the stored logits; None takes that of the first logits (lossless).
        alpha: weight of the KL, a number >= 0 or a 0-d tensor; may be set at any time. The default is the community's,
            not a value read from the paper.
        temperature: tau > 0, a number or a 0-d tensor; may be set at any time. The default is the community's.
        label_smoothing: of the CE, as in torch.
        weight: ``(C,)`` class weights of the CE, as in torch; goes where the module goes.
        ignore_index: rows with this label leave the CE.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        impl: ``"auto" | "cuda" | "triton" | "cpu" | "torch"``, as in :func:`fused_lb_loss`.
        device: where to allocate the buffer when ``capacity`` is given; it follows the logits otherwise.

    Attributes:
        parts: :class:`LossParts` of the last call.
        buffer: the :class:`LogitBuffer`, or None before the first batch.

    Raises:
        ValueError: logits with another number of classes, a batch without new rows, or arguments as in
            :func:`fused_lb_loss`.

    Source: official code ``dlb.py`` (``pre_out``, ``pre_data``), with the memory in the criterion instead of the loop.

    >>> import torch
    >>> criterion = LastBatchLoss(num_classes=3)
    >>> first = criterion(torch.randn(2, 3), torch.tensor([0, 1]))                # two new rows: plain CE
    >>> second = criterion(torch.randn(4, 3), torch.tensor([0, 1, 2, 2]))         # rows 0 and 1 repeat them
    >>> criterion.buffer.count, bool(criterion.parts.lb > 0)
    (2, True)
    """

    mixes = True

    def __init__(
        self,
        num_classes: int,
        *,
        capacity: int | None = None,
        dtype: torch.dtype | None = None,
        alpha: Scalar = 1.0,
        temperature: Scalar = 3.0,
        label_smoothing: float = 0.0,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        impl: str = "auto",
        device: torch.device | str | None = None,
    ) -> None:
        op = "LastBatchLoss"
        num_classes = _args.as_int(num_classes, op, "num_classes", 1)
        if capacity is not None:
            capacity = _args.as_int(capacity, op, "capacity", 1)
        device = _args.check_device(op, "device", device)
        if dtype is not None:
            check_buffer_dtype(op, dtype)
        if weight is not None:
            _args.check_weight_form(op, weight, num_classes)
        super().__init__(
            alpha=alpha, temperature=temperature, label_smoothing=label_smoothing, weight=weight,
            ignore_index=ignore_index, reduction=reduction, impl=impl,
        )  # fmt: skip
        self.num_classes = num_classes
        self.dtype = dtype
        self.buffer: LogitBuffer | None = None
        self._size_follows = capacity is None
        self._dtype_follows = capacity is not None and dtype is None
        if capacity is not None:
            self.buffer = LogitBuffer(num_classes, capacity, dtype or torch.float32, device or "cpu")

    def extra_repr(self) -> str:
        rows = None if self.buffer is None else self.buffer.capacity
        return f"num_classes={self.num_classes}, capacity={rows}, {super().extra_repr()}"

    def cost(self) -> str:
        return "half a batch of logits; no extra forward or pass over the logits"

    def reset(self) -> None:
        """Forget the stored rows; the next batch is taken as the first one of a stream."""
        if self.buffer is not None:
            self.buffer.reset()

    def forward(
        self,
        logits: Tensor,
        target: Tensor | None,
        ids: Tensor | None = None,
        *,
        num_old: int | None = None,
        images: Tensor | None = None,
        epoch: int | None = None,
        target_b: Tensor | None = None,
        lam: Scalar | None = None,
        kd_mask: Tensor | None = None,
    ) -> Tensor:
        """The loss of one batch.

        Args:
            logits: ``(B, C)``.
            target: ``(B,)`` labels, ``(B, C)`` probabilities, or None, as in :func:`fused_lb_loss`.
            ids: ``(B,)`` integer sample ids; a repeated row whose id differs from the stored one gets no KL and is
                counted in ``buffer.mismatched``.
            num_old: how many of the first rows repeat the stored ones; None takes the number stored. Needed only where
                the buffer cannot know: a stream resumed without its buffer.
            images: not used; accepted as by every method.
            epoch: not used; accepted as by every method.
            target_b: ``(B,)`` second labels of mixed images. Mix the repeated rows with the partners and the share
                they had as new rows, or mask them: their teacher saw that image.
            lam: share of ``target`` in mixed images, a number, ``()`` or ``(B,)``.
            kd_mask: ``(B,)`` bool, False takes a repeated row out of the KL.
        """
        op = "LastBatchLoss"
        if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] != self.num_classes:
            _args.check_logits(op, logits, target)
            raise ValueError(f"{op}: logits must have C = {self.num_classes} classes, got {logits.shape[1]}")
        if num_old is not None and type(num_old) is not int:
            num_old = _args.check_num_old(op, num_old)
        if kd_mask is not None:
            _args.check_kd_mask(op, logits, kd_mask, logits.shape[0])
        if target_b is not None or lam is not None:
            lam = _args.check_pair(op, logits, target, target_b, lam)
        options = self._options()
        if self.training and logits.shape[0] > 0:  # an empty batch has no row to teach or to store
            before = self.buffer, self._dtype_follows
            try:
                buffer, stored = self._buffer_for(logits, target, ids, num_old)
                loss, parts = row_loss(
                    options, logits, target, buffer=buffer, ids=ids, num_old=num_old, kd_mask=kd_mask,
                    target_b=target_b, lam=lam,
                )  # fmt: skip
                buffer.count = stored
            except Exception:
                # A refused batch changes nothing, not even the size that it would have given the buffer.
                self.buffer, self._dtype_follows = before
                raise
        elif target is None and not self.training:
            raise ValueError(f"{op}: target is None in eval(), where there is no teacher; nothing is left to compute")
        else:
            loss, parts = row_loss(options, logits, target, target_b=target_b, lam=lam)
        self._parts = parts
        return loss

    def _buffer_for(
        self, logits: Tensor, target: Tensor | None, ids: Tensor | None, num_old: int | None
    ) -> tuple[LogitBuffer, int]:
        """The buffer, on the device of the logits and large enough, and how many rows it will store.

        Decided from shapes, without reading the device.
        """
        batch, buffer = logits.shape[0], self.buffer
        if buffer is not None and not self._dtype_follows and buffer.logits.device == logits.device:
            old = buffer.count if num_old is None else num_old
            if 0 < old < batch <= old + buffer.logits.shape[0]:
                return buffer, batch - old
        # Here the buffer is made, moved or resized, so the other arguments are examined first.
        op = "LastBatchLoss"
        _args.check_logits(op, logits)
        if target is not None:
            _args.check_target(op, logits, target)
        if ids is not None:
            _args.check_ids(op, logits, ids)
        if buffer is None:
            new = max(batch - (num_old or 0), 1)
            buffer = LogitBuffer(self.num_classes, new, self.dtype or logits.dtype, logits.device)
        elif self._dtype_follows and buffer.count == 0 and buffer.logits.dtype != logits.dtype:
            buffer = LogitBuffer(self.num_classes, buffer.capacity, logits.dtype, logits.device)
        elif buffer.logits.device != logits.device:
            buffer = buffer.to(logits.device)
        if self._size_follows:
            old = buffer.count if num_old is None else num_old
            if num_old is None and batch == buffer.count > 0 and batch % 2 == 0:
                # Two batches of one size, all rows of the first stored: both were [old | new], and only the second
                # half of the first is repeated now. Or a stream that starts anew with as many new rows: that would
                # shift every later pair, so here, and only here, the ids are read on the host.
                if ids is None or _starts_with(ids, buffer.ids[batch // 2 :]):
                    buffer = buffer.resized(batch // 2, skip=batch // 2)
                else:
                    buffer = buffer.resized(buffer.capacity, skip=buffer.count)
            elif batch - old > buffer.capacity and not (buffer.count == 0 and batch == 2 * buffer.capacity):
                buffer = buffer.resized(batch - old)
        stored = buffer.stored_rows(batch, num_old)
        if buffer is not self.buffer or self._dtype_follows:
            self.buffer, self._dtype_follows = buffer, False
        return buffer, stored

    def get_extra_state(self) -> Tensor:
        """The buffer's state for ``state_dict()``, packed into one uint8 tensor; empty before the first batch."""
        return pack_state({} if self.buffer is None else self.buffer.state_dict())

    def set_extra_state(self, state: Any) -> None:
        """Take over a saved buffer (packed, or the dict of ``LogitBuffer.state_dict``), or warn and restart it."""
        state = unpack_state(state)
        if not state:
            self.reset()
        elif self._size_follows or self.buffer is None:
            self.buffer = LogitBuffer.from_state(state, self.num_classes, self.dtype)
        else:
            saved = state.get("logits") if isinstance(state, dict) else None
            dtype = saved.dtype if isinstance(saved, Tensor) and saved.is_floating_point() else None
            if self._dtype_follows and dtype not in (None, self.buffer.logits.dtype):
                self.buffer = LogitBuffer(self.num_classes, self.buffer.capacity, dtype, self.buffer.logits.device)
            # A state saved before the first batch holds no logits whose dtype could have been chosen.
            chosen = self.buffer.load_state_dict(state) and self.buffer.count > 0
            self._dtype_follows = self._dtype_follows and not chosen

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        *rest: Any,
    ) -> None:  # fmt: skip
        """As torch does, but weights saved without a last-batch criterion load strictly: the buffer starts empty."""
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *rest)
        key = prefix + "_extra_state"
        if key in missing_keys:
            missing_keys.remove(key)
            self.reset()
            warnings.warn(
                f"LastBatchLoss: the checkpoint has no {key!r}; the buffer starts empty, so the next batch has no "
                "last-batch term",
                stacklevel=2,
            )
