"""The data of a run: training loader, test batches, and what tells them from other data."""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dlb_fast.data import (
    NORMALISATION,
    CenterCrop,
    Compose,
    EvalLoader,
    Flip,
    ImageDecoder,
    ImageFolder,
    ListFile,
    OverlapLoader,
    PadCrop,
    RandomResizedCrop,
    ResidentLoader,
    Resize,
    SampledLoader,
    TarShards,
    eval_transform,
    open_dataset,
    subset,
    with_label_noise,
)
from dlb_fast.data.datasets.folder import say, some
from dlb_fast.data.datasets.labels import read_labels, with_labels
from dlb_fast.data.datasets.open import find_splits, held_out

from .config import FILE_KINDS, SPLIT_KINDS, AugmentConfig, DataConfig
from .distributed import Ranks

__all__ = [
    "RunData",
    "check_classes",
    "check_same_data",
    "classes_differ",
    "eval_loader",
    "evaluation_config",
    "fingerprint",
    "identity",
    "open_data",
    "open_test",
]


FITTED_IMAGES = 2000  # a fifth of the time that CIFAR's test set takes, and a standard error of at most 2 points


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
    def wrong_labels(self) -> int | None:
        """Number of training labels that differ from the data's own; None without label noise."""
        clean = getattr(self.train, "clean_targets", None)
        return None if clean is None else int((np.asarray(self.train.targets) != np.asarray(clean)).sum())

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

        With `overlap` half of every batch repeats the batch before; otherwise all rows are distinct. `sampler` chooses
        the rows in place of `overlap` and `seed`.
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
        reading: dict[str, Any] = {
            "num_threads": self.config.num_threads,
            "decoder": ImageDecoder(max_pixels=self.config.max_pixels),
            "on_error": self.config.on_error,
        }
        if sampler is not None:
            return SampledLoader(self.train, sampler, **options, **reading)
        rows = self.config.batch_size
        sampled = rows // 2 if overlap else rows
        if len(self.train) < sampled:
            raise ValueError(
                f"config: a step samples {sampled} new images, the training set has {len(self.train)}; lower batch_size"
            )
        options |= {"seed": seed, "overlap": overlap, "rank": ranks.rank, "world_size": ranks.world_size}
        if self.in_memory:
            return ResidentLoader(self.train, rows // ranks.world_size, **options)
        return OverlapLoader(self.train, rows // ranks.world_size, **options, **reading)

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

    def sample_images(self, count: int) -> Tensor:
        """At most `count` training images `(n, channels, h, w)` at equal distances, without augmentation."""
        chosen = np.unique(np.linspace(0, len(self.train) - 1, min(count, len(self.train))).astype(np.int64))
        batches = eval_loader(self.train.select(chosen), self.config, self.mean, self.std, torch.device("cpu"))
        return torch.cat([batch.images[batch.targets >= 0] for batch in batches])

    def test_batches(self, device: torch.device, ranks: Ranks | None = None) -> EvalLoader:
        """A loader of this rank's share of the test set, in order, without augmentation.

        The shares are disjoint and differ by at most one image.
        """
        return eval_loader(self.test, self.config, self.mean, self.std, device, ranks)

    def fitted_batches(self, device: torch.device, ranks: Ranks | None = None) -> EvalLoader | None:
        """A loader of 2000 fixed training images without augmentation, for `memorised`; None without wrong labels.

        The targets are `label * num_classes + true class`.
        """
        if not self.wrong_labels:
            return None
        labels, true = np.asarray(self.train.targets), np.asarray(self.train.clean_targets)
        chosen = np.random.default_rng(0).permutation(len(labels))[:FITTED_IMAGES]
        coded = (labels * self.num_classes + true)[chosen]
        return eval_loader(
            self.train.select(chosen).with_targets(coded), self.config, self.mean, self.std, device, ranks
        )


def eval_loader(
    dataset: Any,
    config: DataConfig,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
    ranks: Ranks | None = None,
) -> EvalLoader:
    """A loader of this rank's share of a dataset, in order, with the config's transform of the evaluation."""
    ranks = ranks or Ranks()
    size = config.eval_size or config.image_size
    shorter = config.eval_resize or (None if config.padding is None else size)
    return EvalLoader(
        dataset,
        config.eval_batch_size,
        transform=None if hasattr(dataset, "images") else eval_transform(size, shorter),
        device=device,
        mean=mean,
        std=std,
        num_threads=config.num_threads,
        decoder=ImageDecoder(max_pixels=config.max_pixels),
        on_error=config.on_error,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )


def open_data(config: DataConfig) -> RunData:
    """Open the training and the test set; apply the config's subset and label noise to the training set.

    The split and the subset are those of the data's own labels; the test set keeps these.

    Raises:
        FileNotFoundError: the data or the label file is missing.
        ValueError: unknown kind, missing or damaged files, a test set with other classes, a label file of other data.
    """
    if config.data_seed and config.per_class is None and not config.label_noise and _validation(config) is not None:
        raise ValueError(
            f"config: data_seed={config.data_seed} has no effect with {config.source}, which has its own test set, "
            "only with per_class, label_noise or a held-out part; leave it out"
        )
    train, test = _open_splits(config)
    statistics = config.kind if hasattr(train, "images") else "imagenet"
    known = NORMALISATION.get(statistics)
    mean, std = known if known is not None else _mean_and_std(torch.as_tensor(train.images))
    kept, noise, labels = "none", "none", None
    if config.label_file is not None:
        rest = test if config.kind == "digits" or _is_held_out(config) else None
        labels = read_labels(config.label_file, train, rest)
    if config.per_class is not None:
        found = len(train)
        train = subset(train, config.per_class, config.data_seed)
        kept = f"{config.per_class} images per class of {found}"
    if labels is not None and config.label_file is not None:
        train = with_labels(train, labels, config.label_file)
        noise = f"labels of {config.label_file}"
    elif config.label_noise:
        train = with_label_noise(train, config.label_noise, config.noise_kind, config.data_seed)
        noise = config.noise_kind
    made = RunData(train, test, config, mean, std)
    if (wrong := made.wrong_labels) is not None:
        noise += f", {wrong} of {len(train)} labels wrong ({100 * wrong / len(train):.2f} %)"
    made.about = (
        f"data {config.source}: {train.num_classes} classes, {len(train)} training images, {len(test)} test images "
        f"({_split(config)}); subset: {kept}; label noise: {noise}; normalised by the mean and std of "
        f"{'the training images' if known is None else statistics}"
    )
    if not hasattr(train, "images"):
        made.about += f"; crops of {config.image_size} x {config.image_size} pixels"
    return made


def _open_splits(config: DataConfig) -> tuple[Any, Any]:
    """The training and the test set with their own labels."""
    train = open_dataset(config.source, split="train", seed=config.data_seed)
    test = open_dataset(config.source, split="test", seed=config.data_seed)
    if train.num_classes != test.num_classes:
        raise ValueError(
            f"{config.source}: the training set has {train.num_classes} classes, the test set {test.num_classes}"
        )
    return train, test


def _validation(config: DataConfig) -> Path | None:
    """The validation folder of an image folder, or None."""
    return find_splits(config.path)[1] if config.kind == "imagefolder" else None


def _is_held_out(config: DataConfig) -> bool:
    """Whether the test images are a part of the training images that is held out."""
    return config.kind in ("imagefolder", "list", "tar") and _validation(config) is None


def _split(config: DataConfig) -> str:
    """Where the test images come from."""
    if config.kind in SPLIT_KINDS:
        return "its validation set" if config.kind == "tinyimagenet" else "its test set"
    if config.kind == "synthetic":
        return f"drawn separately, data_seed {config.data_seed}"
    if (validation := _validation(config)) is not None:
        return f"from {validation.name}/"
    return f"{'half' if config.kind == 'digits' else 'a tenth'} of each class held out, data_seed {config.data_seed}"


def _mean_and_std(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    values = images.double() / 255
    mean, std = values.mean((0, 2, 3)), values.std((0, 2, 3)).clamp(min=1e-3)
    return tuple(mean.tolist()), tuple(std.tolist())


# What tells data from other data


def fingerprint(dataset: Any) -> dict[str, Any]:
    """What a dataset consists of, from its labels and the names of its files; reads no image.

    Returns:
        labels: digest of all labels, in order.
        classes: per class the number of its images and a digest of their names, in order. The names are relative to the
            root (absolute ones to their common folder), with `/` and in Unicode's form NFC, so that a moved or copied
            folder is the same. For a dataset without files the size of an image stands for the names.

    Example:
        >>> one, other = (open_data(DataConfig(f"synthetic:8,2,{size}")).train for size in (8, 16))
        >>> fingerprint(one)["labels"] == fingerprint(other)["labels"], fingerprint(one) == fingerprint(other)
        (True, False)
    """
    targets = np.asarray(dataset.targets).astype("<i8")
    true = np.asarray(getattr(dataset, "clean_targets", targets)).astype("<i8")  # wrong labels are no other files
    order = np.argsort(true, kind="stable")
    ends = np.searchsorted(true[order], np.arange(len(dataset.classes) + 1))
    files = getattr(dataset, "files", None)
    base = 0 if files is None else _common_folder(files)
    size = json.dumps(list(dataset.images.shape[1:])) if hasattr(dataset, "images") else ""
    classes = []
    for start, end in pairwise(ends.tolist()):
        names = size if files is None else _same_names([name[base:] for name in files[order[start:end]].tolist()])
        classes.append([end - start, _digest(names.encode("utf-8", "surrogateescape"))])
    return {"labels": _digest(targets.tobytes() + true.tobytes()), "classes": classes}


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _common_folder(files: Any) -> int:
    """Length of the folder that all paths share if all are absolute, else 0."""
    first, last = (os.fsdecode(name) for name in (min(files.tolist(), default=b""), max(files.tolist(), default=b"")))
    if not (os.path.isabs(first) and os.path.isabs(last)):
        return 0
    folder = os.path.commonpath([os.path.dirname(first), os.path.dirname(last)])
    return len(os.fsencode(os.path.join(folder, "")))


def _same_names(names: list[bytes]) -> str:
    text = os.fsdecode(b"\0".join(names))
    if os.sep != "/":
        text = text.replace(os.sep, "/")
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def identity(data: RunData) -> dict[str, str]:
    """The class names and the fingerprints of both sets, as text for the metadata of checkpoints and weights."""
    files = {"train": fingerprint(data.train), "test": fingerprint(data.test)}
    return {"classes": json.dumps([str(name) for name in data.train.classes]), "files": json.dumps(files)}


def classes_differ(before: Sequence[str], now: Sequence[str]) -> str:
    """The first difference of two lists of class names in words, or "" if they are the same names in the same order.

    Example:
        >>> classes_differ(["cat", "dog"], ["dog", "cat"])
        "class 0 was 'cat' and is 'dog' here; the same names in another order"
        >>> classes_differ(["cat", "dog"], ["cat", "dog"])
        ''
    """
    one, other = _normal(before), _normal(now)
    if one == other:
        return ""
    place = next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    was, now_is = (repr(names[place]) if place < len(names) else "none" for names in (before, now))
    said = f"class {place} was {was} and is {now_is} here"
    if len(one) != len(other):
        return f"{said}; {len(one)} classes were, {len(other)} are"
    return said + ("; the same names in another order" if sorted(one) == sorted(other) else "")


def _normal(names: Sequence[str]) -> list[str]:
    return [unicodedata.normalize("NFC", str(name)) for name in names]


def check_classes(before: Sequence[str], now: Sequence[str], who: str) -> None:
    """ValueError if the classes of a trained network and those of the data are not the same names in the same order."""
    if difference := classes_differ(before, now):
        raise ValueError(
            f"{who} was trained with other classes: {difference}. Its outputs would be taken for the wrong classes: "
            "rename the folders or labels back, or start anew with another --out, where --init-from takes over the "
            "weights"
        )


def check_same_data(before: Mapping[str, str], now: Mapping[str, str], origin: str) -> None:
    """Refuse to continue on other data than those of a checkpoint.

    Args:
        before: metadata of the checkpoint.
        now: metadata of the run that continues; only what both have is compared.
        origin: name of the checkpoint, for the message.

    Raises:
        ValueError: other classes, other files or other labels; the message names the first difference.
    """
    if "classes" in before and "classes" in now:
        check_classes(json.loads(before["classes"]), json.loads(now["classes"]), origin)
    if "files" not in before or "files" not in now:
        return
    found, here = json.loads(before["files"]), json.loads(now["files"])
    for split, what in (("train", "training"), ("test", "test")):
        if difference := _files_differ(found[split], here[split], json.loads(now["classes"])):
            raise ValueError(
                f"{origin} was made with other {what} images: {difference}. It continues with the same images in the "
                "same order only: bring them back, or start anew with another --out, where --init-from takes over the "
                "weights"
            )


def _files_differ(before: dict[str, Any], now: dict[str, Any], classes: Sequence[str]) -> str:
    """The first difference of two fingerprints in words, or ""."""
    for name, (count, names), (count_now, names_now) in zip(classes, before["classes"], now["classes"], strict=True):
        if count != count_now:
            return f"class {name!r} had {count} and has {count_now}"
        if names != names_now:
            return f"class {name!r} has as many, but other file names or sizes"
    same = before["labels"] == now["labels"]
    return "" if same else "the images are the same, their order or labels are not (label noise, data_seed, a list?)"


# The test set of an evaluation


def evaluation_config(config: DataConfig, about: Mapping[str, Any]) -> DataConfig:
    """The config for image files that a network evaluates: without a crop, if it was trained on stored images."""
    if config.kind in FILE_KINDS:
        return config
    side = about["size"][0]
    return replace(config, image_size=side, eval_size=None, eval_resize=side)


def open_test(config: DataConfig, about: Mapping[str, Any], source: str | None = None) -> Any:
    """The test set of a trained network: that of its own data, or the test images of another source.

    Another source is matched to the network's classes by name. Its validation folder or published test set is used, or
    all images if it has none. The run's own data in another place keep their held-out tenth.

    Args:
        config: data of the run.
        about: metadata of its weights, as `load_model` returns them.
        source: KIND[:PATH]; None or the config's own source means the run's own data.

    Raises:
        ValueError: other classes; images of other channels or another size; a held-out tenth that is not that of the
            run, because it may contain images of the training.
    """
    if source is None or source == config.source:
        train, test = _open_splits(config)
        check_classes(about["classes"], train.classes, f"the network of the run on {config.source}")
        before = about["files"]["test"]
        if difference := _files_differ(before, fingerprint(test), about["classes"]):
            if _is_held_out(config):
                raise ValueError(
                    f"eval: {config.source} has changed since the training ({difference}), so its held-out tenth may "
                    "contain images of the training; bring the images back, or name other images with --data"
                )
            say(f"eval: the test images of {config.source} have changed since the training: {difference}")
    else:
        test = _other_test(replace(config, source=source), about)
    _check_shape(test, about, source or config.source)
    return test


def _other_test(config: DataConfig, about: Mapping[str, Any]) -> Any:
    source, path = config.source, config.path
    classes, which = list(about["classes"]), "its test set"
    if config.kind == "imagefolder" and path.is_dir():
        train, validation, _ = find_splits(path)
        folder = validation or train or path
        dataset: Any = ImageFolder(folder, classes=classes)
        which = f"all of {folder}"
    elif config.kind == "list" and path.is_file():
        dataset, which = ListFile(path, classes=classes), "all of it"
    elif config.kind == "tar" and path.exists():
        dataset, which = TarShards(path), "all of it"
    else:
        dataset = open_dataset(source, split="test", seed=config.data_seed)
    dataset, matched = _by_name(dataset, classes, source)
    if _is_held_out(config):
        tenth = dataset.select(held_out(dataset, config.data_seed)[1])
        if fingerprint(tenth) == about["files"]["test"]:
            dataset, which = tenth, "the data of the run, of which it held out these"
    say(f"eval: {source}: {len(dataset)} images ({which}){matched}")
    return dataset


def _by_name(dataset: Any, classes: list[str], source: str) -> tuple[Any, str]:
    """(the dataset with labels that index `classes`, what to say about it)."""
    targets = np.asarray(dataset.targets)
    present, place = np.unique(targets), {name: k for k, name in enumerate(_normal(classes))}
    own = _normal(dataset.classes)
    unknown = [str(dataset.classes[k]) for k in present if own[k] not in place]
    if unknown:
        raise ValueError(
            f"eval: {source} has images of classes that the network does not know: {some(unknown)}; its classes are "
            f"{some(classes)}. Leave these images out, or rename them"
        )
    if own != list(place):
        index = np.array([place.get(name, -1) for name in own])
        dataset = dataset.with_targets(index[targets])
        dataset.classes = classes
    lacking = [name for k, name in enumerate(classes) if not np.any(np.asarray(dataset.targets) == k)]
    if lacking:
        return dataset, f"; without images of {len(lacking)} of the {len(classes)} classes: {some(lacking)}"
    return dataset, "" if own == list(place) else "; classes matched by name, they are in another order"


def _check_shape(dataset: Any, about: Mapping[str, Any], source: str) -> None:
    """ValueError for images that the network was not made for."""
    stored = hasattr(dataset, "images")
    wanted = [about["channels"], *about["size"]]
    got = list(dataset.images.shape[1:]) if stored else [3, *about["size"]]
    if got != wanted:
        raise ValueError(
            f"eval: the network takes images of {_shape(wanted)} (channels, height, width), those of {source} are "
            f"{_shape(got) if stored else 'files, read as RGB'}"
        )


def _shape(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))
