"""RandAugment on uint8 tensors, with the operations, magnitudes and pixels of the Pillow implementations.

Source: Cubuk et al., "RandAugment", arXiv 1909.13719; magnitudes as in torchvision's `RandAugment` (31 bins); shears
and translations from the upper left corner, as in the paper's code.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from dlb_fast.data.plan import as_int
from dlb_fast.data.view_rng import ViewRng

__all__ = ["RandAugment"]

_BINS = 31
Op = Callable[[torch.Tensor, float], torch.Tensor]


def affine(image: torch.Tensor, matrix: tuple[float, float, float, float, float, float]) -> torch.Tensor:
    """Nearest neighbour: output pixel (x, y) shows input pixel (a x + b y + c, d x + e y + f), zero outside.

    In Pillow's fixed-point numbers (16 bits behind the point, up to 32767 pixels a side), rounded as it rounds them.
    """
    a, b, c, d, e, f = matrix
    height, width = image.shape[1:]
    x, y = (torch.arange(side, device=image.device) for side in (width, height))
    x, y = x[None, :], y[:, None]
    column = (_fixed(c + a * 0.5 + b * 0.5) + _fixed(a) * x + _fixed(b) * y) >> 16
    row = (_fixed(f + d * 0.5 + e * 0.5) + _fixed(d) * x + _fixed(e) * y) >> 16
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    return image[:, row.clamp(0, height - 1), column.clamp(0, width - 1)] * inside


def _fixed(value: float) -> int:
    return math.floor(value * 65536 + 0.5)


def rotate(image: torch.Tensor, degrees: float) -> torch.Tensor:
    """Counter-clockwise about the centre; the matrix is made in Pillow's steps."""
    angle, (height, width) = -math.radians(degrees % 360), image.shape[1:]
    cos, sin, x, y = round(math.cos(angle), 15), round(math.sin(angle), 15), width / 2, height / 2
    return affine(image, (cos, sin, cos * -x + sin * -y + x, -sin, cos, -sin * -x + cos * -y + y))


def grey(image: torch.Tensor) -> torch.Tensor:
    """(1, h, w) luminance, ITU-R 601 in Pillow's integers."""
    if image.shape[0] == 1:
        return image
    red, green, blue = image.to(torch.int32)
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).to(torch.uint8)[None]


def blend(image: torch.Tensor, other: torch.Tensor | float, amount: float) -> torch.Tensor:
    """`other + (1 + amount) * (image - other)`, cut off to [0, 255]."""
    base = other.float() if isinstance(other, torch.Tensor) else other
    return (base + (1 + amount) * (image.float() - base)).clamp_(0, 255).to(torch.uint8)


def contrast(image: torch.Tensor, amount: float) -> torch.Tensor:
    """Away from (or towards) the mean luminance."""
    return blend(image, float(int(grey(image).double().mean() + 0.5)), amount)


def sharpness(image: torch.Tensor, amount: float) -> torch.Tensor:
    """Away from (or towards) the smoothed image; the outermost pixels have no smoothed value."""
    smooth = image.clone()
    if min(image.shape[1:]) > 2:
        pixels = image.to(torch.int32)
        total = 4 * pixels[:, 1:-1, 1:-1]
        for row in range(3):
            for column in range(3):
                total += pixels[:, row : row + image.shape[1] - 2, column : column + image.shape[2] - 2]
        smooth[:, 1:-1, 1:-1] = (total.double() / 13 + 0.5).to(torch.uint8)
    return blend(image, smooth, amount)


def autocontrast(image: torch.Tensor, _: float) -> torch.Tensor:
    """Each channel stretched to 0..255."""
    low, high = (f(image.flatten(1), 1).view(-1, 1, 1).double() for f in (torch.amin, torch.amax))
    scale = 255 / (high - low)
    stretched = (image.double() * scale - low * scale).clamp(0, 255)
    return torch.where(high > low, stretched, image.double()).to(torch.uint8)


def equalize(image: torch.Tensor, _: float) -> torch.Tensor:
    """Each channel's histogram made flat."""
    channels = []
    for channel in image:
        histogram = torch.bincount(channel.flatten().long(), minlength=256)
        used = histogram[histogram > 0]
        step = int(used.sum() - used[-1]) // 255
        if step == 0:
            channels.append(channel)
            continue
        before = torch.cumsum(histogram, 0) - histogram
        table = ((before + step // 2) // step).clamp(max=255).to(torch.uint8)
        channels.append(table[channel.long()])
    return torch.stack(channels)


def posterize(image: torch.Tensor, bits: float) -> torch.Tensor:
    """Keep the upper bits."""
    return image & (0xFF << (8 - int(bits)) & 0xFF)


def solarize(image: torch.Tensor, threshold: float) -> torch.Tensor:
    """Invert pixels from the threshold on."""
    return torch.where(image.float() >= threshold, 255 - image, image)


# name -> (operation, magnitude of a level in [0, 1] for an image (height, width), whether its sign is drawn)
_OPERATIONS: dict[str, tuple[Op, Callable[[float, int, int], float], bool]] = {
    "identity": (lambda image, _: image, lambda level, h, w: 0.0, False),
    "shear_x": (lambda image, m: affine(image, (1, m, 0, 0, 1, 0)), lambda level, h, w: 0.3 * level, True),
    "shear_y": (lambda image, m: affine(image, (1, 0, 0, m, 1, 0)), lambda level, h, w: 0.3 * level, True),
    "translate_x": (
        lambda image, m: affine(image, (1, 0, m, 0, 1, 0)),
        lambda level, h, w: float(int(150 / 331 * w * level)),
        True,
    ),
    "translate_y": (
        lambda image, m: affine(image, (1, 0, 0, 0, 1, m)),
        lambda level, h, w: float(int(150 / 331 * h * level)),
        True,
    ),
    "rotate": (rotate, lambda level, h, w: 30 * level, True),
    "brightness": (lambda image, m: blend(image, 0.0, m), lambda level, h, w: 0.9 * level, True),
    "color": (lambda image, m: blend(image, grey(image), m), lambda level, h, w: 0.9 * level, True),
    "contrast": (contrast, lambda level, h, w: 0.9 * level, True),
    "sharpness": (sharpness, lambda level, h, w: 0.9 * level, True),
    "posterize": (posterize, lambda level, h, w: 8 - round(4 * level), False),
    "solarize": (solarize, lambda level, h, w: 255 * (1 - level), False),
    "autocontrast": (autocontrast, lambda level, h, w: 0.0, False),
    "equalize": (equalize, lambda level, h, w: 0.0, False),
}


class RandAugment:
    """`num_ops` operations drawn from fourteen, all at one magnitude, with a drawn sign where it has one.

    Args:
        num_ops: operations per view. magnitude: 0 to 30.

    Example:
        >>> RandAugment()(torch.zeros(3, 8, 8, dtype=torch.uint8), ViewRng(0, 0, 0, 0)).shape
        torch.Size([3, 8, 8])
    """

    def __init__(self, num_ops: int = 2, magnitude: int = 9) -> None:
        self.num_ops = as_int(num_ops, "RandAugment", "num_ops", 0)
        self.magnitude = as_int(magnitude, "RandAugment", "magnitude", 0)
        if self.magnitude >= _BINS:
            raise ValueError(f"RandAugment: magnitude must be at most {_BINS - 1}, got {magnitude}")

    def __call__(self, image: torch.Tensor, rng: ViewRng) -> torch.Tensor:
        if image.shape[0] not in (1, 3):
            raise ValueError(f"RandAugment: images must have 1 or 3 channels, got {image.shape[0]}")
        operations = list(_OPERATIONS.values())
        for _ in range(self.num_ops):
            operation, strength, signed = operations[rng.integer(len(operations))]
            magnitude = strength(self.magnitude / (_BINS - 1), image.shape[1], image.shape[2])
            negative = bool(rng.integer(2))  # always drawn: every operation takes the same share of the numbers
            image = operation(image, -magnitude if signed and negative else magnitude)
        return image

    def __repr__(self) -> str:
        return f"RandAugment({self.num_ops}, magnitude={self.magnitude})"
