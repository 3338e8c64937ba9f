"""`Batch`, which every loader yields, and helpers to build it."""

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
        images: (n, channels, height, width).
        targets: (n,) int64 class indices.
        ids: (n,) int64 sample ids; `ids[:num_old]` equals the new ids of the batch before.
        num_old: number of repeated rows; 0 only in the first batch of a run.
        epoch: epoch of the new rows.
        step: index of the batch within its epoch.
        target_b: None, or (n,) int64 classes of the samples mixed in (`Mix`).
        lam: None, or (n,) float32: weight of the own sample in image i; the other sample has `1 - lam[i]`.

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
        """Images of the repeated rows: a view of `images`."""
        return self.images[: self.num_old]

    @property
    def new(self) -> torch.Tensor:
        """Images of the new rows: a view of `images`."""
        return self.images[self.num_old :]

    @property
    def has_old(self) -> bool:
        """Whether the batch has repeated rows."""
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
    """Stack the views of a batch to (n, c, h, w); TypeError or ValueError naming the sample whose view differs."""
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
    """`value` if it is a tensor, else a CPU tensor of it (independent of the default device)."""
    return value if isinstance(value, torch.Tensor) else torch.as_tensor(value, device="cpu")


def to_device(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """Copy a small host array to `device` without a synchronisation."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
