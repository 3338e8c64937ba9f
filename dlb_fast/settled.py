"""Calls like the last one, spared the checks that it passed: those take as long as a small kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from . import _backends, ops
from .buffer import LogitBuffer

Scalar = float | Tensor


# What a call with labels, numbers and a buffer came down to: (logits, buffer, slots, ids, num_old, target) -> outputs.
Settled = Callable[..., tuple[Tensor, ...] | None]


def settle(
    impl: str, logits: Tensor, *, alpha: Scalar, temperature: Scalar, label_smoothing: float, z_loss: float,
    ignore_index: int, reduction: str, gradient: bool = False,
) -> Settled | None:  # fmt: skip
    """The call with these options, checked once for all calls alike; None where the op does not check its tensors
    itself, or where a number may change on its own. ``gradient``: it comes back, instead of an autograd node."""
    impl = _backends.pick(impl, logits.device.type)
    if impl not in ("cpu", "cuda") or isinstance(alpha, Tensor) or isinstance(temperature, Tensor):
        return None
    numbers = (float(alpha), float(temperature), 1.0, 0.0, float(label_smoothing), float(z_loss), -1.0)
    kinds = (ignore_index, ops.TEACHER_KIND["logits"], ops.REDUCTION[reduction])
    return ops.roll_call(impl, (*[None] * 6, *numbers, *kinds), gradient=gradient)


def settled_step(
    settled: Settled,
    logits: Tensor,
    target: Tensor | None,
    buffer: LogitBuffer | None,
    ids: Tensor | None,
    num_old: int | None,
) -> Any:
    """One more call like the one that was settled, without its checks, which take as long as a small kernel.

    None where the call is another one, or where the op, which looks at its tensors before it writes anything, refuses
    them: then the long way says why. Every line here is paid for at each step, with cold caches, where a line takes as
    long as ten rows of the loss: nothing is looked at that the op looks at.
    """
    if buffer is None:
        return None
    try:
        old = buffer.count
        new = logits.shape[0] - old
        # As many new rows as are stored is the ordinary batch: they fit.
        if not old or (new != old and not 0 < new <= buffer.capacity):
            return None
        if num_old is None:
            num_old = -1  # left to the device: a captured step is replayed with counts of its own
        elif num_old != old or type(num_old) is not int:
            return None
        tensors = (logits, buffer.logits, buffer.slots, ids, num_old, target)
    except (TypeError, AttributeError, IndexError):
        return None
    try:
        result = settled(*tensors)
    except RuntimeError as error:
        if not _refused(str(error)):
            raise  # the op may have run: the long way would roll the buffer a second time
        return None
    if result is not None:
        buffer.count = new
    return result


def _refused(words: str) -> bool:
    """Whether the op, or torch before it, did not take its arguments: it has written nothing then."""
    return "last_batch" in words or "is not a class" in words


# What `dlb_step` has found out about its numbers, by implementation, for the next call with them.
SETTLED_STEPS: dict[tuple[str | None, tuple[Any, ...]], Settled] = {}
