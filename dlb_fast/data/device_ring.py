"""Decoded images on the device: each is copied once, both its views are cut there (`augment_on="device"`).

The rules of `device_stream` hold here too, with one more for the ring:

7. The images of half g are read by batch g (first views) and by batch g + 1 (second views). So `consumed` is recorded
   on both slots that a batch read. The ring hands out half k only when slots k and k + 1 are free, i.e. when batch
   k + 1 - size was released: on the host nobody needs the images that half k replaces.

Images of one half are packed one behind the other, in the order in which threads finish; the table says where. On a CPU
the same code runs with an api that executes at once.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dlb_fast.data.device_augment import BOX_START, COLUMNS, ViewParameters, cut, shrink_to
from dlb_fast.data.device_stream import CudaApi, Normalise, StreamApi, pinned
from dlb_fast.data.erasing import BOX_COLUMNS
from dlb_fast.data.memory import BufferPool
from dlb_fast.data.slots import Item, Slot
from dlb_fast.data.view_rng import ViewRng

__all__ = ["RingStage"]

_CHANNELS, _ALIGN = 3, 16
_WHOLE = (0,) * BOX_COLUMNS  # nothing is erased


class _AtOnce:
    """A `StreamApi` for a CPU: everything has happened when the call returns."""

    def new_event(self) -> None: ...
    def record(self, event: Any, stream: Any) -> None: ...
    def wait(self, stream: Any, event: Any) -> None: ...
    def synchronize(self, event_or_stream: Any) -> None: ...
    def current(self) -> None: ...

    def copy(self, stream: Any, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source)

    def launch(self, stream: Any, work: Callable[[], None]) -> None:
        work()

    def device(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()


@dataclass(slots=True)
class _Held:
    """The buffers of one slot: packed images and the table of its batch's views, on the host and on the device."""

    host: torch.Tensor
    images: torch.Tensor
    host_table: torch.Tensor
    table: torch.Tensor
    copied: Any
    consumed: Any
    numbers: NDArray[np.int64]  # the host table's memory
    half: int = -1  # whose images are here
    used: int = 0  # bytes
    sent: int = -1  # the half whose images were copied last
    copying: bool = False
    read: bool = False


class RingStage:
    """Stage of a pipeline that augments on the device; the face of `CpuStage`, with `add` in place of `write`.

    Args:
        device, normalise: where and what. transform: as `ViewParameters` takes it. seed: of the views. pixels: largest
            image kept; larger ones are shrunk before, which changes their views against `augment_on="host"`.
        api, copy_stream: torch.cuda's (or none, on a CPU) unless a test brings its own.
    """

    def __init__(
        self,
        device: torch.device,
        normalise: Normalise,
        transform: Any,
        seed: int,
        pixels: int,
        *,
        api: StreamApi | None = None,
        copy_stream: Any = None,
    ) -> None:
        self.device, self._normalise = device, normalise
        self._parameters, self._seed, self._pixels = ViewParameters(transform), seed, pixels
        cuda = device.type == "cuda"
        self._api: StreamApi = api or (CudaApi(device) if cuda else _AtOnce())
        self.copy_stream = torch.cuda.Stream(device) if cuda and copy_stream is None else copy_stream
        self._slots: list[Slot] = []
        self._lock = threading.RLock()
        self._pool = BufferPool()

    def prepare(self, slots: Sequence[Slot], half: int) -> None:
        """All buffers (rule 1); `half` new samples per batch."""
        size = half * (self._pixels * _CHANNELS + _ALIGN)
        self._slots = list(slots)
        with self._api.device():
            for slot in slots:
                host = pinned((size,), torch.uint8, self.device)
                table = pinned((2 * half, len(COLUMNS)), torch.int64, self.device)
                there = [torch.empty(t.shape, dtype=t.dtype, device=self.device) for t in (host, table)]
                events = self._api.new_event(), self._api.new_event()
                slot.stage = _Held(host, there[0], table, there[1], *events, table.numpy())
            fresh = self._api.new_event()
            self._api.record(fresh, self._api.current())
            self._api.wait(self.copy_stream, fresh)

    def _held(self, step: int) -> _Held:
        held = self._slots[step % len(self._slots)].stage
        assert isinstance(held, _Held)
        return held

    def _read_by(self, slot: Slot) -> list[_Held]:
        """The slots whose buffers a batch reads (rule 7)."""
        return [self._held(slot.step), *([self._held(slot.step - 1)] if slot.num_old else [])]

    def _host_free(self, held: _Held) -> None:
        if held.copying:
            self._api.synchronize(held.copied)
            held.copying = False

    def add(self, item: Item, image: torch.Tensor, sample: int, target: int) -> None:
        """Keep one decoded image and note the views that batches will cut from it."""
        if image.dtype != torch.uint8 or image.shape[0] != _CHANNELS:
            raise ValueError(
                f"OverlapLoader: augment_on='device' needs uint8 RGB images, sample {sample} is {tuple(image.shape)} "
                f"{image.dtype}; use augment_on='host'"
            )
        image = shrink_to(image, self._pixels)
        _, h, w = image.shape
        size = _CHANNELS * h * w
        use, slot, _ = item.targets[0]
        half = slot.step - use  # a carried sample has its second use only, in the batch after its half
        held = self._held(half)
        with self._lock:
            if held.half != half:
                self._host_free(held)
                held.half, held.used = half, 0
            offset = held.used
            held.used += size + -size % _ALIGN
        held.host[offset : offset + size].view(h, w, _CHANNELS).permute(2, 0, 1).copy_(image)
        for use, slot, row in item.targets:
            drawn = self._parameters.draw(h, w, ViewRng(self._seed, item.epoch, sample, use))
            mine = self._held(slot.step)
            with self._lock:
                self._host_free(mine)
            mine.numbers[row] = (1 - use, offset, h, w, *drawn, *_WHOLE, target, sample)

    def ids(self, slot: Slot) -> NDArray[np.int64]:
        """(rows,) sample ids of a full slot."""
        return self._held(slot.step).numbers[: slot.rows, -1]

    @property
    def size(self) -> tuple[int, int]:
        """(h, w) of the views."""
        return self._parameters.size, self._parameters.size

    def submit(self, slot: Slot) -> None:
        """A batch's rows are all there: copy its images, those of the half before if need be, and its table."""
        with self._api.device(), self._lock:
            # A full batch has all of the half before, if it repeats it; else that one may still be incomplete.
            for step in (slot.step - 1, slot.step) if slot.num_old else (slot.step,):
                held = self._held(step)
                if held.half != step or held.sent == step:
                    continue  # copied already
                if held.read:
                    self._api.wait(self.copy_stream, held.consumed)
                self._api.copy(self.copy_stream, held.images[: held.used], held.host[: held.used])
                self._api.record(held.copied, self.copy_stream)
                held.sent, held.copying = step, True
            held = self._held(slot.step)
            if slot.boxes is not None:
                held.numbers[: slot.rows, BOX_START : BOX_START + BOX_COLUMNS] = slot.boxes.T
            if held.read:
                self._api.wait(self.copy_stream, held.consumed)
            self._api.copy(self.copy_stream, held.table, held.host_table)
            self._api.record(held.copied, self.copy_stream)
            held.copying = True

    def deliver(self, slot: Slot) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Images (rows, c, size, size), targets and ids (rows,) as new tensors of the consumer's stream."""
        size, n = self._parameters.size, slot.rows
        own, before = self._held(slot.step), self._held(slot.step - 1)
        with self._api.device():
            stream = self._api.current()
            self._api.wait(stream, own.copied)  # the copy stream runs in order: the half before has arrived as well
            shape = (n, size, size, _CHANNELS)
            pool = self._pool if self.device.type == "cpu" else None
            out = self._normalise.empty(shape, torch.uint8, self.device, pool=pool)
            meta = torch.empty((2, n), dtype=torch.int64, device=self.device)
            table = own.numbers[:n].copy()

            def read() -> None:
                cut(before.images, own.images, table, own.table[:n], self._parameters, self._normalise, out)
                meta.copy_(own.table[:n, -2:].T)

            self._api.launch(stream, read)
            for held in self._read_by(slot):
                self._api.record(held.consumed, stream)
                held.read = True
        return out.permute(0, 3, 1, 2), meta[0], meta[1]

    def bytes_of(self, slot: Slot) -> int:
        """Bytes copied to the device for the slot's batch: its new images once, and its table."""
        held = self._held(slot.step)
        return held.used + held.table.nbytes

    def close(self) -> None:
        """Wait for everything that touches the device buffers, then let them go (rule 6)."""
        with self._api.device():
            self._api.synchronize(self.copy_stream)
            for slot in self._slots:
                if isinstance(slot.stage, _Held) and slot.stage.read:
                    self._api.synchronize(slot.stage.consumed)
                slot.stage = None
