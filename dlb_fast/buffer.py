"""The logit buffer: the logits of the rows that the next batch repeats."""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ._args import FLOATS, as_int, check_device, check_dtype, check_ids, check_logits, check_num_old, has_values
from .reference import finite_rows

UNKNOWN_ID = -(2**63)
"""Id of a row stored without a sample id; such a row teaches only batches that come without ids."""

COUNTERS = ("latest", "taught", "mismatched", "unknown", "not_finite", "untaught")
"""Header of ``slots``: which generation was stored last, and what became of the repeated rows; see `LogitBuffer`."""
HEADER = len(COUNTERS)
_VERSION = 2
_PIECE = 1 << 24  # logits that are stored at a time


class Match(NamedTuple):
    """How a batch meets the stored rows, on the device. The first ``k`` rows of the batch face ``k`` slots."""

    again: Tensor  # () whether this is the batch that was stored last
    first: Tensor  # () the first of the rows to be stored
    faced: Tensor  # (k,) rows that face a stored row
    unknown: Tensor  # (k,) rows with an id that face a row without one
    mismatched: Tensor  # (k,) rows that face the row of another sample
    not_finite: Tensor  # (k,) rows that repeat a sample whose stored logits are not finite

    @property
    def repeats(self) -> Tensor:
        """(k,) rows with a teacher."""
        return self.faced & ~self.unknown & ~self.mismatched & ~self.not_finite


def _counter(name: str) -> property:
    return property(lambda self: self.slots[COUNTERS.index(name)], doc=f"``{name}`` of the header, 0-d on the device.")


class LogitBuffer:
    """The logits of up to ``capacity`` rows and their sample ids, at a fixed address on the device.

    Slot ``j`` holds the row that the next batch has at position ``j``. The buffer keeps two generations of rows: one
    teaches the batch while the other takes its new rows. So the same batch may be evaluated again (activation
    checkpointing, SAM, closures): it meets the same teacher, and its latest evaluation is what is stored. The count,
    the ids and the counters are on the device, so a first step, a short batch and a resume need no branch on the host,
    and a step can be captured in a CUDA graph.

    Args:
        num_classes: ``C``.
        capacity: rows stored, normally half the batch the model sees.
        dtype: of the stored logits, normally that of the logits (lossless). float16 instead of float32 changes the KL
            gradient by 0.1 to 0.3 %, bfloat16 by 1 to 2 %.
        device: device of the logits.

    Attributes:
        count: rows stored by the last batch.
        batch: rows of that batch.
        taught, mismatched, unknown, not_finite: how many rows so far had a teacher, met the row of another sample, met
            a row stored without an id, met logits that are not finite (0-d int64 on the device).
        of_classes: where the rows are the packed top k of logits (``TopK.packed``), of how many classes; 0: they are
            logits.
        untaught: batches in a row that met stored rows and repeated none of them (0-d int64 on the device).

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
        self.capacity = as_int(capacity, "LogitBuffer", "capacity", 1)
        device = check_device("LogitBuffer", "device", device) or "cpu"
        check_dtype("LogitBuffer", "dtype", dtype)
        # Tensors made under inference_mode could not be written to in training.
        traced = torch.compiler.is_compiling()  # which knows no inference mode
        with torch.inference_mode(False) if not traced and torch.is_inference_mode_enabled() else nullcontext():
            # Eight rows of any dtype fill whole packets of 16 bytes: both generations begin on a packet.
            self.rows = torch.zeros(2, -(-capacity // 8) * 8, num_classes, dtype=dtype, device=device)
            # The header, then for each generation its count, its ids and which of its rows are finite.
            self.slots = torch.zeros(HEADER + 2 * (1 + 2 * capacity), dtype=torch.int64, device=device)
            self._generations[:, 1 : 1 + capacity] = UNKNOWN_ID
        # The host computes its copy of the count from the batch sizes; nothing is read from the device.
        self.count = self.batch = 0
        self.of_classes = 0

    @property
    def num_classes(self) -> int:
        """Columns ``C``."""
        return self.rows.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the stored logits."""
        return self.rows.dtype

    @property
    def device(self) -> torch.device:
        """Device of the stored logits."""
        return self.rows.device

    @property
    def _generations(self) -> Tensor:
        """(2, 1 + 2 capacity): count, ids, finite."""
        return self.slots[HEADER:].view(2, -1)

    @property
    def _latest(self) -> Tensor:
        return self.slots[:1]

    @property
    def logits(self) -> Tensor:
        """A copy of the stored rows (count, C)."""
        return self.rows.index_select(0, self._latest)[0, : self.count]

    @property
    def ids(self) -> Tensor:
        """A copy of the sample ids (count,) int64 of the stored rows; ``UNKNOWN_ID`` where none was given."""
        return self._generations.index_select(0, self._latest)[0, 1 : 1 + self.count]

    taught = _counter("taught")
    mismatched = _counter("mismatched")
    unknown = _counter("unknown")
    not_finite = _counter("not_finite")
    untaught = _counter("untaught")

    def reset(self) -> None:
        """Forget every row and set the counters to 0: the next batch is plain cross entropy. Addresses stay."""
        self.slots.zero_()
        self._generations[:, 1 : 1 + self.capacity] = UNKNOWN_ID
        self.count = self.batch = 0

    def to(self, device: torch.device | str) -> LogitBuffer:
        """Move the storage to another device, which changes its addresses."""
        self.rows, self.slots = self.rows.to(device), self.slots.to(device)
        return self

    def recognise(
        self, batch: int, ids: Tensor | None, num_old: int | None, again: int = -1, op: str = "LastBatchLoss"
    ) -> int:
        """The op's argument ``again`` for a batch: 1 if it is the one stored last, 0 if not, -1 if the device decides.

        The device compares the ids where the number of stored rows does not depend on the answer, which is so for
        every batch of a steady stream. Otherwise (a short batch, or a first batch that is all new, and the next one of
        the same size) the ids are read here.
        """
        if again == 1 and batch != self.batch:
            raise ValueError(
                f"{op}: the same batch again must have its {self.batch} rows, got {batch}; pass ids= with "
                "every batch, or leave same_batch() between batches"
            )
        if again >= 0:
            return again
        if ids is None or batch != self.batch or not self.count:
            return 0
        if batch == 2 * self.count or (num_old is not None and batch != self.count):
            return -1
        if not has_values(self.slots):
            return 0
        with _disable_current_modes():  # selective checkpointing takes no op that the first evaluation did not have
            return int(self._holds(ids))

    def stored_rows(self, batch: int, num_old: int | None, again: int = 0, op: str = "LastBatchLoss") -> int:
        """How many of ``batch`` rows will be stored; raises ValueError where the rows do not fit the buffer."""
        if again == 1:
            return self.count
        old = self.count if num_old is None else num_old
        new = batch - old
        if num_old is None and self.count == 0 and batch == 2 * self.capacity:
            return self.capacity  # [old | new] before any teacher exists
        if 0 <= old <= batch and 0 <= new <= self.capacity and (new > 0 or num_old is not None):
            return new
        if num_old is None and new <= 0:
            wrong = f"{old} rows of the batch before are to be repeated, so more than {old} were expected, got {batch}"
        else:
            given = "num_old" if num_old is not None else "the buffer"
            wrong = (
                f"{given} says {old} repeated rows, which leaves {new} new ones of {batch}, and the buffer keeps at "
                f"most {self.capacity}"
            )
        raise ValueError(
            f"{op}: a batch is [repeated rows | new rows]; {wrong}. Take the batches from OverlapBatchSampler (a "
            "loader with shuffle=True repeats nothing), pass capacity= (half the batch size) or num_old=, or call "
            "reset() when a new stream of batches starts"
        )

    def _holds(self, ids: Tensor) -> bool:
        """Whether the last rows of a batch are the stored ones, and its first rows are not, or are all it has."""
        stored, count = self.ids, self.count
        ids = ids.to(stored)
        all_new = len(ids) == count
        return torch.equal(ids[len(ids) - count :], stored) and (all_new or not torch.equal(ids[:count], stored))

    def match(self, batch: int, ids: Tensor | None = None, num_old: int | None = None, again: int = -1) -> Match:
        """How a batch meets the stored rows, in plain torch, without reading the device.

        Args:
            batch: rows of the batch.
            ids: ``(B,)`` sample ids, or None.
            num_old: how many of its first rows repeat; None takes the device's count.
            again: 1 for the batch stored last, 0 for a new one, -1 to compare the ids.
        """
        size, device = self.capacity, self.slots.device
        rows = min(size, batch)
        position = torch.arange(rows, device=device)
        generations = self._generations
        latest = generations.index_select(0, self._latest)[0]
        stored = latest[0].clamp(0, size)
        same = torch.full((), again == 1, device=device)
        if ids is not None:  # whatever `again` is: a recomputation by checkpoint must run the ops of the first time
            inside = position < stored
            last_ids = ids.index_select(0, (batch - stored + position).clamp(0, max(batch - 1, 0)))
            kept = latest[1 : 1 + rows]
            repeats_all = ((ids[:rows] == kept) | ~inside).all() & (stored < batch)
            found = ((last_ids == kept) | ~inside).all() & ~repeats_all & (stored > 0) & (stored <= batch)
            if num_old is not None:
                found = found & (stored == batch - num_old)
            if again < 0:
                same = found
        taught_by = torch.where(same, 1 - self._latest, self._latest)
        teacher = generations.index_select(0, taught_by)[0]
        count = teacher[0].clamp(0, size)
        if num_old is not None:
            old = torch.full_like(count, min(num_old, batch))
        else:
            old = torch.where(same, (batch - stored).clamp(min=0), stored.clamp(max=batch))
        first = batch - (batch - old).clamp(0, size)
        faced = position < torch.minimum(torch.minimum(count, old), first)
        unknown = mismatched = torch.zeros_like(faced)
        if ids is not None:
            kept = teacher[1 : 1 + rows]
            unknown = faced & (kept == UNKNOWN_ID)
            mismatched = faced & ~unknown & (kept != ids[:rows])
        not_finite = faced & ~unknown & ~mismatched & (teacher[1 + size : 1 + size + rows] == 0)
        return Match(same, first, faced, unknown, mismatched, not_finite)

    def teacher(self, match: Match) -> Tensor:
        """The rows (k, C) that teach the first rows of the matched batch, valid where ``match.repeats``."""
        generation = torch.where(match.again, 1 - self._latest, self._latest)
        return self.rows.index_select(0, generation)[0, : len(match.faced)]

    def update(
        self,
        logits: Tensor,
        ids: Tensor | None = None,
        num_old: int | None = None,
        again: int = -1,
        kd_mask: Tensor | None = None,
        start: int = 0,
    ) -> None:
        """Store the new rows of a batch and count, in plain torch, without reading the device.

        Args:
            logits: ``(B - start, C)``; the rows after the repeated ones are stored, cast to the buffer's dtype.
            ids: ``(B,)`` sample ids, or None.
            num_old: how many of the first rows repeat; None takes the device's count.
            again: 1 for the batch stored last, 0 for a new one, -1 to compare the ids.
            kd_mask: ``(B,)`` bool, rows that may be taught; only the counter of taught rows depends on it.
            start: the row of the batch that ``logits`` begin with, at most the first one that is stored.
        """
        op = "LogitBuffer.update"
        check_logits(op, logits)
        if logits.shape[1] != self.num_classes or logits.device != self.device:
            raise ValueError(
                f"{op}: logits must have C = {self.num_classes} classes on {self.device}, got {logits.shape[1]} on "
                f"{logits.device}; make a buffer with num_classes={logits.shape[1]} and device={str(logits.device)!r}"
            )
        batch, size = start + logits.shape[0], self.capacity
        if ids is not None:
            check_ids(op, logits[:1].expand(batch, -1) if start else logits, ids)
        num_old = check_num_old(op, num_old)
        again = self.recognise(batch, ids, num_old, again, op)
        count = self.stored_rows(batch, num_old, again, op)
        match = self.match(batch, ids, num_old, again)
        repeats = match.repeats
        valid = repeats if kd_mask is None else repeats & kd_mask[: len(repeats)]
        counts = [match.mismatched.sum(), match.unknown.sum(), match.not_finite.sum()]
        # Batches in a row that found stored rows and repeated none of them.
        untaught = torch.where(match.faced.any(), (self.untaught + 1) * ~repeats.any(), self.untaught)

        written_to = torch.where(match.again, self._latest, 1 - self._latest)
        rows = len(match.faced)
        source = match.first + torch.arange(rows, device=self.slots.device)
        written = source < batch
        source = source.clamp(max=max(batch - 1, 0))
        finite = torch.empty_like(written)
        flat, piece = self.rows.flatten(0, 1), max(_PIECE // self.num_classes, 1)
        for at in range(0, rows, piece):  # a copy of a few rows at a time
            some = slice(at, min(at + piece, rows))
            new_rows = logits.detach().index_select(0, (source[some] - start).clamp(min=0)).to(flat.dtype)
            finite[some] = finite_rows(new_rows)
            places = written_to * self.rows.shape[1] + torch.arange(some.start, some.stop, device=flat.device)
            new_rows = torch.where(written[some, None], new_rows, flat.index_select(0, places))
            flat.index_copy_(0, places, new_rows)

        new_ids = torch.full_like(source, UNKNOWN_ID) if ids is None else ids.to(torch.int64).index_select(0, source)
        slots = self._generations.index_select(0, written_to)[0]
        slots[0] = batch - match.first
        slots[1 : 1 + rows] = torch.where(written, new_ids, slots[1 : 1 + rows])
        of_finite = slice(1 + size, 1 + size + rows)
        slots[of_finite] = torch.where(written, finite.to(torch.int64), slots[of_finite])
        self._generations.index_copy_(0, written_to, slots[None])
        self.slots[:1] = written_to
        self.slots[1:5] += torch.stack([valid.sum(), *counts])
        self.slots[5] = untaught
        self.count, self.batch = count, batch

    def resized(self, capacity: int, skip: int = 0) -> LogitBuffer:
        """A buffer of another capacity with the stored rows of this one from ``skip`` on."""
        other = LogitBuffer(self.num_classes, capacity, self.rows.dtype, self.rows.device)
        other.of_classes = self.of_classes
        latest = self._generations.index_select(0, self._latest)[0]
        kept, size = self.count - skip, self.capacity
        slots = other._generations[0]
        other.rows[0, :kept] = self.logits[skip:]
        slots[0] = kept
        slots[1 : 1 + kept] = latest[1 + skip : 1 + self.count]
        slots[1 + capacity : 1 + capacity + kept] = latest[1 + size + skip : 1 + size + self.count]
        other.slots[1:HEADER] = self.slots[1:HEADER]
        other.count = kept
        return other

    def state_dict(self) -> dict[str, Any]:
        """The stored rows, ids and counters, on the CPU; all shapes follow from ``num_classes`` and ``capacity``."""
        logits = torch.zeros(self.capacity, self.num_classes, dtype=self.dtype, device="cpu")
        ids = torch.full((self.capacity,), UNKNOWN_ID, dtype=torch.int64, device="cpu")
        logits[: self.count], ids[: self.count] = self.logits.detach(), self.ids
        rank, world_size = rank_and_size()
        return {
            "version": _VERSION,
            "num_classes": self.num_classes,
            "of_classes": self.of_classes,
            "capacity": self.capacity,
            "count": self.count,
            "rank": rank,
            "world_size": world_size,
            **dict(zip(COUNTERS[1:], self.slots[1:HEADER].tolist(), strict=True)),
            "logits": logits,
            "ids": ids,
        }

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Take over a saved buffer; where it does not fit, warn, restart empty and return False.

        The capacity may differ as long as the rows fit, and so may the dtype: the rows are as if stored in this one.
        """
        self.reset()
        trouble = _state_trouble(state, self.num_classes, self.capacity, self.of_classes)
        if trouble:
            _warn_of(trouble)
            return False
        count = state["count"]
        logits = state["logits"][:count].to(self.rows)
        slots = self._generations[0]
        self.rows[0, :count] = logits
        slots[0] = count
        slots[1 : 1 + count] = state["ids"][:count].to(self.slots.device)
        slots[1 + self.capacity : 1 + self.capacity + count] = finite_rows(logits)
        counters = torch.tensor([state[name] for name in COUNTERS[1:]], dtype=torch.int64, device="cpu")
        self.slots[1:HEADER] = counters.to(self.slots.device)
        self.count = count
        return True

    @classmethod
    def from_state(
        cls,
        state: dict[str, Any],
        num_classes: int | None = None,
        dtype: torch.dtype | None = None,
        of_classes: int | None = None,
    ) -> LogitBuffer | None:
        """A saved buffer, on the CPU; None, with a warning, where the state cannot be read.

        ``num_classes``, ``of_classes`` and ``dtype``, where given, replace those of the state; others are refused
        (classes) or converted (dtype).
        """
        trouble = _state_trouble(state, num_classes, of_classes=of_classes)
        if trouble:
            _warn_of(trouble)
            return None
        buffer = cls(state["num_classes"], state["capacity"], dtype or state["logits"].dtype)
        buffer.of_classes = state["of_classes"]
        buffer.load_state_dict(state)
        return buffer


def to_bytes(numbers: Sequence[int], tensors: Iterable[Tensor], spare: int = 0) -> Tensor:
    """Numbers and tensors as one uint8 tensor on the CPU: a checksum, the numbers as int64, the tensors, spare bytes.

    Every saver can write it, and its size does not depend on the values.
    """
    parts = [torch.tensor([0, *numbers], dtype=torch.int64, device="cpu"), *tensors]
    parts.append(torch.zeros(spare, dtype=torch.uint8, device="cpu"))
    packed = torch.cat([part.detach().cpu().contiguous().view(-1).view(torch.uint8) for part in parts])
    packed[:8].view(torch.int64).fill_(zlib.crc32(packed[8:].numpy().data))
    return packed


def from_bytes(packed: Tensor, numbers: int) -> tuple[list[int], Tensor]:
    """The numbers that `to_bytes` wrote, and the bytes of the tensors; ValueError where it did not write them."""
    packed = packed.detach().cpu().contiguous()
    start = 8 * (1 + numbers)
    if packed.dtype != torch.uint8 or packed.dim() != 1 or len(packed) < start:
        raise ValueError(f"saved bytes expected, got {packed.dtype} of shape {tuple(packed.shape)}")
    checksum, *read = packed[:start].clone().view(torch.int64).tolist()
    if checksum != zlib.crc32(packed[8:].numpy().data):
        raise ValueError("the checksum is wrong: damaged, or something else")
    return read, packed[start:]


def split_bytes(packed: Tensor, forms: Iterable[tuple[Sequence[int], torch.dtype]]) -> list[Tensor]:
    """Tensors of these shapes and dtypes from bytes, and the bytes left over; ValueError where there are too few."""
    tensors, start = [], 0
    for shape, dtype in forms:
        stop = start + math.prod(shape) * dtype.itemsize
        if stop > len(packed):
            raise ValueError(f"at least {stop} bytes of tensors expected, got {len(packed)}")
        tensors.append(packed[start:stop].clone().view(dtype).view(tuple(shape)))
        start = stop
    return [*tensors, packed[start:]]


# The numbers of a packed buffer; its ids and rows follow.
_NUMBERS = ("version", "dtype", "num_classes", "of_classes", "capacity", "count", "rank", "world_size", *COUNTERS[1:])


def pack_state(state: dict[str, Any], itemsize: int = 0) -> Tensor:
    """The state of a buffer as one uint8 tensor, whose size does not depend on what is stored.

    Args:
        state: of ``LogitBuffer.state_dict``; an empty one gives an empty tensor.
        itemsize: bytes kept for every logit, at least those of its dtype.
    """
    if not state:
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    logits = state["logits"]
    known = {**state, "dtype": FLOATS.index(logits.dtype)}
    spare = logits.numel() * max(itemsize - logits.element_size(), 0)
    return to_bytes([known[name] for name in _NUMBERS], [state["ids"], logits], spare)


def unpack_state(packed: Any) -> Any:
    """The state that `pack_state` packed, or {"unreadable": reason}; anything but a tensor is returned as it is."""
    if not isinstance(packed, Tensor):
        return packed
    if packed.numel() == 0:
        return {}
    try:
        numbers, rest = from_bytes(packed, len(_NUMBERS))
        state: dict[str, Any] = dict(zip(_NUMBERS, numbers, strict=True))
        if state["version"] == _VERSION:  # the layout of others is unknown
            rows, classes, dtype = state["capacity"], state["num_classes"], FLOATS[state.pop("dtype")]
            forms = [((rows,), torch.int64), ((rows, classes), dtype)]
            state["ids"], state["logits"], _ = split_bytes(rest, forms)
        return state
    except Exception as error:  # also a tensor without data, and numbers that only the checksum vouches for
        return {"unreadable": f"{type(error).__name__}: {error}"}


def stored_dtype(state: Any) -> torch.dtype | None:
    """The dtype of the rows in a state; None where there are none, so that their dtype was not chosen by any logits."""
    logits = state.get("logits") if isinstance(state, dict) and state.get("count") else None
    return logits.dtype if isinstance(logits, Tensor) and logits.dtype in FLOATS else None


def rank_and_size() -> tuple[int, int]:
    """The rank of this process and the number of ranks; (0, 1) without a process group."""
    grouped = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if grouped else (0, 1)


def _warn_of(trouble: str) -> None:
    warnings.warn(
        f"LogitBuffer: the saved buffer does not fit ({trouble}); it restarts empty, so the next batch has no "
        "last-batch term",
        stacklevel=3,
    )


def _state_trouble(
    state: Any, num_classes: int | None, capacity: int | None = None, of_classes: int | None = None
) -> str:
    """Why a buffer of so many classes and rows (None: of the state's) cannot take over a state; "" where it can."""
    if not isinstance(state, dict):
        return f"a dict expected, got {type(state).__name__}"
    if "unreadable" in state:
        return str(state["unreadable"])
    version = state.get("version", _VERSION)
    if version != _VERSION:
        return f"version {_VERSION} expected, got {version}"
    from_zero = ("of_classes", "count", "rank", "world_size", *COUNTERS[1:])
    least = {"num_classes": 1, "capacity": 1, **dict.fromkeys(from_zero, 0)}
    missing = [key for key in (*least, "logits", "ids") if key not in state]
    if missing:
        return f"missing {', '.join(missing)}"
    for name, bound in least.items():
        if not isinstance(state[name], int) or not bound <= state[name] < 2**63:
            return f"{name} must be an integer >= {bound}, got {state[name]!r}"
    if of_classes is not None and state["of_classes"] != of_classes:
        names = [f"the top k of {n} classes" if n else "logits" for n in (of_classes, state["of_classes"])]
        return f"expected {names[0]}, saved {names[1]}"
    rows, count, logits, ids = state["capacity"], state["count"], state["logits"], state["ids"]
    if not isinstance(logits, Tensor) or logits.dtype not in FLOATS:
        return f"logits must be a floating tensor, got {getattr(logits, 'dtype', type(logits).__name__)}"
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
        return f"ids must be an int64 tensor, got {getattr(ids, 'dtype', type(ids).__name__)}"
    if count > min(rows, capacity or rows):
        return f"capacity {min(rows, capacity or rows)}, saved {count} rows"
    wanted = (rows, num_classes or state["num_classes"])
    if logits.shape != wanted or ids.shape != wanted[:1]:
        return f"expected logits {wanted}, got {tuple(logits.shape)} with ids {tuple(ids.shape)}"
    if state["num_classes"] != wanted[1]:
        return f"expected {wanted[1]} classes, saved {state['num_classes']}"
    saved, here = (state["rank"], state["world_size"]), rank_and_size()
    if count and saved != here:
        return (
            f"saved by rank {saved[0]} of {saved[1]}, loaded by rank {here[0]} of {here[1]}, which has other rows; "
            "save the state of every rank under a key of its own"
        )
    return ""
