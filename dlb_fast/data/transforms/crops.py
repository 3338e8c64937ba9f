"""Crops, flips and resizes of uint8 images, driven by the random numbers of the view.

A transform is called as `transform(image, rng)` with a uint8 image (c, h, w) and a `ViewRng`; it returns a uint8 tensor
(c, h', w') and does not modify its input. Some transforms also have `transform.batch(images, rngs)` for images
(n, c, h, w) on any device and a `ViewRngs`; row i equals `transform(images[i], rng of view i)` bit for bit. `batch` may
modify `images`, which the loader has just gathered.

Every loader accepts any callable `transform(image, rng)`, and `transform(image)` as in torchvision; `ResidentLoader` is
faster if it also has `batch`. The loader casts and normalises after the transform.
"""

from __future__ import annotations

import functools
import math
import platform
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from dlb_fast import _backends
from dlb_fast._args import as_int
from dlb_fast.data.batch import to_device
from dlb_fast.data.rng import FLIP, ViewRng, ViewRngs, fold, fold_array, key_of
from dlb_fast.data.transforms.single import as_transform

__all__ = [
    "NORMALISATION",
    "BatchTransform",
    "CenterCrop",
    "Compose",
    "CompiledCrop",
    "Flip",
    "PadCrop",
    "RandomResizedCrop",
    "Resize",
    "Transform",
    "eval_transform",
    "train_transform",
]

# (mean, std) per channel of the training images scaled to [0, 1]; the customary values.
NORMALISATION: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


class Transform(Protocol):
    """A transform for any loader."""

    def __call__(self, image: torch.Tensor, rng: ViewRng) -> torch.Tensor: ...


class BatchTransform(Transform, Protocol):
    """A transform that also processes a whole batch at once."""

    def batch(self, images: torch.Tensor, rngs: ViewRngs) -> torch.Tensor: ...


def windows(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Every window of every image, a view (N, H - h + 1, W - w + 1, h, w * c) of images (N, H, W, c).

    `windows(images, (h, w))[rows, top, left].view(-1, h, w, c)` is one gather that copies whole lines of a window.
    """
    count, height, width, channels = images.shape
    (h, w), line = size, width * channels
    return images.as_strided(
        (count, height - h + 1, width - w + 1, h, w * channels), (height * line, line, channels, line, 1)
    )


class Compose:
    """Applies transforms in order; they share the random numbers of the view.

    A transform of one argument, such as torchvision's, is called as `transform(image)` with a PIL image.
    """

    def __init__(self, transforms: Sequence[Transform]) -> None:
        for transform in transforms:
            if not callable(transform):
                raise TypeError(f"Compose: expected callables transform(image, rng), got {transform!r}")
        self.transforms = [as_transform("Compose", transform) for transform in transforms]

    def __call__(self, image: torch.Tensor, rng: ViewRng) -> torch.Tensor:
        for transform in self.transforms:
            image = transform(image, rng)
        return image

    @property
    def batched(self) -> bool:
        """Whether all transforms have `batch`."""
        return all(has_batch(transform) for transform in self.transforms)

    def batch(self, images: torch.Tensor, rngs: ViewRngs) -> torch.Tensor:
        """Apply the transforms in order to a batch."""
        for transform in self.transforms:
            images = transform.batch(images, rngs)
        return images

    def __repr__(self) -> str:
        return f"Compose({self.transforms})"


def has_batch(transform: object) -> bool:
    """Whether `transform` can be applied to a whole batch at once."""
    return bool(transform.batched) if isinstance(transform, Compose) else hasattr(transform, "batch")


class PadCrop:
    """Zero padding on all sides, then a crop of the original size (or `size`) at a uniform position.

    Args:
        padding: pixels on each side.
        size: side of the crop; None means the size of the image.

    Example:
        >>> PadCrop(4)(torch.zeros(3, 32, 32, dtype=torch.uint8), ViewRng(0, 0, 0, 0)).shape
        torch.Size([3, 32, 32])
    """

    def __init__(self, padding: int = 4, size: int | None = None) -> None:
        self.padding = as_int(padding, "PadCrop", "padding", 0)
        self.size = None if size is None else as_int(size, "PadCrop", "size", 1)

    def output(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) of the crop of a (height, width) image; ValueError when it does not fit."""
        h, w = (height, width) if self.size is None else (self.size, self.size)
        if h > height + 2 * self.padding or w > width + 2 * self.padding:
            raise ValueError(
                f"PadCrop: a crop of {h} x {w} does not fit into {height} x {width} padded by {self.padding}; "
                "resize first or use a smaller size"
            )
        return h, w

    def place(self, rngs: ViewRngs, height: int, width: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(top, left) of every view's crop in the padded image."""
        h, w = self.output(height, width)
        top = rngs.integer(height + 2 * self.padding - h + 1)
        return top, rngs.integer(width + 2 * self.padding - w + 1)

    def pad(self, images: torch.Tensor) -> torch.Tensor:
        """(N, c, h, w) to (N, h + 2 p, w + 2 p, c) contiguous, with a border of zeros."""
        n, c, h, w = images.shape
        p = self.padding
        padded = images.new_zeros((n, h + 2 * p, w + 2 * p, c))
        padded[:, p : p + h, p : p + w] = images.permute(0, 2, 3, 1)
        return padded

    def __call__(self, image: torch.Tensor, rng: ViewRng) -> torch.Tensor:
        p, (height, width) = self.padding, image.shape[1:]
        h, w = self.output(height, width)
        top, left = rng.integer(height + 2 * p - h + 1), rng.integer(width + 2 * p - w + 1)
        padded = image.new_zeros((height + 2 * p, width + 2 * p, image.shape[0])).permute(2, 0, 1)
        padded[:, p : p + height, p : p + width] = image
        return padded[:, top : top + h, left : left + w]

    def batch(self, images: torch.Tensor, rngs: ViewRngs) -> torch.Tensor:
        """Crop a batch by one gather from the padded images."""
        count, channels, height, width = images.shape
        h, w = self.output(height, width)
        top, left = (to_device(a, images.device) for a in self.place(rngs, height, width))
        rows = torch.arange(count, device=images.device)
        return windows(self.pad(images), (h, w))[rows, top, left].view(-1, h, w, channels).permute(0, 3, 1, 2)

    def __repr__(self) -> str:
        return f"PadCrop({self.padding}, size={self.size})"


class Flip:
    """Horizontal flip.

    Args:
        p: probability.
        alternate: flip exactly one of the two views of a sample in each epoch; which one alternates between epochs,
            with a random start per sample. `p` must then be 0.5.

    Source: the alternating flip of K. Jordan, "94% on CIFAR-10 in 3.29 seconds", arXiv 2404.00498, here for two views
    per epoch.
    """

    def __init__(self, p: float = 0.5, *, alternate: bool = False) -> None:
        if not 0 <= p <= 1:
            raise ValueError(f"Flip: p must be in [0, 1], got {p}")
        if alternate and p != 0.5:
            raise ValueError(f"Flip: alternate=True shows each sample flipped half of the time; p must be 0.5, got {p}")
        self.p, self.alternate = float(p), alternate

    def __call__(self, image: torch.Tensor, rng: ViewRng) -> torch.Tensor:
        return image.flip(2) if self.flips(rng) else image

    def flips(self, rng: ViewRng) -> bool:
        """Whether this view is flipped."""
        if self.alternate:
            start = fold(key_of(rng.seed, FLIP), rng.sample)
            return bool((start ^ rng.epoch ^ rng.view) & 1)
        return rng.uniform() < self.p

    def chosen(self, rngs: ViewRngs) -> NDArray[np.bool_]:
        """(n,) bool: which views are flipped."""
        if self.alternate:
            start = fold_array(key_of(rngs.seed, FLIP), rngs.samples).astype(np.int64)
            return ((start ^ rngs.epochs ^ rngs.views) & 1).astype(bool)
        return rngs.uniform() < self.p

    def batch(self, images: torch.Tensor, rngs: ViewRngs) -> torch.Tensor:
        """Flip the chosen rows in place."""
        rows = to_device(np.flatnonzero(self.chosen(rngs)), images.device)
        images[rows] = images[rows].flip(3)
        return images

    def __repr__(self) -> str:
        return f"Flip({self.p}, alternate={self.alternate})"


def resize(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Antialiased bilinear resize of a uint8 (c, h, w) image; differs from Pillow by about 0.01 grey levels."""
    if tuple(image.shape[1:]) == size:
        return image
    # This batch stride lets torch recognise channels-last, which `image[None]` does not; the resize is twice as fast.
    batch = image.as_strided((1, *image.shape), (image.stride(1) * image.shape[1], *image.stride()))
    return F.interpolate(batch, size=size, mode="bilinear", antialias=True, align_corners=False)[0]


class RandomResizedCrop:
    """A crop of random area and aspect ratio, resized to `size`; distributed as in torchvision.

    Args:
        size: side of the output.
        scale: range of the crop's share of the area.
        ratio: range of width / height.
    """

    ATTEMPTS = 10

    def __init__(
        self,
        size: int,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
    ) -> None:
        self.size = as_int(size, "RandomResizedCrop", "size", 1)
        for name, (low, high) in (("scale", scale), ("ratio", ratio)):
            if not 0 < low <= high:
                raise ValueError(f"RandomResizedCrop: {name} must be 0 < low <= high, got {(low, high)}")
        self.scale, self.ratio = scale, ratio
        self._log_ratio = math.log(ratio[0]), math.log(ratio[1])

    def box(self, height: int, width: int, rng: ViewRng) -> tuple[int, int, int, int]:
        """(top, left, h, w) of the crop; always consumes the same number of random numbers."""
        start = rng.counter
        for _ in range(self.ATTEMPTS):
            area = height * width * rng.uniform(*self.scale)
            aspect = math.exp(rng.uniform(*self._log_ratio))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                rng.counter = start + 2 * self.ATTEMPTS
                return rng.integer(height - h + 1), rng.integer(width - w + 1), h, w
        rng.skip(2)
        h, w = height, width  # the largest central crop with an allowed aspect ratio
        if width / height < self.ratio[0]:
            h = min(height, max(1, round(width / self.ratio[0])))
        elif width / height > self.ratio[1]:
            w = min(width, max(1, round(height * self.ratio[1])))
        return (height - h) // 2, (width - w) // 2, h, w

    def __call__(self, image: torch.Tensor, rng: ViewRng) -> torch.Tensor:
        top, left, h, w = self.box(image.shape[1], image.shape[2], rng)
        return resize(image[:, top : top + h, left : left + w], (self.size, self.size))

    def __repr__(self) -> str:
        return f"RandomResizedCrop({self.size}, scale={self.scale}, ratio={self.ratio})"


_VIEW = "int row{0}, int top{0}, int left{0}, int height{0}, int width{0}, bool flip{0}"
SCHEMA = (
    f"resized_crops_(Tensor image, Tensor(a!) images, {_VIEW.format('')}, "
    f"Tensor(b!)? images_b, {_VIEW.format('_b')}, Tensor? table) -> ()"
)
_NO_VIEW = (None, 0, 0, 0, 0, 0, False)


@functools.cache
def resized_crops() -> Any:
    """The op `dlb_fast::resized_crops_`; None if it is not built, or on ARM, where torch is as fast.

    `op(image, images, row, top, left, height, width, flip, images_b or None, row_b, ..., flip_b, table or None)`
    resizes the crop `image[:, top:top+height, left:left+width]` with antialiasing to the size of `images[row]`, mirrors
    it if `flip`, and writes it into `images[row]`; the second view likewise. It releases the interpreter lock.
    image: (c, h, w) uint8. images: (n, h', w', c), any strides, uint8; or float32 with a table (c, 256) float32, and
    the op writes `table[channel, pixel]`.

    Raises:
        RuntimeError: from the op, for a shape, dtype, row or crop that does not fit.

    Source: the arithmetic of torch's `_upsample_bilinear2d_aa` (after Pillow's resampling).
    """
    if platform.machine().lower() not in ("x86_64", "amd64") or _backends.load_library():
        return None
    return torch.ops.dlb_fast.resized_crops_.default


class CompiledCrop:
    """`RandomResizedCrop` and optionally `Flip` by one compiled call that writes the views into their batches.

    The pixels equal those of the transforms. No view is allocated outside its batch.

    Args:
        crop: the crop.
        flip: the flip after it, or None.
    """

    def __init__(self, crop: RandomResizedCrop, flip: Flip | None) -> None:
        self._crop, self._flip, self._op = crop, flip, resized_crops()

    @classmethod
    def of(cls, transform: object) -> CompiledCrop | None:
        """The compiled form of a transform, or None."""
        steps = transform.transforms if isinstance(transform, Compose) else [transform]
        kinds = [type(step) for step in steps]  # exact types, because a subclass may behave differently
        if kinds not in ([RandomResizedCrop], [RandomResizedCrop, Flip]) or resized_crops() is None:
            return None
        return cls(steps[0], steps[1] if len(steps) == 2 else None)  # type: ignore[arg-type]

    @property
    def size(self) -> int:
        """Side of the views."""
        return self._crop.size

    def __call__(
        self, image: torch.Tensor, rows: Sequence[tuple[ViewRng, torch.Tensor, int]], table: torch.Tensor | None
    ) -> None:
        """Write one or two views of `image` (c, h, w) uint8.

        Args:
            image: any strides.
            rows: for each view its random numbers, the images (n, size, size, c) of its batch, and its row.
            table: None for uint8 images; for float32 images the normalised pixel values, (c, 256) float32.
        """
        _, height, width = image.shape
        views: list[Any] = []
        for rng, images, row in rows:
            box = self._crop.box(height, width, rng)
            views += (images, row, *box, self._flip is not None and self._flip.flips(rng))
        if len(rows) == 1:
            views += _NO_VIEW
        self._op(image, *views, table)


class Resize:
    """Resize the shorter side to `size`, keeping the aspect ratio, or the image to (h, w) if `size` is a pair."""

    def __init__(self, size: int | tuple[int, int]) -> None:
        sizes = (size,) if isinstance(size, int) else tuple(size)
        if len(sizes) not in (1, 2):
            raise ValueError(f"Resize: size must be an int or (height, width), got {size!r}")
        self.size = tuple(as_int(s, "Resize", "size", 1) for s in sizes)

    def __call__(self, image: torch.Tensor, rng: ViewRng | None = None) -> torch.Tensor:
        if len(self.size) == 2:
            return resize(image, (self.size[0], self.size[1]))
        (h, w), (short,) = image.shape[1:], self.size
        return resize(image, (short, int(short * w / h)) if h <= w else (int(short * h / w), short))

    def __repr__(self) -> str:
        return f"Resize({self.size})"


class CenterCrop:
    """The middle `size` x `size` pixels; smaller images are padded with zeros."""

    def __init__(self, size: int) -> None:
        self.size = as_int(size, "CenterCrop", "size", 1)

    def __call__(self, image: torch.Tensor, rng: ViewRng | None = None) -> torch.Tensor:
        c, h, w = image.shape
        if h < self.size or w < self.size:
            canvas = image.new_zeros((c, max(h, self.size), max(w, self.size)))
            top, left = (canvas.shape[1] - h) // 2, (canvas.shape[2] - w) // 2
            canvas[:, top : top + h, left : left + w] = image
            image, (h, w) = canvas, canvas.shape[1:]
        top, left = round((h - self.size) / 2), round((w - self.size) / 2)
        return image[:, top : top + self.size, left : left + self.size]

    def __repr__(self) -> str:
        return f"CenterCrop({self.size})"


def train_transform(kind: str, size: int) -> Compose:
    """Usual training transform: "small" is `PadCrop(size // 8)`, "imagenet" `RandomResizedCrop(size)`; then `Flip`."""
    if kind == "small":
        return Compose([PadCrop(size // 8), Flip()])
    if kind == "imagenet":
        return Compose([RandomResizedCrop(size), Flip()])
    raise ValueError(f'train_transform: kind must be "small" or "imagenet", got {kind!r}')


def eval_transform(size: int, resize_to: int | None = None) -> Compose:
    """Resize of the shorter side (by default to size / 0.875, as for ImageNet) and a centre crop."""
    return Compose([Resize(round(size / 0.875) if resize_to is None else resize_to), CenterCrop(size)])
