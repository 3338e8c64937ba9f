"""The losses as modules, for any training loop."""

from __future__ import annotations

import copy
import inspect
import operator
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from . import _args, ops
from .buffer import UNKNOWN_ID, LogitBuffer, pack_state, stored_dtype, unpack_state
from .functional import LossParts, Options, Teacher, TopK, distill, prepare, row_loss
from .linear import linear_loss, logits_of
from .reference import Scalar, compute_dtype

_MANY_TIMES = 100  # evaluations of one batch after which a loop is warned; a line search takes fewer
_CHECK_EVERY = 16  # batches between two looks at how many repeated no row


def _repeats_second_half(buffer: LogitBuffer, batch: int, ids: Tensor | None) -> bool:
    """Whether a batch of as many rows as are stored begins with the second half of them; reads its ids on the host."""
    if ids is None or not _args.has_values(ids):
        return True  # as in a stream that goes on; where it does not, the ids differ on the device and teach nothing
    stored = buffer.ids[batch // 2 :]
    return bool(((stored == ids[: batch // 2]) | (stored == UNKNOWN_ID)).all())


def arguments_of(criterion: type[DistillationLoss]) -> dict[str, inspect.Parameter]:
    """The arguments of a criterion by name; ``**options`` stand for those of the class below it."""
    found: dict[str, inspect.Parameter] = {}
    for cls in criterion.__mro__:
        if "__init__" not in vars(cls):
            continue
        own = [p for p in inspect.signature(vars(cls)["__init__"]).parameters.values() if p.name != "self"]
        named = {p.name: p for p in own if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
        found = {**named, **found} if found else named
        if cls is DistillationLoss or not any(p.kind is p.VAR_KEYWORD for p in own):
            break
    return found


def _equal(value: object, default: object) -> bool:
    return value is default or (not isinstance(value, (Tensor, nn.Module)) and bool(value == default))


def _short(value: object) -> str:
    if isinstance(value, Tensor):
        return repr(value.detach()) if value.dim() == 0 else f"Tensor{tuple(value.shape)}"
    return type(value).__name__ if isinstance(value, nn.Module) else repr(value)


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
    again: bool | Tensor = False  # whether the last recorded batch is evaluated again; a () bool where ids decide it
    lam: Scalar | None = None  # share of ``target`` where the images are mixed
    kd_mask: Tensor | None = None  # (B,) bool: False takes a row out of the method's own term


class DistillationLoss(nn.Module):
    """Base of every method: a criterion with a teacher. ``loss = criterion(logits, target, ids, images=...)``.

    ``L = (ce_weight + ce_alpha * alpha) CE + alpha * tau^2 * mean KL(teacher || softmax(z / tau))``

    A method overrides :meth:`teacher`, or :meth:`objective` where its loss is no KL to a teacher. A method with a state
    also overrides :meth:`record` (called after the loss of every training batch), :meth:`step` (after every optimiser
    step), :meth:`setup` (once, with the model), :meth:`reset`, :meth:`cost`, and torch's ``get_extra_state`` and
    ``set_extra_state``. The training loop calls ``setup(model)`` once and ``step()`` after every optimiser step.

    In ``eval()`` every method is torch's cross entropy with the same options and does not change its state. In
    ``train()`` without gradient (``no_grad``, ``inference_mode``) the loss is computed with the same teacher, and
    nothing is recorded. The same batch evaluated again (activation checkpointing, SAM, closures) meets the teacher of
    its first time, and its latest evaluation is what is remembered. It is recognised by its ids; inside backward, where
    only activation checkpointing calls a loss, also without them; a loop without ids says it by :meth:`same_batch`. A
    new epoch or :meth:`step` begins a new batch whatever its ids.

    The gradient goes to the logits, and to ``Teacher.student`` where a method gives one. A teacher gets none.

    Args:
        alpha: weight of the KL, a number >= 0 or a 0-d tensor; may be reassigned at any time.
        temperature: tau, as in :func:`fused_lb_loss`; may be reassigned at any time.
        ce_weight: weight of the cross entropy.
        ce_alpha: what alpha adds to that weight; -1 gives ``(1 - alpha) CE``.
        label_smoothing: of the cross entropy, as in torch.
        weight: ``(C,)`` class weights of the cross entropy, a buffer as in torch.
        ignore_index: rows with this label leave the cross entropy.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        impl: ``"auto" | "cuda" | "triton" | "cpu" | "torch"``, as in :func:`fused_lb_loss`.

    Attributes:
        needs: which of ``ids``, ``images`` and ``epoch`` every training batch must come with.
        mixes: whether the teacher still fits when images are mixed (mixup, CutMix); otherwise ``target_b`` is refused.
        softens_student: whether ``temperature`` softens the student; otherwise it belongs to the teacher alone.
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
    softens_student = True
    copies_model = False
    weight: Tensor | None
    _kept_as: ClassVar[Mapping[str, str]] = {}  # argument -> the attribute that has its value, where the names differ
    _loads_without_memory = False  # whether weights saved without any criterion load strictly
    _starts_empty = "the memory starts empty"

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
        checked = prepare(
            op, impl=impl, alpha=alpha, temperature=temperature, label_smoothing=label_smoothing,
            ignore_index=ignore_index, reduction=reduction,
        )  # fmt: skip
        if weight is not None:
            _args.check_tensor(op, "weight", weight)
        if impl not in ("auto", "torch") and (
            refusal := ops.unsupported(None, weight=weight, alpha=alpha, temperature=temperature)
        ):
            raise RuntimeError(f"{op}: impl={impl!r} {refusal} use impl='torch', plain autograd")
        self.alpha, self.temperature = checked.alpha, checked.temperature
        self.ce_weight, self.ce_alpha = _args.check_ce_weight(op, alpha, ce_weight, ce_alpha)
        self.label_smoothing, self.ignore_index = checked.label_smoothing, checked.ignore_index
        self.reduction, self.impl = reduction, impl
        self.register_buffer("weight", weight)
        self.counted: int | None = None
        self._parts: list[Tensor | None] = [None]  # a list, because setting a module's attribute takes a microsecond
        self._same: bool | None = None  # see _set_same; False until the batch is remembered
        self._last_without_grad = False  # of the calls in train(): such a call remembers nothing
        # Of the batch remembered last: its ids, at a fixed address while the number of rows stays, its epoch and rows.
        self._last_ids: Tensor | None = None
        self._last_epoch: int | None = None
        self._last_rows = 0
        self._same_ids = 0  # calls in a row with those ids
        # The attributes that the options were last prepared from, and those options.
        self._prepared: tuple[tuple[Any, ...], Options] | None = None

    @contextmanager
    def same_batch(self) -> Iterator[None]:
        """All calls inside are one batch: they meet the same teacher, and the latest is what is remembered.

        For loops that evaluate a batch several times and pass no ids: SAM, closures of LBFGS, line searches. With ids
        the criterion recognises the batch itself, and so it does inside backward (activation checkpointing). An
        inner block belongs to the outer one.

        >>> criterion = LastBatchLoss(num_classes=3)
        >>> with criterion.same_batch():
        ...     first = criterion(torch.zeros(2, 3), torch.tensor([0, 1]))
        ...     second = criterion(torch.ones(2, 3), torch.tensor([0, 1]))   # what the next batch learns from
        >>> criterion.buffer.logits[0].tolist()
        [1.0, 1.0, 1.0]
        """
        outermost = self._same is None
        if outermost:
            self._set_same(False)
        try:
            yield
        finally:
            if outermost:
                self._set_same(None)

    def _set_same(self, same: bool | None) -> None:
        """The calls from here on: True the last batch again, False one new batch, None what ids and backward tell."""
        self._same = same

    def _again(self, ids: Tensor | None) -> int:
        """Whether a call is the last batch once more: 1 yes, 0 no, -1 where the ids tell."""
        if self._same is not None:
            return int(self._same)
        if ids is not None:
            return -1
        if self._last_without_grad or torch.compiler.is_compiling():
            return 0  # the first evaluation of reentrant checkpointing is one without gradient
        return int(torch._C._current_graph_task_id() != -1)  # inside backward: a recomputation

    def _note_call(self, remembered: bool) -> None:
        """Note whether a call in train() remembered its batch."""
        if remembered and self._same is False:
            self._same = True
        if self._last_without_grad is remembered:  # setting a module's attribute takes a microsecond
            self._last_without_grad = not remembered

    def teacher(self, inputs: Inputs) -> Teacher:
        """The teacher of this batch; every method writes it."""
        raise NotImplementedError(f"{type(self).__name__}: a method must define teacher(inputs) -> Teacher")

    def objective(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Loss and parts of a training batch: the cross entropy and the KL to :meth:`teacher`.

        A method whose loss is no KL to a teacher writes this instead. ``parts`` is detached and holds the loss, the
        cross entropy, the method's own term, and how many rows have the largest logit at their label.
        """
        return self._distilled(self.teacher(inputs), inputs)

    def _distilled(self, teacher: Teacher, inputs: Inputs) -> tuple[Tensor, Tensor]:
        temperature = self.temperature if self.softens_student else 1.0
        result = distill(
            type(self).__name__, inputs.logits, inputs.target, teacher, alpha=self.alpha, temperature=temperature,
            ce_weight=self.ce_weight, ce_alpha=self.ce_alpha, label_smoothing=self.label_smoothing, weight=self.weight,
            ignore_index=self.ignore_index, kd_mask=inputs.kd_mask, target_b=inputs.target_b, lam=inputs.lam,
            reduction=self.reduction, impl=self.impl,
        )  # fmt: skip
        self.counted = teacher.rows
        return result

    def record(self, inputs: Inputs) -> None:
        """Remember the batch; called without gradient after the loss of a training batch was computed.

        Where ``inputs.again`` is true the batch takes the place of its earlier evaluation, and :meth:`teacher` must
        have given what it gave then. ``inputs.again`` may be a tensor on the device; choose by ``torch.where``.
        """

    def step(self) -> None:
        """Count an optimiser step; the loop calls it after every one. The next batch is a new one."""
        self._forget_ids()

    def setup(self, model: nn.Module) -> None:
        """See the model; the loop calls it once before training."""

    def reset(self) -> None:
        """Forget everything: the method is then as it was made."""
        self._last_ids = self._last_epoch = None
        self._last_rows = 0
        if self._same is not None:
            self._same = False

    def _is_again(self, rows: int, ids: Tensor | None, epoch: int | None) -> bool | Tensor:
        """``Inputs.again``; the ids are compared on the device, and only for a method that records."""
        again = self._again(ids) if self._last_rows else 0
        if again == 1 and rows != self._last_rows:
            raise ValueError(
                f"{type(self).__name__}: the same batch again must have its {self._last_rows} rows, got {rows}; pass "
                "ids= with every batch, or leave same_batch() between batches"
            )
        if again >= 0:
            return again == 1
        last = self._last_ids
        if ids is None or last is None or epoch != self._last_epoch:
            return False
        if last.shape != ids.shape or last.device != ids.device:
            return False
        same = (ids == last).all()
        if torch.is_grad_enabled() and _args.readable(same):
            self._same_ids = self._same_ids + 1 if same else 0
            if self._same_ids == _MANY_TIMES:
                warnings.warn(
                    f"{type(self).__name__}: the ids were the same {_MANY_TIMES} times in a row, so all these calls "
                    "were one batch, which keeps the teacher of its first time. Where every batch is the whole set, "
                    "call criterion.step() after every optimiser step, or pass epoch=",
                    stacklevel=3,
                )
        return same

    def _keep_ids(self, rows: int, ids: Tensor | None, epoch: int | None) -> None:
        """Remember of which batch the record is."""
        self._last_rows, self._last_epoch = rows, epoch
        last = self._last_ids
        if ids is None:
            self._forget_ids()
        elif last is not None and last.shape == ids.shape and last.device == ids.device:
            last.copy_(ids)
        else:
            self._last_ids = ids.to(torch.int64, copy=True)

    def _forget_ids(self) -> None:
        """Take the next batch for a new one; by a value on the device, which a captured graph reads too."""
        if self._last_ids is not None:
            self._last_ids.fill_(UNKNOWN_ID)

    def cost(self) -> str:
        """One line on memory and extra work per step beside plain cross entropy."""
        return "no state, no extra forward"

    @property
    def parts(self) -> LossParts:
        """The terms of the last call, detached 0-d tensors on the device."""
        if self._parts[0] is None:
            raise RuntimeError(f"{type(self).__name__}.parts: there are none before the first call of the criterion")
        return LossParts.unpack(self._parts[0])

    def _keep_parts(self, parts: Tensor) -> None:
        if not torch.compiler.is_exporting():  # an exported program keeps nothing
            self._parts[0] = ops.unwrapped(parts) if torch._C._are_functorch_transforms_active() else parts

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        *rest: Any,
    ) -> None:  # fmt: skip
        """As torch does, but a checkpoint of a cross entropy, with class weights, loads strictly: it has no memory."""
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *rest)
        key = prefix + "_extra_state"
        if key in missing_keys and (self._loads_without_memory or prefix + "weight" in state_dict):
            missing_keys.remove(key)
            self.reset()
            warnings.warn(f"{type(self).__name__}: the checkpoint has no {key!r}; {self._starts_empty}", stacklevel=2)

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
        """``alpha``, ``temperature`` and every other argument that has no default or another value than it."""
        shown = []
        for name, parameter in arguments_of(type(self)).items():
            try:
                value = operator.attrgetter(self._kept_as.get(name, name))(self)
            except AttributeError:
                continue  # an argument that is not kept
            if name in ("alpha", "temperature") or not _equal(value, parameter.default):
                shown.append(f"{name}={_short(value)}")
        return ", ".join(shown)

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
        inputs = None
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
                raise ValueError(
                    f"{op}: needs {wanted} with every batch in train(); pass it to the call, or call criterion.eval() "
                    "for a validation"
                )
            if target_b is not None and not self.mixes:
                raise ValueError(
                    f"{op}: needs one class per row, got target_b of mixed images, which its teacher does not fit; "
                    "turn mixup and CutMix off"
                )
            remembers = type(self).record is not DistillationLoss.record
            if remembers and torch.is_grad_enabled() and torch._C._are_functorch_transforms_active():
                ops.refuse_memory(op)
            again = remembers and self._is_again(logits.shape[0], ids, epoch)
            inputs = Inputs(
                logits, target, options.temperature, ids, images, epoch, options.ignore_index, target_b, again,
                lam, kd_mask,
            )  # fmt: skip
            loss, parts = self.objective(inputs)
        elif target is None:
            raise ValueError(f"{op}: target is None in eval(), where there is no teacher; nothing is left to compute")
        else:
            evaluated = Inputs(logits, target, 1.0, target_b=target_b, lam=lam, kd_mask=kd_mask)
            loss, parts = self._distilled(Teacher("none"), evaluated)
        self._keep_parts(parts)
        if inputs is not None:
            recorded = torch.is_grad_enabled()
            if recorded and remembers:
                with torch.no_grad():
                    self.record(inputs)
                    self._keep_ids(logits.shape[0], ids, epoch)
            self._note_call(recorded)
        return loss


class LastBatchLoss(DistillationLoss):
    """Self-distillation from the last mini-batch as a criterion: ``loss = criterion(logits, target, ids)``.

    ``L = CE + alpha * tau^2 * mean KL(softmax(t / tau) || softmax(z / tau))`` over the rows that repeat samples of the
    previous batch; ``t`` are the logits the model gave them then. A batch is ``[repeated rows | new rows]``, as
    ``OverlapBatchSampler`` makes it: the stored rows teach the first rows, and the other rows are stored for the next
    batch, in the same launch. The first batch holds new rows only and is plain CE.

    The same batch evaluated again meets the same teacher, and its latest evaluation is what is stored; see
    :class:`DistillationLoss`. Stored rows teach only rows of the same id; rows stored without ids teach only batches
    without ids; rows that are not finite teach nothing. When many batches in a row repeat no sample, the criterion
    warns once. With gradient accumulation every call is a batch: a micro-batch learns from the previous micro-batch.

    The buffer is not a registered buffer, because DistributedDataParallel would overwrite every rank's teacher with
    rank 0's. It is part of ``state_dict()`` through ``get_extra_state``, as one tensor of bytes, whose size is the same
    before and after training when ``capacity`` is given: torch.distributed.checkpoint loads only equal sizes. A saved
    buffer that does not fit or is another rank's, or a checkpoint without one, restarts it with a warning.

    ``keep="top_k"`` stores ``2 k + 1`` numbers per row instead of ``C``, for many classes: the k largest logits, their
    classes, and the log-sum-exp of all at the temperature of that call. The teacher then has k classes and one bucket
    for the rest, see :class:`TopK`. A temperature that is set anew holds from the next stored rows on: those stored
    before it have the rest of the old one.

    Args:
        num_classes: ``C``.
        keep: what is stored of a row: "logits", all C, or "top_k", the k largest and the sum of all.
        k: how many with keep="top_k"; at most C.
        capacity: rows stored, half the batch the model sees; None takes it from the first batches.
        dtype: dtype of the stored logits; None takes that of the first logits (lossless), for which a checkpoint keeps
            8 bytes per logit when ``capacity`` is given. With keep="top_k" float32, or float64 for float64 logits.
        alpha: weight of the KL, a number >= 0 or a 0-d tensor; may be set at any time. The default is the community's,
            not a value read from the paper.
        temperature: tau, as in :func:`fused_lb_loss`; may be set at any time. The default is the community's.
        label_smoothing: of the CE, as in torch.
        weight: ``(C,)`` class weights of the CE, a buffer as in torch.
        ignore_index: rows with this label leave the CE.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        impl: ``"auto" | "cuda" | "triton" | "cpu" | "torch"``, as in :func:`fused_lb_loss`.
        device: where to allocate the buffer when ``capacity`` is given; it follows the logits otherwise.

    Attributes:
        parts: :class:`LossParts` of the last call.
        buffer: the :class:`LogitBuffer`, with counters of the rows taught and not; or None before the first batch.

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
    _kept_as: ClassVar[Mapping[str, str]] = {"capacity": "buffer.capacity"}
    _loads_without_memory = True
    _starts_empty = "the buffer starts empty, so the next batch has no last-batch term"

    def __init__(
        self,
        num_classes: int,
        *,
        keep: str = "logits",
        k: int = 64,
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
        if keep not in ("logits", "top_k"):
            raise ValueError(f"{op}: keep must be 'logits' or 'top_k', got {keep!r}")
        k = _args.check_kept(op, k, num_classes) if keep == "top_k" else _args.as_int(k, op, "k", 1)
        if keep == "logits" and k != 64:
            raise ValueError(f"{op}: k belongs to keep='top_k', got k={k} with keep='logits', which stores all classes")
        if keep == "top_k" and dtype not in (None, torch.float32, torch.float64):
            raise TypeError(
                f"{op}: keep='top_k' stores float32 or float64, which hold the numbers of the classes, got {dtype}; "
                "leave dtype=None"
            )
        if capacity is not None:
            capacity = _args.as_int(capacity, op, "capacity", 1)
        device = _args.check_device(op, "device", device)
        if dtype is not None:
            _args.check_dtype(op, "dtype", dtype)
        if weight is not None:
            _args.check_weight_form(op, weight, num_classes)
        super().__init__(
            alpha=alpha, temperature=temperature, label_smoothing=label_smoothing, weight=weight,
            ignore_index=ignore_index, reduction=reduction, impl=impl,
        )  # fmt: skip
        self.num_classes = num_classes
        self.keep, self.k = keep, k
        self.dtype = dtype
        self.buffer: LogitBuffer | None = None
        self._batches_with_ids = [0]  # a list, as `_parts`
        self._untaught: Tensor | None = None  # copy of buffer.untaught on the host
        self._warned = False
        self._warned_no_ids = False
        self._size_follows = capacity is None
        self._dtype_follows = capacity is not None and dtype is None
        if capacity is not None:
            self.buffer = self._new_buffer(capacity, dtype or torch.float32, device or "cpu")

    @property
    def _of_classes(self) -> int:
        """``LogitBuffer.of_classes`` of its buffer."""
        return self.num_classes if self.keep == "top_k" else 0

    @property
    def _columns(self) -> int:
        """What is stored of a row."""
        return 2 * self.k + 1 if self.keep == "top_k" else self.num_classes

    def _stored_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """In which dtype rows of logits of this dtype are stored."""
        return self.dtype or (compute_dtype(dtype) if self.keep == "top_k" else dtype)

    def _new_buffer(self, capacity: int, dtype: torch.dtype, device: torch.device | str) -> LogitBuffer:
        buffer = LogitBuffer(self._columns, capacity, dtype, device)
        buffer.of_classes = self._of_classes
        return buffer

    def cost(self) -> str:
        if self.keep == "top_k":
            return f"two times {2 * self.k + 1} numbers per stored row, and a pass over the new rows that finds them"
        return "a batch of logits (one half teaches, one is stored); no extra forward or pass over the logits"

    def reset(self) -> None:
        """Forget the stored rows; the next batch is taken as the first one of a stream."""
        super().reset()
        self._batches_with_ids[0] = 0
        if self.buffer is not None:
            self.buffer.reset()

    def forward(
        self,
        logits: Tensor,
        target: Tensor | None,
        ids: Tensor | None = None,
        *,
        head_weight: Tensor | None = None,
        head_bias: Tensor | None = None,
        num_old: int | None = None,
        images: Tensor | None = None,
        epoch: int | None = None,
        target_b: Tensor | None = None,
        lam: Scalar | None = None,
        kd_mask: Tensor | None = None,
    ) -> Tensor:
        """The loss of one batch.

        Args:
            logits: ``(B, C)``, or with ``head_weight`` the hidden states ``(B, D)`` of which the last layer makes them.
            target: ``(B,)`` labels, ``(B, C)`` probabilities, or None, as in :func:`fused_lb_loss`.
            ids: ``(B,)`` integer sample ids; a row whose id differs from the stored one gets no KL and is counted in
                ``buffer.mismatched`` (``buffer.unknown`` where the row was stored without an id).
            head_weight: ``(C, D)`` the weight of the last layer: its product, the loss and every gradient are computed
                for a few rows at a time, without the logits of the batch, as in :func:`fused_linear_lb_loss`. With
                ``keep="top_k"`` nothing of the size of the logits is stored either.
            head_bias: ``(C,)`` the bias of the last layer.
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
        layer = None
        if head_weight is not None:
            layer = logits, head_weight
            logits = logits_of(op, logits, head_weight, head_bias)
        elif head_bias is not None:
            raise ValueError(f"{op}: head_bias was given without head_weight, which makes logits of hidden states")
        if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] != self.num_classes:
            _args.check_logits(op, logits, target)
            raise ValueError(
                f"{op}: logits must have C = {self.num_classes} classes, got {logits.shape[1]}; make the criterion "
                f"with num_classes={logits.shape[1]}, or the model with {self.num_classes}"
            )
        if num_old is not None and type(num_old) is not int:
            num_old = _args.check_num_old(op, num_old)
        if kd_mask is not None:
            _args.check_kd_mask(op, logits, kd_mask, logits.shape[0])
        if target_b is not None or lam is not None:
            lam = _args.check_pair(op, logits, target, target_b, lam)
        options = self._options()

        def evaluate(
            teacher: Tensor | None, mask: Tensor | None, kept_from: int = 0, keep: int = 0
        ) -> tuple[Tensor, Tensor, Tensor | None]:
            if layer is not None:
                return linear_loss(
                    options, *layer, target, teacher, head_bias=head_bias, kind=self.keep, kd_mask=mask,
                    target_b=target_b, lam=lam, kept_from=kept_from, keep=keep,
                )  # fmt: skip
            loss, parts = row_loss(
                options, logits, target, teacher=teacher, teacher_kind=self.keep, kd_mask=mask, target_b=target_b,
                lam=lam,
            )  # fmt: skip
            return loss, parts, None

        if not self.training or logits.shape[0] == 0:  # an empty batch has no row to teach or to store
            if target is None and not self.training:
                raise ValueError(
                    f"{op}: target is None in eval(), where there is no teacher; nothing is left to compute"
                )
            loss, parts, _ = evaluate(None, None)
        elif not torch.is_grad_enabled():
            teacher, mask = self._stored_teacher(logits, ids, num_old, kd_mask)
            loss, parts, _ = evaluate(teacher, mask)
            self._note_call(False)
            if ids is None and self._batches_with_ids[0]:
                self._warn_no_ids()
        else:
            before = self.buffer, self._dtype_follows
            try:
                buffer, stored, again = self._buffer_for(logits, target, ids, num_old, self._again(ids))
                if self.keep == "logits" and layer is None:
                    loss, parts = row_loss(
                        options, logits, target, buffer=buffer, ids=ids, num_old=num_old, again=again, kd_mask=kd_mask,
                        target_b=target_b, lam=lam,
                    )  # fmt: skip
                    buffer.count, buffer.batch = stored, logits.shape[0]
                else:
                    if torch._C._are_functorch_transforms_active():
                        ops.refuse_memory(op)
                    teacher, mask = self._taught_by(buffer, logits.shape[0], ids, num_old, again, kd_mask)
                    first = logits.shape[0] - stored
                    loss, parts, new = evaluate(teacher, mask, first, self.k if self.keep == "top_k" else -1)
                    if new is None:
                        new = TopK.of(logits[first:], self.k, self.temperature).packed()
                    del teacher  # a copy of the stored rows
                    buffer.update(new, ids, num_old, again, kd_mask, start=first)
            except Exception:
                # A refused batch changes nothing, not even the size that it would have given the buffer.
                self.buffer, self._dtype_follows = before
                raise
            if self._last_without_grad or self._same is False:
                self._note_call(True)
            if ids is not None and not torch.compiler.is_compiling():
                self._batches_with_ids[0] += 1
                if self._batches_with_ids[0] % _CHECK_EVERY == 0:
                    self._warn_untaught(buffer)
            elif ids is None and self._batches_with_ids[0]:
                self._warn_no_ids()
        self._keep_parts(parts)
        return loss

    def _stored_teacher(
        self, logits: Tensor, ids: Tensor | None, num_old: int | None, kd_mask: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The stored rows that teach this batch, and which are valid; nothing changes."""
        buffer, batch = self.buffer, logits.shape[0]
        if buffer is None:
            return None, None
        if buffer.device != logits.device:  # as after a resume, before the first batch with gradient moves it
            buffer = copy.copy(buffer).to(logits.device)
        if ids is not None:
            _args.check_ids("LastBatchLoss", logits, ids)
        again = self._again(ids) if batch == buffer.batch else 0
        if self._all_stored(buffer, batch, num_old) and buffer.recognise(batch, ids, num_old, again) < 1:
            again = 0
            if _repeats_second_half(buffer, batch, ids):
                buffer = buffer.resized(batch // 2, skip=batch // 2)
        return self._taught_by(buffer, batch, ids, num_old, again, kd_mask)

    @staticmethod
    def _taught_by(
        buffer: LogitBuffer, batch: int, ids: Tensor | None, num_old: int | None, again: int, kd_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The rows of the buffer that teach the first rows of a batch, and which of them are valid."""
        match = buffer.match(batch, ids, num_old, again)
        valid = match.repeats
        return buffer.teacher(match), valid if kd_mask is None else valid & kd_mask[: len(valid)]

    def _warn_untaught(self, buffer: LogitBuffer) -> None:
        """Warn once when many batches in a row repeat no row of the batch before. Never waits for the device."""
        capturing = buffer.slots.is_cuda and torch.cuda.is_current_stream_capturing()
        if self._warned or capturing or not _args.has_values(buffer.slots):
            return
        if not buffer.slots.is_cuda:
            untaught = int(buffer.untaught)
        else:  # look at the copy that was asked for last time, and ask for another
            if self._untaught is None:
                self._untaught = torch.zeros((), dtype=torch.int64, pin_memory=True)
            untaught = int(self._untaught)
            self._untaught.copy_(buffer.untaught, non_blocking=True)
        if untaught >= _CHECK_EVERY // 2:
            self._warned = True
            warnings.warn(
                f"LastBatchLoss: the last {untaught} batches repeated no row of the batch before them, so they learned "
                "nothing from it. Likely causes: the loader shuffles (shuffle=True, or a framework replaced the "
                "sampler) instead of taking its batches from OverlapBatchSampler, or ids are not the same for the same "
                "sample. criterion.buffer counts: rows taught, mismatched, unknown, not_finite; batches untaught",
                stacklevel=5,  # the caller, past torch's two frames
            )

    def _warn_no_ids(self) -> None:
        """Warn once that a batch without ids follows batches with ids: most often a validation in `train()`."""
        if self._warned_no_ids or torch.compiler.is_compiling():
            return
        self._warned_no_ids = True
        warnings.warn(
            "LastBatchLoss: in train(), a batch without ids follows batches with ids, so the loss contains the KL to "
            "logits that may be those of other samples. In validation call criterion.eval() first, which gives "
            "torch's cross entropy (and criterion.train() after it); in training pass ids= with every batch",
            stacklevel=5,  # the caller, past torch's two frames
        )

    def _all_stored(self, buffer: LogitBuffer, batch: int, num_old: int | None) -> bool:
        """Whether the buffer took its size from a batch of as many rows, all of which it stored."""
        return self._size_follows and num_old is None and batch == buffer.count > 0 and batch % 2 == 0

    def _buffer_for(
        self, logits: Tensor, target: Tensor | None, ids: Tensor | None, num_old: int | None, again: int
    ) -> tuple[LogitBuffer, int, int]:
        """The buffer, on the device of the logits and large enough, its rows to be stored, and the op's ``again``.

        Decided from shapes, almost always without reading the device.
        """
        batch, buffer = logits.shape[0], self.buffer
        if buffer is not None and not self._dtype_follows and buffer.rows.device == logits.device:
            old = buffer.count if num_old is None else num_old
            if 0 < old < batch <= old + buffer.capacity and (again == 0 or batch == 2 * buffer.count == buffer.batch):
                return buffer, batch - old, again
        # Here the buffer is made, moved or resized, so the other arguments are examined first.
        op = "LastBatchLoss"
        _args.check_logits(op, logits)
        if target is not None:
            _args.check_target(op, logits, target)
        if ids is not None:
            _args.check_ids(op, logits, ids)
        if buffer is None:
            new = max(batch - (num_old or 0), 1)
            buffer = self._new_buffer(new, self._stored_dtype(logits.dtype), logits.device)
        elif self._dtype_follows and buffer.count == 0 and buffer.dtype != self._stored_dtype(logits.dtype):
            buffer = self._new_buffer(buffer.capacity, self._stored_dtype(logits.dtype), logits.device)
        elif buffer.device != logits.device:
            buffer = buffer.to(logits.device)
        again = buffer.recognise(batch, ids, num_old, again)
        if self._size_follows and again < 1:
            old = buffer.count if num_old is None else num_old
            if self._all_stored(buffer, batch, num_old):
                # Both batches were [old | new], and only the second half of the first is repeated now. Or a stream
                # starts anew with as many new rows: that would shift every later pair.
                if _repeats_second_half(buffer, batch, ids):
                    buffer = buffer.resized(batch // 2, skip=batch // 2)
                else:
                    buffer = buffer.resized(buffer.capacity, skip=buffer.count)
                    buffer.untaught.add_(1)  # or a loader that shuffles: then no batch ever repeats a row
            elif batch - old > buffer.capacity and not (buffer.count == 0 and batch == 2 * buffer.capacity):
                buffer = buffer.resized(batch - old)
        stored = buffer.stored_rows(batch, num_old, again)
        if buffer is not self.buffer or self._dtype_follows:
            self.buffer, self._dtype_follows = buffer, False
        return buffer, stored, again

    def get_extra_state(self) -> Tensor:
        """The buffer for ``state_dict()``, as one uint8 tensor whose size is the same before and after training.

        With ``capacity=None`` the size is known after the first batch, before which the tensor is empty. A dtype that
        follows the logits may be any: every logit then takes the 8 bytes of the widest.
        """
        if self.buffer is None:
            return pack_state({})
        wide = self.dtype is None and not self._size_follows
        return pack_state(self.buffer.state_dict(), itemsize=8 if wide else 0)

    def set_extra_state(self, state: Any) -> None:
        """Take over a saved buffer (packed, or the dict of ``LogitBuffer.state_dict``), or warn and restart it."""
        state, buffer = unpack_state(state), self.buffer
        if not state:
            self.reset()
            return
        super().reset()
        saved = stored_dtype(state)
        dtype = self.dtype or saved
        if self.dtype is None and buffer is not None and not self._dtype_follows:
            # Its own logits have chosen a dtype already: take the one that holds both.
            dtype = buffer.dtype if saved is None else torch.promote_types(buffer.dtype, saved)
        if buffer is None or self._size_follows:
            self.buffer = LogitBuffer.from_state(state, self._columns, dtype, self._of_classes)
            return
        if dtype is not None and dtype != buffer.dtype:
            self.buffer = buffer = self._new_buffer(buffer.capacity, dtype, buffer.device)
        loaded = buffer.load_state_dict(state)
        self._dtype_follows = self._dtype_follows and not (loaded and saved is not None)
