"""Calls like the last one, spared the checks that it passed: those take as long as a small kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from . import _backends, ops
from .buffer import LogitBuffer

Scalar = float | Tensor


class Settled(NamedTuple):
    """An implementation and its options, checked once for all calls alike."""

    impl: str
    options: tuple[Any, ...]  # after the target


def settle(
    impl: str, logits: Tensor, *, alpha: Scalar, temperature: Scalar, label_smoothing: float, z_loss: float,
    ignore_index: int, reduction: str,
) -> Settled | None:  # fmt: skip
    """What a call with labels, numbers and a buffer came down to; None where the op does not check its tensors itself,
    or where a number may change on its own."""
    impl = _backends.pick(impl, logits.device.type)
    if impl not in ("cpu", "cuda") or isinstance(alpha, Tensor) or isinstance(temperature, Tensor):
        return None
    numbers = (float(alpha), float(temperature), 1.0, 0.0, label_smoothing, z_loss, -1.0)
    kinds = (ignore_index, ops.TEACHER_KIND["logits"], ops.REDUCTION[reduction])
    return Settled(impl, (*[None] * 6, *numbers, *kinds))


def settled_step(
    settled: Settled,
    logits: Tensor,
    target: Tensor | None,
    buffer: LogitBuffer | None,
    ids: Tensor | None,
    num_old: int | None,
    execute: Callable[..., Any] | None = None,
) -> Any:
    """One more call like the one that was settled, without its checks, which take as long as a small kernel.

    None where the call is another one, or where the op, which looks at its tensors before it writes anything, refuses
    them: then the long way says why. Every line here is paid for at each step, with cold caches: nothing is looked at
    that the op looks at.
    """
    if buffer is None:
        return None
    try:
        old = buffer.count
        new = logits.shape[0] - old
        if num_old not in (None, old) or old == 0 or not 0 < new <= buffer.capacity:
            return None
        # -1 leaves the count to the device: a captured step is replayed with counts of its own.
        args = (buffer.logits, buffer.slots, ids, -1 if num_old is None else num_old, target, *settled.options)
        result = (execute or ops.run_eagerly)(settled.impl, "last_batch_roll", logits, *args)
    except (RuntimeError, TypeError, AttributeError, IndexError):
        return None
    buffer.count = new
    return result


# What `dlb_step` has found out about its numbers, by implementation, for the next call with them.
SETTLED_STEPS: dict[tuple[str | None, tuple[Any, ...]], Settled] = {}
