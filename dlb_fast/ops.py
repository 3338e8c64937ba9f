"""The ops ``dlb_fast::last_batch``, ``last_batch_update`` and ``scale_grad_``: schemas, fake tensors, derivative.

``last_batch`` computes the loss, its gradient and the top-1 count in one call; ``last_batch_`` writes the gradient over
the logits. ``last_batch_update`` takes its teacher from the logit buffer and then replaces the stored rows by the
batch's new rows. ``scale_grad_`` multiplies a gradient by the upstream gradient in place, and touches nothing where
that is 1.

The compiled ops are defined in ``csrc/last_batch.cpp``, their Triton forms (``*_triton``) here. Both take their
arguments from the table in ``options.h``. The derivative is an ``autograd.Function`` around the op: the gradient is
ready when backward arrives. It is differentiable once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _args, _backends
from ._options import OPTIONS, PARTS, REDUCTION
from .reference import compute_dtype

_GRAD_SCALE = PARTS.index("grad_scale")
OPTION_SCHEMA = "".join(f"{kind} {name}, " for name, kind in OPTIONS.items())
_TAIL = OPTION_SCHEMA + "bool need_grad) -> (Tensor loss, Tensor parts, Tensor grad)"
SCHEMAS = {
    "last_batch": f"(Tensor logits, Tensor? teacher, int teacher_kind, {_TAIL}",
    "last_batch_update": (
        f"(Tensor logits, Tensor(a!) rows, Tensor(b!) slots, Tensor? ids, int num_old, int again, {_TAIL}"
    ),
    "scale_grad_": "(Tensor(a!) grad, Tensor upstream, Tensor parts) -> ()",
}
IN_PLACE = f"(Tensor(a!) logits, Tensor? teacher, int teacher_kind, {OPTION_SCHEMA}bool need_grad) -> "
IN_PLACE += "(Tensor loss, Tensor parts)"
"""``last_batch_``, on the CPU only: the gradient is written over the logits. The caller masks the rows whose teacher is
not finite; where one is left, ``parts`` counts fewer valid rows than were asked for, and the result is not used."""


def _fake_loss(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, classes = logits.shape
    *_, reduction, need_grad = args
    for value in args:
        # A real call with one tensor on the meta device comes here too.
        if isinstance(value, Tensor) and value.device != logits.device:
            raise RuntimeError(f"last_batch: a tensor is on {value.device}, the logits are on {logits.device}")
    dtype = compute_dtype(logits.dtype)
    loss = logits.new_empty((batch,) if reduction == REDUCTION["none"] else (), dtype=dtype)
    parts = logits.new_empty((len(PARTS),), dtype=dtype)
    grad = logits.new_empty((batch if need_grad else 0, classes))
    return loss, parts, grad


def _fake_in_place(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _fake_loss(logits, *args)[:2]


def _fake_scale_grad(grad: Tensor, upstream: Tensor, parts: Tensor) -> None:
    return None


_FAKES: dict[str, Any] = {
    "last_batch": _fake_loss,
    "last_batch_update": _fake_loss,
    "scale_grad_": _fake_scale_grad,
    "last_batch_": _fake_in_place,
}
_TRITON = {
    "last_batch": "last_batch_triton",
    "last_batch_update": "last_batch_update_triton",
    "scale_grad_": "scale_grad_triton_",
}


def _triton_kernel(name: str) -> Any:
    def run(*args: Any) -> Any:
        # The first call that needs Triton imports it; `import dlb_fast` does not.
        from .kernels import last_batch_triton

        return getattr(last_batch_triton, name)(*args)

    return run


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


_LIBRARY = _register()
_FOUND: dict[tuple[str, str], Any] = {}


def op_for(impl: str, name: str) -> Any:
    """The registered op of an implementation ("cpu", "cuda" or "triton"); ``name`` is a key of ``SCHEMAS``."""
    op = _FOUND.get((impl, name))
    if op is None:
        registered = _TRITON[name] if impl == "triton" else name
        op = _FOUND[impl, name] = getattr(torch.ops.dlb_fast, registered).default
    return op


def refuse_memory(op: str) -> None:
    """What remembers the batch raises this inside a transform of torch.func, where logits have no value to keep."""
    raise RuntimeError(
        f"{op}: in train() it remembers the batch, which a transform of torch.func does not allow; call it in eval() "
        "or under torch.no_grad(), or transform the method's function, which takes its teacher as an argument"
    )


def unwrapped(parts: Tensor) -> Tensor:
    """``parts`` without the wrappers of torch.func.grad, jvp and the like, which end with the transform."""
    while torch._C._functorch.is_gradtrackingtensor(parts):
        parts = torch._C._functorch.get_unwrapped(parts)
    return parts


def unsupported(logits: Tensor | None, **given: Any) -> str:
    """What a call asks for that only plain PyTorch has, as the middle of a sentence; "" for nothing.

    That is a gradient of one of the ``given`` arguments, a transform of torch.func (vmap too), forward mode.
    """
    if torch.is_grad_enabled():
        for name, value in given.items():
            if isinstance(value, Tensor) and value.requires_grad:
                return f"has no gradient of {name}, which requires one; pass {name}.detach(), or"
    if torch._C._are_functorch_transforms_active():
        return "does not know torch.func;"
    if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        tensors = (v for v in (logits, *given.values()) if isinstance(v, Tensor) and v.is_floating_point())
        if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
            return "does not know forward mode;"
    return ""


def refuse_second_derivative() -> None:
    """In a backward: raise with create_graph=True."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        # torch's once_differentiable would refuse only where the upstream gradient requires a gradient; that of a loss
        # is a constant, and a gradient penalty would silently train on a part.
        raise RuntimeError(
            "the compiled losses are differentiable once, and backward was called with create_graph=True; use "
            "impl='torch' for second derivatives"
        )


def times_upstream(
    impl: str, grad: Tensor, upstream: Tensor, parts: Tensor, owned: bool, enlarged: bool = False
) -> Tensor:
    """A saved gradient (rows, columns) times the upstream gradient, 0-d or (rows,); in place where it is ``owned``.

    It is stored multiplied by ``parts[grad_scale]``, which is 1 on a CPU but for float16 and with ``enlarged``.
    """
    if (
        torch.compiler.is_compiling()
        or type(upstream) is not Tensor
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.is_legacy_batchedtensor(upstream)
        or torch._C._are_functorch_transforms_active()
    ):
        # Traced, fake, watched by a mode, or batched (is_grads_batched): the upstream gradient has no value to read, or
        # more than one, and what is saved must not be written to.
        factor = upstream / parts[_GRAD_SCALE]
        factor = factor if factor.dim() == 0 else factor[:, None]
        return (grad.to(parts.dtype) * factor).to(grad.dtype)
    if not owned or torch._C._autograd._get_current_graph_task_keep_graph():
        grad = grad.clone()  # retain_graph=True: the next backward needs the saved gradient unchanged
    if impl == "torch":
        return grad.mul_(upstream / parts[_GRAD_SCALE])
    # scale_grad_ leaves at once for a factor of 1, which a GPU's host cannot read without waiting; a CPU's can.
    if upstream.dim() > 0 or impl != "cpu" or enlarged or grad.dtype is torch.float16 or upstream.item() != 1.0:
        op_for(impl, "scale_grad_")(grad, upstream, parts)
    return grad


class _LastBatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, impl: str, name: str, args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        loss, parts, grad = op_for(impl, name)(logits, *args, True)
        ctx.save_for_backward(grad, parts)
        ctx.impl = impl
        # Whoever has saved tensors packed (checkpoint, save_on_cpu, a log of what is saved) may hold on to them.
        ctx.owned = torch.compiler.is_compiling() or torch._C._autograd._top_saved_tensors_default_hooks(False) is None
        ctx.mark_non_differentiable(parts)
        ctx.set_materialize_grads(False)
        return loss, parts

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _parts: None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return None, None, None, None
        grad, parts = ctx.saved_tensors
        refuse_second_derivative()
        return times_upstream(ctx.impl, grad, upstream, parts, ctx.owned), None, None, None


def run(impl: str, name: str, logits: Tensor, args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """Loss, differentiable with respect to the logits, and parts; ``args`` follow the logits, without ``need_grad``."""
    if logits.requires_grad and torch.is_grad_enabled():
        # One tuple, because autograd walks over every argument of a Function in Python.
        return _LastBatch.apply(logits, impl, name, args)
    loss, parts, _ = op_for(impl, name)(logits, *args, False)
    return loss, parts


def run_with_grad(
    impl: str, name: str, logits: Tensor, args: tuple[Any, ...], upstream: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Loss and the gradient times ``upstream``, without autograd."""
    loss, parts, grad = op_for(impl, name)(logits.detach(), *args, True)
    if isinstance(upstream, Tensor) or upstream != 1.0 or logits.dtype == torch.float16:
        op_for(impl, "scale_grad_")(grad, _args.on_device(upstream, parts.dtype, parts.device), parts)
    return loss, grad
