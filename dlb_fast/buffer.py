"""The logit buffer: the logits of the rows that the next batch repeats."""

from __future__ import annotations

import io
import warnings
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ._args import as_int, check_device, check_dtype

UNKNOWN_ID = -(2**63)
"""Slot id of a row stored without a sample id; it matches any id."""

_COUNT, _MISMATCHED, _HEADER = 0, 1, 2
_VERSION = 1


class LogitBuffer:
    """The logits of up to ``capacity`` rows and their sample ids, at a fixed address on the device.

    Slot ``j`` holds the row that the next batch has at position ``j``. The count, the ids and the number of mismatches
    are on the device, so a first step, a short batch and a resume need no branch on the host, and a step can be
    captured in a CUDA graph. A row whose id differs from the slot's gets no KL and is counted.

    Args:
        num_classes: ``C``.
        capacity: rows stored, normally half the batch the model sees.
        dtype: of the stored logits, normally that of the logits (lossless). float16 instead of float32 changes the KL
            gradient by 0.1 to 0.3 %, bfloat16 by 1 to 2 %.
        device: device of the logits.

    Raises:
        ValueError, TypeError: sizes that are no integers >= 1, a dtype that cannot be stored. The loss that uses the
            buffer raises the other errors.

    Source: ``pre_out`` of the official ``dlb.py``.

    >>> buffer = LogitBuffer(num_classes=10, capacity=4)
    >>> buffer.update(torch.randn(4, 10), torch.arange(4))
    >>> buffer.count, buffer.ids.tolist()
    (4, [0, 1, 2, 3])
    """

    def __init__(
        self,
        num_classes: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        num_classes = as_int(num_classes, "LogitBuffer", "num_classes", 1)
        capacity = as_int(capacity, "LogitBuffer", "capacity", 1)
        device = check_device("LogitBuffer", "device", device) or "cpu"
        check_buffer_dtype("LogitBuffer", dtype)
        # Tensors made under inference_mode could not be written to in training.
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            self.logits = torch.zeros(capacity, num_classes, dtype=dtype, device=device)
            # One tensor for the kernels: [count, mismatched, id of slot 0, id of slot 1, ...].
            self.slots = torch.full((_HEADER + capacity,), UNKNOWN_ID, dtype=torch.int64, device=device)
            self.slots[:_HEADER] = 0
        # The host computes its copy of the count from the batch sizes; nothing is read from the device.
        self.count = 0

    @property
    def capacity(self) -> int:
        """Rows the buffer can hold."""
        return self.logits.shape[0]

    @property
    def num_classes(self) -> int:
        """Columns ``C``."""
        return self.logits.shape[1]

    @property
    def ids(self) -> Tensor:
        """Sample ids (count,) int64 of the stored rows; ``UNKNOWN_ID`` where none was given."""
        return self.slots[_HEADER : _HEADER + self.count]

    @property
    def mismatched(self) -> Tensor:
        """How many rows so far had another id than their slot (0-d int64 on the device)."""
        return self.slots[_MISMATCHED]

    @property
    def valid(self) -> Tensor:
        """Which slots (capacity,) hold a row, computed on the device."""
        return torch.arange(self.capacity, device=self.slots.device) < self.slots[_COUNT]

    def reset(self) -> None:
        """Forget every row: the next batch is plain cross entropy. Addresses stay."""
        self.slots.fill_(UNKNOWN_ID)
        self.slots[:_HEADER] = 0
        self.count = 0

    def to(self, device: torch.device | str) -> LogitBuffer:
        """Move the storage to another device, which changes its addresses."""
        self.logits, self.slots = self.logits.to(device), self.slots.to(device)
        return self

    def stored_rows(self, batch: int, num_old: int | None) -> int:
        """How many of ``batch`` rows will be stored; raises ValueError where the rows do not fit the buffer."""
        capacity = self.logits.shape[0]
        old = self.count if num_old is None else num_old
        new = batch - old
        if num_old is None and self.count == 0 and batch == 2 * capacity:
            return capacity  # [old | new] before any teacher exists
        if 0 <= old <= batch and 0 <= new <= capacity and (new > 0 or num_old is not None):
            return new
        given = "num_old" if num_old is not None else "the buffer"
        raise ValueError(
            f"LastBatchLoss: a batch is [repeated rows | new rows]; {given} says {old} repeated rows, which leaves "
            f"{new} new ones of {batch}, and the buffer keeps at most {capacity}. Feed it by OverlapBatchSampler, "
            "pass capacity= (half the batch size) or num_old=, or call reset() when a new stream of batches starts"
        )

    def teacher(self, logits: Tensor, ids: Tensor | None, num_old: int | None = None) -> tuple[Tensor, Tensor]:
        """The stored rows (k, C) for the first rows of a batch, and which are valid (k,); counts mismatches."""
        rows = min(self.capacity, logits.shape[0] if num_old is None else num_old)
        valid = torch.arange(rows, device=self.slots.device) < self.slots[_COUNT]
        if ids is not None:
            stored = self.slots[_HEADER : _HEADER + rows]
            same = (stored == ids[:rows]) | (stored == UNKNOWN_ID)
            self.slots[_MISMATCHED] += (valid & ~same).sum()
            valid = valid & same
        return self.logits[:rows], valid

    @torch.no_grad()
    def update(self, logits: Tensor, ids: Tensor | None = None, num_old: int | None = None) -> None:
        """Replace the stored rows by the new rows of the batch, in plain torch, without reading the device.

        Args:
            logits: ``(B, C)``; the rows after the repeated ones are stored, cast to the buffer's dtype.
            ids: ``(B,)`` sample ids, or None.
            num_old: how many of the first rows repeat; None takes the device's count.
        """
        batch, rows = logits.shape[0], min(self.capacity, logits.shape[0])
        count = self.stored_rows(batch, num_old)
        old = self.slots[_COUNT] if num_old is None else torch.full_like(self.slots[_COUNT], num_old)
        stored = (batch - old).clamp(0, self.capacity)
        position = torch.arange(rows, device=self.slots.device)
        source = (batch - stored + position).clamp(max=batch - 1)
        written = position < stored
        new_rows = logits.detach()[source].to(self.logits.dtype)
        self.logits[:rows] = torch.where(written[:, None], new_rows, self.logits[:rows])
        new_ids = torch.full_like(source, UNKNOWN_ID) if ids is None else ids.to(torch.int64)[source]
        slot_ids = self.slots[_HEADER : _HEADER + rows]
        self.slots[_HEADER : _HEADER + rows] = torch.where(written, new_ids, slot_ids)
        self.slots[_COUNT] = stored
        self.count = count

    def resized(self, capacity: int, skip: int = 0) -> LogitBuffer:
        """A buffer of another capacity with the stored rows of this one from ``skip`` on."""
        other = LogitBuffer(self.num_classes, capacity, self.logits.dtype, self.logits.device)
        kept = self.count - skip
        other.logits[:kept] = self.logits[skip : self.count]
        other.slots[_HEADER : _HEADER + kept] = self.ids[skip:]
        other.slots[_COUNT] = kept
        other.slots[_MISMATCHED] = self.slots[_MISMATCHED]
        other.count = kept
        return other

    def state_dict(self) -> dict[str, Any]:
        """The stored rows, ids, count and mismatch counter, as tensors and numbers on the CPU."""
        return {
            "version": _VERSION,
            "num_classes": self.num_classes,
            "capacity": self.capacity,
            "count": self.count,
            "logits": self.logits[: self.count].detach().cpu().clone(),
            "ids": self.ids.cpu().clone(),
            "mismatched": int(self.slots[_MISMATCHED]),
        }

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Take over a saved buffer; on a mismatch warn, restart empty and return False."""
        self.reset()
        trouble = _state_trouble(state, self.num_classes, self.capacity)
        if trouble:
            _warn_of(trouble)
            return False
        count = state["count"]
        self.logits[:count] = state["logits"].to(self.logits)
        self.slots[_HEADER : _HEADER + count] = state["ids"].to(self.slots.device)
        self.slots[_COUNT] = count
        self.slots[_MISMATCHED] = state["mismatched"]
        self.count = count
        return True

    @classmethod
    def from_state(
        cls, state: dict[str, Any], num_classes: int | None = None, dtype: torch.dtype | None = None
    ) -> LogitBuffer | None:
        """A saved buffer, on the CPU; None, with a warning, where the state cannot be read.

        ``num_classes`` and ``dtype``, where given, replace those of the state; another number of classes is refused.
        """
        known = state if isinstance(state, dict) else {}
        classes, capacity = known.get("num_classes"), known.get("capacity")
        if not isinstance(classes, int) or not isinstance(capacity, int) or classes < 1 or capacity < 1:
            _warn_of(f"num_classes = {classes!r} and capacity = {capacity!r} are not sizes")
            return None
        trouble = _state_trouble(state, num_classes or classes, capacity)
        if trouble:
            _warn_of(trouble)
            return None
        buffer = cls(classes, capacity, dtype or state["logits"].dtype)
        return buffer if buffer.load_state_dict(state) else None


def check_buffer_dtype(op: str, dtype: object) -> None:
    """A dtype in which the kernels can store logits."""
    check_dtype(op, "dtype", dtype)


def pack_state(state: dict[str, Any]) -> Tensor:
    """A state as one uint8 tensor: savers that know tensors only (safetensors) can write it."""
    if not state:
        return torch.empty(0, dtype=torch.uint8)
    file = io.BytesIO()
    torch.save(state, file)
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


def unpack_state(packed: Any) -> Any:
    """The state that `pack_state` packed, or {"unreadable": reason}; anything but a tensor is returned as it is."""
    if not isinstance(packed, Tensor):
        return packed
    if packed.numel() == 0:
        return {}
    try:
        return torch.load(io.BytesIO(packed.cpu().numpy().tobytes()), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive may raise anything
        return {"unreadable": f"{type(error).__name__}: {error}"}


def _warn_of(trouble: str) -> None:
    warnings.warn(
        f"LogitBuffer: the saved buffer does not fit ({trouble}); it restarts empty, so the next batch has no "
        "last-batch term",
        stacklevel=3,
    )


def _state_trouble(state: dict[str, Any], num_classes: int, capacity: int) -> str:
    if not isinstance(state, dict):
        return f"a dict expected, got {type(state).__name__}"
    missing = [key for key in ("version", "count", "logits", "ids", "mismatched") if key not in state]
    if missing:
        return f"missing {', '.join(missing)}"
    if state["version"] != _VERSION:
        return f"version {_VERSION} expected, got {state['version']}"
    count, logits, ids = state["count"], state["logits"], state["ids"]
    for name in ("count", "mismatched"):
        if not isinstance(state[name], int) or state[name] < 0:
            return f"{name} must be an integer >= 0, got {state[name]!r}"
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        return f"logits must be a floating tensor, got {getattr(logits, 'dtype', type(logits).__name__)}"
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
        return f"ids must be an int64 tensor, got {getattr(ids, 'dtype', type(ids).__name__)}"
    if count > capacity:
        return f"capacity {capacity}, saved {count} rows"
    if tuple(logits.shape) != (count, num_classes) or tuple(ids.shape) != (count,):
        return f"expected logits {(count, num_classes)}, got {tuple(logits.shape)} with ids {tuple(ids.shape)}"
    return ""
