"""What torch is promised: the ops ``dlb_fast::last_batch*``, their fake tensors and their derivative.

One op computes the loss, its gradient and the top-1 count in one call; ``last_batch_roll`` also reads its teacher from
the logit buffer and replaces it. The compiled ops are declared in ``csrc/last_batch.cpp`` with the schema below (a test
compares the two); the Triton ones are declared here. The derivative is a plain ``autograd.Function`` around the op: the
gradient is ready when backward arrives, which multiplies it by the upstream gradient, in place, and not at all when
that is 1. Differentiable once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _backends
from .reference import compute_dtype

REDUCTION = {"mean": 0, "sum": 1, "none": 2}
TEACHER_KIND = {"none": 0, "logits": 1, "probabilities": 2, "virtual": 3}
PARTS = ("loss", "ce", "lb", "correct", "grad_scale", "taught")
"""Entries of the op's ``parts``. ``grad_scale`` is the power of two by which a float16 gradient is stored multiplied,
so that it neither underflows before the upstream gradient (a loss scale) reaches it nor overflows; 1 for the other
dtypes."""

_OPTIONS = (
    "Tensor? target, Tensor? target_b, Tensor? lam, Tensor? weight, Tensor? kd_mask, "
    "Tensor? alpha_t, Tensor? temperature_t, float alpha, float temperature, float ce_weight, float ce_alpha, "
    "float label_smoothing, float correct_share, int ignore_index, int teacher_kind, "
    "int reduction, bool need_grad) -> (Tensor loss, Tensor parts, Tensor grad)"
)
SCHEMAS = {
    "last_batch": f"(Tensor logits, Tensor? teacher, {_OPTIONS}",
    "last_batch_roll": f"(Tensor logits, Tensor(a!) buffer, Tensor(b!) slots, Tensor? ids, int num_old, {_OPTIONS}",
    "scale_grad_": "(Tensor(a!) grad, Tensor upstream, Tensor parts) -> ()",
}


def _fake_outputs(logits: Tensor, reduction: int, need_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    batch, classes = logits.shape
    dtype = compute_dtype(logits.dtype)
    loss = logits.new_empty((batch,) if reduction == REDUCTION["none"] else (), dtype=dtype)
    parts = logits.new_empty((len(PARTS),), dtype=dtype)
    grad = logits.new_empty((batch, classes) if need_grad else (0, classes))
    return loss, parts, grad


def _fake_last_batch(logits: Tensor, teacher: Tensor | None, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_outputs(logits, options[-2], options[-1])


def _fake_last_batch_roll(
    logits: Tensor, buffer: Tensor, slots: Tensor, ids: Tensor | None, num_old: int, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_outputs(logits, options[-2], options[-1])


def _fake_scale_grad(grad: Tensor, upstream: Tensor, parts: Tensor) -> None:
    return None


_FAKES: dict[str, Any] = {
    "last_batch": _fake_last_batch,
    "last_batch_roll": _fake_last_batch_roll,
    "scale_grad_": _fake_scale_grad,
}


def _register() -> torch.library.Library:
    if not _backends.load_library():
        for name, fake in _FAKES.items():
            torch.library.register_fake(f"dlb_fast::{name}", fake)
    library = torch.library.Library("dlb_fast", "FRAGMENT")
    for name, schema in SCHEMAS.items():
        triton_name = _TRITON[name]
        library.define(f"{triton_name}{schema}")
        library.impl(triton_name, _triton_kernel(name), "CompositeExplicitAutograd")
        torch.library.register_fake(f"dlb_fast::{triton_name}", _FAKES[name])
    return library


_TRITON = {
    "last_batch": "last_batch_triton",
    "last_batch_roll": "last_batch_roll_triton",
    "scale_grad_": "scale_grad_triton_",
}


def _triton_kernel(name: str) -> Any:
    def run(*args: Any) -> Any:
        # Triton is imported by the first call that needs it, never by `import dlb_fast`.
        from .kernels import last_batch_triton

        return getattr(last_batch_triton, name)(*args)

    return run


_LIBRARY = _register()


_FOUND: dict[tuple[str, str], Any] = {}


def op_for(impl: str, name: str) -> Any:
    """The registered op of an implementation ("cpu", "cuda" or "triton"); ``name`` is a key of ``SCHEMAS``."""
    op = _FOUND.get((impl, name))
    if op is None:
        registered = _TRITON[name] if impl == "triton" else name
        op = _FOUND[impl, name] = getattr(torch.ops.dlb_fast, registered).default
    return op


def _gradient(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
    grad, parts = ctx.saved_tensors
    if torch._C._autograd._get_current_graph_task_keep_graph():
        grad = grad.clone()  # retain_graph=True: the saved gradient has to survive for the next backward
    # The op skips a factor of 1 by itself; on the CPU, where looking is free, even the call can be spared.
    if grad.dtype is torch.float16 or not grad.is_cpu or upstream.dim() > 0 or upstream.item() != 1.0:
        op_for(ctx.impl, "scale_grad_")(grad, upstream, parts)
    return grad, None, None, None


def _traced_gradient(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
    """The same without a write into what is saved, for torch.compile."""
    grad, parts = ctx.saved_tensors
    factor = upstream / parts[4]
    factor = factor if factor.dim() == 0 else factor[:, None]
    return (grad.to(parts.dtype) * factor).to(grad.dtype), None, None, None


class _LastBatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, impl: str, name: str, args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        loss, parts, grad = op_for(impl, name)(logits, *args, True)
        ctx.save_for_backward(grad, parts)
        ctx.impl = impl
        ctx.mark_non_differentiable(parts)
        ctx.set_materialize_grads(False)
        return loss, parts

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _parts: None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return None, None, None, None
        if torch.compiler.is_compiling():
            return _traced_gradient(ctx, upstream)
        if torch.is_grad_enabled():
            # Somebody wants a derivative of this gradient. torch's once_differentiable would refuse it only where the
            # upstream gradient needs one: that of a loss is a constant, and a penalty would silently train on a part.
            raise RuntimeError(
                "the compiled losses are differentiable once, and backward was called with create_graph=True; use "
                "impl='torch' for second derivatives"
            )
        return _gradient(ctx, upstream)


def unknown_to_ops(logits: Tensor) -> str:
    """What asks for more than the ops can give: a transform of torch.func (vmap too) or a forward derivative; or ""."""
    if torch.compiler.is_compiling():
        return ""
    if torch._C._are_functorch_transforms_active():
        return "torch.func"
    dual = forward_ad._current_level >= 0 and forward_ad.unpack_dual(logits).tangent is not None
    return "forward mode" if dual else ""


def run(impl: str, name: str, logits: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """Call op ``name`` of ``impl``; ``args`` are its arguments after ``logits`` without the last, ``need_grad``.

    Returns the loss, differentiable with respect to the logits, and ``parts``.
    """
    if logits.requires_grad and torch.is_grad_enabled():
        # One tuple, because autograd walks over every argument of a Function in Python.
        return _LastBatch.apply(logits, impl, name, args)
    loss, parts, _ = op_for(impl, name)(logits, *args, False)
    return loss, parts


def step(impl: str, name: str, logits: Tensor, *args: Any, upstream: Tensor | float = 1.0) -> tuple[Tensor, ...]:
    """Like :func:`run` without an autograd node: loss, parts, and the gradient times ``upstream``."""
    loss, parts, grad = op_for(impl, name)(logits.detach(), *args, True)
    if isinstance(upstream, Tensor) or upstream != 1.0 or logits.dtype == torch.float16:
        factor = torch.as_tensor(upstream, dtype=parts.dtype, device=parts.device)
        op_for(impl, "scale_grad_")(grad, factor, parts)
    return loss, parts, grad
