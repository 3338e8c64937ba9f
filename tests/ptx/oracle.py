"""Holds what a kernel returned against ``dlb_fast.reference`` in float64, and against eager in the same dtype."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dlb_fast import reference
from dlb_fast.buffer import LogitBuffer
from ptx.harness import Emulator, Result

# Half a unit in the last place of the stored gradient, relative, with 2 % for the float32 behind it.
ROUNDING = {torch.float64: 0.0, torch.float32: 0.0, torch.bfloat16: 2.0**-8 * 1.02, torch.float16: 2.0**-11 * 1.02}
KERNEL_ONLY = ("seed", "grad_offset", "need_grad")


def _as(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def reference_of(
    logits: Tensor, target: Tensor | None, teacher: Tensor | None, dtype: torch.dtype, options: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, parts and gradient (of the sum of the loss) by autograd, computed in ``dtype``."""
    options = {k: _as(v, dtype) for k, v in options.items() if k not in KERNEL_ONLY}
    ce_alpha = options.pop("ce_alpha", 0.0)
    options["ce_weight"] = options.get("ce_weight", 1.0) + ce_alpha * options.get("alpha", 1.0)
    options["teacher_kind"] = options.pop("kind", "logits")
    if options["teacher_kind"] == "virtual":
        teacher = None
    z = (logits.double() if dtype == torch.float64 else logits.clone()).detach().requires_grad_()
    loss, parts = reference.last_batch_loss(z, _as(target, dtype), _as(teacher, dtype), **options)
    loss.sum().backward()
    assert z.grad is not None
    return loss.detach(), parts, z.grad


def compare(
    result: Result, logits: Tensor, target: Tensor | None, teacher: Tensor | None = None, **options: Any
) -> None:
    """Loss and parts to float32 accuracy; the gradient within one rounding of float64, and no worse than eager."""
    loss, parts, grad = reference_of(logits, target, teacher, torch.float64, options)
    _, _, eager = reference_of(logits, target, teacher, logits.dtype, options)
    size = 1.0 + sum(_largest(t) for t in (logits, teacher) if t is not None)
    if options.get("kind") or teacher is not None:
        # tau^2 times a difference of numbers as large as log C, each to a unit in float32's last place (2e-6 / 16).
        tau, alpha = float(options.get("temperature", 3.0)), abs(float(options.get("alpha", 1.0)))
        size += max(1.0, alpha) * tau * tau * math.log(logits.shape[1]) / 16
    close = {"rtol": 3e-6, "atol": 2e-6 * size, "equal_nan": True}
    torch.testing.assert_close(result.loss.double(), loss, **close)
    torch.testing.assert_close(
        result.parts[:4].double(), parts.double(), **(close | {"atol": 2e-6 * size * len(logits)})
    )
    if result.grad is None:
        return
    scale = float(result.parts[4])
    assert scale == 1.0 or logits.dtype == torch.float16
    got = result.grad.double() / scale
    torch.testing.assert_close(got.isnan(), grad.isnan())
    got, grad, eager = got.nan_to_num(), grad.nan_to_num(), eager.double().nan_to_num()
    # The float32 behind the rounding: exponentials to 2 ulp, sums over C terms. Where p_s and p_t cancel, the error is
    # that of the shares, not of their difference.
    # An exponential below float32's smallest normal number is none.
    tolerance = 2e-6 * (_shares(logits, result, options) + grad.abs()) + 2.0**-125
    if logits.dtype == torch.float16:
        tolerance += 2.0**-25 / scale  # half of float16's smallest step, where it is subnormal
    worst = (got - grad).abs() - ROUNDING[logits.dtype] * grad.abs() - tolerance
    assert not (worst > 0).any(), f"gradient off by {worst.max():.3g} too much at {worst.argmax()}"
    # Exponentials that err by up to 2 ulp, most of them by as much: 3e-7 of the shares.
    assert (got - grad).norm() <= (eager - grad).norm() * 1.01 + 0.15 * tolerance.norm()


def _largest(values: Tensor) -> float:
    return float(values.float().nan_to_num(posinf=0, neginf=0).abs().max()) if values.numel() else 0.0


def _shares(logits: Tensor, result: Result, options: dict[str, Any]) -> Tensor:
    """(B, C): the probabilities of which the gradient is a difference, times the coefficients of its terms."""
    temperature, alpha = float(options.get("temperature", 3.0)), abs(float(options.get("alpha", 1.0)))
    mean = options.get("reduction", "mean") == "mean"
    ce = 1.0 + alpha * abs(options.get("ce_alpha", 0.0))
    kl = alpha * temperature / (max(float(result.parts[5]), 1.0) if mean else 1.0)
    ce /= 1.0 if not mean else max(len(logits), 1) / 4
    z = logits.double().nan_to_num()
    even = (ce + kl) / z.shape[1] if options.get("label_smoothing") or options.get("kind") == "virtual" else 0.0
    return ce * torch.softmax(z, 1) + kl * torch.softmax(z / temperature, 1) + even


def run(
    emulator: Emulator, logits: Tensor, target: Tensor | None = None, teacher: Tensor | None = None, **options: Any
) -> Result:
    """Run a kernel without a buffer and hold it against the reference."""
    result = emulator.last_batch(logits, target, teacher=teacher, **options)
    compare(result, logits, target, teacher, **options)
    return result


class Buffer(LogitBuffer):
    """The definition of the buffer without the checks of the host: what the device has to do with any call."""

    def recognise(self, batch: int, ids: Tensor | None, num_old: int | None, again: int = -1, op: str = "") -> int:
        return again

    def stored_rows(self, batch: int, num_old: int | None, again: int = 0, op: str = "") -> int:
        return self.count


class Stream:
    """A buffer in the hands of the kernels, and the same one as the definition keeps it."""

    def __init__(self, emulator: Emulator, classes: int, capacity: int, dtype: torch.dtype = torch.float32) -> None:
        self.emulator, self.buffer = emulator, Buffer(classes, capacity, dtype)
        self.rows, self.slots = self.buffer.rows.clone(), self.buffer.slots.clone()

    def step(
        self, logits: Tensor, target: Tensor | None, ids: Tensor | None = None, num_old: int | None = None,
        again: int = -1, kd_mask: Tensor | None = None, losses: bool = True, **options: Any,
    ) -> Result:  # fmt: skip
        """One batch through a kernel, held against the definition: losses, gradient, rows, ids, flags and counters."""
        match = self.buffer.match(len(logits), ids, num_old, again)
        teacher, valid = self.buffer.teacher(match), match.repeats
        mask = valid.new_zeros(max(len(valid), 0)) if kd_mask is not None else None
        if mask is not None and kd_mask is not None:  # rows behind its end are not taught
            mask[: len(kd_mask)] = kd_mask[: len(mask)]
            valid = valid & mask
        result = self.emulator.last_batch(
            logits, target, rows=self.rows, slots=self.slots, ids=ids, num_old=-1 if num_old is None else num_old,
            again=again, kd_mask=kd_mask, **options,
        )  # fmt: skip
        if losses:
            compare(result, logits, target, teacher, kd_mask=valid, **options)
        assert float(result.parts[5]) == int(valid.sum())
        self.buffer.update(logits, ids, num_old, again, mask)
        assert self.slots.tolist() == self.buffer.slots.tolist(), "counters, count, ids or finite flags"
        torch.testing.assert_close(self.rows, self.buffer.rows, rtol=0, atol=0, equal_nan=True, msg="stored rows")
        return result


def batch(
    rows: int, classes: int, dtype: torch.dtype = torch.float32, *, taught: int | None = None, drift: float = 0.5,
    scale: float = 2.0, seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Logits, labels and a teacher near the first rows' logits."""
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, classes, generator=g) * scale).to(dtype)
    target = torch.randint(0, classes, (rows,), generator=g)
    taught = rows // 2 if taught is None else taught
    teacher = (logits[:taught].float() + drift * torch.randn(taught, classes, generator=g)).to(dtype)
    return logits, target, teacher
