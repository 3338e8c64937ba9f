"""RandAugment on uint8 tensors, by Pillow's operations.

Source: Cubuk et al., "RandAugment", arXiv 1909.13719; magnitudes as in torchvision's `RandAugment` (31 bins). Shears
and translations start at the upper left corner, as in the paper's code.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from dlb_fast._args import as_int
from dlb_fast.data.rng import ViewRng

__all__ = ["RandAugment"]

_BINS = 31
# (operation on a Pillow image, magnitude from (level in [0, 1], height, width), whether the sign is random)
Operation = tuple[Callable[[Any, float], Any], Callable[[float, int, int], float], bool]


@functools.cache
def operations() -> dict[str, Operation]:
    """The fourteen operations by name; the first call imports Pillow."""
    from PIL import Image, ImageEnhance, ImageOps

    def affine(image: Any, *matrix: float) -> Any:  # output (x, y) is input (a x + b y + c, d x + e y + f), or black
        return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)

    def none(level: float, h: int, w: int) -> float:
        return 0.0

    def shear(level: float, h: int, w: int) -> float:
        return 0.3 * level

    def blend(level: float, h: int, w: int) -> float:
        return 0.9 * level

    return {
        "identity": (lambda image, m: image, none, False),
        "shear_x": (lambda image, m: affine(image, 1, m, 0, 0, 1, 0), shear, True),
        "shear_y": (lambda image, m: affine(image, 1, 0, 0, m, 1, 0), shear, True),
        "translate_x": (
            lambda image, m: affine(image, 1, 0, m, 0, 1, 0),
            lambda level, h, w: float(int(150 / 331 * w * level)),
            True,
        ),
        "translate_y": (
            lambda image, m: affine(image, 1, 0, 0, 0, 1, m),
            lambda level, h, w: float(int(150 / 331 * h * level)),
            True,
        ),
        "rotate": (lambda image, m: image.rotate(m), lambda level, h, w: 30 * level, True),
        "brightness": (lambda image, m: ImageEnhance.Brightness(image).enhance(1 + m), blend, True),
        "color": (lambda image, m: ImageEnhance.Color(image).enhance(1 + m), blend, True),
        "contrast": (lambda image, m: ImageEnhance.Contrast(image).enhance(1 + m), blend, True),
        "sharpness": (lambda image, m: ImageEnhance.Sharpness(image).enhance(1 + m), blend, True),
        "posterize": (
            lambda image, m: ImageOps.posterize(image, int(m)),
            lambda level, h, w: 8 - round(4 * level),
            False,
        ),
        "solarize": (
            lambda image, m: ImageOps.solarize(image, m),  # type: ignore[arg-type]  # a float works too
            lambda level, h, w: 255 * (1 - level),
            False,
        ),
        "autocontrast": (lambda image, m: ImageOps.autocontrast(image), none, False),
        "equalize": (lambda image, m: ImageOps.equalize(image), none, False),
    }


class RandAugment:
    """Applies `num_ops` random operations of fourteen, all at one magnitude, with a random sign for signed operations.

    Args:
        num_ops: number of operations per view.
        magnitude: integer from 0 to 30.

    Raises:
        ImportError: Pillow is not installed.

    Example:
        >>> RandAugment()(torch.zeros(3, 8, 8, dtype=torch.uint8), ViewRng(0, 0, 0, 0)).shape
        torch.Size([3, 8, 8])
    """

    def __init__(self, num_ops: int = 2, magnitude: int = 9) -> None:
        self.num_ops = as_int(num_ops, "RandAugment", "num_ops", 0)
        self.magnitude = as_int(magnitude, "RandAugment", "magnitude", 0)
        if self.magnitude >= _BINS:
            raise ValueError(f"RandAugment: magnitude must be at most {_BINS - 1}, got {magnitude}")
        operations()  # raise now, not during an epoch, if Pillow is missing

    def __call__(self, image: torch.Tensor, rng: ViewRng) -> torch.Tensor:
        from PIL import Image

        channels, height, width = image.shape
        if channels not in (1, 3):
            raise ValueError(f"RandAugment: images must have 1 or 3 channels, got {channels}")
        pixels = image.permute(1, 2, 0).contiguous().cpu().numpy()
        picture = Image.fromarray(pixels if channels == 3 else pixels[:, :, 0])
        choice = list(operations().values())
        for _ in range(self.num_ops):
            operation, strength, signed = choice[rng.integer(len(choice))]
            magnitude = strength(self.magnitude / (_BINS - 1), height, width)
            negative = bool(rng.integer(2))  # drawn for unsigned operations too: each consumes two random numbers
            picture = operation(picture, -magnitude if signed and negative else magnitude)
        result = torch.from_numpy(np.array(picture).reshape(height, width, channels))
        return result.permute(2, 0, 1).to(image.device)

    def __repr__(self) -> str:
        return f"RandAugment({self.num_ops}, magnitude={self.magnitude})"
