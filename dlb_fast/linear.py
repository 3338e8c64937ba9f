"""The loss from hidden states: the last layer's product, the objective and every gradient, a few rows at a time.

The logits of a batch of many classes are the memory of a training step. Here they exist for one chunk of rows: the
op ``dlb_fast::linear_last_batch`` multiplies the chunk's hidden states by the weight, the row kernel writes the
gradient over the logits, and two products take it to the hidden states and to the weight. The next chunk reuses the
memory. A row's loss does not depend on the other rows but for the divisors of ``reduction="mean"``, which are known
before the first chunk.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import _args, _backends, ops, reference
from ._options import OPTIONS, PARTS, REDUCTION, TEACHER_KIND, TENSORS
from .functional import (
    LossParts,
    Options,
    TopK,
    _beyond_cuda,
    _op_tensors,
    _rows_contiguous,
    pack_top_k,
    prepare,
    row_loss,
    top_k_impl,
)
from .reference import Scalar

KINDS = ("logits", "probabilities", "hidden", "top_k")
LOGIT_BYTES, LOGIT_BYTES_ON_CPU = 256 << 20, 36 << 20
"""Default ``max_memory``: few chunks, because each reads the whole weight and adds to its whole gradient."""
_SLICE_BYTES = 4 << 20  # of the logits' gradient where it is widened for a product: so much stays in a cache
_GRAD_SCALE, _VALID = PARTS.index("grad_scale"), PARTS.index("valid")

_FIRST = {
    "hidden": "Tensor", "head_weight": "Tensor", "head_bias": "Tensor?",
    "teacher": "Tensor?", "teacher_weight": "Tensor?", "teacher_bias": "Tensor?", "row_factors": "Tensor?",
    "teacher_kind": "int", "impl": "str", "max_memory": "int", "dtype": "ScalarType", "teacher_dtype": "ScalarType",
    "kept_from": "int", "keep": "int",
}  # fmt: skip
_LAST = {"need_hidden": "bool", "need_weight": "bool", "need_bias": "bool"}
_SCHEMA = {**_FIRST, **OPTIONS, **_LAST}
SCHEMA = f"({', '.join(f'{kind} {name}' for name, kind in _SCHEMA.items())}) -> "
SCHEMA += "(Tensor loss, Tensor parts, Tensor kept, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)"
"""``dtype`` is that of the logits (autocast's, or that of the hidden states). ``row_factors`` (B,) multiply the rows'
gradients. ``kept`` are the logits of the rows from ``kept_from`` on (``keep=-1``), their packed top k (``keep=k``), or
nothing (``keep=0``). The gradients are those of the loss times ``parts[grad_scale]``."""


def _named(args: tuple[Any, ...]) -> SimpleNamespace:
    return SimpleNamespace(**dict(zip(_SCHEMA, args, strict=True)))


def _empty_outputs(call: SimpleNamespace) -> tuple[Tensor, ...]:
    hidden, weight = call.hidden, call.head_weight
    batch, classes = hidden.shape[0], weight.shape[0]
    wide = reference.compute_dtype(call.dtype)
    per_row = call.reduction == REDUCTION["none"]
    # In float16 a gradient may underflow or overflow before the loss scale reaches it. A GPU sums into float32.
    of_hidden = call.dtype if call.dtype is torch.bfloat16 and not hidden.is_cuda else wide
    columns, kept_dtype = (2 * call.keep + 1, wide) if call.keep > 0 else (classes, call.dtype)
    return (
        hidden.new_empty((batch,) if per_row else (), dtype=wide),
        hidden.new_empty((len(PARTS),), dtype=wide),
        hidden.new_empty((batch - call.kept_from if call.keep else 0, columns), dtype=kept_dtype),
        hidden.new_empty(hidden.shape if call.need_hidden else (0, hidden.shape[1]), dtype=of_hidden),
        hidden.new_empty(weight.shape if call.need_weight else (0, weight.shape[1]), dtype=wide),
        hidden.new_empty((classes if call.need_bias else 0,), dtype=wide),
    )


def _fake(*args: Any) -> tuple[Tensor, ...]:
    return _empty_outputs(_named(args))


def _run(*args: Any) -> tuple[Tensor, ...]:
    call = _named(args)
    device = call.hidden.device.type
    with torch.no_grad(), torch.autocast(device, enabled=False) if _autocasts(device) else contextlib.nullcontext():
        return _Chunks(call).run()


def _autocasts(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _on_host(tensor: Tensor) -> bool:
    """Whether reading a value waits for no device."""
    return tensor.is_cpu


class _Chunks:
    """One call of the op."""

    def __init__(self, call: SimpleNamespace) -> None:
        self.call = call
        self.hidden, self.weight = call.hidden.detach().to(call.dtype), call.head_weight.detach().to(call.dtype)
        self.bias = None if call.head_bias is None else call.head_bias.detach().to(call.dtype)
        self.batch, self.classes = self.hidden.shape[0], self.weight.shape[0]
        self.outputs = _empty_outputs(call)
        self.loss, self.parts, self.kept, self.grad_hidden, self.grad_weight, self.grad_bias = self.outputs
        self.teacher_head: list[Any] | None = None
        self.taught = 0 if call.teacher is None else call.teacher.shape[0]
        if call.teacher_weight is not None:
            head = (call.teacher, call.teacher_weight, call.teacher_bias)
            self.teacher_head = [None if part is None else part.detach().to(call.teacher_dtype) for part in head]
        self.mean = call.reduction == REDUCTION["mean"]
        self.sum_dtype = torch.float64 if self.hidden.device.type != "mps" else torch.float32  # over the chunks
        self.needs_grad = call.need_hidden or call.need_weight or call.need_bias
        # With a factor per row the logits are widened, so that a gradient is rounded once, after its factor.
        self.factored = call.row_factors is not None and call.dtype.itemsize < 4
        row_bytes = self.classes * (call.dtype.itemsize + 4 * self.factored)
        if self.teacher_head is not None:
            row_bytes += self.classes * call.teacher_dtype.itemsize
        most = max(call.max_memory // row_bytes, 1)
        self.rows = -(-self.batch // max(-(-self.batch // most), 1))  # of a chunk: all of one size, but for the last
        self.memory: dict[str, Tensor] = {}  # of a chunk, reused by the next

    def run(self) -> tuple[Tensor, ...]:
        if self.batch == 0:
            for output in self.outputs:
                output.zero_()
            self.parts[_GRAD_SCALE] = 1.0
            return self.outputs
        finite = None
        if self.taught and self.mean and self.call.impl != "cpu":
            finite = self.finite_teachers()
        if not self.walk(finite):
            self.walk(self.finite_teachers())
        return self.outputs

    def reused(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory without values; the first of a name is the largest."""
        if name not in self.memory:
            self.memory[name] = self.hidden.new_empty(shape, dtype=dtype)
        return self.memory[name][: shape[0], : shape[1]]

    def logits(self, name: str, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``rows weight^T + bias`` in the memory of that name."""
        out = self.reused(name, (rows.shape[0], weight.shape[0]), rows.dtype)
        if bias is None:
            return torch.mm(rows, weight.t(), out=out)
        return torch.addmm(bias, rows, weight.t(), out=out)

    def teachers(self, start: int, stop: int) -> Tensor:
        """The teachers of rows [start, stop)."""
        if self.teacher_head is None:
            return self.call.teacher[start:stop]
        rows, weight, bias = self.teacher_head
        return self.logits("teacher", rows[start:stop], weight, bias)

    def finite_teachers(self) -> Tensor:
        chunks = range(0, self.taught, self.rows)
        return torch.cat([reference.finite_rows(self.teachers(a, min(a + self.rows, self.taught))) for a in chunks])

    def divisors(self, valid: Tensor | None) -> tuple[Tensor | float, Tensor | float]:
        """Of the sums of the two terms in the mean: the weight of the rows that count, the number of valid teachers."""
        call = self.call
        by_ce: Tensor | float = 1.0
        if call.target is not None and call.target.dim() == 2:
            by_ce = float(self.batch)
        elif call.target is not None:
            counts = call.target != call.ignore_index
            if call.target_b is not None:
                counts = counts & (call.target_b != call.ignore_index)
            if call.weight is not None and call.target_b is None:
                weights = call.weight[call.target.clamp(0, self.classes - 1)].to(self.sum_dtype)
                by_ce = torch.where(counts, weights, torch.zeros_like(weights)).sum()
            else:
                by_ce = counts.sum(dtype=self.sum_dtype)
        by_kl = float(self.taught) if valid is None else valid.sum(dtype=self.sum_dtype)
        return by_ce, by_kl

    def walk(self, finite: Tensor | None) -> bool:
        """Every chunk. False: a teacher row is not finite and was not masked, so that the outputs are wrong."""
        call, host = self.call, _on_host(self.hidden)
        mask = call.kd_mask
        if finite is not None:
            mask = finite if mask is None else mask & finite
        fixed = {name: getattr(call, name) for name in OPTIONS}
        fixed["reduction"] = REDUCTION["none" if call.reduction == REDUCTION["none"] else "sum"]
        by_ce: Any = 1.0
        by_kl: Any = 1.0
        if host and call.alpha_t is not None:
            fixed["alpha"], fixed["alpha_t"] = call.alpha_t.item(), None
        if self.mean:
            by_ce, by_kl = self.divisors(mask)
        if host:
            by_ce, by_kl = float(by_ce), float(by_kl)
            ce_weight = call.ce_weight + call.ce_alpha * fixed["alpha"]
            fixed["ce_weight"], fixed["ce_alpha"] = ce_weight / by_ce if by_ce else 0.0, 0.0
            fixed["alpha"] = fixed["alpha"] / by_kl if by_kl else 0.0
            after: Any = 1.0  # divides the result
            share_ce, share_kl = 1.0 / by_ce if by_ce else 0.0, 1.0 / by_kl if by_kl else 0.0
        elif self.mean:
            # No value is read, which would wait for the device: by_ce times the loss is summed, and divided at the end.
            by_ce = torch.as_tensor(by_ce, dtype=self.sum_dtype, device=self.hidden.device)
            by_kl = torch.as_tensor(by_kl, dtype=self.sum_dtype, device=self.hidden.device)
            none = by_ce == 0
            if call.target is not None and call.target.dim() == 1:
                fixed["target"] = torch.where(none, torch.full_like(call.target, call.ignore_index), call.target)
            after = torch.where(none, torch.ones_like(by_ce), by_ce)
            alpha = call.alpha if call.alpha_t is None else call.alpha_t
            alpha = torch.where(by_kl == 0, torch.zeros_like(by_kl), alpha * after / by_kl)
            fixed["alpha_t"] = alpha.to(reference.compute_dtype(call.dtype))
            share_ce = 1.0 / after
            share_kl = torch.where(by_kl == 0, torch.zeros_like(by_kl), 1.0 / by_kl)
        else:
            after, share_ce, share_kl = 1.0, 1.0, 1.0

        sums = torch.zeros(len(PARTS), dtype=self.sum_dtype, device=self.hidden.device)
        scale: Tensor | float = 1.0
        for start in range(0, self.batch, self.rows):
            stop = min(start + self.rows, self.batch)
            loss, parts, wrong = self.chunk(start, stop, fixed, mask, finite is not None)
            if wrong:
                return False
            if self.loss.dim() == 1:
                self.loss[start:stop] = loss
            sums[: len(parts)] += parts
            if call.dtype is torch.float16 and len(parts) > _GRAD_SCALE:
                scale = parts[_GRAD_SCALE]
        if self.loss.dim() == 0:
            self.loss.copy_(sums[0] / after)
        self.parts.copy_(sums)
        self.parts[0] = sums[0] / after
        self.parts[1] = sums[1] * share_ce
        self.parts[2] = sums[2] * share_kl
        self.parts[_GRAD_SCALE] = 1.0 if call.row_factors is not None else scale * after
        return True

    def chunk(
        self, start: int, stop: int, fixed: dict[str, Any], mask: Tensor | None, all_known: bool
    ) -> tuple[Tensor, Tensor, bool]:
        """Rows [start, stop): loss, parts, and whether a teacher row turned out not to be finite."""
        call = self.call
        hidden = self.hidden[start:stop]
        z = self.logits("student", hidden, self.weight, self.bias)
        if call.keep and stop > call.kept_from:
            first = max(start, call.kept_from)
            new = z[first - start :]
            if call.keep > 0:
                temperature = call.temperature if call.temperature_t is None else call.temperature_t
                new = TopK.of(new, call.keep, temperature).packed()
            self.kept[first - call.kept_from : stop - call.kept_from] = new
        options = dict(fixed)
        for name in ("target", "target_b", "lam"):
            value = options[name]
            if value is not None and value.dim() > 0:
                options[name] = value[start:stop]
        taught = min(stop, self.taught)
        teacher, kind, asked = None, TEACHER_KIND["none"], 0
        options["kd_mask"] = None
        if start < taught:
            teacher, kind, asked = self.teachers(start, taught), call.teacher_kind, taught - start
            options["kd_mask"] = None if mask is None else mask[start:taught]
            if call.impl not in ("cpu", "torch") and not all_known:
                finite = reference.finite_rows(teacher)
                options["kd_mask"] = finite if options["kd_mask"] is None else options["kd_mask"] & finite
        logits = z
        if self.factored:
            logits = self.reused("wide logits", z.shape, torch.float32).copy_(z)
        loss, parts, grad = self.row_op(logits, teacher, kind, options)
        if call.impl == "cpu" and asked and not all_known:
            asked = asked if options["kd_mask"] is None else int(options["kd_mask"].sum())
            if int(parts[_VALID]) < asked:
                return loss, parts, True
        if grad is not None:
            if call.row_factors is not None:
                factors = call.row_factors[start:stop]
                if call.impl == "torch":
                    grad = grad.mul_(factors[:, None])
                else:
                    ops.op_for(call.impl, "scale_grad_")(grad, factors, parts)
            if self.factored and call.dtype is torch.bfloat16:
                grad = z.copy_(grad)
            self.add_gradients(grad, hidden, start, stop)
        return loss, parts, False

    def row_op(
        self, z: Tensor, teacher: Tensor | None, kind: int, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        impl, need = self.call.impl, self.needs_grad
        if impl == "torch":
            return _by_autograd(z, teacher, kind, options, need)
        args = (None if teacher is None else _rows_contiguous(teacher), kind, *options.values())
        if impl == "cpu":
            loss, parts = torch.ops.dlb_fast.last_batch_.default(z, *args, need)
            return loss, parts, z if need else None
        loss, parts, grad = ops.op_for(impl, "last_batch")(z, *args, need)
        return loss, parts, grad if need else None

    def add_gradients(self, grad: Tensor, hidden: Tensor, start: int, stop: int) -> None:
        """The chunk's share of every gradient that is needed."""
        first, wide = start == 0, self.grad_weight.dtype
        # Only a GPU has a product of half-precision operands into float32; elsewhere they are widened, in slices.
        widens = hidden.dtype != wide and not grad.is_cuda
        step = max(_SLICE_BYTES // (4 * self.rows), 256)
        slices = range(0, self.classes, step)
        if self.call.need_hidden:
            out = self.grad_hidden[start:stop]
            if out.dtype == grad.dtype == hidden.dtype:
                torch.mm(grad, self.weight, out=out)
            elif widens:
                out.zero_()
                for c in slices:
                    out.addmm_(grad[:, c : c + step].to(out.dtype), self.weight[c : c + step].to(out.dtype))
            else:
                out.copy_(torch.mm(grad, self.weight, out_dtype=out.dtype))
        if self.call.need_weight and widens:
            wide_hidden = self.reused("wide hidden", hidden.shape, wide).copy_(hidden)
            with _bfloat16_products() if grad.dtype is torch.bfloat16 else contextlib.nullcontext():
                for c in slices:
                    part = grad[:, c : c + step]
                    part = self.reused("wide gradient", part.shape, wide).copy_(part)
                    self.grad_weight[c : c + step].addmm_(part.t(), wide_hidden, beta=0 if first else 1)
        elif self.call.need_weight:
            if grad.dtype == wide:
                self.grad_weight.addmm_(grad.t(), hidden, beta=0 if first else 1)
            else:
                product = torch.mm(grad.t(), hidden, out_dtype=wide)
                self.grad_weight.copy_(product) if first else self.grad_weight.add_(product)
        if self.call.need_bias:
            if first:
                self.grad_bias.zero_()
            for c in slices:
                self.grad_bias[c : c + step] += grad[:, c : c + step].sum(0, dtype=wide)


@contextlib.contextmanager
def _bfloat16_products() -> Iterator[None]:
    """Let float32 operands that hold bfloat16 values be multiplied as such: exact, summed in float32, and as fast.

    torch has no product of bfloat16 operands into float32 on a CPU, but a setting by which oneDNN rounds float32
    operands to bfloat16 first, where the processor multiplies these faster. It is one of the process: beside other
    threads, whose float32 products it would round as well, these products stay in float32.
    """
    if threading.active_count() > 1:
        yield
        return
    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined, unused-ignore]
    before, setting.fp32_precision = setting.fp32_precision, "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


def _by_autograd(
    z: Tensor, teacher: Tensor | None, kind: int, options: dict[str, Any], need: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A chunk by the definition; the gradient in the compute dtype for float16, else in that of the logits."""
    names = {number: name for name, number in TEACHER_KIND.items()}
    alpha = options["alpha"] if options["alpha_t"] is None else options["alpha_t"]
    temperature = options["temperature"] if options["temperature_t"] is None else options["temperature_t"]
    ce_weight = options["ce_weight"] + (options["ce_alpha"] * alpha if options["ce_alpha"] else 0.0)
    inference = torch.inference_mode(False) if need else contextlib.nullcontext()
    with inference, torch.set_grad_enabled(need):
        leaf = z.float() if z.dtype is torch.float16 else z.detach()
        leaf = leaf.requires_grad_() if need else leaf
        loss, parts = reference.last_batch_loss(
            leaf, options["target"], teacher, alpha=alpha, temperature=temperature,
            label_smoothing=options["label_smoothing"], weight=options["weight"], ignore_index=options["ignore_index"],
            kd_mask=options["kd_mask"], reduction="none" if options["reduction"] == REDUCTION["none"] else "sum",
            target_b=options["target_b"], lam=options["lam"],
            ce_weight=ce_weight, teacher_kind=names[kind],
        )  # fmt: skip
        grad = torch.autograd.grad(loss.sum(), leaf)[0] if need else None
    return loss.detach(), parts, grad


_LIBRARY = torch.library.Library("dlb_fast", "FRAGMENT")
_LIBRARY.define(f"linear_last_batch{SCHEMA}")
_LIBRARY.impl("linear_last_batch", _run, "CompositeExplicitAutograd")
torch.library.register_fake("dlb_fast::linear_last_batch", _fake)


class _LinearLastBatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, args: dict[str, Any], needs: tuple[bool, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        op = torch.ops.dlb_fast.linear_last_batch.default
        later = args["reduction"] == REDUCTION["none"]  # the factor of a row is known in the backward
        loss, parts, kept, *grads = op(hidden, weight, bias, *args.values(), *((False,) * 3 if later else needs))
        ctx.impl, ctx.needs, ctx.later = args["impl"], needs, later
        ctx.owned = torch.compiler.is_compiling() or torch._C._autograd._top_saved_tensors_default_hooks(False) is None
        ctx.enlarged = args["dtype"] is torch.float16 or not _on_host(hidden)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        if later:
            tensors = {name: value for name, value in args.items() if isinstance(value, Tensor)}
            ctx.args = {name: None if name in tensors else value for name, value in args.items()}
            ctx.names = tuple(tensors)
            ctx.save_for_backward(hidden, weight, bias, *tensors.values())
        else:
            ctx.save_for_backward(parts, *grads)
        ctx.mark_non_differentiable(parts, kept)
        ctx.set_materialize_grads(False)
        return loss, parts, kept

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return None, None, None, None, None
        ops.refuse_second_derivative()
        if ctx.later:
            hidden, weight, bias, *tensors = ctx.saved_tensors
            args = {**ctx.args, **dict(zip(ctx.names, tensors, strict=True)), "row_factors": upstream, "keep": 0}
            op = torch.ops.dlb_fast.linear_last_batch.default
            _, parts, _, *grads = op(hidden, weight, bias, *args.values(), *ctx.needs)
        else:
            parts, *grads = ctx.saved_tensors
        result: list[Tensor | None] = []
        for grad, need, dtype in zip(grads, ctx.needs, ctx.dtypes, strict=True):
            if need and not ctx.later:
                rows = grad if grad.dim() == 2 else grad[None]
                grad = ops.times_upstream(ctx.impl, rows, upstream, parts, ctx.owned, ctx.enlarged).view(grad.shape)
            result.append(grad.to(dtype) if need else None)
        return *result, None, None


def fused_linear_lb_loss(
    hidden: Tensor,
    head_weight: Tensor,
    target: Tensor | None,
    teacher: Any = None,
    *,
    head_bias: Tensor | None = None,
    kind: str = "logits",
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
    max_memory: int | None = None,
    return_parts: bool = False,
) -> Any:
    """:func:`fused_lb_loss` from hidden states: its value and gradients without ``(B, C)`` logits in memory.

    ``L = CE(z, y) + alpha * tau^2 * mean_{i < H} KL(teacher_i || softmax(z_i / tau))`` with ``z = h W^T + b``

    A chunk of rows is multiplied, its loss and gradient are computed by the row kernel, and the gradients of ``h``,
    ``W`` and ``b`` are formed from it, before the next chunk takes its memory. The gradient of the weight is summed in
    float32 (float64 for float64) over the chunks, and rounded once to the weight's dtype. What requires no gradient (a
    frozen head, detached hidden states) costs no product. With ``reduction="none"`` the gradients are computed in the
    backward, which forms the logits once more.

    Args:
        hidden: ``(B, D)`` float32, bfloat16, float16 or float64, the input of the last layer; any strides.
        head_weight: ``(C, D)`` the weight of the last layer, as in ``torch.nn.Linear``, in the dtype of ``hidden``;
            inside ``torch.autocast`` both are cast to its dtype. It may be the weight of an embedding (tied).
        target: ``(B,)`` labels, ``(B, C)`` probabilities, or None for the KL alone.
        teacher: of the first ``H <= B`` rows, as ``kind`` says; None gives plain cross entropy. Detached.
        head_bias: ``(C,)`` the bias of the last layer.
        kind: ``"logits"``: teacher ``(H, C)``; ``"probabilities"``: ``(H, C)``, used as they are; ``"hidden"``:
            teacher ``(hidden_t (H, D2), head_weight_t (C, D2))``, or with a third ``(C,)`` bias: its logits are formed
            chunk by chunk too; ``"top_k"``: a :class:`TopK` of ``H`` rows (on a GPU in plain PyTorch).
        alpha: as in :func:`fused_lb_loss`, and so are the other options up to ``reduction``.
        temperature: tau of both distributions.
        label_smoothing: of the cross entropy.
        weight: ``(C,)`` class weights of the cross entropy.
        ignore_index: rows with this label leave the cross entropy.
        kd_mask: ``(H,)`` bool, False takes a row out of the KL.
        target_b: ``(B,)`` second labels of mixed inputs.
        lam: share of ``target`` in mixed inputs, a number, ``()`` or ``(B,)``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` for losses ``(B,)``.
        impl: ``"auto" | "cuda" | "triton" | "cpu" | "torch"``; ``"torch"`` is the definition, plain autograd with all
            logits in memory.
        max_memory: bytes for the logits of a chunk, at least one row's; None takes 36 MiB on a CPU, 256 MiB elsewhere.
            On a GPU the chunk's gradient takes as much again. The result does not depend on it beyond rounding.
        return_parts: also return :class:`LossParts`.

    Returns:
        The loss in float32 (float64 for float64), 0-d or ``(B,)``; with ``return_parts`` a pair.

    Raises:
        ValueError, TypeError: as :func:`fused_lb_loss`; a teacher that does not fit ``kind``. RuntimeError: as there.

    Source: the objective as :func:`fused_lb_loss`; chunks of rows with their gradients in the forward: Hsu et al.,
    "Liger Kernel", arXiv 2410.10989.

    >>> import torch
    >>> from dlb_fast import fused_linear_lb_loss
    >>> hidden, head = torch.randn(4, 8, requires_grad=True), torch.nn.Linear(8, 100)
    >>> y, teacher = torch.tensor([1, 5, 7, 99]), torch.randn(2, 100)
    >>> loss = fused_linear_lb_loss(hidden, head.weight, y, teacher, head_bias=head.bias)
    >>> loss.backward()
    >>> hidden.grad.shape, head.weight.grad.shape
    (torch.Size([4, 8]), torch.Size([100, 8]))
    """
    op = "fused_linear_lb_loss"
    if kd_mask is not None and teacher is None:
        raise ValueError(f"{op}: kd_mask was given without a teacher; there is no KL term to mask")
    if target is None and teacher is None:
        raise ValueError(f"{op}: target and teacher are both None; nothing is left to compute")
    options = prepare(
        op, impl=impl, alpha=alpha, temperature=temperature, label_smoothing=label_smoothing, weight=weight,
        ignore_index=ignore_index, reduction=reduction,
    )  # fmt: skip
    if kind == "top_k" and teacher is not None:
        teacher = pack_top_k(op, teacher)
    loss, parts, _ = linear_loss(
        options, hidden, head_weight, target, teacher, head_bias=head_bias, kind=kind, kd_mask=kd_mask,
        target_b=target_b, lam=lam, max_memory=max_memory,
    )  # fmt: skip
    return (loss, LossParts.unpack(parts)) if return_parts else loss


def logits_of(op: str, hidden: Tensor, head_weight: Tensor, head_bias: Tensor | None) -> Tensor:
    """Shape, dtype and device of the logits, for checks: (B, C) without values. The layer is checked before."""
    _check_head(op, hidden, head_weight, head_bias, _HEAD)
    dtype = _product_dtype(op, hidden, head_weight, head_bias, _HEAD)
    return hidden.new_empty((), dtype=dtype).expand(hidden.shape[0], head_weight.shape[0])


def _check_head(op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, names: tuple[str, str, str]) -> None:
    """Hidden states (B, D), the weight (C, D) and bias (C,) of a last layer, in one dtype and on one device."""
    of_hidden, of_weight, of_bias = names
    for name, value in zip(names, (hidden, weight, bias), strict=True):
        if value is None and name == of_bias:
            continue
        value = _args.check_tensor(op, name, value)
        if value.dtype not in _args.FLOATS:
            raise TypeError(f"{op}: {name} must be float32, bfloat16, float16 or float64, got {value.dtype}")
        if value.device != hidden.device:
            raise ValueError(
                f"{op}: {name} must be on the device of {of_hidden} ({hidden.device}), got {value.device}; move it "
                f"with {name}.to({of_hidden}.device)"
            )
    if hidden.dim() != 2:
        remedy = f"; pass {of_hidden}.flatten(0, -2) and target.flatten()" if hidden.dim() > 2 else ""
        raise ValueError(f"{op}: {of_hidden} must have shape (B, D), got {tuple(hidden.shape)}{remedy}")
    width = hidden.shape[1]
    if weight.dim() != 2 or weight.shape[1] != width or weight.shape[0] < 1:
        remedy = f"; pass {of_weight}.T" if weight.dim() == 2 and weight.shape[0] == width else ""
        raise ValueError(
            f"{op}: {of_weight} must have shape (C, {width}), one row per class as in torch.nn.Linear, got "
            f"{tuple(weight.shape)}{remedy}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: {of_bias} must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")


def _product_dtype(op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, names: tuple[str, str, str]) -> Any:
    """The dtype of ``F.linear(hidden, weight, bias)``: autocast's, or the one that all have."""
    given = {name: t.dtype for name, t in zip(names, (hidden, weight, bias), strict=True) if t is not None}
    device = hidden.device.type
    if torch.float64 not in given.values() and _autocasts(device):
        return torch.get_autocast_dtype(device)
    for name, dtype in given.items():
        if dtype != hidden.dtype:
            raise TypeError(
                f"{op}: {name} must have the dtype of {names[0]} ({hidden.dtype}), got {dtype}; pass "
                f"{name}.to({hidden.dtype}), or call it inside torch.autocast"
            )
    return hidden.dtype


_HEAD = ("hidden", "head_weight", "head_bias")
_TEACHER_HEAD = ("the teacher's hidden states", "the teacher's head_weight", "the teacher's head_bias")


def linear_loss(
    options: Options,
    hidden: Tensor,
    head_weight: Tensor,
    target: Tensor | None,
    teacher: Any = None,
    *,
    head_bias: Tensor | None = None,
    kind: str = "logits",
    kd_mask: Tensor | None = None,
    target_b: Tensor | None = None,
    lam: Scalar | None = None,
    max_memory: int | None = None,
    kept_from: int = 0,
    keep: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, parts and the kept rows of :func:`fused_linear_lb_loss`; errors name ``options.op``.

    A teacher of kind ``"top_k"`` is packed. The rows from ``kept_from`` on are kept as the op says.
    """
    op = options.op
    like = logits_of(op, hidden, head_weight, head_bias)
    dtype = like.dtype
    if target is not None:
        target = _args.check_target(op, like, target)
    if target_b is not None or lam is not None:
        lam = _args.check_pair(op, like, target, target_b, lam)
    if kind not in KINDS:
        raise ValueError(f"{op}: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if options.float64_only and dtype is not torch.float64:
        _args.check_temperature(op, options.temperature, dtype)
    if max_memory is None:
        max_memory = LOGIT_BYTES_ON_CPU if hidden.is_cpu else LOGIT_BYTES
    else:
        max_memory = _args.as_int(max_memory, op, "max_memory", 1, "a number of bytes or None")
    rows, head, teacher_dtype = _teacher_parts(op, like, teacher, kind)
    if kd_mask is not None and rows is not None:
        _args.check_kd_mask(op, like, kd_mask, rows.shape[0])
    _args.check_label_ranges(op, target, target_b, head_weight.shape[0], options.ignore_index)

    beyond = hidden.is_cuda and _beyond_cuda(like, rows)
    impl = _backends.pick(options.impl, hidden.device, beyond, op)
    refusal = ops.unsupported(
        hidden, target=target, weight=options.weight, lam=lam, alpha=options.alpha, temperature=options.temperature
    )
    if kind == "top_k" and rows is not None:
        impl = top_k_impl(options, impl)
    rows_kind = "logits" if kind == "hidden" else kind
    if options.impl == "torch" or refusal:
        if options.impl not in ("auto", "torch"):
            raise RuntimeError(f"{op}: impl={impl!r} {refusal} use impl='torch', plain autograd")
        logits = F.linear(hidden, head_weight, head_bias)
        if kind == "hidden" and rows is not None:
            with torch.no_grad():
                rows = F.linear(rows, *head)
        loss, parts = row_loss(
            options._replace(impl="torch"), logits, target, teacher=rows,
            teacher_kind=rows_kind, kd_mask=kd_mask, target_b=target_b, lam=lam,
        )  # fmt: skip
        new = logits.detach()[kept_from:] if keep else logits.new_empty((0, logits.shape[1]))
        return loss, parts, TopK.of(new, keep, options.temperature).packed() if keep > 0 else new

    tensors = _op_tensors(options, like, target, kd_mask, target_b, lam)
    numbers = dict(zip([name for name in OPTIONS if name not in TENSORS], options.numbers, strict=True))
    given = dict(
        teacher=None if rows is None else rows.detach(), teacher_weight=head[0] if head else None,
        teacher_bias=head[1] if len(head) > 1 else None, row_factors=None,
        teacher_kind=TEACHER_KIND["none" if rows is None else rows_kind], impl=impl, max_memory=max_memory,
        dtype=dtype, teacher_dtype=teacher_dtype or dtype, kept_from=kept_from, keep=keep,
        **{name: tensors.get(name) for name in TENSORS}, **numbers,
    )  # fmt: skip
    args = {name: given[name] for name in [*_FIRST, *OPTIONS][3:]}  # between the bias and the needs, in order
    needs = tuple(t is not None and t.requires_grad for t in (hidden, head_weight, head_bias))
    if torch.is_grad_enabled() and any(needs):
        loss, parts, kept = _LinearLastBatch.apply(hidden, head_weight, head_bias, args, needs)
    else:
        op_call = torch.ops.dlb_fast.linear_last_batch.default
        loss, parts, kept, *_ = op_call(hidden, head_weight, head_bias, *args.values(), False, False, False)
    return loss, parts, kept


def _teacher_parts(
    op: str, like: Tensor, teacher: Any, kind: str
) -> tuple[Tensor | None, tuple[Tensor, ...], torch.dtype | None]:
    """The teacher's rows, the head that makes logits of them, and the dtype of that product."""
    if teacher is None:
        return None, (), None
    if kind == "top_k":
        packed = teacher.to(reference.compute_dtype(like.dtype))
        _args.check_packed(op, like, packed)
        return packed, (), packed.dtype
    if isinstance(teacher, TopK):
        raise TypeError(f"{op}: a TopK belongs to kind='top_k', got kind={kind!r}")
    if kind != "hidden":
        if isinstance(teacher, (tuple, list)):
            raise TypeError(
                f"{op}: with kind={kind!r} the teacher must be a torch.Tensor, got {type(teacher).__name__}; hidden "
                "states and the layer that makes logits of them belong to kind='hidden'"
            )
        _args.check_teacher(op, like, teacher, "teacher")
        return teacher, (), teacher.dtype
    if not isinstance(teacher, (tuple, list)) or len(teacher) not in (2, 3):
        got = f"{len(teacher)} entries" if isinstance(teacher, (tuple, list)) else type(teacher).__name__
        raise TypeError(
            f"{op}: with kind='hidden' the teacher must be (hidden_t, head_weight_t) or (hidden_t, head_weight_t, "
            f"head_bias_t), got {got}"
        )
    rows, *head = teacher
    bias = head[1] if len(head) > 1 else None
    _check_head(op, rows, head[0], bias, _TEACHER_HEAD)
    dtype = _product_dtype(op, rows, head[0], bias, _TEACHER_HEAD)
    logits = rows.new_empty((), dtype=dtype).expand(rows.shape[0], head[0].shape[0])
    _args.check_teacher(op, like, logits, "the teacher's logits")
    return rows, tuple(part.detach() for part in head if part is not None), dtype
