"""The batch that every loader yields, and how views become one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from numpy.typing import NDArray


@dataclass(slots=True)
class Batch:
    """One training batch: rows `[0, num_old)` repeat the new rows of the batch before, in the same order.

    Args:
        images: (n, channels, height, width), on the device.
        targets: (n,) int64 class indices.
        ids: (n,) int64 sample ids; `ids[:num_old]` equals the new ids of the batch before.
        num_old: repeated rows; 0 only in the very first batch of a run.
        epoch: epoch in which the new rows are new.
        step: index of the batch within its epoch.
        target_b: None, or (n,) int64 classes of the samples mixed in (`Mix`).
        lam: None, or (n,) float32: image i shows `lam[i]` of its own content and `1 - lam[i]` of the other sample's.

    Example:
        >>> batch = Batch(torch.zeros(4, 1, 8, 8), torch.zeros(4), torch.arange(4), num_old=2, epoch=0, step=1)
        >>> batch.has_old, tuple(batch.new.shape)
        (True, (2, 1, 8, 8))
    """

    images: torch.Tensor
    targets: torch.Tensor
    ids: torch.Tensor
    num_old: int
    epoch: int
    step: int
    target_b: torch.Tensor | None = None
    lam: torch.Tensor | None = None

    @property
    def old(self) -> torch.Tensor:
        """The repeated rows' images: a view of `images`."""
        return self.images[: self.num_old]

    @property
    def new(self) -> torch.Tensor:
        """The new rows' images: a view of `images`."""
        return self.images[self.num_old :]

    @property
    def has_old(self) -> bool:
        """Whether rows of the batch before are repeated."""
        return self.num_old > 0

    def __len__(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The same batch with its tensors on `device`."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory; torch's DataLoader calls this when `pin_memory=True`."""
        return self._with(torch.Tensor.pin_memory)

    def _with(self, move: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        pair = [None if tensor is None else move(tensor) for tensor in (self.target_b, self.lam)]
        images, targets, ids = move(self.images), move(self.targets), move(self.ids)
        return replace(self, images=images, targets=targets, ids=ids, target_b=pair[0], lam=pair[1])

    def __repr__(self) -> str:
        shown = ", ".join(
            f"{f.name}={tuple(v.shape) if isinstance(v, torch.Tensor) else v}"
            for f in fields(self)
            for v in (getattr(self, f.name),)
            if v is not None
        )
        return f"Batch({shown})"


def stack_views(operation: str, views: Sequence[torch.Tensor], ids: Sequence[int]) -> torch.Tensor:
    """(n, c, h, w) of the views of a batch; TypeError or ValueError naming the sample whose view does not fit."""
    for view, sample in zip(views, ids, strict=True):
        if not isinstance(view, torch.Tensor) or view.ndim != 3:
            got = f"shape {tuple(view.shape)}" if isinstance(view, torch.Tensor) else type(view).__name__
            raise TypeError(f"{operation}: transform: expected a (c, h, w) tensor, got {got} for sample {sample}")
        if (view.shape, view.dtype) != (views[0].shape, views[0].dtype):
            raise ValueError(
                f"{operation}: sample {sample} has shape {tuple(view.shape)} {view.dtype}, sample {ids[0]} of its "
                f"batch has {tuple(views[0].shape)} {views[0].dtype}; pass a transform that brings all to one size and "
                "dtype, such as eval_transform(224)"
            )
    return torch.stack(list(views))


def tensor_of(value: Any) -> torch.Tensor:
    """A tensor as it is; anything else as a tensor on the CPU, whatever the default device is."""
    return value if isinstance(value, torch.Tensor) else torch.as_tensor(value, device="cpu")


def to_device(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """A small host array on `device`, without making the host wait for the device."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
