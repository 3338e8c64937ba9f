"""Views of a resident set: crop and flip in one gather, then what is left of the transform, then the normalisation; all
in one pass where nothing is left of the transform."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from dlb_fast.data.augment import Compose, Flip, PadCrop, Transform, has_batch, to_device, windows
from dlb_fast.data.batch import stack_views
from dlb_fast.data.compiled import GATHERED, gathered_views
from dlb_fast.data.device_stream import Normalise
from dlb_fast.data.memory import BufferPool
from dlb_fast.data.normalise import CPU_CHUNK
from dlb_fast.data.view_rng import ViewRng, ViewRngs

Places = NDArray[np.int64]


def gather_on_host(images: NDArray[np.uint8], places: Places, size: tuple[int, int]) -> torch.Tensor:
    """Crop and flip by copying windows: (n, h, w, c) uint8. `places` as in `gather_on_device`.

    Every window is one block of an array of all windows, so numpy copies it row by row; those to be flipped go through
    torch's flip, which knows interleaved channels. Three times as fast as a copy per image, more than torch's gathers.
    """
    (h, w), channels = size, images.shape[3]
    every = sliding_window_view(images.reshape(*images.shape[:2], -1), (h, w * channels), axis=(1, 2))
    row, top, left, flipped = places
    out = np.empty((places.shape[1], h, w * channels), dtype=np.uint8)
    for mirrored in (False, True):
        chosen = np.flatnonzero(flipped.astype(bool) == mirrored)
        if not len(chosen):
            continue
        views = every[row[chosen], top[chosen], left[chosen] * channels]
        if mirrored:
            pixels = torch.from_numpy(views).view(-1, h, w, channels).permute(0, 3, 1, 2)
            for part in pixels.split(max(1, CPU_CHUNK // max(1, pixels[0].numel()))):
                part.copy_(part.flip(3))
        out[chosen] = views
    return torch.from_numpy(out).view(-1, h, w, channels)


def gather_on_device(images: torch.Tensor, places: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Crop and flip without a host synchronisation: (n, h, w, c) uint8.

    Args:
        images: (N, H, W, c) uint8, contiguous.
        places: (4, n) int64: row, top, left, and 1 where the view is flipped.
        size: (h, w).
    """
    rows, top, left, flipped = places
    views = windows(images, top, left, size, rows).permute(0, 2, 3, 1)
    return torch.where(flipped[:, None, None, None] != 0, views.flip(2), views)


class ResidentViews:
    """See the module.

    Args:
        images: (N, c, h, w) uint8 on the device.
        transform: None, transforms of `dlb_fast.data`, or any callable `transform(image, rng)`.
        normalise: cast and normalisation. operation: the loader's name, for messages.
    """

    def __init__(
        self,
        images: torch.Tensor,
        transform: Transform | None,
        normalise: Normalise,
        operation: str = "ResidentLoader",
    ) -> None:
        self._normalise, self._operation = normalise, operation
        self._height, self._width = images.shape[2:]
        steps: list[Any] = list(transform.transforms) if isinstance(transform, Compose) else [transform]
        self._crop: PadCrop | None = steps.pop(0) if steps and type(steps[0]) is PadCrop else None
        self._flip: Flip | None = steps.pop(0) if steps and type(steps[0]) is Flip else None
        self._rest = Compose([step for step in steps if step is not None])
        self._batched = has_batch(self._rest)
        # Padded once: every crop is then a window. PadCrop(0) only changes the layout.
        self._images = (self._crop or PadCrop(0)).pad(images)
        self._on_host = images.device.type == "cpu"
        self._pool = BufferPool()  # a batch in fresh memory takes as long to map as to fill
        # One pass for all, where the op is built and nothing else stands between the gather and the normalisation.
        one_pass = self._on_host and gathered_views() is not None and not self._rest.transforms
        one_pass = one_pass and normalise.dtype in GATHERED
        self._table = normalise.table(images.shape[1]) if one_pass else None

    def __call__(self, rngs: ViewRngs) -> tuple[torch.Tensor, torch.Tensor]:
        """(images (n, c, h, w), sample ids (n,)) on the device."""
        places = np.zeros((4, len(rngs)), dtype=np.int64)
        places[0], size = rngs.samples, (self._height, self._width)
        if self._crop is not None:
            places[1], places[2] = self._crop.place(rngs, *size)
            size = self._crop.output(*size)
        if self._flip is not None:
            places[3] = self._flip.chosen(rngs)
        if self._table is not None:
            out = self._empty((len(rngs), *size, self._table.shape[0]))
            gathered_views()(self._images, torch.from_numpy(places), self._table, out)
            return self._erased(out, rngs), torch.from_numpy(places[0])
        if self._on_host:
            views, ids = gather_on_host(self._images.numpy(), places, size), torch.from_numpy(places[0])
        else:
            moved = to_device(places, self._images.device)  # all the host knows, in one copy
            views, ids = gather_on_device(self._images, moved, size), moved[0]
        return self._normalised(self._transformed(views.permute(0, 3, 1, 2), rngs), rngs), ids

    def _transformed(self, views: torch.Tensor, rngs: ViewRngs) -> torch.Tensor:
        if self._batched:
            return self._rest.batch(views, rngs)
        counter, singles = rngs.counter, []
        for view, epoch, sample, use in zip(views, rngs.epochs, rngs.samples, rngs.uses, strict=True):
            rng = ViewRng(rngs.seed, int(epoch), int(sample), int(use))
            rng.skip(counter)
            singles.append(self._rest(view, rng))
        return stack_views(self._operation, singles, rngs.samples.tolist())

    def _normalised(self, views: torch.Tensor, rngs: ViewRngs) -> torch.Tensor:
        pixels = views.permute(0, 2, 3, 1).contiguous()
        if not self._on_host:
            return self._normalise(pixels, rngs)
        out = self._empty(tuple(pixels.shape), pixels.dtype)
        self._normalise.into(out, pixels)
        return self._erased(out, rngs)

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        return self._normalise.empty(shape, dtype, pool=self._pool)

    def _erased(self, out: torch.Tensor, rngs: ViewRngs) -> torch.Tensor:
        boxes = self._normalise.boxes(rngs, *out.shape[1:3])
        if boxes is not None:
            self._normalise.blank(out, torch.from_numpy(boxes))
        return out.permute(0, 3, 1, 2)
