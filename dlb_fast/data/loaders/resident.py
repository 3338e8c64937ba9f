"""`ResidentLoader` keeps a dataset as uint8 on the device and gathers each batch in one operation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Subset

from dlb_fast.data._args import class_indices, device_of, length_of
from dlb_fast.data.batch import Batch, stack_views, tensor_of, to_device
from dlb_fast.data.datasets.open import load_into_memory
from dlb_fast.data.datasets.source import is_torchvisions, with_decoder, without_transform
from dlb_fast.data.decode.decode import ImageDecoder
from dlb_fast.data.plan import make_plan
from dlb_fast.data.position import Iteration, StreamPosition
from dlb_fast.data.rng import ViewRng, ViewRngs
from dlb_fast.data.transforms.crops import Compose, PadCrop, Transform, has_batch, windows
from dlb_fast.data.transforms.erasing import Eraser
from dlb_fast.data.transforms.mixing import Mix, check_mix
from dlb_fast.data.transforms.normalise import Normalise
from dlb_fast.data.transforms.single import as_transform

__all__ = ["ResidentLoader", "ResidentViews", "resident_tensors"]


class ResidentLoader:
    """Overlapping batches of images on the device; one iteration is one epoch, the next iteration the next.

    Rows `[0, num_old)` of a batch repeat the new rows of the batch before, with new augmentation. With the same
    transform the batches equal those of `OverlapBatchSampler` and `OverlapLoader` bit for bit.

    Args:
        dataset: has `images` (N, c, h, w) uint8 and `targets` (N,), tensors or arrays; or a torchvision dataset of
            images of one size, which is loaded into memory and whose own `transform` is applied to each view.
        batch_size: rows of a batch on this rank, an even number; half of them are new.
        transform: called as `transform(image, rng)`, or None. The transforms of `dlb_fast.data` run on the whole batch
            at once (a leading `PadCrop` is part of the gather, from a dataset that was padded once). Any other callable
            is called per image; one of a single argument, such as torchvision's, as `transform(image)` with a PIL
            image, and with the global random numbers seeded by the view.
        device: device of the dataset and of the batches; None means the CPU.
        overlap: False turns repetition off: `batch_size` new samples per batch (odd sizes too), one view of each.
        seed: non-negative integer, the same on all ranks.
        shuffle: a new order each epoch; False keeps the order of the dataset.
        drop_last: True yields full halves only; False covers every sample (see `OverlapPlan`).
        rank: as in `OverlapBatchSampler`.
        world_size: as in `OverlapBatchSampler`.
        mean: per channel, of pixels in [0, 1]: images are `(x / 255 - mean) / std`, or `x / 255` without mean and std.
        std: per channel, of pixels in [0, 1].
        dtype: dtype of the images; torch.uint8 keeps the pixels.
        channels_last: memory format of the images.
        erase: `RandomErasing` or `Cutout`, applied to normalised views.
        mix: mixup and CutMix; both views of a sample are mixed alike.

    Raises:
        TypeError: no uint8 images, targets that are no integers, a size that is no integer.
        ValueError: as many targets as images are expected; sizes as in `OverlapPlan`.

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
        overlap: bool = True,
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
        images, targets, own = resident_tensors(dataset, name)
        self.plan, self.rank = make_plan(
            name,
            len(images),
            batch_size,
            overlap=overlap,
            shuffle=shuffle,
            seed=seed,
            drop_last=drop_last,
            rank=rank,
            world_size=world_size,
        )
        self.half = self.plan.rows  # new rows of a batch
        self.batch_size = 2 * self.half if overlap else self.half
        self.device = device_of(name, device)
        normalise = Normalise(mean, std, dtype, channels_last=channels_last, erase=erase)
        self.mix = check_mix(name, mix, dtype)
        self._views = ResidentViews(images.to(self.device), [own, transform], normalise, name)
        self._targets = targets.to(self.device)
        self._position = StreamPosition(self.plan, name)

    def __len__(self) -> int:
        """Steps per epoch, equal on all ranks."""
        return self.plan.steps_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        return self._batches(self._position.iterate())

    def _batches(self, iteration: Iteration) -> Iterator[Batch]:
        while (position := iteration.peek()) is not None:
            batch = self.make(*position)
            iteration.advance()
            yield batch

    def make(self, epoch: int, step: int) -> Batch:
        """Batch `step` of `epoch`: `[second views of the half before | first views of this half]`."""
        ids, epochs, views = self.plan.views(epoch, step, self.rank)
        images, rows = self._views(ViewRngs(self.plan.seed, epochs, ids, views))
        batch = Batch(images, self._targets[rows], rows, int(views.sum()), epoch, step)
        return batch if self.mix is None else self.mix.of_plan(batch, self.plan, self.rank)

    @property
    def epoch(self) -> int:
        """Epoch of the position, as in `state_dict()`."""
        return self._position.epoch

    @property
    def sampler(self) -> ResidentLoader:
        """The loader itself, for frameworks that call `loader.sampler.set_epoch` (Lightning, timm)."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Start `epoch` from its first batch; the current epoch is not restarted, so a resume stays exact."""
        self._position.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """The position after the delivered batches: a flat dict of ints and bools."""
        return self._position.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved position; RuntimeError while an iteration is active, ValueError on any mismatch."""
        self._position.load_state_dict(state)

    def close(self) -> None:
        """Does nothing, because this loader has no threads; all loaders have this method."""

    def __enter__(self) -> ResidentLoader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class ResidentViews:
    """Makes the views of one batch from images on the device: gather and crop, transform, normalise, erase.

    Args:
        images: (N, c, h, w) uint8 on the device.
        transforms: one after the other: None, transforms of `dlb_fast.data`, or any callable `transform(image, rng)`
            or `transform(image)`.
        normalise: cast and normalisation.
        operation: name of the loader, for messages.
    """

    def __init__(
        self, images: torch.Tensor, transforms: Sequence[Any], normalise: Normalise, operation: str
    ) -> None:
        self._normalise, self._operation = normalise, operation
        steps: list[Any] = []
        for transform in transforms:
            given = as_transform(operation, transform)
            steps += given.transforms if isinstance(given, Compose) else [given]
        steps = [step for step in steps if step is not None]
        crop = steps.pop(0) if steps and type(steps[0]) is PadCrop else None
        self._rest = Compose(steps)
        self._batched = has_batch(self._rest)
        self._cropped = crop is not None
        pad = PadCrop(0) if crop is None else crop
        h, w = pad.output(*images.shape[2:])
        self._windows = windows(pad.pad(images), (h, w))  # padded once, so that every crop is a window
        self._shape = (-1, h, w, images.shape[1])

    def __call__(self, rngs: ViewRngs) -> tuple[torch.Tensor, torch.Tensor]:
        """(images (n, c, h, w), sample ids (n,)) on the device."""
        index = np.zeros((3, len(rngs.samples)), dtype=np.int64)  # sample, top, left
        index[0] = rngs.samples
        if self._cropped:  # the same random numbers as PadCrop
            _, down, across = self._windows.shape[:3]
            index[1], index[2] = rngs.integer(down), rngs.integer(across)
        if self._windows.is_cpu:  # NumPy copies whole lines of windows, three times as fast as torch
            ids = torch.from_numpy(index[0])
            views = torch.from_numpy(self._windows.numpy()[tuple(index)]).view(self._shape)
        else:
            ids, top, left = to_device(index, self._windows.device)
            views = self._windows[ids, top, left].view(self._shape)
        if self._rest.transforms:
            views = self._transformed(views.permute(0, 3, 1, 2), rngs).permute(0, 2, 3, 1).contiguous()
        return self._normalise(views, rngs), ids

    def _transformed(self, views: torch.Tensor, rngs: ViewRngs) -> torch.Tensor:
        if self._batched:
            return self._rest.batch(views, rngs)
        counter, singles = rngs.counter, []
        for image, epoch, sample, view in zip(views, rngs.epochs, rngs.samples, rngs.views, strict=True):
            rng = ViewRng(rngs.seed, int(epoch), int(sample), int(view))
            rng.skip(counter)
            with rng.seeded():  # for transforms that draw from torch's global random numbers
                singles.append(self._rest(image, rng))
        return stack_views(self._operation, singles, rngs.samples.tolist()).to(self._windows.device)


def resident_tensors(dataset: Any, operation: str) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """(images uint8 (N, c, h, w), targets int64 (N,), own transform or None) of a dataset, checked.

    The items of a torchvision dataset are loaded into memory, without its own transform.
    """
    own = None
    if not (hasattr(dataset, "images") and hasattr(dataset, "targets")):
        length_of(operation, dataset)  # what is no dataset at all has an error of its own
        raw, own = without_transform(dataset)
        if not _is_torchvisions_set(raw):
            raise TypeError(
                f"{operation}: dataset needs `images` (N, c, h, w) uint8 and `targets` (N,), {type(dataset).__name__} "
                "has not both; use OverlapLoader for files, or load_into_memory(dataset) first"
            )
        dataset = load_into_memory(with_decoder(raw, ImageDecoder()))
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
    return images, targets, own


def _is_torchvisions_set(dataset: Any) -> bool:
    if isinstance(dataset, ConcatDataset):
        return all(_is_torchvisions_set(part) for part in dataset.datasets)
    return _is_torchvisions_set(dataset.dataset) if isinstance(dataset, Subset) else is_torchvisions(dataset)
