"""Cast and normalise uint8 pixels into the network's dtype and memory format in one operation, then erase boxes."""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from dlb_fast.data.batch import to_device
from dlb_fast.data.rng import ViewRngs
from dlb_fast.data.transforms.erasing import Eraser, check_erase, erase_

__all__ = ["BufferPool", "Normalise"]

# Values per operation on a CPU. Below torch's threshold for threads, because waking threads for 100 kB costs more than
# it saves, and on a busy machine an operation then waits 20 ms for them (measured: 2 cores, load 8).
CPU_CHUNK = 32768
_ALIGN = 64
_CPU = torch.device("cpu")


class BufferPool:
    """Allocates uninitialised host tensors and reuses their memory once they are freed.

    A batch of images has tens of megabytes. For new memory the system maps and clears pages, which takes longer than
    writing the pixels. Here a tensor's storage keeps a NumPy array alive. When the last tensor, view or NumPy alias is
    freed, the array is freed and its memory is reused. So the memory of a tensor that is still in use never changes.

    Args:
        keep: number of blocks kept for reuse; further blocks are freed.

    Example:
        >>> pool = BufferPool()
        >>> first = pool.empty((4, 4), torch.float32)
        >>> address = first.data_ptr()
        >>> del first
        >>> pool.empty((4, 4), torch.float32).data_ptr() == address
        True
    """

    def __init__(self, keep: int | None = 4) -> None:
        self._free: deque[np.ndarray[Any, np.dtype[np.uint8]]] = deque(maxlen=keep)  # appends and pops are atomic

    def __reduce__(self) -> tuple[type[BufferPool], tuple[int | None]]:
        return BufferPool, (self._free.maxlen,)  # a copy starts without free blocks

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised contiguous tensor; its memory is reused after its storage is freed."""
        size = math.prod(shape) * dtype.itemsize
        block = None
        for _ in range(len(self._free)):
            try:
                found = self._free.popleft()
            except IndexError:  # another thread took the last block
                break
            if size + _ALIGN <= len(found) <= 2 * (size + _ALIGN):
                block = found
                break
            self._free.append(found)
        if block is None:
            block = np.empty(size + _ALIGN, dtype=np.uint8)
        start = -block.ctypes.data % _ALIGN
        lent = block[start : start + size]
        weakref.finalize(lent, self._free.append, block).atexit = False
        return torch.from_numpy(lent).view(dtype).view(shape)


class Normalise:
    """uint8 (n, h, w, c) to (n, c, h, w) of `dtype`: `(x / 255 - mean) / std`, one multiply-add per value.

    Args:
        mean: one number per channel, of images scaled to [0, 1]; None for both means `x / 255`.
        std: one number per channel, of images scaled to [0, 1].
        dtype: a floating dtype, or torch.uint8 to keep the pixels.
        channels_last: memory format of the result (its shape is always (n, c, h, w)).
        erase: `RandomErasing` or `Cutout`, applied after the normalisation.

    Raises:
        ValueError: std has a zero, the channel counts differ, or a dtype that is neither floating nor uint8.

    Example:
        >>> Normalise(None, None, torch.float32)(torch.full((1, 2, 2, 3), 255, dtype=torch.uint8)).max()
        tensor(1.)
    """

    def __init__(
        self,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        dtype: torch.dtype = torch.float32,
        *,
        channels_last: bool = True,
        erase: Eraser | None = None,
    ) -> None:
        if (mean is None) != (std is None):
            raise ValueError("Normalise: mean and std: expected both or neither, got only one of them.")
        self.mean, self.std = _per_channel("mean", mean), _per_channel("std", std)
        means, stds = self.mean or (), self.std or ()
        if len(means) != len(stds) or not all(s > 0 for s in stds):
            raise ValueError(f"Normalise: expected as many positive std as mean, got mean={mean}, std={std}.")
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"Normalise: dtype: expected a torch.dtype such as torch.float32, got {dtype!r}.")
        if not (dtype.is_floating_point or dtype == torch.uint8):
            raise ValueError(f"Normalise: dtype: expected a floating dtype or torch.uint8, got {dtype}.")
        check_erase(erase, dtype)
        self.dtype = dtype
        self.channels_last = channels_last
        self.erase = erase
        self._pool = BufferPool()
        self._factors: dict[tuple[torch.device, int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self._fills: dict[tuple[torch.device, int], torch.Tensor] = {}

    def __call__(self, x: torch.Tensor, rngs: ViewRngs | None = None) -> torch.Tensor:
        """Normalise views `x` (n, h, w, c) to (n, c, h, w); with `rngs` also erase boxes."""
        out = self.empty(x.shape, x.dtype, x.device)
        self.into(out, x)
        if rngs is not None and self.erase is not None:
            self.blank(out, to_device(self.erase.draw(rngs, x.shape[1], x.shape[2]), x.device))
        return out.permute(0, 3, 1, 2)

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """An uninitialised result (n, h, w, c) for views of this shape and dtype; on a CPU from the buffer pool."""
        if dtype != torch.uint8 and self.mean is not None:
            raise ValueError(
                f"Normalise: mean and std: expected uint8 views, got {dtype}, which the transform has scaled already; "
                "leave the normalisation to one of the two"
            )
        out_dtype = self.dtype if dtype == torch.uint8 else dtype
        n, h, w, c = shape
        order = (n, h, w, c) if self.channels_last else (n, c, h, w)
        if device.type == "cpu":
            out = self._pool.empty(order, out_dtype)
        else:
            out = torch.empty(order, dtype=out_dtype, device=device)
        return out if self.channels_last else out.permute(0, 2, 3, 1)

    def forget_buffers(self) -> None:
        """Free the memory of the buffer pool."""
        self._pool = BufferPool()

    def into(self, out: torch.Tensor, x: torch.Tensor) -> None:
        """Write normalised `x` into `out`, both (n, h, w, c); views that are not uint8 are copied unchanged."""
        if x.dtype != torch.uint8 or self.dtype == torch.uint8:
            out.copy_(x)
            return
        n, h, w, c = x.shape
        scale, bias = self._factors.get((x.device, w, c)) or self.factors(x.device, w, c)
        if self.channels_last:
            x, out = x.reshape(n * h, w * c), out.view(n * h, w * c)
        else:
            scale, bias = scale.view(w, c), bias.view(w, c)
        if x.device.type != "cpu" or out.dtype != torch.float32:
            torch.addcmul(bias, x, scale, out=out)
            return
        step = max(1, CPU_CHUNK // max(1, x[0].numel()))
        for part, pixels in zip(out.split(step), x.split(step), strict=True):
            # `part` holds the converted pixels, so that addcmul allocates no temporary; the values are the same
            torch.addcmul(bias, part.copy_(pixels), scale, out=part)

    def factors(self, device: torch.device, width: int, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 scale and bias (width * channels,) of an image row: `x * scale + bias` is the normalised value."""
        mean, std = self.mean or (0.0,) * channels, self.std or (1.0,) * channels
        if len(mean) != channels:
            raise ValueError(f"Normalise: mean has {len(mean)} channels, the images have {channels}.")
        pairs = [(1 / (255 * s), -m / s) for m, s in zip(mean, std, strict=True)]
        rows = torch.tensor(pairs, dtype=torch.float64, device="cpu").float().to(device)
        self._factors[device, width, channels] = found = (rows[:, 0].repeat(width), rows[:, 1].repeat(width))
        return found

    def table(self, channels: int) -> torch.Tensor:
        """(channels, 256): the normalised value of every pixel value, by the arithmetic of `into`."""
        ramp = torch.arange(256, dtype=torch.uint8, device="cpu").repeat_interleave(channels).view(256, 1, 1, channels)
        out = self.empty(ramp.shape, ramp.dtype, _CPU)
        self.into(out, ramp)
        return out.reshape(256, channels).t().contiguous()

    def blank(self, out: torch.Tensor, boxes: torch.Tensor) -> None:
        """Erase `boxes` (5, n) in normalised views `out` (n, h, w, c); both are on one device."""
        assert self.erase is not None
        erase_(out, boxes, self.erase.mode, self._fill(out.device, out.shape[3]))

    def _fill(self, device: torch.device, channels: int) -> torch.Tensor:
        """float32 (channels,): normalised fill values of mode "const"."""
        found = self._fills.get((device, channels))
        if found is None:
            greys = None if self.erase is None else self.erase.fill
            if greys is not None and len(greys) not in (1, channels):
                raise ValueError(f"Normalise: {self.erase} has {len(greys)} grey values for {channels} channels")
            scale, bias = self.factors(_CPU, 1, channels)
            values = torch.zeros_like(bias)
            if greys is not None:
                grey = torch.tensor(greys, dtype=torch.float32, device="cpu")
                values = torch.addcmul(bias, grey.expand(channels), scale)
            found = self._fills[device, channels] = values.to(device)
        return found


def _per_channel(name: str, values: Any) -> tuple[float, ...] | None:
    if values is None:
        return None
    try:
        found = () if isinstance(values, (str, bytes)) else tuple(float(value) for value in values)
    except (TypeError, ValueError):
        found = ()
    if not found:
        raise TypeError(f"Normalise: {name}: expected one number per channel, such as (0.5, 0.5, 0.5), got {values!r}.")
    if not all(map(math.isfinite, found)):
        raise ValueError(f"Normalise: {name}: expected finite numbers, got {values!r}.")
    return found
