"""The official scheme for any `DataLoader`: two views per item, the second one kept until the next batch.

The DataLoader loads new samples only and decodes each once. `pair_halves` builds `[second views of the batch before |
first views of this batch]` and copies each view to the device once, as uint8 if the transform returns uint8.

Source: Meta-knowledge-Lab/DLB, `my_dataloader.py` (two transforms of one image) and `dlb.py` (`train_one_epoch`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import Dataset

from dlb_fast.data._args import length_of
from dlb_fast.data.batch import Batch, tensor_of
from dlb_fast.data.datasets.source import as_image, without_transform
from dlb_fast.data.decode.decode import is_pillow
from dlb_fast.data.rng import ViewRng
from dlb_fast.data.sampler import SampleIndex
from dlb_fast.data.transforms.normalise import Normalise
from dlb_fast.data.transforms.single import takes_rng


class TwoViews(Dataset[tuple[torch.Tensor, torch.Tensor, int, int]]):
    """Items `(first view, second view, target, id)` of a map-style dataset whose items are `(image, target)`.

    Args:
        dataset: map-style dataset; each item is loaded once. A torchvision dataset's own `transform` is applied to each
            view, before `transform`.
        transform: called twice per item, as `transform(image)` like torchvision's, or with a `seed` as
            `transform(image, rng)` with the view's `ViewRng`; a view then depends on (seed, epoch, id, view) only.
        seed: None, or the seed of the views.

    With a `seed` call `set_epoch(e)` before each epoch. Worker processes of a DataLoader have copies of this object, so
    with persistent workers use a `HalfBatchSampler`, whose indices carry the epoch.

    Example:
        >>> first, second, target, index = TwoViews([(torch.zeros(1, 2, 2), 5)], lambda image: image + 1)[0]
        >>> first.shape == second.shape, target, index
        (True, 5, 0)
    """

    def __init__(self, dataset: Any, transform: Callable[..., Any], *, seed: int | None = None) -> None:
        if not callable(transform):
            raise TypeError(f"TwoViews: transform must be callable, got {transform!r} ({type(transform).__name__})")
        if takes_rng(transform) != (seed is not None):
            needs, takes = ("no seed", "transform(image)") if seed is not None else ("a seed", "transform(image, rng)")
            raise TypeError(
                f"TwoViews: seed must fit the transform: {takes} takes {needs}, got seed={seed!r}; pass a seed with "
                "transform(image, rng) for views that are the same in every run, and none with transform(image)"
            )
        length_of("TwoViews", dataset)
        self.dataset, self._own = without_transform(dataset)
        self.transform = transform
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next views."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, Any, int, int]:
        image, target = self.dataset[index][:2]
        views = [image if self._own is None else self._own(image) for _ in range(2)]
        if self.seed is None:
            return self.transform(views[0]), self.transform(views[1]), target, index
        epoch = index.epoch if isinstance(index, SampleIndex) else self.epoch
        views = [as_image(view) if is_pillow(view) else view for view in views]
        rngs = [ViewRng(self.seed, epoch, int(index), view) for view in (0, 1)]
        return self.transform(views[0], rngs[0]), self.transform(views[1], rngs[1]), target, index


class PairHalves:
    """The iterable that `pair_halves` returns."""

    def __init__(self, loader: Iterable[Any], device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        self._loader = loader
        self._device = torch.device("cpu" if device is None else device)
        self._dtype = dtype
        self._normalise = None if dtype is None else Normalise(None, None, dtype)  # bit-identical to the other loaders
        self._kept: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self.epoch = 0

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch in the batches; the DataLoader's sampler and dataset have their own `set_epoch`."""
        self.epoch = epoch

    def reset(self) -> None:
        """Drop the second views that were kept; the next batch has no repeated rows."""
        self._kept = None

    def __iter__(self) -> Iterator[Batch]:
        epoch = self.epoch
        for step, (first, second, targets, ids) in enumerate(self._loader):
            first, second, targets, ids = (
                tensor_of(t).to(self._device, non_blocking=True) for t in (first, second, targets, ids)
            )
            kept, self._kept = self._kept, (second, targets, ids)
            parts = [(first, targets, ids)] if kept is None else [kept, (first, targets, ids)]
            images, all_targets, all_ids = (torch.cat(column) for column in zip(*parts, strict=True))
            yield Batch(self._scaled(images), all_targets, all_ids, 0 if kept is None else len(kept[1]), epoch, step)
        self.epoch = epoch + 1

    def _scaled(self, images: torch.Tensor) -> torch.Tensor:
        if self._normalise is None or images.dtype != torch.uint8:
            return images if self._dtype is None else images.to(self._dtype)
        if images.ndim != 4:
            raise ValueError(
                f"pair_halves: views must be (h, c, H, W) to be scaled, got {tuple(images.shape)}; pass dtype=None to "
                "take them as they are"
            )
        return self._normalise(images.permute(0, 2, 3, 1))


def pair_halves(
    loader: Iterable[Any],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> PairHalves:
    """Turn a DataLoader of `TwoViews` items into overlapping batches; one iteration yields one epoch of `Batch`.

    The second views of an epoch's last half become the repeated rows of the next epoch's first batch, as in the
    official code. The DataLoader shuffles and shards; its batch size is the new half. With
    `batch_sampler=HalfBatchSampler(...)` the order is that of `OverlapPlan`. With the DataLoader's own shuffling a
    sample may be in an epoch's last half and in the next epoch's first half. A position inside an epoch cannot be
    saved.

    Args:
        loader: yields (first views (h, c, H, W), second views, targets (h,), ids (h,)).
        device: device of the batches; None means the CPU.
        dtype: dtype of the images; uint8 images are scaled to [0, 1]. None leaves them unchanged.

    Example:
        >>> loader = [(torch.zeros(2, 1), torch.ones(2, 1), torch.zeros(2), torch.tensor([0, 1]))] * 2
        >>> [(batch.num_old, batch.images[:, 0].tolist()) for batch in pair_halves(loader)]
        [(0, [0.0, 0.0]), (2, [1.0, 1.0, 0.0, 0.0])]
    """
    return PairHalves(loader, device, dtype)
