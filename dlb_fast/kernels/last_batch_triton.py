"""The ops ``last_batch``, ``last_batch_update`` and ``scale_grad_`` in Triton (NVIDIA, AMD, and the interpreter).

Launches: one; a second, small one before it only where the means divide by a count that takes too long to count in
every program (``B > 4096``, or programs * B * bytes per row > 16 MiB, see ``launch``): 8 bytes per row and label.
Bytes per logit of the batch, ``s`` per logit, half the rows with a teacher: read s, write s, teacher read s/2, and with
the buffer write s/2: 2.5 s and 3 s. Above 8192 columns the row is read twice; the second pass runs backwards, so
that it meets the end of the row in L2 (up to 4 s and 4.5 s where it does not). Without gradient: 1.5 s and 2 s.

Everything is summed in a fixed order (no float atomics): results are bit-identical from run to run. Nothing is read
back by the host; a launch can be captured in a CUDA graph. float64 logits are computed in float64.
"""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import torch
from torch import Tensor

from .._options import FLOATS, OPTIONS, PARTS, REDUCTION, TEACHER_KIND
from ..reference import compute_dtype
from . import launch
from .counting import HEADER, count_kernel
from .last_batch_kernel import CONSTANT, COUNT_HERE, COUNTED, MAX_PROGRAMS, last_batch_kernel
from .scale_kernel import scale_kernel

_NAMES = [*OPTIONS, "need_grad"]
Options: Any = namedtuple("Options", _NAMES)  # type: ignore[misc]
_NONE, _LOGITS, _VIRTUAL = (TEACHER_KIND[kind] for kind in ("none", "logits", "virtual"))
_MEAN, _ROWS = REDUCTION["mean"], REDUCTION["none"]
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _rows(name: str, value: Tensor) -> Tensor:
    """Rows of unit stride; any row stride."""
    if value.dtype not in _DTYPES:
        raise TypeError(f"last_batch (triton): {name} must be float32, bfloat16, float16 or float64, got {value.dtype}")
    return value if value.stride(1) == 1 or value.shape[1] == 1 else value.contiguous()


def _line(value: Tensor | None) -> Tensor | None:
    """Labels, ids, masks and weights are read with unit stride."""
    return None if value is None else value.contiguous()


def last_batch(
    logits: Tensor, teacher: Tensor | None, teacher_kind: int, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, parts and gradient (see ``SCHEMAS``); the teacher (H, C) is only read."""
    if teacher_kind != _VIRTUAL and (teacher is None or teacher.shape[0] == 0):
        teacher_kind = _NONE
    return _run(logits, teacher, None, None, -1, 0, teacher_kind, Options(*options))


def last_batch_update(
    logits: Tensor, rows: Tensor, slots: Tensor, ids: Tensor | None, num_old: int, again: int, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, parts and gradient; one generation of ``rows`` (2, R, C) teaches, the other takes the batch's new rows.

    ``again``: 1 the batch of the last call once more, 0 a new batch, -1 the ids decide.
    """
    if not (rows.is_contiguous() and slots.is_contiguous()):
        raise ValueError("last_batch_update (triton): rows and slots must be contiguous; make a new LogitBuffer")
    return _run(logits, rows.flatten(0, 1), slots, ids, num_old, again, _LOGITS, Options(*options))


def _run(
    logits: Tensor,
    teacher: Tensor | None,
    slots: Tensor | None,
    ids: Tensor | None,
    num_old: int,
    again: int,
    kind: int,
    options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    target, target_b, lam, weight, kd_mask = (
        options.target, options.target_b, options.lam, options.weight, options.kd_mask
    )  # fmt: skip
    ignore_index, need_grad = options.ignore_index, options.need_grad
    logits = _rows("logits", logits)
    batch, classes = logits.shape
    compute, device, update = compute_dtype(logits.dtype), logits.device, slots is not None
    capacity = 0 if slots is None else (slots.numel() - HEADER.value - 2) // 4
    by_row = options.reduction == _ROWS
    loss = torch.empty((batch,) if by_row else (), dtype=compute, device=device)
    parts = torch.empty(len(PARTS), dtype=compute, device=device)
    grad = torch.empty((batch if need_grad else 0, classes), dtype=logits.dtype, device=device)
    if batch == 0:
        parts.zero_()[4:5].fill_(1.0)
        if slots is not None:  # nothing is stored from an empty batch
            latest = slots[:1] & 1
            written = latest if again == 1 else 1 - latest
            slots.index_fill_(0, HEADER.value + written * (1 + 2 * capacity), 0)
            slots[:1] = written
        return loss.zero_(), parts, grad

    dense = target is not None and target.dim() == 2
    if target is not None:
        target = _rows("target", target) if dense else _line(target)
    target_b, lam, weight, ids = _line(target_b), _line(lam), _line(weight), _line(ids)
    mask = None if kd_mask is None or kind == _NONE else kd_mask.contiguous().view(torch.uint8)
    by_label = kind == _VIRTUAL and options.correct_share >= 0.0
    if by_label and (target is None or dense):
        raise ValueError("last_batch (triton): correct_share needs target labels (B,); pass them, or a uniform teacher")

    given = 0
    if update:  # one program per tile of a steady batch; where the device finds more pairs, a program takes several
        stored = min(max(batch - num_old, 0) if num_old >= 0 else batch, capacity)
        pairs = max(stored, batch - stored)
    else:
        if kind == _VIRTUAL:
            given = batch
        elif kind != _NONE:
            assert teacher is not None
            teacher = _rows("teacher", teacher)
            given = teacher.shape[0]
        pairs = max(given, batch - given)

    aligned = launch.aligned_rows(logits) and launch.aligned_rows(grad)
    if teacher is not None and kind != _VIRTUAL:
        aligned = aligned and launch.aligned_rows(teacher)
    tiles = launch.tiling(classes, logits.element_size(), aligned, launch.warp_size(device))
    programs = min(-(-pairs // tiles.rows), MAX_PROGRAMS.value)
    has_ce, has_weight, mean = target is not None, weight is not None, options.reduction == _MEAN
    labels, pair = has_ce and not dense, target_b is not None
    per_row = 8 * labels + 8 * pair + 4 * (labels and has_weight) + (mask is not None)
    if update:
        per_row += 4 if ids is None else 16  # the finite flags of half the rows; ids and stored ids
    decide = again < 0 and ids is not None
    counting, chunk, count_parts = CONSTANT.value, 0, 0
    if decide or (mean and (per_row or by_label)):
        counting = COUNT_HERE.value
        if batch > launch.COUNT_HERE_ROWS or programs * batch * per_row > launch.COUNT_HERE_BYTES:
            counting = COUNTED.value
            count_parts = min(-(-batch // launch.COUNT_CHUNK), 256)
            chunk = -(-batch // count_parts)
    dtype = launch.triton_dtype(compute)
    nvidia = device.type == "cuda" and torch.version.hip is None
    limit = launch.register_limit(tiles, pair, logits.element_size(), nvidia)
    numbers = [getattr(options, name) for name in FLOATS]
    sizes = (batch, given, capacity, num_old, again, 0 if mask is None else mask.shape[0], ignore_index)
    with launch.device_guard(device):
        key, space = launch.workspace(device, compute)
        try:
            if count_parts:
                count_kernel[(count_parts,)](
                    space.counts, slots, ids, mask, target, target_b, weight, *sizes, chunk,
                    dtype, classes, update, labels, pair, has_weight, ids is not None, mask is not None, by_label,
                    num_warps=4,
                )  # fmt: skip
            last_batch_kernel[(programs,)](
                logits, teacher, slots, ids, target, target_b, lam, weight, mask, options.alpha_t,
                options.temperature_t, loss, parts, grad, space.ticket, space.partials, space.counts,
                *sizes, count_parts, *numbers,
                dtype, classes, tiles.rows, tiles.block, tiles.tiles, tiles.vector, tiles.axis,
                logits.stride(0), 0 if teacher is None else teacher.stride(0), target.stride(0) if dense else 0,
                kind, update, has_ce, dense, pair, lam is not None and lam.dim() == 1, has_weight,
                options.label_smoothing > 0.0, ids is not None, mask is not None, by_label, mean, by_row, need_grad,
                counting,
                num_warps=tiles.warps, **limit,
            )  # fmt: skip
        except BaseException:
            launch.drop_workspace(key)
            raise
    return loss, parts, grad


def scale_grad_(grad: Tensor, upstream: Tensor, parts: Tensor) -> None:
    """``grad *= upstream / grad_scale`` in place, row by row for an upstream (B,); one launch that touches nothing
    where the factor is 1, which is decided on the device. Otherwise 2 s bytes per logit."""
    if grad.numel() == 0:
        return
    block = 2048
    grid = (min(-(-grad.numel() // block), 2048),)
    per_row = upstream.dim() == 1
    with launch.device_guard(grad.device):
        scale_kernel[grid](
            grad, upstream, parts, grad.shape[0], grad.shape[1], block, per_row, upstream.stride(0) if per_row else 0,
            num_warps=4,
        )  # fmt: skip
