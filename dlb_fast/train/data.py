"""The data of a run: training loader and test batches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dlb_fast.data import (
    NORMALISATION,
    CenterCrop,
    Compose,
    EvalLoader,
    Flip,
    ImageDecoder,
    OverlapLoader,
    PadCrop,
    RandomResizedCrop,
    ResidentLoader,
    Resize,
    SampledLoader,
    eval_transform,
    open_dataset,
    subset,
    with_label_noise,
)
from dlb_fast.data.datasets.open import find_splits

from .config import AugmentConfig, DataConfig
from .distributed import Ranks

__all__ = ["RunData", "open_data"]


@dataclass
class RunData:
    """A training set and a test set, with methods that make their loaders.

    Attributes:
        train: dataset with `targets`, `classes` and `num_classes`; images in memory or files.
        test: dataset of the same classes.
        config: batch size, crop, sizes.
        mean: per channel, of the training set's pixels in [0, 1].
        std: per channel, of the training set's pixels in [0, 1].
        about: what the data are and what was done to them, in one line.
    """

    train: Any
    test: Any
    config: DataConfig
    mean: tuple[float, ...]
    std: tuple[float, ...]
    about: str = ""

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.train.num_classes

    @property
    def in_memory(self) -> bool:
        """Whether the images are uint8 tensors in memory; otherwise they are files."""
        return hasattr(self.train, "images")

    @property
    def channels(self) -> int:
        """Number of channels of an image."""
        return self.train.images.shape[1] if self.in_memory else 3

    def train_loader(
        self,
        *,
        overlap: bool,
        seed: int,
        device: torch.device,
        channels_last: bool = False,
        sampler: Any = None,
        augment: AugmentConfig | None = None,
        ranks: Ranks | None = None,
    ) -> Any:
        """A loader of this rank's share of the training batches (`batch_size` rows over all ranks).

        Args:
            overlap: whether half of every batch repeats the batch before; otherwise all rows are distinct.
            seed: seed of the order and the views.
            device: device of the batches.
            channels_last: memory format of the images.
            sampler: a sampler of the rows, in place of `overlap` and `seed`.
            augment: augmentation after crop and flip.
            ranks: the processes that share the batches.
        """
        augment, ranks = augment or AugmentConfig(), ranks or Ranks()
        options: dict[str, Any] = {
            "device": device,
            "mean": self.mean,
            "std": self.std,
            "channels_last": channels_last,
            "transform": self._train_transform(augment),
            "mix": augment.mix(),
            "erase": augment.erase(),
        }
        on_error = self.config.on_error
        threads = self.config.num_threads
        if sampler is not None:
            options |= {"num_threads": threads, "decoder": self._decoder(), "on_error": on_error}
            return SampledLoader(self.train, sampler, **options)
        rows = self.config.batch_size
        sampled = rows // 2 if overlap else rows
        if len(self.train) < sampled:
            raise ValueError(
                f"config: a step samples {sampled} new images, the training set has {len(self.train)}; lower batch_size"
            )
        options |= {"seed": seed, "overlap": overlap, "rank": ranks.rank, "world_size": ranks.world_size}
        if self.in_memory:
            return ResidentLoader(self.train, rows // ranks.world_size, **options)
        options |= {"num_threads": threads, "decoder": self._decoder(), "on_error": on_error}
        return OverlapLoader(self.train, rows // ranks.world_size, **options)

    def _decoder(self) -> ImageDecoder:
        return ImageDecoder(max_pixels=self.config.max_pixels)

    def _train_transform(self, augment: AugmentConfig) -> Compose | None:
        steps: list[Any] = []
        size, padding = self.config.image_size, self.config.padding
        if not self.in_memory:
            steps += [RandomResizedCrop(size)] if padding is None else [Resize(size), CenterCrop(size)]
        elif padding is None:
            padding = 4
        if padding:
            steps.append(PadCrop(padding))
        if self.config.flip:
            steps.append(Flip())
        steps += augment.transforms()
        return Compose(steps) if steps else None

    def test_batches(self, device: torch.device, ranks: Ranks | None = None) -> EvalLoader:
        """A loader of this rank's share of the test set, in order, without augmentation.

        The shares are disjoint and differ by at most one image.
        """
        config, ranks = self.config, ranks or Ranks()
        in_memory = hasattr(self.test, "images")
        size = config.eval_size or config.image_size
        shorter = config.eval_resize or (None if config.padding is None else size)
        return EvalLoader(
            self.test,
            config.eval_batch_size,
            transform=None if in_memory else eval_transform(size, shorter),
            device=device,
            mean=self.mean,
            std=self.std,
            num_threads=config.num_threads,
            decoder=self._decoder(),
            on_error=config.on_error,
            rank=ranks.rank,
            world_size=ranks.world_size,
        )


def open_data(config: DataConfig) -> RunData:
    """Open the training and the test set; apply the config's subset and label noise to the training set.

    Raises:
        ValueError: unknown kind, missing or damaged files, a test set with other classes.
    """
    if config.data_seed and config.per_class is None and not config.label_noise and _has_own_test_set(config):
        raise ValueError(
            f"config: data_seed={config.data_seed} has no effect with {config.source}, which has its own test set, "
            "only with per_class, label_noise or a held-out part; leave it out"
        )
    train = open_dataset(config.source, split="train", seed=config.data_seed)
    test = open_dataset(config.source, split="test", seed=config.data_seed)
    if train.num_classes != test.num_classes:
        raise ValueError(
            f"{config.source}: the training set has {train.num_classes} classes, the test set {test.num_classes}"
        )
    statistics = config.kind if hasattr(train, "images") else "imagenet"
    known = NORMALISATION.get(statistics)
    mean, std = known if known is not None else _mean_and_std(torch.as_tensor(train.images))
    kept, noise = "none", "none"
    if config.per_class is not None:
        found = len(train)
        train = subset(train, config.per_class, config.data_seed)
        kept = f"{config.per_class} images per class of {found}"
    if config.label_noise:
        train = with_label_noise(train, config.label_noise, config.noise_kind, config.data_seed)
        wrong = int((torch.as_tensor(train.targets) != torch.as_tensor(train.clean_targets)).sum())
        noise = f"{config.noise_kind}, {wrong} of {len(train)} labels wrong"
    about = (
        f"data {config.source}: {train.num_classes} classes, {len(train)} training images, {len(test)} test images "
        f"({_split(config)}); subset: {kept}; label noise: {noise}; normalised by the mean and std of "
        f"{'the training images' if known is None else statistics}"
    )
    return RunData(train, test, config, mean, std, about)


def _has_own_test_set(config: DataConfig) -> bool:
    return config.kind == "imagefolder" and find_splits(Path(config.source.partition(":")[2]))[1] is not None


def _split(config: DataConfig) -> str:
    """Where the test images come from."""
    path = config.source.partition(":")[2]
    if config.kind in ("cifar10", "cifar100", "tinyimagenet"):
        return "its validation set" if config.kind == "tinyimagenet" else "its test set"
    if config.kind == "synthetic":
        return f"drawn separately, data_seed {config.data_seed}"
    validation = find_splits(Path(path))[1] if config.kind == "imagefolder" else None
    if validation is not None:
        return f"from {validation.name}/"
    return f"{'half' if config.kind == 'digits' else 'a tenth'} of each class held out, data_seed {config.data_seed}"


def _mean_and_std(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    values = images.double() / 255
    mean, std = values.mean((0, 2, 3)), values.std((0, 2, 3)).clamp(min=1e-3)
    return tuple(mean.tolist()), tuple(std.tolist())
