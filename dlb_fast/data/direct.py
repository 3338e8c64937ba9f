"""Views made in their place in the batch: no image between the resize and the row it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from dlb_fast.data.augment import Compose, Flip, RandomResizedCrop
from dlb_fast.data.compiled import resized_crops
from dlb_fast.data.view_rng import ViewRng

__all__ = ["Place", "direct_writer", "row_of"]

Place = tuple[ViewRng, torch.Tensor, int]  # a view's numbers, the images (n, h, w, c) it goes into, and its row there
Writer = Callable[[torch.Tensor, Sequence[Place]], None]

# F.interpolate has no `out`; this is the operator it calls for antialiased bilinear resizing.
_RESIZE = torch.ops.aten._upsample_bilinear2d_aa
_FLIP = torch.ops.aten.flip.out
_NO_VIEW = (None, 0, 0, 0, 0, 0, False)


def direct_writer(transform: object) -> Writer | None:
    """`write(image, places)`, one or two places, with the pixels of `transform(image, rng)` and fewer passes, or None.

    It exists for a `RandomResizedCrop` alone or before a `Flip`. image: (c, h, w) uint8; the images of a place:
    (n, size, size, c) uint8; any strides. Both views are one call of the compiled op where it is built, else torch's
    resize writes each into its row: the same bits.

    Example:
        >>> write = direct_writer(RandomResizedCrop(4))
        >>> rows = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
        >>> write(torch.full((3, 6, 8), 7, dtype=torch.uint8), [(ViewRng(0, 0, 0, 0), rows, 1)])
        >>> rows[1].unique()
        tensor([7], dtype=torch.uint8)
    """
    steps = transform.transforms if isinstance(transform, Compose) else [transform]
    if [type(step) for step in steps] not in ([RandomResizedCrop], [RandomResizedCrop, Flip]):
        return None  # a subclass may do anything, so it is none of these
    crop, flip = steps[0], steps[1] if len(steps) == 2 else None
    assert isinstance(crop, RandomResizedCrop) and (flip is None or isinstance(flip, Flip))
    return _by_op(crop, flip) if resized_crops() is not None else _by_torch(crop, flip)


def _by_op(crop: RandomResizedCrop, flip: Flip | None) -> Writer:
    op = resized_crops()

    def write(image: torch.Tensor, places: Sequence[Place]) -> None:
        _, height, width = image.shape
        views = []
        for rng, images, row in places:
            box = crop.box(height, width, rng)
            views.append((images, row, *box, flip is not None and flip.flips(rng)))
        op(image, *views[0], *(views[1] if len(views) > 1 else _NO_VIEW))

    return write


def _by_torch(crop: RandomResizedCrop, flip: Flip | None) -> Writer:
    size = [crop.size, crop.size]

    def one(image: torch.Tensor, rng: ViewRng, row: torch.Tensor) -> None:
        top, left, h, w = crop.box(image.shape[1], image.shape[2], rng)
        channel, line, column = image.stride()
        # One call for crop and batch dimension, whose stride keeps channels-last recognisable (see `augment.resize`).
        start = image.storage_offset() + top * line + left * column
        window = image.as_strided((1, image.shape[0], h, w), (h * line, channel, line, column), start)
        if flip is not None and flip.flips(rng):
            _FLIP(_RESIZE(window, size, False), [3], out=row)
        else:
            _RESIZE.out(window, size, False, out=row)

    def write(image: torch.Tensor, places: Sequence[Place]) -> None:
        for rng, images, row in places:
            one(image, rng, row_of(images, row))

    return write


def row_of(images: torch.Tensor, row: int) -> torch.Tensor:
    """Image `row` of (n, h, w, c) as (1, c, h, w), in one call."""
    n, h, w, c = images.stride()
    _, height, width, channels = images.shape
    return images.as_strided((1, channels, height, width), (n, c, h, w), images.storage_offset() + row * n)
