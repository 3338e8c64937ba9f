"""A set that fits on the device: uint8 images beside the model, batches by one gather, nothing decoded or copied."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import torch

from dlb_fast.data._cursor import Cursor
from dlb_fast.data._ranks import check_callable, device_of, make_plan
from dlb_fast.data._targets import class_indices
from dlb_fast.data.augment import Transform
from dlb_fast.data.batch import Batch
from dlb_fast.data.erasing import Eraser
from dlb_fast.data.memory import tensor_of
from dlb_fast.data.mixing import Mix, check_mix
from dlb_fast.data.normalise import Normalise
from dlb_fast.data.resident_views import ResidentViews
from dlb_fast.data.view_rng import ViewRngs


class ResidentLoader:
    """Overlapping batches from images that live on the device; one iteration is one epoch and moves on by itself.

    Rows `[0, num_old)` of a batch are the new rows of the batch before: simply indexed again, and augmented anew.
    With the same transform the batches are those of `OverlapBatchSampler` and `OverlapLoader`, bit for bit.

    Args:
        dataset: has `images` (N, c, h, w) uint8 and `targets` (N,), tensors or arrays.
        batch_size: rows the model sees on this rank: even; half of them are new.
        repeat: False gives plain epochs: `batch_size` new samples per batch (odd sizes too), each seen once.
        transform: `transform(image, rng)`, or None. Those of `dlb_fast.data` run on the whole batch at once (a leading
            `PadCrop`, then `Flip`, is one gather from a set that was padded once); any other callable is called per
            image.
        device: where the set is kept and batches are made; None is the CPU.
        seed, shuffle, drop_last, rank, world_size: as in `OverlapBatchSampler`.
        mean, std: of images in [0, 1], per channel: `(x / 255 - mean) / std`; both None: `x / 255`.
        dtype: of the images; torch.uint8 leaves pixels as they are. channels_last: their memory format.
        erase: `RandomErasing` or `Cutout`: a box of every view, drawn from the view's own numbers, after the rest.
        mix: mixup and CutMix, both uses of a sample mixed alike.

    Raises:
        TypeError, ValueError: a set without uint8 images, targets that do not match, sizes as in `OverlapPlan`.

    Example:
        >>> from types import SimpleNamespace
        >>> digits = SimpleNamespace(images=torch.zeros(6, 1, 8, 8, dtype=torch.uint8), targets=torch.arange(6))
        >>> [batch.ids.tolist() for batch in ResidentLoader(digits, 4, shuffle=False)]
        [[0, 1], [0, 1, 2, 3], [2, 3, 4, 5]]
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        *,
        transform: Transform | None = None,
        device: torch.device | str | None = None,
        repeat: bool = True,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
        rank: int | None = None,
        world_size: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = True,
        erase: Eraser | None = None,
        mix: Mix | None = None,
    ) -> None:
        name = "ResidentLoader"
        images, targets = resident_tensors(dataset, name)
        self.plan, self.rank = make_plan(
            name, len(images), batch_size, repeat=repeat, shuffle=shuffle, seed=seed, drop_last=drop_last, rank=rank,
            world_size=world_size,
        )  # fmt: skip
        self.half, self.repeat = self.plan.rows, repeat
        self.batch_size = 2 * self.half if repeat else self.half
        check_callable(name, transform=transform)
        normalise = Normalise(mean, std, dtype, channels_last=channels_last, erase=erase)
        self.mix = check_mix(name, mix, dtype)
        self.device = device_of(name, device)
        self._views = ResidentViews(images.to(self.device), transform, normalise, name)
        self._targets = targets.to(self.device)
        self._cursor = Cursor(self.plan, name)

    def __len__(self) -> int:
        """Steps per epoch, equal on all ranks."""
        return self.plan.halves_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        iteration = self._cursor.iterate()
        while (position := iteration.peek()) is not None:
            with iteration.making():
                batch = self.make(*position)
            iteration.advance()
            yield batch

    def make(self, epoch: int, step: int) -> Batch:
        """Batch `step` of `epoch`: a pure function of its place."""
        old, new = self.plan.batch(epoch, step, self.rank)
        before = self.plan.before(epoch, step)
        drawn = np.repeat(np.array([epoch if before is None else before[0], epoch]), [len(old), len(new)])
        use = np.repeat(np.array([1, 0]), [len(old), len(new)])
        host_ids = np.concatenate([old, new])
        images, ids = self._views(ViewRngs(self.plan.seed, drawn, host_ids, use))
        batch = Batch(images, self._targets[ids], ids, len(old), epoch, step)
        return batch if self.mix is None else self.mix.of_plan(batch, self.plan, self.rank)

    @property
    def epoch(self) -> int:
        """Epoch of the next batch to deliver."""
        return self._cursor.epoch

    @property
    def sampler(self) -> ResidentLoader:
        """Itself, for frameworks that announce the epoch by `loader.sampler.set_epoch` (Lightning, timm)."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Start `epoch` from its first batch; nothing happens when it is the current one (so a resume stays exact)."""
        self._cursor.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """The position after the delivered batches, O(1): a flat dict of ints and bools."""
        return self._cursor.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved position; RuntimeError while an iteration is active, ValueError on any mismatch."""
        self._cursor.load_state_dict(state)

    def close(self) -> None:
        """Nothing runs between batches, so there is nothing to stop; here for the loaders' common face."""

    def __enter__(self) -> ResidentLoader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def resident_tensors(dataset: Any, operation: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(images uint8 (N, c, h, w), targets int64 (N,)) of a dataset, checked."""
    if not (hasattr(dataset, "images") and hasattr(dataset, "targets")):
        raise TypeError(
            f"{operation}: dataset needs `images` (N, c, h, w) uint8 and `targets` (N,), {type(dataset).__name__} has "
            "not both; use OverlapLoader for files, or load_into_memory(dataset) first"
        )
    images, targets = tensor_of(dataset.images), torch.from_numpy(class_indices(operation, dataset.targets))
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise TypeError(
            f"{operation}: dataset.images must be uint8 (N, channels, height, width), got {images.dtype} "
            f"{tuple(images.shape)}"
        )
    if targets.shape != (len(images),):
        raise ValueError(
            f"{operation}: dataset.targets must have shape ({len(images)},) like the images, got {tuple(targets.shape)}"
        )
    return images, targets
