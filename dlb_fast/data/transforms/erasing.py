"""Random erasing and Cutout overwrite a rectangle of a view.

The boxes are a pure function of the view (seed, epoch, sample, view) and are computed on the host, so all loaders erase
the same boxes. A noise value is an integer hash of the view's key and the pixel's position, so all devices write the
same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from dlb_fast._args import as_int
from dlb_fast.data.batch import to_device
from dlb_fast.data.rng import ERASE, GOLDEN, MASK, MIX1, MIX2, Draws, ViewRng, ViewRngs, fold_array, mix_array

__all__ = ["BOX_COLUMNS", "Cutout", "Eraser", "RandomErasing", "box_mask", "check_erase", "erase_"]

BOX_COLUMNS = 5  # top, left, height, width (0 if nothing is erased), key of the noise
MODES = ("const", "rand", "pixel")
NOISE_START = 1 << 20  # the boxes use the counters below
NOISE_UNIT = math.sqrt(3) / 65536  # scales the sum of four 16-bit uniforms to variance 1


class Eraser(Protocol):
    """The type of a loader's `erase` argument: `RandomErasing` or `Cutout`."""

    @property
    def mode(self) -> str:
        """One of `MODES`."""

    @property
    def fill(self) -> list[int] | None:
        """Grey values of mode "const"; None means the mean."""

    def draw(self, rngs: ViewRngs, height: int, width: int) -> NDArray[np.int64]:
        """(5, n): the box of every view, inside the image, and the key of its noise."""


class Cutout:
    """Fills a square of `size` pixels around a uniform centre; the square may reach over the border.

    Use it as a transform on uint8 images, or as `erase=Cutout(...)` of a loader on normalised views.

    Args:
        size: side in pixels.
        fill: one grey value or one per channel, 0 to 255 (the set's mean is customary).

    Source: DeVries and Taylor, arXiv 1708.04552.
    """

    mode = "const"

    def __init__(self, size: int, fill: int | Sequence[int] = 0) -> None:
        self.size = as_int(size, "Cutout", "size", 1)
        values = list(fill) if isinstance(fill, Iterable) else [fill]
        self.fill = [as_int(value, "Cutout", "fill", 0) for value in values]
        if not values or max(self.fill) > 255:
            raise ValueError(f"Cutout: fill must be in [0, 255], got {fill}")
        self._fills: dict[torch.device, torch.Tensor] = {}

    def __call__(self, image: torch.Tensor, rng: ViewRng) -> torch.Tensor:
        top, left = (
            rng.integer(image.shape[1]) - self.size // 2,
            rng.integer(image.shape[2]) - self.size // 2,
        )
        image = image.clone()
        image[:, max(0, top) : max(0, top + self.size), max(0, left) : max(0, left + self.size)] = self._fill(image)
        return image

    def batch(self, images: torch.Tensor, rngs: ViewRngs) -> torch.Tensor:
        """Fill the squares of a batch by one mask."""
        height, width = images.shape[2:]
        boxes = to_device(self._squares(rngs, height, width), images.device)
        return torch.where(box_mask(boxes, height, width)[:, None], self._fill(images), images)

    def _squares(self, draws: Draws, height: int, width: int) -> NDArray[np.int64]:
        """(4, n): top, left, height, width; they may reach over the border."""
        corners = [draws.integer(side) - self.size // 2 for side in (height, width)]
        return np.stack([*corners, *[np.full(len(draws), self.size)] * 2])

    def draw(self, rngs: ViewRngs, height: int, width: int) -> NDArray[np.int64]:
        """(5, n) boxes cut off at the border, for a loader's `erase`."""
        top, left, h, w = self._squares(Draws(erase_keys(rngs)), height, width)
        bottom, right = np.minimum(top + h, height), np.minimum(left + w, width)
        top, left = np.maximum(top, 0), np.maximum(left, 0)
        return np.stack([top, left, np.maximum(bottom - top, 0), np.maximum(right - left, 0), np.zeros_like(top)])

    def _fill(self, images: torch.Tensor) -> torch.Tensor:
        if len(self.fill) not in (1, images.shape[-3]):
            raise ValueError(
                f"Cutout: fill: expected one grey value or one for each of the {images.shape[-3]} channels, got "
                f"{self.fill}"
            )
        found = self._fills.get(images.device)
        if found is None:  # cached per device, because a copy from pageable memory synchronises
            found = torch.tensor(self.fill, dtype=torch.uint8, device=images.device)[:, None, None]
            self._fills[images.device] = found
        return found

    def __repr__(self) -> str:
        return f"Cutout({self.size}, fill={self.fill})"


class RandomErasing:
    """Erases a rectangle of random area and aspect ratio of a normalised view; the `erase` argument of a loader.

    Args:
        prob: probability that a view is erased.
        area: range of the area of the box relative to the image.
        aspect: range of height / width of the box, log-uniform.
        mode: "const" writes zeros (the mean, after normalisation), "rand" one noise value per channel, "pixel" one per
            pixel and channel. The noise is a sum of four uniforms: mean 0, variance 1, nearly normal, at most 3.5.

    Raises:
        ValueError: a number out of range, an unknown mode.

    Source: Zhong et al., arXiv 1708.04896; ranges of area and aspect, modes and the default mode as in timm's
        `RandomErasing`, whose noise is normal and whose probability is 0.5 by default; 0.25 is DeiT's `--reprob`.

    Example:
        >>> boxes = RandomErasing(prob=1.0).draw(ViewRngs(0, 0, np.arange(3), 0), 32, 32)
        >>> boxes.shape, bool((boxes[2:4] > 0).all())
        ((5, 3), True)
    """

    ATTEMPTS = 10
    fill: list[int] | None = None

    def __init__(
        self,
        prob: float = 0.25,
        *,
        area: tuple[float, float] = (0.02, 1 / 3),
        aspect: tuple[float, float] = (0.3, 1 / 0.3),
        mode: str = "const",
    ) -> None:
        if not 0 <= prob <= 1:
            raise ValueError(f"RandomErasing: prob must be in [0, 1], got {prob}")
        if not 0 < area[0] <= area[1] < 1:
            raise ValueError(f"RandomErasing: area must be 0 < low <= high < 1, got {area}")
        if not 0 < aspect[0] <= aspect[1] < math.inf:
            raise ValueError(f"RandomErasing: aspect must be 0 < low <= high, got {aspect}")
        if mode not in MODES:
            raise ValueError(f"RandomErasing: mode must be one of {', '.join(MODES)}, got {mode!r}")
        self.prob, self.area, self.aspect, self.mode = prob, area, aspect, mode

    def draw(self, rngs: ViewRngs, height: int, width: int) -> NDArray[np.int64]:
        """(5, n) boxes: the first of ten attempts that fits; a view without a fit is not erased."""
        keys = erase_keys(rngs)
        draws, boxes = Draws(keys), np.zeros((BOX_COLUMNS, len(rngs)), np.int64)
        missing = draws.uniform() < self.prob
        for attempt in range(self.ATTEMPTS):
            if not missing.any():
                draws.skip(2 * (self.ATTEMPTS - attempt))  # every view consumes the same number of random numbers
                break
            area = height * width * draws.uniform(*self.area)
            aspect = np.exp(draws.uniform(math.log(self.aspect[0]), math.log(self.aspect[1])))
            h, w = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
            found = missing & (h >= 1) & (w >= 1) & (h < height) & (w < width)
            boxes[2, found], boxes[3, found] = h[found], w[found]
            missing &= ~found
        boxes[0], boxes[1] = draws.integer(height - boxes[2] + 1), draws.integer(width - boxes[3] + 1)
        boxes[4] = keys.view(np.int64)
        return boxes

    def __repr__(self) -> str:
        return f"RandomErasing({self.prob}, area={self.area}, aspect={self.aspect}, mode={self.mode!r})"


def erase_keys(rngs: ViewRngs) -> NDArray[np.uint64]:
    """(n,) keys for erasing, independent of the random numbers of the transforms."""
    return fold_array(rngs.keys, np.array(ERASE, np.int64))


def noise(key: int, positions: NDArray[np.int64]) -> NDArray[np.float32]:
    """Noise of mean 0 and variance 1 at `positions` (below 2**40) of one view, rounded once to float32."""
    counters = (positions + NOISE_START).astype(np.uint64)
    bits = mix_array(np.uint64(key & MASK) + counters * np.uint64(GOLDEN))
    parts = [(bits >> np.uint64(shift)) & np.uint64(0xFFFF) for shift in (0, 16, 32, 48)]
    total = sum(part.astype(np.int64) for part in parts) - 2 * 65535
    return total.astype(np.float32) * np.float32(NOISE_UNIT)


def box_mask(boxes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(n, height, width) bool, true inside the boxes (4, n): top, left, height and width, which may reach outside."""
    inside = []
    for start, size, side in ((boxes[0], boxes[2], height), (boxes[1], boxes[3], width)):
        at = torch.arange(side, device=boxes.device)
        inside.append((at >= start[:, None]) & (at < (start + size)[:, None]))
    return inside[0][:, :, None] & inside[1][:, None, :]


def erase_(out: torch.Tensor, boxes: torch.Tensor, mode: str, fill: torch.Tensor) -> None:
    """Overwrite boxes of views in place: by slices on a CPU (the definition), by a mask on other devices.

    Args:
        out: (n, h, w, c) normalised views.
        boxes: (5, n) int64 on the device of `out`.
        mode: one of `MODES`.
        fill: (c,) float32 values of mode "const", on the device of `out`.
    """
    if out.device.type != "cpu":
        erase_by_mask(out, boxes, mode, fill)
        return
    _, height, width, channels = out.shape
    for view, (top, left, h, w, key) in zip(out, boxes.T.tolist(), strict=True):
        if h == 0 or w == 0:
            continue
        window: Any = fill
        if mode == "rand":
            window = torch.from_numpy(noise(key, np.arange(channels)))
        elif mode == "pixel":
            rows, columns = np.arange(top, top + h)[:, None, None], np.arange(left, left + w)[:, None]
            window = torch.from_numpy(noise(key, (rows * width + columns) * channels + np.arange(channels)))
        view[top : top + h, left : left + w] = window


def erase_by_mask(out: torch.Tensor, boxes: torch.Tensor, mode: str, fill: torch.Tensor) -> None:
    """`erase_` on a GPU, without a synchronisation."""
    value = fill if mode == "const" else _device_noise(boxes[4], out, mode)
    mask = box_mask(boxes[:4], out.shape[1], out.shape[2])[..., None]
    out.copy_(torch.where(mask, value.to(out.dtype), out))


def _device_noise(keys: torch.Tensor, out: torch.Tensor, mode: str) -> torch.Tensor:
    """float32 noise at all positions of `out`, by int64 arithmetic modulo 2**64."""
    n, height, width, channels = out.shape
    count = channels if mode == "rand" else height * width * channels
    counters = torch.arange(NOISE_START, NOISE_START + count, device=out.device)
    z = keys[:, None] + counters * _signed(GOLDEN)
    for shift, factor in ((30, MIX1), (27, MIX2), (31, 1)):
        z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    total = (z & 0xFFFF) + ((z >> 16) & 0xFFFF) + ((z >> 32) & 0xFFFF) + ((z >> 48) & 0xFFFF) - 2 * 65535
    values = total.float() * torch.tensor(NOISE_UNIT, dtype=torch.float32, device=out.device)
    return values.view(n, 1, 1, channels) if mode == "rand" else values.view(n, height, width, channels)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def check_erase(erase: Any, dtype: torch.dtype) -> None:
    """Raise unless `erase` is an eraser (or None) and the images are floating."""
    if erase is None:
        return
    if not hasattr(erase, "draw") or not hasattr(erase, "mode"):
        raise TypeError(f"erase: expected RandomErasing, Cutout or None, got {type(erase).__name__}")
    if not dtype.is_floating_point:
        raise ValueError(f"erase: needs a floating dtype, got {dtype}; on uint8 use Cutout as a transform")
