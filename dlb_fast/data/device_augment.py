"""Crop, antialiased resize, flip, cutout and normalisation of a batch in one pass over decoded images on the device.

The parameters of every view are drawn on the host from its `ViewRng`, as the transforms of `augment` draw them, so a
view is the same crop wherever it is cut. `cut_torch` uses torch's uint8 resize row by row (bit-identical to the host's
views on a CPU); the Triton kernel does all rows in one launch and may differ from it by a grey level (float weights).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dlb_fast.data.augment import Compose, Flip, RandomResizedCrop, resize
from dlb_fast.data.erasing import BOX_COLUMNS, Cutout
from dlb_fast.data.normalise import Normalise
from dlb_fast.data.view_rng import ViewRng

__all__ = ["COLUMNS", "ViewParameters", "cut", "cut_torch", "shrink_to"]

# One row per view. own: 1 where the image lies in this batch's buffer, 0 in that of the batch before; offset: its first
# byte there; then its size, the crop, the flip, the cut-out corner (after the flip), the box to erase with the key of
# its noise, the target and the sample id.
COLUMNS = (
    "own", "offset", "height", "width", "top", "left", "crop_h", "crop_w", "flip", "hole_top", "hole_left",
    "erase_top", "erase_left", "erase_h", "erase_w", "erase_key", "target", "id",
)  # fmt: skip
BOX_START = COLUMNS.index("erase_top")
_FLIPPED = torch.tensor([[[0, 1]]], device="cpu")


class ViewParameters:
    """The draws of `RandomResizedCrop`, then optionally `Flip`, then optionally `Cutout`.

    Args:
        transform: one of these, or a `Compose` of them in this order.

    Raises:
        ValueError: another transform; it has to run on the host.

    Example:
        >>> parameters = ViewParameters(Compose([RandomResizedCrop(8), Flip()]))
        >>> parameters.size, len(parameters.draw(20, 30, ViewRng(0, 0, 0, 0)))
        (8, 7)
    """

    def __init__(self, transform: Any) -> None:
        steps = list(transform.transforms) if isinstance(transform, Compose) else [transform]
        kinds = [type(step) for step in steps]
        wanted = [kind for kind in (RandomResizedCrop, Flip, Cutout) if kind in kinds]
        if kinds != wanted or RandomResizedCrop not in kinds:
            raise ValueError(
                "OverlapLoader: transform: with augment_on='device' expected RandomResizedCrop, then Flip and Cutout "
                f"if wanted, got {transform!r}; use augment_on='host' for any other transform"
            )
        by_kind: dict[type, Any] = dict(zip(kinds, steps, strict=True))
        self._crop: RandomResizedCrop = by_kind[RandomResizedCrop]
        self._flip: Flip | None = by_kind.get(Flip)
        cutout: Cutout | None = by_kind.get(Cutout)
        self.size = self._crop.size
        self.hole = cutout.size if cutout else 0
        self.fill = list(cutout.fill) if cutout else [0]

    def draw(self, height: int, width: int, rng: ViewRng) -> tuple[int, ...]:
        """(top, left, crop_h, crop_w, flip, hole_top, hole_left) of one view of an image."""
        box = self._crop.box(height, width, rng)
        flip = int(self._flip(_FLIPPED, rng)[0, 0, 0]) if self._flip else 0
        hole = (0, 0)
        if self.hole:
            hole = (rng.integer(self.size) - self.hole // 2, rng.integer(self.size) - self.hole // 2)
        return (*box, flip, *hole)


def shrink_to(image: torch.Tensor, pixels: int) -> torch.Tensor:
    """An image (c, h, w) of at most `pixels` pixels: larger ones are resized (antialiased), keeping their shape."""
    _, h, w = image.shape
    if h * w <= pixels:
        return image
    factor = (pixels / (h * w)) ** 0.5
    return resize(image, (max(1, int(h * factor)), max(1, int(w * factor))))


def cut_torch(
    before: torch.Tensor,
    own: torch.Tensor,
    table: NDArray[np.int64],
    parameters: ViewParameters,
    normalise: Normalise,
    out: torch.Tensor,
) -> None:
    """The definition: view i of `table` into `out[i]` (size, size, c); `before` and `own` are flat uint8 buffers."""
    channels = out.shape[3]
    fill = torch.tensor(parameters.fill, dtype=torch.uint8, device=out.device).expand(channels)
    for i, (mine, at, h, w, top, left, ch, cw, flip, hole_top, hole_left, *_) in enumerate(table.tolist()):
        source = own if mine else before
        image = source[at : at + h * w * channels].view(h, w, channels).permute(2, 0, 1)
        view = resize(image[:, top : top + ch, left : left + cw], (parameters.size, parameters.size))
        view = view.flip(2) if flip else view
        view = view.permute(1, 2, 0)
        if parameters.hole:
            view = view.clone()
            rows = slice(max(0, hole_top), max(0, hole_top + parameters.hole))
            view[rows, max(0, hole_left) : max(0, hole_left + parameters.hole)] = fill
        boxes = torch.from_numpy(table[i : i + 1, BOX_START : BOX_START + BOX_COLUMNS].T)
        normalise.into(out[i : i + 1], view[None].contiguous(), boxes if normalise.erase else None)


def cut(
    before: torch.Tensor,
    own: torch.Tensor,
    table: NDArray[np.int64],
    device_table: torch.Tensor,
    parameters: ViewParameters,
    normalise: Normalise,
    out: torch.Tensor,
) -> None:
    """`cut_torch`, by the Triton kernel on a CUDA device. `device_table`: the same rows (n, 18) there."""
    if out.device.type == "cuda":
        from dlb_fast.data.device_kernel import cut_triton

        cut_triton(before, own, device_table, parameters, normalise, out)
    else:
        cut_torch(before, own, table, parameters, normalise, out)
