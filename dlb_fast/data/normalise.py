"""From uint8 pixels to what the network is fed: cast, normalisation, erasing and memory format in one operation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dlb_fast.data.augment import to_device
from dlb_fast.data.erasing import Eraser, check_erase, erase_
from dlb_fast.data.memory import BufferPool
from dlb_fast.data.view_rng import ViewRngs

__all__ = ["Normalise"]

# Values per operation on a CPU: below torch's grain for threads, because waking threads for 100 kB costs more than it
# saves, and on a busy machine waiting for them takes 20 ms an operation (measured: 2 cores, load 8).
CPU_CHUNK = 32768


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


class Normalise:
    """uint8 (n, h, w, c) to (n, c, h, w) of `dtype`: `(x / 255 - mean) / std`, one multiply-add per value.

    Args:
        mean, std: one number per channel, of images scaled to [0, 1]; None for both means plain `x / 255`.
        dtype: floating, or torch.uint8 to hand the pixels over as they are.
        channels_last: memory format of the result (its shape is always (n, c, h, w)).
        erase: `RandomErasing` or `Cutout`: a box of each view is overwritten, in the same operation on a GPU.

    Errors: ValueError when std has a zero or the channel counts differ.

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
        self._fills: dict[tuple[torch.device, int], torch.Tensor] = {}
        self._rows: dict[tuple[torch.device, int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def _factors(self, device: torch.device, width: int, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and bias of one image row (width * channels): a broadcast over whole rows vectorises."""
        found = self._rows.get((device, width, channels))
        if found is None:
            scale, bias = self.per_channel(device, channels)
            found = self._rows[device, width, channels] = (scale.repeat(width), bias.repeat(width))
        return found

    def per_channel(self, device: torch.device, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 (channels,) scale and bias: a normalised value is `x * scale + bias`."""
        found = self._rows.get((device, 1, channels))
        if found is None:
            mean, std = self.mean or (0.0,) * channels, self.std or (1.0,) * channels
            if len(mean) != channels:
                raise ValueError(f"Normalise: mean has {len(mean)} channels, the images have {channels}.")
            factors = [(1 / (255 * s), -m / s) for m, s in zip(mean, std, strict=True)]
            pairs = torch.tensor(factors, dtype=torch.float64, device="cpu")
            scale, bias = (pairs[:, k].float().to(device) for k in (0, 1))
            found = self._rows[device, 1, channels] = (scale, bias)
        return found

    def empty(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | None = None,
        *,
        pool: BufferPool | None = None,
    ) -> torch.Tensor:
        """The result's memory as (n, h, w, c), for views of `shape` (n, h, w, c) and `dtype`; from `pool` on a host."""
        out_dtype = self.dtype if dtype == torch.uint8 else dtype
        n, h, w, c = shape
        order = (n, h, w, c) if self.channels_last else (n, c, h, w)
        out = pool.empty(order, out_dtype) if pool else torch.empty(order, dtype=out_dtype, device=device)
        return out if self.channels_last else out.permute(0, 2, 3, 1)

    def boxes(self, rngs: ViewRngs, height: int, width: int) -> NDArray[np.int64] | None:
        """(5, n) boxes to erase of views of that size, or None."""
        return None if self.erase is None else self.erase.draw(rngs, height, width)

    def fill(self, device: torch.device, channels: int) -> torch.Tensor:
        """float32 (channels,): what the boxes of mode "const" are filled with, normalised."""
        found = self._fills.get((device, channels))
        if found is None:
            scale, bias = self.per_channel(torch.device("cpu"), channels)
            greys = None if self.erase is None else self.erase.fill
            if greys is not None and len(greys) not in (1, channels):
                raise ValueError(f"Normalise: {self.erase} has {len(greys)} grey values for {channels} channels")
            values = torch.zeros_like(bias)
            if greys is not None:
                grey = torch.tensor(greys, dtype=torch.float32, device="cpu")
                values = torch.addcmul(bias, grey.expand(channels), scale)
            found = self._fills[device, channels] = values.to(device)
        return found

    def into(self, out: torch.Tensor, x: torch.Tensor, boxes: torch.Tensor | None = None) -> None:
        """`out[...] = normalised x`, both (n, h, w, c), then erased: `boxes` (5, n) on the device of `out`.

        Views that are not uint8 are the user's to normalise.
        """
        if boxes is None or self.erase is None:
            self._plain(out, x)
        elif out.device.type == "cuda" and x.dtype == torch.uint8:
            from dlb_fast.data.finish_kernel import finish_triton

            finish_triton(self, out, x, boxes)
        else:
            self._plain(out, x)
            self.blank(out, boxes)

    def blank(self, out: torch.Tensor, boxes: torch.Tensor) -> None:
        """Erase the boxes of what is normalised already."""
        assert self.erase is not None
        erase_(out, boxes, self.erase.mode, self.fill(out.device, out.shape[3]))

    def table(self, channels: int) -> torch.Tensor:
        """(channels, 256): what each value of a byte becomes, by the arithmetic of `into`."""
        cpu = torch.device("cpu")  # whatever the default device is
        ramp = torch.arange(256, dtype=torch.uint8, device=cpu)[:, None, None, None].expand(256, 1, 1, channels)
        ramp = ramp.contiguous()
        out = self.empty(ramp.shape, ramp.dtype, cpu)
        self._plain(out, ramp)
        return out.reshape(256, channels).t().contiguous()

    def _plain(self, out: torch.Tensor, x: torch.Tensor) -> None:
        if x.dtype != torch.uint8 or self.dtype == torch.uint8:
            out.copy_(x)
            return
        n, h, w, c = x.shape
        scale, bias = self._factors(x.device, w, c)
        if self.channels_last:
            x, out = x.reshape(n * h, w * c), out.view(n * h, w * c)
        else:
            scale, bias = scale.view(w, c), bias.view(w, c)
        if x.device.type != "cpu" or out.dtype != torch.float32:
            torch.addcmul(bias, x, scale, out=out)
            return
        step = max(1, CPU_CHUNK // max(1, x[0].numel()))
        for part, pixels in zip(out.split(step), x.split(step), strict=True):
            # a CPU would convert into a temporary first; the values are the same
            torch.addcmul(bias, part.copy_(pixels), scale, out=part)

    def __call__(self, x: torch.Tensor, rngs: ViewRngs | None = None) -> torch.Tensor:
        """(n, c, h, w) of views `x` (n, h, w, c); with the views' `rngs` they are erased as well."""
        out = self.empty(x.shape, x.dtype, x.device)
        drawn = None if rngs is None else self.boxes(rngs, x.shape[1], x.shape[2])
        self.into(out, x, None if drawn is None else to_device(drawn, x.device))
        return out.permute(0, 3, 1, 2)
