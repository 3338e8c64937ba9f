"""Turn a filled slot into a batch that the consumer owns; on CUDA over one copy stream.

The rules for CUDA (`tests/test_device_stream.py` runs this file against a model of streams that executes late and in
any order the events allow, and shows that every rule is needed for correct pixels):

1. A loader has one copy stream, and every slot one pinned host buffer and one device buffer. They are not freed between
   batches, so the caching allocator cannot reuse their memory during a copy.
2. Before a copy into a device buffer the copy stream waits for `consumed`, which the consumer's stream recorded after
   it last read that buffer.
3. After the copy the copy stream records `copied`; the consumer's stream waits for it before it reads.
4. Before a thread writes into a pinned buffer again, the host waits for `copied`: the copy engine may still read it.
5. The batch is a new tensor, allocated and written on the consumer's current stream (cast, normalisation and memory
   format in one operation), so it needs no `record_stream` and is never overwritten.
6. `close` waits for the copy stream before it frees the device buffers.

The thread that wrote a slot's last row starts its copy, which runs while the consumer trains on an earlier batch. On a
CPU there is no copy: threads write normalised pixels into the batch.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from dlb_fast.data.loaders.ring import Slot
from dlb_fast.data.transforms.erasing import BOX_COLUMNS
from dlb_fast.data.transforms.normalise import Normalise

__all__ = ["CpuStage", "CudaStage", "make_stage"]

_LOG = logging.getLogger("dlb_fast.data")


class CpuStage:
    """Stage for the CPU: threads write normalised pixels into the batch that is yielded.

    Args:
        normalise: cast and normalisation.
    """

    copy_stream = None

    def __init__(self, normalise: Normalise) -> None:
        self.device = torch.device("cpu")
        self.row_dtype = normalise.dtype  # dtype of `rows` when the views are uint8
        self._normalise = normalise
        self._delivered: deque[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = deque()
        self._lock = threading.Lock()
        self._shape: tuple[int, ...] = ()
        self._dtype = torch.uint8

    def prepare(self, slots: Sequence[Slot], rows: int, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        """Allocate the targets and ids of all slots; views are (h, w, c) = `shape` of `dtype`."""
        self._shape, self._dtype = shape, dtype
        for slot in slots:
            slot.meta = torch.zeros((2, rows), dtype=torch.int64, device="cpu")
            slot.numbers = slot.meta.numpy()

    def rows(self, slot: Slot) -> torch.Tensor:
        """The images (n, h, w, c) of a slot, allocated when the first view is written."""
        if slot.fresh:
            with self._lock:
                if slot.fresh:
                    # Keep the last two batches, which the consumer may hold, and free earlier ones in this thread.
                    # Freeing a tensor releases the interpreter lock; in the consumer's thread, which competes with
                    # the workers for the lock and a core, that took up to 5 ms.
                    while len(self._delivered) > 2:
                        self._delivered.popleft()
                    with torch.enable_grad():  # a view made under no_grad cannot be modified in place under autograd
                        slot.images = self._normalise.empty((slot.rows, *self._shape), self._dtype, self.device)
                    slot.fresh = False
        assert slot.images is not None
        return slot.images

    def write(self, slot: Slot, row: int, view: torch.Tensor) -> None:
        """Write one view (c, h, w) into its row."""
        self._normalise.into(self.rows(slot)[row : row + 1], view.permute(1, 2, 0)[None])

    def ids(self, slot: Slot) -> NDArray[np.int64]:
        """(rows,) sample ids of a full slot."""
        assert slot.numbers is not None
        return slot.numbers[1, : slot.rows]

    @property
    def size(self) -> tuple[int, int]:
        """(h, w) of the views."""
        return self._shape[0], self._shape[1]

    def submit(self, slot: Slot) -> None:
        """Erase the boxes of a full slot and build the batch.

        The worker thread does this, because every torch call of the consumer would release the interpreter lock and
        then wait for it.
        """
        assert slot.images is not None and slot.meta is not None
        if slot.boxes is not None:
            self._normalise.blank(slot.images, torch.from_numpy(slot.boxes))
        images, slot.images = slot.images, None
        with torch.enable_grad():
            slot.stage = (images.permute(0, 3, 1, 2), *slot.meta[:, : slot.rows].clone().unbind())

    def deliver(self, slot: Slot) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Images (rows, c, h, w), targets (rows,) and ids (rows,), removed from the slot."""
        tensors, slot.stage = slot.stage, None
        assert isinstance(tensors, tuple)
        self._delivered.append(tensors)
        return tensors

    def bytes_of(self, slot: Slot) -> int:
        """Bytes copied to the device for the slot's batch."""
        return 0

    def close(self) -> None:
        """Free the buffers."""
        self._delivered.clear()
        self._normalise.forget_buffers()


def pinned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A pinned host buffer for copies to `device`; pageable, with a warning, if the system refuses to pin it.

    Example:
        >>> pinned((2, 3), torch.uint8, torch.device("cpu")).shape
        torch.Size([2, 3])
    """
    if device.type == "cuda":
        try:
            return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=True)
        except RuntimeError as error:
            _LOG.warning("cannot pin %s of %s (%s): copies will not overlap with compute", shape, dtype, error)
    return torch.empty(shape, dtype=dtype, device="cpu")


class StreamApi(Protocol):
    """The stream operations of `CudaStage`: `torch.cuda`, or the tests' model of it."""

    def new_event(self) -> Any: ...
    def record(self, event: Any, stream: Any) -> None: ...
    def wait(self, stream: Any, event: Any) -> None: ...
    def synchronize(self, event_or_stream: Any) -> None: ...
    def copy(self, stream: Any, target: torch.Tensor, source: torch.Tensor) -> None: ...
    def current(self) -> Any: ...
    def launch(self, stream: Any, work: Callable[[], None]) -> None: ...
    def device(self) -> AbstractContextManager[Any]: ...


class CudaApi:
    """`StreamApi` on `torch.cuda`, for one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def new_event(self) -> torch.cuda.Event:
        return torch.cuda.Event()

    def record(self, event: torch.cuda.Event, stream: torch.cuda.Stream) -> None:
        event.record(stream)

    def wait(self, stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
        stream.wait_event(event)

    def synchronize(self, event_or_stream: torch.cuda.Event | torch.cuda.Stream) -> None:
        event_or_stream.synchronize()

    def copy(self, stream: torch.cuda.Stream, target: torch.Tensor, source: torch.Tensor) -> None:
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)

    def current(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device)

    def launch(self, stream: torch.cuda.Stream, work: Callable[[], None]) -> None:
        work()  # `stream` is the calling thread's current stream already

    def device(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self._device)


@dataclass(slots=True)
class _DeviceSlot:
    """Device buffers and events of one slot."""

    images: torch.Tensor
    meta: torch.Tensor
    copied: Any
    consumed: Any
    copying: bool = False  # `copied` was recorded and the host has not waited for it
    read: bool = False  # `consumed` was recorded


class CudaStage:
    """Stage for CUDA, by rules 1 to 6 at the top of this file.

    Args:
        device: a CUDA device.
        normalise: cast and normalisation.
        api: stream operations; None uses `torch.cuda`.
        copy_stream: None creates one.
    """

    def __init__(
        self, device: torch.device, normalise: Normalise, *, api: StreamApi | None = None, copy_stream: Any = None
    ) -> None:
        self.device = device
        self.row_dtype = torch.uint8
        self._normalise = normalise
        self._api: StreamApi = api or CudaApi(device)
        self.copy_stream = copy_stream if copy_stream is not None else torch.cuda.Stream(device)
        self._slots: list[_DeviceSlot] = []
        self.size = (0, 0)  # (h, w) of the views, set by `prepare`

    def prepare(self, slots: Sequence[Slot], rows: int, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        """Allocate pinned and device buffers of all slots (rule 1); views are (h, w, c) = `shape`."""
        for slot in slots:
            slot.images = pinned((rows, *shape), dtype, self.device)
            slot.meta = pinned((2 + (BOX_COLUMNS if self._normalise.erase else 0), rows), torch.int64, self.device)
            slot.numbers = slot.meta.numpy()
            self._prepare_device(slot, slot.images, slot.meta)
        self.size = shape[0], shape[1]

    def _prepare_device(self, slot: Slot, images: torch.Tensor, meta: torch.Tensor) -> None:
        with self._api.device():
            images, meta = (torch.empty(t.shape, dtype=t.dtype, device=self.device) for t in (images, meta))
            device_slot = _DeviceSlot(images, meta, self._api.new_event(), self._api.new_event())
            # pending work of the current stream may still use the memory that the allocator returned
            allocated = self._api.new_event()
            self._api.record(allocated, self._api.current())
            self._api.wait(self.copy_stream, allocated)
        slot.stage = device_slot
        self._slots.append(device_slot)

    def rows(self, slot: Slot) -> torch.Tensor:
        """The pinned buffer (n, h, w, c), after the copy engine has read its previous rows (rule 4)."""
        device_slot = slot.stage
        assert isinstance(device_slot, _DeviceSlot) and slot.images is not None
        if device_slot.copying:
            self._api.synchronize(device_slot.copied)  # safe from several threads: nothing records the event meanwhile
            device_slot.copying = False
        return slot.images

    def write(self, slot: Slot, row: int, view: torch.Tensor) -> None:
        """Write one view (c, h, w) into its row of the pinned buffer."""
        self.rows(slot)[row].copy_(view.permute(1, 2, 0))

    def ids(self, slot: Slot) -> NDArray[np.int64]:
        """(rows,) sample ids of a full slot."""
        assert slot.numbers is not None
        return slot.numbers[1, : slot.rows]

    def submit(self, slot: Slot) -> None:
        """Start the copy of a full slot (rules 2 and 3); the thread that filled it calls this."""
        device_slot, n = slot.stage, slot.rows
        assert isinstance(device_slot, _DeviceSlot) and slot.images is not None and slot.meta is not None
        if slot.boxes is not None:
            assert slot.numbers is not None
            slot.numbers[2:, :n] = slot.boxes
        with self._api.device():
            if device_slot.read:
                self._api.wait(self.copy_stream, device_slot.consumed)
            self._api.copy(self.copy_stream, device_slot.images[:n], slot.images[:n])
            self._api.copy(self.copy_stream, device_slot.meta, slot.meta)
            self._api.record(device_slot.copied, self.copy_stream)
            device_slot.copying = True

    def deliver(self, slot: Slot) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Images (rows, c, h, w), targets (rows,) and ids (rows,): new tensors on the current stream (rules 3, 5)."""
        device_slot, n = slot.stage, slot.rows
        assert isinstance(device_slot, _DeviceSlot)
        with self._api.device():
            stream = self._api.current()
            self._api.wait(stream, device_slot.copied)
            source, numbers = device_slot.images[:n], device_slot.meta[:, :n]
            out = self._normalise.empty(source.shape, source.dtype, source.device)
            meta = torch.empty((2, n), dtype=numbers.dtype, device=self.device)

            def read() -> None:
                self._normalise.into(out, source)
                if self._normalise.erase is not None:
                    self._normalise.blank(out, numbers[2:])
                meta.copy_(numbers[:2])

            self._api.launch(stream, read)
            self._api.record(device_slot.consumed, stream)
            device_slot.read = True
        return out.permute(0, 3, 1, 2), meta[0], meta[1]

    def bytes_of(self, slot: Slot) -> int:
        """Bytes copied to the device for the slot's batch."""
        assert slot.images is not None and slot.meta is not None
        return slot.images[: slot.rows].nbytes + slot.meta[:, : slot.rows].nbytes

    def close(self) -> None:
        """Wait for all work on the device buffers, then free them (rule 6)."""
        with self._api.device():
            self._api.synchronize(self.copy_stream)
            for device_slot in self._slots:
                if device_slot.read:
                    self._api.synchronize(device_slot.consumed)
        self._slots.clear()


def make_stage(device: torch.device, normalise: Normalise, copy_stream: Any = None) -> CpuStage | CudaStage:
    """The stage of a device: CUDA (also ROCm, which torch calls cuda) or the CPU.

    Example:
        >>> type(make_stage(torch.device("cpu"), Normalise(None, None))).__name__
        'CpuStage'
    """
    if device.type == "cuda":
        return CudaStage(device, normalise, copy_stream=copy_stream)
    return CpuStage(normalise)
