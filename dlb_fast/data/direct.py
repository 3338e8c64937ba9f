"""Views made in their place in the batch: no image between the resize and the row it belongs to."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dlb_fast.data.augment import Compose, Flip, RandomResizedCrop
from dlb_fast.data.view_rng import ViewRng

__all__ = ["direct_writer"]

Writer = Callable[[torch.Tensor, ViewRng, torch.Tensor], None]

# F.interpolate has no `out`; this is the operator it calls for antialiased bilinear resizing.
_RESIZE = torch.ops.aten._upsample_bilinear2d_aa
_FLIP = torch.ops.aten.flip.out


def direct_writer(transform: object) -> Writer | None:
    """`write(image, rng, row)` with the pixels of `row.copy_(transform(image, rng))` and fewer passes, or None.

    It exists for a `RandomResizedCrop` alone or before a `Flip`. image: (c, h, w) uint8; row: (1, c, size, size) uint8,
    any strides.

    Example:
        >>> write = direct_writer(RandomResizedCrop(4))
        >>> row = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
        >>> write(torch.full((3, 6, 8), 7, dtype=torch.uint8), ViewRng(0, 0, 0, 0), row)
        >>> row.unique()
        tensor([7], dtype=torch.uint8)
    """
    steps = transform.transforms if isinstance(transform, Compose) else [transform]
    if [type(step) for step in steps] not in ([RandomResizedCrop], [RandomResizedCrop, Flip]):
        return None  # a subclass may do anything, so it is none of these
    crop, flip = steps[0], steps[1] if len(steps) == 2 else None
    assert isinstance(crop, RandomResizedCrop) and (flip is None or isinstance(flip, Flip))
    size = [crop.size, crop.size]

    def write(image: torch.Tensor, rng: ViewRng, row: torch.Tensor) -> None:
        top, left, h, w = crop.box(image.shape[1], image.shape[2], rng)
        channel, line, column = image.stride()
        # One call for crop and batch dimension, whose stride keeps channels-last recognisable (see `augment.resize`).
        start = image.storage_offset() + top * line + left * column
        window = image.as_strided((1, image.shape[0], h, w), (h * line, channel, line, column), start)
        if flip is not None and flip.flips(rng):
            _FLIP(_RESIZE(window, size, False), [3], out=row)
        else:
            _RESIZE.out(window, size, False, out=row)

    return write
