"""From a data config to what the loop eats: training batches, and the images to evaluate on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dlb_fast.data.augment import NORMALISATION, Compose, Flip, PadCrop, eval_transform, train_transform
from dlb_fast.data.batch import Batch
from dlb_fast.data.datasets import open_dataset, subset, with_label_noise
from dlb_fast.data.device_stream import Normalise
from dlb_fast.data.resident import ResidentLoader
from dlb_fast.data.sampled_loader import SampledLoader

from .config import DataConfig

__all__ = ["NewRows", "Sets", "open_sets"]


class NewRows:
    """Batches without repeated rows: the new halves of an overlap loader of twice the batch size.

    Every epoch draws each sample once, in the same kind of stream and with the same augmentation as DLB's loader;
    resuming is the loader's own. (The second views are made and dropped: that costs loading time, no training time.)
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.loader:
            old = batch.num_old
            yield Batch(batch.new, batch.targets[old:], batch.ids[old:], 0, batch.epoch, batch.step)

    def state_dict(self) -> dict[str, Any]:
        """The loader's position."""
        return self.loader.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a position."""
        self.loader.load_state_dict(state)

    def close(self) -> None:
        """Stop the loader."""
        self.loader.close()


@dataclass
class Sets:
    """A training set and its test set, ready to make loaders."""

    train: Any
    test: Any
    config: DataConfig
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def num_classes(self) -> int:
        """Classes of the training set."""
        return self.train.num_classes

    @property
    def resident(self) -> bool:
        """Whether the images are held as uint8 tensors (else they are files)."""
        return hasattr(self.train, "images")

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return self.train.images.shape[1] if self.resident else 3

    def train_loader(
        self, *, overlap: bool, seed: int, device: torch.device, channels_last: bool, sampler: Any = None
    ) -> Any:
        """Batches of `batch_size` rows: those of a row sampler; else half of them repeated with `overlap`, all distinct
        without."""
        if sampler is not None:
            return self._sampled_loader(sampler, device, channels_last)
        rows = self.config.batch_size if overlap else 2 * self.config.batch_size
        if len(self.train) < rows // 2:
            raise ValueError(
                f"config: a step draws {rows // 2} new images, the training set has {len(self.train)}; lower batch_size"
            )
        options: dict[str, Any] = {"seed": seed, "device": device, "mean": self.mean, "std": self.std}
        options["channels_last"] = channels_last
        if self.resident:
            loader: Any = ResidentLoader(self.train, rows, transform=self._transform(), **options)
        else:
            from dlb_fast.data.overlap_loader import OverlapLoader

            loader = OverlapLoader(
                self.train, rows, transform=self._transform(), num_threads=self.config.num_threads, **options
            )
        return loader if overlap else NewRows(loader)

    def _transform(self) -> Any:
        if not self.resident:
            return train_transform("imagenet", self.config.image_size)
        steps: list[Any] = [PadCrop(self.config.padding)] if self.config.padding else []
        steps += [Flip()] if self.config.flip else []
        return Compose(steps) if steps else None

    def _sampled_loader(self, sampler: Any, device: torch.device, channels_last: bool) -> SampledLoader:
        return SampledLoader(
            self.train, sampler, transform=self._transform(), device=device, mean=self.mean, std=self.std,
            channels_last=channels_last, num_threads=self.config.num_threads,
        )  # fmt: skip

    def test_batches(self, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """The test set once, in order, without augmentation."""
        rows = self.config.eval_batch_size
        if hasattr(self.test, "images"):
            images, targets = torch.as_tensor(self.test.images), torch.as_tensor(self.test.targets).long()
            normalise = Normalise(self.mean, self.std)
            for start in range(0, len(images), rows):
                part = images[start : start + rows].to(device).permute(0, 2, 3, 1).contiguous()
                yield normalise(part), targets[start : start + rows].to(device)
            return
        from dlb_fast.data.overlap_loader import OverlapLoader

        # half a batch is new: with batches of twice the rows, the new rows of one epoch are the set, once
        loader = OverlapLoader(
            self.test, 2 * min(rows, len(self.test)), transform=eval_transform(self.config.image_size), shuffle=False,
            drop_last=False, device=device, mean=self.mean, std=self.std, num_threads=self.config.num_threads,
        )  # fmt: skip
        with loader:
            for batch in NewRows(loader):
                yield batch.images, batch.targets


def open_sets(config: DataConfig) -> Sets:
    """Open training and test set, cut the training set down and flip labels as the config says.

    Raises:
        ValueError: unknown kind, missing or damaged files, a test set with other classes.
    """
    train = open_dataset(config.source, split="train", seed=config.data_seed)
    test = open_dataset(config.source, split="test", seed=config.data_seed)
    if train.num_classes != test.num_classes:
        raise ValueError(
            f"{config.source}: the training set has {train.num_classes} classes, the test set {test.num_classes}"
        )
    kind = config.source.split(":")[0]
    known = NORMALISATION.get(kind if hasattr(train, "images") else "imagenet")
    mean, std = known if known is not None else _statistics(torch.as_tensor(train.images))
    if config.per_class is not None:
        train = subset(train, config.per_class, config.data_seed)
    if config.label_noise:
        train = with_label_noise(train, config.label_noise, config.noise_kind, config.data_seed)
    return Sets(train, test, config, mean, std)


def _statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    values = images.double() / 255
    mean, std = values.mean((0, 2, 3)), values.std((0, 2, 3)).clamp(min=1e-3)
    return tuple(mean.tolist()), tuple(std.tolist())
