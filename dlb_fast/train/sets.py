"""From a data config to what the loop eats: training batches, and the images to evaluate on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dlb_fast.data import (
    NORMALISATION,
    Compose,
    EvalLoader,
    Flip,
    OverlapLoader,
    PadCrop,
    RandomResizedCrop,
    ResidentLoader,
    SampledLoader,
    eval_transform,
    open_dataset,
    subset,
    with_label_noise,
)

from .augment_config import AugmentConfig
from .config import DataConfig
from .distributed import ALONE, Ranks

__all__ = ["Sets", "open_sets"]


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
        self,
        *,
        overlap: bool,
        seed: int,
        device: torch.device,
        channels_last: bool,
        sampler: Any = None,
        augment: AugmentConfig | None = None,
        ranks: Ranks = ALONE,
    ) -> Any:
        """This rank's share of batches of `batch_size` rows: those of a row sampler; else half of them repeated with
        `overlap`, all distinct without."""
        augment = augment or AugmentConfig()
        options: dict[str, Any] = {"device": device, "mean": self.mean, "std": self.std, "mix": augment.mix()}
        options |= {"channels_last": channels_last, "transform": self._transform(augment), "erase": augment.erase()}
        threads = self.config.num_threads
        if sampler is not None:
            return SampledLoader(self.train, sampler, num_threads=threads, **options)
        rows = self.config.batch_size
        drawn = rows // 2 if overlap else rows
        if len(self.train) < drawn:
            raise ValueError(
                f"config: a step draws {drawn} new images, the training set has {len(self.train)}; lower batch_size"
            )
        rows //= ranks.world_size
        options |= {"seed": seed, "overlap": overlap, "rank": ranks.rank, "world_size": ranks.world_size}
        if self.resident:
            return ResidentLoader(self.train, rows, **options)
        return OverlapLoader(self.train, rows, num_threads=threads, **options)

    def _transform(self, augment: AugmentConfig) -> Any:
        config = self.config
        if not self.resident:
            steps: list[Any] = [RandomResizedCrop(config.image_size)]
        else:
            steps = [PadCrop(config.padding)] if config.padding else []
        steps += [*([Flip()] if config.flip else []), *augment.transforms()]
        return Compose(steps) if steps else None

    def test_batches(self, device: torch.device, ranks: Ranks = ALONE) -> EvalLoader:
        """This rank's share of the test set, once, in order, without augmentation; the shares differ by at most one
        image and no image is in two."""
        config = self.config
        fixed = hasattr(self.test, "images")
        views = None if fixed else eval_transform(config.eval_size or config.image_size, config.eval_resize)
        return EvalLoader(
            self.test, config.eval_batch_size, transform=views, device=device, mean=self.mean, std=self.std,
            num_threads=config.num_threads, rank=ranks.rank, world_size=ranks.world_size,
        )  # fmt: skip


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
